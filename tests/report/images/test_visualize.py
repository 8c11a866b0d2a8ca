"""Pictures: what the figures hold, in the pixels and numbers that they should."""

import csv
import math
import random
import shutil

import numpy as np
import pytest
import torch
from digit_images import write_digit_folder
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.patches import Rectangle
from original_layouts import write_voc2007_classification
from PIL import Image
from safetensors.torch import save_file
from sklearn.metrics import silhouette_samples
from torch.utils.data import Dataset
from torchvision.transforms import v2

from bissl_zoo.analysis.reduced_problem import narrow_widths
from bissl_zoo.backbones import merge_split_states
from bissl_zoo.config import LazyCall as L
from bissl_zoo.config import LazyConfig, load_config
from bissl_zoo.data.views import MaskedView, Views
from bissl_zoo.downstream import Classification
from bissl_zoo.engine.build import Weights, build_datasets, build_downstream
from bissl_zoo.engine.checks import open_context
from bissl_zoo.engine.init import load_init
from bissl_zoo.engine.runner import run
from bissl_zoo.engine.stages import Bissl, PretextWarmup
from bissl_zoo.errors import CheckpointError, ConfigError, DatasetError
from bissl_zoo.evaluation import DetectionEvaluator, knn_accuracy
from bissl_zoo.registry import PRETEXT_METHODS, build_backbone, build_dataset
from bissl_zoo.report.images.box_crops import BoxCrops, square_around
from bissl_zoo.report.images.data import Sample, draw_samples, draw_views, samples_of
from bissl_zoo.report.images.drawing import DPI, fitted, save_figure, text_width
from bissl_zoo.report.images.embeddings import draw_embeddings, embedding, project, silhouette, write_csv
from bissl_zoo.report.images.predictions import Prediction, draw_predictions, predict, quality_of
from bissl_zoo.report.images.run_backbones import load_stages
from bissl_zoo.report.images.visualize import picture_data, picture_embeddings, picture_predictions, picture_views
from bissl_zoo.runs.checkpoint import Checkpointer, load_checkpoint
from bissl_zoo.runs.directory import load_run_config

CPU = torch.device("cpu")
CLASSES = ["cat", "_dog", "price $5 and $6"]
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def noise(height=20, width=30, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def boxed(boxes, labels, difficult=None):
    hard = torch.tensor(difficult or [False] * len(labels))
    return {"boxes": torch.tensor(boxes).float().view(-1, 4), "labels": torch.tensor(labels), "difficult": hard}


def sample(target, index=0, image=None):
    return Sample(index, image or noise(seed=index), target, f"file_{index}.jpg")


def rectangles(axes):
    """The boxes of an image as x0, y0, x1, y1."""
    patches = [patch for patch in axes.patches if type(patch) is Rectangle]
    return [(*patch.get_xy(), patch.get_xy()[0] + patch.get_width(), patch.get_xy()[1] + patch.get_height())
            for patch in patches]  # fmt: skip


def words(figure):
    """All text of a figure."""
    texts = [text for axes in figure.axes for text in (*axes.texts, axes.title)]
    legends = [text for legend in figure.legends for text in legend.get_texts()]
    return [text.get_text() for text in (*figure.texts, *texts, *legends) if text.get_text()]


def pixels_of(axes):
    return np.asarray(axes.images[0].get_array())


def random_states():
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """Handwritten digits as an image folder: 60 to train, 40 to test, of 4 classes."""
    return write_digit_folder(tmp_path_factory.mktemp("digits"))


@pytest.fixture
def labelled(tiny_config, digits):
    """The tiny config with digits of one class per image: `labelled(seed=1)`."""

    def build(**changed):
        cfg = tiny_config(**changed)
        cfg.task = L(Classification)(image_size=32)
        for role in ("train", "test"):
            cfg.dataloader[role].dataset = L(build_dataset)(name="image_folder", root=str(digits), split=role)
        return cfg

    return build


def test_boxes_lie_at_their_pixels_and_difficult_ones_are_dashed():
    boxes = [[2.0, 3.0, 12.5, 9.0], [0.0, 0.0, 30.0, 20.0], [20.0, 1.0, 29.0, 19.0]]
    picture = noise()
    figure = draw_samples([sample(boxed(boxes, [0, 1, 2], [False, True, False]), image=picture)], CLASSES, "title")
    (axes,) = figure.axes
    assert rectangles(axes) == [tuple(box) for box in boxes]
    assert [patch.get_linestyle() for patch in axes.patches if type(patch) is Rectangle] == ["-", "--", "-"]
    # pixel (x, y) covers [x, x + 1] by [y, y + 1], with y downwards, as the boxes count them
    assert axes.images[0].get_extent() == [0, 30, 20, 0] == [*axes.get_xlim(), *axes.get_ylim()]
    assert np.array_equal(pixels_of(axes), np.asarray(picture))
    assert {"cat", "_dog", "price $5 and $6", "difficult", "3 objects", "file_0.jpg", "title"} <= set(words(figure))


def test_a_box_is_seen_around_its_pixels_in_the_file_that_is_written(tmp_path):
    image = np.zeros((40, 40, 3), dtype=np.uint8)
    image[10:20, 20:30] = (255, 0, 255)
    figure = draw_samples([sample(boxed([[20, 10, 30, 20]], [1]), image=Image.fromarray(image))], CLASSES, "")
    save_figure(figure, tmp_path / "box.png")
    left, bottom, width, height = figure.axes[0].get_window_extent().bounds
    top = figure.bbox.height - bottom - height
    drawn = np.asarray(Image.open(tmp_path / "box.png").convert("RGB")).astype(int)
    drawn = drawn[round(top) : round(top + height), round(left) : round(left + width)]
    below_the_name = slice(round(12 / 40 * height), None)
    for colour, part, corners in (((255, 0, 255), slice(0, None), (20, 10, 30, 20)),
                                  ((0xE6, 0x9F, 0x00), below_the_name, (20, 12, 30, 20))):  # fmt: skip
        rows, columns = (abs(drawn[part] - colour).sum(axis=2) < 40).nonzero()
        rows = rows + part.start
        seen = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]) * 40 / width
        assert seen == pytest.approx(corners, abs=0.75)  # a line is half a pixel wide


def test_a_sheet_of_16_images_has_16_axes_and_no_text_on_another():
    generator = np.random.default_rng(0)
    samples = []
    for index in range(16):
        corner = generator.uniform(0, 60, (5, 2))
        boxes = np.concatenate([corner, corner + generator.uniform(5, 30, (5, 2))], axis=1).tolist()
        target = boxed(boxes, generator.integers(0, 12, 5).tolist())
        samples.append(sample(target, index, noise(90, 100, index))._replace(name="a_very_long_name" * 9 + ".jpg"))
    figure = draw_samples(samples, [f"class number {label}" for label in range(12)], "A title " * 60)
    assert len(figure.axes) == 16 and not figure.legends  # 12 classes do not have a colour each
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    names = [text for axes in figure.axes for text in axes.texts]
    assert 16 <= len(names) <= 80
    extents = [text.get_window_extent(canvas.get_renderer()) for text in (*figure.texts, *names)]
    whole = figure.bbox
    for number, one in enumerate(extents):
        assert one.x0 >= whole.x0 and one.x1 <= whole.x1 and one.y0 >= whole.y0 and one.y1 <= whole.y1
        for other in extents[:number]:  # half a dot of rounding
            assert one.x1 <= other.x0 + 1 or other.x1 <= one.x0 + 1 or one.y1 <= other.y0 + 1 or other.y1 <= one.y0 + 1


def test_a_crowd_is_told_by_the_legend_and_few_objects_by_name():
    crowd = boxed([[i, i, i + 3, i + 3] for i in range(12)], [0] * 12)
    figure = draw_samples([sample(crowd), sample(boxed([[1, 1, 9, 9]], [1]), 1)], CLASSES, "")
    assert [len(axes.texts) for axes in figure.axes] == [0, 1]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["cat", "_dog"]


def test_labels_of_one_class_of_several_and_of_none():
    assert "_dog" in words(draw_samples([sample(1)], CLASSES, ""))
    assert "cat, price $5 and $6" in words(draw_samples([sample(torch.tensor([1.0, -1.0, 1.0]))], CLASSES, ""))
    assert words(draw_samples([sample(None)], None, "")) == ["file_0.jpg"]
    with pytest.raises(DatasetError, match="no images"):
        draw_samples([], CLASSES, "")


def test_text_is_cut_in_its_middle_to_the_room_it_has():
    assert fitted("short", 1.0, 7) == "short"
    cut = fitted("a_long_name_of_a_file_000045.jpg", 1.0, 7)
    assert text_width(cut, 7) <= 1.0 and cut.startswith("a_long") and cut.endswith("45.jpg") and "\u2026" in cut
    assert fitted("two\nlines \x1b[31m", 9, 7) == "two lines \\u001b[31m"


def plain_views(mean=MEAN, std=STD):
    """Two views that are the image itself, normalised."""
    return Views([v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)])] * 2)


def test_views_have_the_colours_of_their_image_again():
    image = noise(32, 32)
    figure = draw_views([sample(None, image=image)], plain_views(), MEAN, STD, "views")
    assert len(figure.axes) == 3
    assert np.array_equal(pixels_of(figure.axes[0]), np.asarray(image))
    for axes in figure.axes[1:]:
        assert np.abs(pixels_of(axes) - np.asarray(image) / 255).max() <= 1 / 255


def test_what_a_mask_hides_is_grey_and_the_rest_is_as_it_was():
    image = noise(32, 32)
    masked = MaskedView(plain_views().transforms[0], cells=4, hidden=6)
    figure = draw_views([sample(None, image=image)], masked, MEAN, STD, "")
    _, view, seen = (pixels_of(axes) for axes in figure.axes)
    hidden = (seen != view).any(axis=2)
    assert hidden.sum() == pytest.approx(6 * 64, abs=8) and np.ptp(seen[hidden]) == 0
    cells = hidden.reshape(4, 8, 4, 8).mean(axis=(1, 3))
    assert ((cells > 0.9).sum(), (cells == 0).sum()) == (6, 10)
    with pytest.raises(ConfigError, match=r"torch.int64 of shape \(3,\)"):
        draw_views([sample(None)], lambda image: (torch.zeros(3, dtype=torch.long),), MEAN, STD, "")


@pytest.mark.parametrize("name", PRETEXT_METHODS.list())
def test_every_pretext_method_shows_its_views(tiny_config, at_scenes, name):
    cfg = tiny_config()
    cfg.pretext = load_config(f"common/pretext/{name}.py").pretext
    cfg.pretext.update(narrow_widths({"name": name}))
    if name == "simmim":
        cfg.backbone = L(build_backbone)(name="test_vit", class_token=False, global_pool="avg")
        cfg.bilevel.shared_stage = None
    before = random_states()
    figure = picture_views(cfg, images=2, seed=3)
    assert random_states() == before
    count = {"dino": 10}.get(name, 2)
    assert len(figure.axes) == 2 * (1 + count)
    assert all(0 <= pixels_of(axes).min() and pixels_of(axes).max() <= 255 for axes in figure.axes)
    again, other = picture_views(cfg, images=2, seed=3), picture_views(cfg, images=2, seed=4)
    same = [np.array_equal(pixels_of(a), pixels_of(b)) for a, b in zip(figure.axes, again.axes, strict=True)]
    assert all(same)
    assert not np.array_equal(pixels_of(figure.axes[1]), pixels_of(other.axes[1]))


def test_data_of_a_config_has_the_boxes_of_its_annotations(tiny_config, at_scenes):
    cfg = tiny_config()
    before = random_states()
    figure = picture_data(cfg, "test", images=4, seed=1)
    assert random_states() == before
    dataset = build_datasets(cfg, {"test"})["test"]
    by_name = {dataset.source(i).rsplit("/", 1)[1]: i for i in range(len(dataset))}
    names = [text.get_text() for text in figure.texts if text.get_text() in by_name]
    assert len(figure.axes) == len(names) == 4
    for axes, name in zip(figure.axes, names, strict=True):
        image, target = dataset[by_name[name]]
        assert np.array_equal(pixels_of(axes), np.asarray(image))
        assert rectangles(axes) == [pytest.approx(box) for box in target["boxes"].tolist()]
        assert {text.get_text() for text in axes.texts} == {dataset.classes[label] for label in target["labels"]}
    assert len(picture_data(cfg, "pretext", images=99).axes) == 24


def test_an_image_that_cannot_be_read_is_named(tiny_config, scenes_copy, monkeypatch):
    root, folder = scenes_copy
    monkeypatch.setenv("BISSL_ZOO_DATASETS", str(root))
    bad = folder / "JPEGImages" / f"{(folder / 'ImageSets/Main/test.txt').read_text().split()[0]}.jpg"
    bad.write_bytes(b"no image")
    with pytest.raises(DatasetError, match=bad.name):
        picture_data(tiny_config(), "test")


def test_predicted_boxes_are_those_of_the_run_s_model(finished, at_scenes):
    cfg = load_run_config(finished)
    cfg.train.init = str(finished)
    before = random_states()
    figure = picture_predictions(cfg, images=3, seed=1, threshold=0.06)
    assert random_states() == before
    context = open_context(cfg, "test", roles={"test"})
    backbone, task = (part.eval() for part in build_downstream(context, load_init(str(finished), cfg, True)[0]))
    dataset = context.data["test"]
    by_name = {dataset.source(i).rsplit("/", 1)[1]: i for i in range(len(dataset))}
    names = [text.get_text() for text in figure.texts if text.get_text() in by_name]
    assert len(figure.axes) == 2 * len(names) == 6
    for truth, predicted, name in zip(figure.axes[::2], figure.axes[1::2], names, strict=True):
        image, target = task.transform(train=False)(*dataset[by_name[name]])
        found = task.predict(backbone, [image])[0]
        expected = found["boxes"][found["scores"] >= 0.06]
        assert rectangles(truth) == [pytest.approx(box) for box in target["boxes"].tolist()]
        assert sorted(rectangles(predicted)) == [pytest.approx(box, abs=1e-3) for box in sorted(expected.tolist())]
        evaluator = DetectionEvaluator(task.classes)
        evaluator.process([found], [target])
        assert f"AP50 of this image {evaluator.evaluate()['voc_AP50']:.2f}" in words(figure)


def test_the_worst_are_the_worst_of_the_whole_set(finished, at_scenes):
    cfg = load_run_config(finished)
    cfg.train.init = str(finished)
    context = open_context(cfg, "test", roles={"test"})
    backbone, task = build_downstream(context, load_init(str(finished), cfg, True)[0])
    every = predict(backbone, task, context.data["test"], range(8), CPU, batch_size=3)
    assert [one.index for one in every] == list(range(8)) and backbone.training
    figure = picture_predictions(cfg, images=3, worst=True)
    worst = sorted(one.quality for one in every)[:3]
    said = [float(word.split()[-1]) for word in words(figure) if word.startswith("AP50 of this image")]
    assert said == [pytest.approx(quality, abs=0.005) for quality in worst]
    assert any(word.endswith("3 of 8 images, the worst") for word in words(figure))


def test_what_a_prediction_is_worth():
    found = {"boxes": torch.tensor([[0.0, 0, 9, 9]]), "scores": torch.tensor([0.8]), "labels": torch.tensor([0])}
    assert quality_of(found, boxed([[0, 0, 9, 9]], [0]), 3) == 1.0
    assert quality_of(found, boxed([[0, 0, 9, 9], [20, 0, 29, 9]], [0, 1]), 3) == 0.5
    assert quality_of(found, boxed([], []), 3) == pytest.approx(0.2)
    probabilities = torch.tensor([0.1, 0.7, 0.2])
    assert quality_of(probabilities, 2, 3) == pytest.approx(0.2)
    assert quality_of(probabilities, torch.tensor([1.0, 0.0, -1.0]), 3) == pytest.approx(-0.6)


def test_classes_are_told_with_their_probabilities(labelled):
    dataset = build_datasets(labelled(), {"test"})["test"]
    backbone = build_backbone(name="test_resnet").split("c3")[0]
    torch.manual_seed(0)
    task = Classification(backbone, dataset.classes, image_size=32)
    predictions = predict(backbone, task, dataset, [0, 5, 30], CPU, batch_size=2)
    transform = task.transform(train=False)
    images = torch.stack([transform(*dataset[index])[0] for index in (0, 5, 30)])
    expected = task.eval().predict(backbone.eval(), images).softmax(dim=1)
    assert torch.allclose(torch.stack([one.found for one in predictions]), expected, atol=1e-6)
    figure = draw_predictions(samples_of(dataset, [0, 5, 30]), predictions, dataset.classes, "")
    assert len(figure.axes) == 3
    for row, index in zip(expected, (0, 5, 30), strict=True):
        truth, best = dataset[index][1], int(row.argmax())
        mark = "\u2713" if best == truth else "\u2717"
        aside = "" if best == truth else f" (true class {row[truth]:.2f})"
        assert f"{mark} {best} {row[best]:.2f}{aside}" in words(figure) and f"true: {truth}" in words(figure)


def test_several_classes_are_told_by_their_order():
    prediction = Prediction(0, torch.tensor([0.9, 0.2, 0.6]), 0.0)
    said = words(draw_predictions([sample(torch.tensor([1.0, 0.0, 0.0]))], [prediction], CLASSES, ""))
    assert {"true: cat", "\u2713 cat 0.90", "\u2717 price $5 and $6 0.60", "\u2717 _dog 0.20"} <= set(said)


def test_predictions_need_a_fine_tuned_model(tiny_config, at_scenes, tmp_path):
    with pytest.raises(CheckpointError, match="Predictions need a fine-tuned model. Give the directory of a run"):
        picture_predictions(tiny_config())
    cfg = tiny_config(train__output_dir=tmp_path / "run", train__stages="[pretrain]", train__publish__name="null")
    run(cfg, "test")
    cfg.train.init = str(tmp_path / "run")
    with pytest.raises(CheckpointError, match="no checkpoint of finetune"):
        picture_predictions(cfg)
    save_file(build_backbone(name="test_resnet").state_dict(), tmp_path / "plain.safetensors")
    cfg.train.init = str(tmp_path / "plain.safetensors")
    with pytest.raises(CheckpointError, match="holds no task head"):
        picture_predictions(cfg)


def clusters(distance, count=30, width=16):
    generator = torch.Generator().manual_seed(0)
    centres = torch.eye(3, width) * distance
    labels = torch.arange(3).repeat_interleave(count)
    return centres[labels] + torch.randn(3 * count, width, generator=generator), labels


def test_clusters_have_a_silhouette_above_a_half_and_noise_has_none():
    features, labels = clusters(20.0)
    unit = torch.nn.functional.normalize(features, dim=1).numpy()
    reference = silhouette_samples(
        1 - unit @ unit.T - np.diag(np.diag(1 - unit @ unit.T)), labels, metric="precomputed"
    )
    assert silhouette(features, labels) == pytest.approx(reference.mean(), abs=1e-5) and reference.mean() > 0.5
    assert abs(silhouette(*clusters(0.0))) < 0.1
    assert math.isnan(silhouette(features, torch.zeros_like(labels)))
    assert math.isnan(silhouette(features, torch.arange(len(labels))))


def test_maps_of_one_seed_are_equal_and_keep_clusters_apart():
    features, labels = clusters(20.0)
    before = random_states()
    points = project(features, seed=1)
    assert random_states() == before
    assert points.shape == (90, 2) and np.array_equal(points, project(features, seed=1))
    distances = np.linalg.norm(points[:, None] - points[None], axis=2) + np.diag([np.inf] * 90)
    assert (labels[distances.argmin(axis=1)] == labels).float().mean() > 0.95


def test_few_images_make_a_map_and_fewer_than_three_do_not():
    features, labels = clusters(5.0, count=1)
    one = embedding("tiny", features, labels, features, labels)
    assert one.points.shape == (3, 2) and np.isfinite(one.points).all()
    with pytest.raises(DatasetError, match="tiny: 2 images; a map of embeddings needs 3 or more"):
        embedding("tiny", features, labels, features[:2], labels[:2])


def test_a_collapsed_network_is_one_point_and_its_title_says_so():
    features, labels = torch.ones(12, 8), torch.arange(12) % 3
    one = embedding("flat", features, labels, features, labels)
    assert np.ptp(one.points) == 0
    assert draw_embeddings([one], CLASSES, "").axes[0].get_title() == "flat\nkNN 0.333   all features are alike"


def test_many_classes_differ_in_shape_and_too_many_are_told_of():
    generator = torch.Generator().manual_seed(0)
    for count, told in ((10, True), (100, False)):
        features, labels = torch.randn(2 * count, 8, generator=generator), torch.arange(2 * count) % count
        figure = draw_embeddings(
            [embedding("a", features, labels, features, labels)], [str(i) for i in range(count)], ""
        )
        assert bool(figure.legends) == told
        assert any("100 classes, more than" in word for word in words(figure)) != told
        markers = figure.axes[0].collections
        assert sum(len(points.get_offsets()) for points in markers) == 2 * count and len(markers) == (2 if told else 9)


def features_by_hand(state, architecture, dataset):
    """Pooled features of central crops, without the code under test."""
    backbone = build_backbone(name=architecture)
    backbone.load_state_dict(state)
    crop = [v2.PILToTensor(), v2.Resize(37, v2.InterpolationMode.BICUBIC), v2.CenterCrop(32)]  # 37 is 32 / 0.875
    normalize = v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    transform = v2.Compose([*crop, v2.ToDtype(torch.float32, True), normalize])
    images, labels = zip(*((transform(image), label) for image, label in dataset), strict=True)
    with torch.no_grad():
        return backbone.eval().model(torch.stack(images)), torch.tensor(labels)


def stage_state(folder, stage):
    levels = load_checkpoint(Checkpointer(folder / "checkpoints").newest(stage))[1]["levels"]
    level = levels["lower"] if stage == "bissl" else levels["level"]
    tail = {key[len("tail.") :]: value for key, value in level["head"].items() if key.startswith("tail.")}
    return merge_split_states(level["backbone"], tail)


def test_a_run_with_a_bissl_stage_has_two_maps_with_their_own_knn(finished, at_scenes, labelled):
    cfg = labelled()
    before = random_states()
    picture = picture_embeddings(cfg, [str(finished)])
    assert random_states() == before
    data = build_datasets(cfg, {"train", "test"})
    titles = [axes.get_title() for axes in picture.figure.axes]
    for title, name, stage in zip(titles, ("pretrained", "BiSSL"), ("pretrain", "bissl"), strict=True):
        state = stage_state(finished, stage)
        parts = [part for role in ("train", "test") for part in features_by_hand(state, "test_resnet", data[role])]
        knn = knn_accuracy(*parts, k=20)["top1"]
        assert title == f"finished: {name}\nkNN {knn:.3f}   silhouette {silhouette(*parts[2:]):.3f}"
    assert sum(len(points.get_offsets()) for points in picture.figure.axes[0].collections) == 40
    assert any("k = 20, from 60 images of dataloader.train" in word for word in words(picture.figure))


def test_the_coordinates_are_written_with_image_and_class(tmp_path):
    features, labels = clusters(5.0, count=2)
    one = embedding("a, b", features, labels, features, labels)
    write_csv([one], CLASSES, [f"{i}.png" for i in range(6)], tmp_path / "deep" / "points.csv")
    with open(tmp_path / "deep" / "points.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["image"] for row in rows] == [f"{i}.png" for i in range(6)] and rows[0]["backbone"] == "a, b"
    assert [row["class"] for row in rows] == [CLASSES[label] for label in labels]
    assert np.allclose([[float(row["x"]), float(row["y"])] for row in rows], one.points, rtol=1e-4)


def test_the_backbone_that_enters_the_stage_is_the_one_it_started_from(finished, at_scenes, run_copy):
    cfg = load_run_config(run_copy)
    cfg.train.stages, cfg.train.init = ["bissl"], None
    LazyConfig.save(cfg, run_copy / "config.yaml")
    (name, entering), (_, leaving) = load_stages(str(run_copy))
    assert name == "run: random weights"
    state = entering.model.state_dict()
    assert any(not torch.equal(state[key], value) for key, value in leaving.model.state_dict().items())
    context = open_context(cfg, "test")
    # whether or not a new pretext head is warmed up before the stage
    for level in (PretextWarmup().build(context, Weights()).level, Bissl().build(context, Weights()).problem.lower):
        started = merge_split_states(level.backbone.state_dict(), level.head.tail.state_dict())
        assert state.keys() == started.keys() and all(torch.equal(state[key], started[key]) for key in state)
    cfg.train.init = str(finished)
    LazyConfig.save(cfg, run_copy / "config.yaml")
    (name, entering), _ = load_stages(str(run_copy))
    expected = stage_state(finished, "bissl")
    assert name == "run: from finished"
    assert all(torch.equal(value, expected[key]) for key, value in entering.model.state_dict().items())


def test_a_run_whose_stage_is_not_finished_has_no_maps(run_copy):
    shutil.rmtree(run_copy / "checkpoints" / "bissl")
    with pytest.raises(CheckpointError, match="no checkpoint of its stage bissl"):
        load_stages(str(run_copy))


class Boxes(Dataset):
    """Two images with boxes; the crops of the first are told apart by their colours."""

    classes = CLASSES

    def __len__(self):
        return 2

    def __getitem__(self, index):
        image = Image.new("RGB", (40, 30), (index, 0, 0))
        image.paste((0, 200, 0), (4, 4, 18, 18))
        return image, boxed([[4, 4, 18, 18], [30, 0, 40, 30], [0, 0, 2, 2]], [1, 2, 0], [False, False, True])


def test_crops_are_squares_around_boxes_and_difficult_objects_are_left_out():
    crops = BoxCrops(Boxes())
    assert len(crops) == 4 and [crops[i][1] for i in range(4)] == [1, 2, 1, 2]
    crop, _ = crops[0]
    assert crop.size == (16, 16)  # 14 / 0.875, of which a central crop keeps the box
    assert np.array_equal(np.asarray(crop)[1:15, 1:15], np.full((14, 14, 3), (0, 200, 0)))
    assert crops[1][0].size == (30, 30) and crops.source(3) == "1#1"
    assert square_around((30, 0, 40, 30), (40, 30)) == (10, 0, 40, 30)
    assert square_around((0, 0, 0.2, 0.3), (40, 30)) == (0, 0, 1, 1)


def test_objects_of_a_detection_set_are_embedded_by_their_crops(finished, at_scenes):
    cfg = load_run_config(finished)
    picture = picture_embeddings(cfg, [str(finished)], images=15)
    assert [len(one.labels) for one in picture.embeddings] == [
        15 if len(picture.names) == 15 else len(picture.names)
    ] * 2
    assert all("#" in name for name in picture.names)
    assert any("crops of the true boxes" in word for word in words(picture.figure))
    with pytest.raises(DatasetError, match="dataloader.test gives 2 objects; a map of embeddings needs 3 or more"):
        picture_embeddings(cfg, [str(finished)], images=2)


def test_images_of_several_classes_are_on_the_map_and_not_in_the_figures(finished, labelled, tmp_path, monkeypatch):
    write_voc2007_classification(tmp_path)
    monkeypatch.setenv("BISSL_ZOO_DATASETS", str(tmp_path))
    cfg = labelled()
    for role, split in {"train": "trainval", "test": "test"}.items():
        cfg.dataloader[role].dataset = L(build_dataset)(name="voc2007_classification", split=split)
    picture = picture_embeddings(cfg, [str(finished)])
    data = build_datasets(cfg, {"train", "test"})
    counts = {role: [int((target == 1).sum()) for _, target in found] for role, found in data.items()}
    assert set(counts["test"]) == {1, 2} and len(picture.classes) == 22
    first = picture.embeddings[0]
    for label, count in zip(first.labels, counts["test"], strict=True):
        assert picture.classes[label] == "several classes" if count > 1 else label < 20
    alone = {role: [place for place, count in enumerate(found) if count == 1] for role, found in counts.items()}
    only = [[(data[role][place][0], int(data[role][place][1].argmax())) for place in alone[role]]
            for role in ("train", "test")]  # fmt: skip
    state = stage_state(finished, "pretrain")
    parts = [part for one in only for part in features_by_hand(state, "test_resnet", one)]
    assert first.knn == knn_accuracy(*parts, k=20)["top1"]
    assert first.silhouette == pytest.approx(silhouette(*parts[2:]), abs=1e-6)
    said = words(picture.figure)
    assert "several classes" in said and "no class" not in said
    assert f"both of images of one class only, here {len(alone['test'])} of 15" in said
    assert any(f"from {len(alone['train'])} images of dataloader.train" in word for word in said)


def test_where_no_image_has_one_class_there_is_a_map_without_figures():
    features, _ = clusters(5.0, count=2)
    labels = torch.tensor([3, 3, 4, 4, 3, 3])
    one = embedding("mixed", features, labels, features, labels, classes=3)
    assert math.isnan(one.knn) and len(one.points) == 6
    figure = draw_embeddings([one], [*CLASSES, "several classes", "no class"], "")
    assert "mixed\nkNN undefined   silhouette undefined" in words(figure)
    assert embedding("all", features, labels, features, labels).knn == 1.0


@pytest.mark.parametrize(("ending", "begin"), [("png", b"\x89PNG"), ("pdf", b"%PDF"), ("svg", b"<?xml")])
def test_pictures_are_written_in_the_format_of_their_name(tmp_path, ending, begin):
    figure = draw_samples([sample(boxed([[1, 1, 9, 9]], [2]), i) for i in range(3)], CLASSES, "title")
    path = tmp_path / "new" / f"picture.{ending.upper()}"
    save_figure(figure, path)
    assert path.read_bytes().startswith(begin) and [*path.parent.iterdir()] == [path]
    if ending == "png":
        with Image.open(path) as image:
            image.load()
            assert image.size == tuple(int(inches * DPI) for inches in figure.get_size_inches())
            assert image.info["dpi"] == pytest.approx((DPI, DPI), abs=0.1)


def test_a_picture_that_cannot_be_written_is_an_error_for_people(tmp_path):
    figure = draw_samples([sample(0)], CLASSES, "")
    with pytest.raises(ConfigError, match="ends in .png, .pdf, .svg"):
        save_figure(figure, tmp_path / "picture.gif")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        save_figure(figure, tmp_path / "file" / "picture.png")
