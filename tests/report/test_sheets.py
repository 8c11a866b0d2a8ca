"""Sheets of samples, views and predictions: the pixels, boxes and texts that they show."""

import numpy as np
import pytest
import torch
from image_figures import pixels_of, random_states, rectangles
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image
from safetensors.torch import save_file
from torchvision.transforms import v2

from bissl_zoo.analysis.reduced_problem import narrow_widths
from bissl_zoo.config import LazyCall as L
from bissl_zoo.config import load_config
from bissl_zoo.data.views import MaskedView, Views
from bissl_zoo.downstream import Classification, FasterRCNN
from bissl_zoo.engine.build import build_datasets, build_downstream
from bissl_zoo.engine.checks import open_context
from bissl_zoo.engine.init import load_init
from bissl_zoo.errors import CheckpointError, ConfigError, DatasetError, ZooError
from bissl_zoo.registry import PRETEXT_METHODS, build_backbone
from bissl_zoo.report.sheets import DPI, Sample, draw_samples, draw_views, predict, save_figure
from bissl_zoo.report.visualize import data_figure, predictions_figure, views_figure
from bissl_zoo.runs.directory import load_run_config

CLASSES = ["cat", "_dog", "price $5 and $6"]
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def noise(height=20, width=30, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def sample(target, index=0, image=None):
    return Sample(index, image or noise(seed=index), target, f"file_{index}.jpg")


def detection():
    trunk, _ = build_backbone(name="test_resnet").split("c3")
    return FasterRCNN(trunk, CLASSES, min_size=32, max_size=64, anchor_sizes=(8,), box_head=8)


def boxed(boxes, labels):
    difficult = torch.zeros(len(labels), dtype=torch.bool)
    return {"boxes": torch.tensor(boxes).float(), "labels": torch.tensor(labels), "difficult": difficult}


def test_a_box_is_drawn_around_its_pixels_in_the_written_file(tmp_path):
    image = np.zeros((40, 40, 3), dtype=np.uint8)
    image[10:20, 20:30] = (255, 0, 255)
    target = boxed([[20, 10, 30, 20]], [1])
    figure = draw_samples([sample(target, image=Image.fromarray(image))], detection(), "")
    save_figure(figure, tmp_path / "box.png")
    left, bottom, width, height = figure.axes[0].get_window_extent().bounds
    top = figure.bbox.height - bottom - height
    drawn = np.asarray(Image.open(tmp_path / "box.png").convert("RGB")).astype(int)
    drawn = drawn[round(top) : round(top + height), round(left) : round(left + width)]
    for colour in ((255, 0, 255), (0xE6, 0x9F, 0x00)):
        below_the_name = round(12 / 40 * height)
        rows, columns = (abs(drawn[below_the_name:] - colour).sum(axis=2) < 40).nonzero()
        edges = np.array([columns.min(), rows.max() + below_the_name + 1, columns.max() + 1]) * 40 / width
        assert edges == pytest.approx([20, 20, 30], abs=0.75)  # a line is half a pixel wide


@pytest.mark.slow
def test_a_sheet_of_16_images_has_no_text_on_another_and_none_outside():
    samples = [sample(boxed([], []), n, noise(90, 100, n))._replace(name="a_long_name" * 9) for n in range(16)]
    figure = draw_samples(samples, detection(), "A title " * 60)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    texts = [text for axes in figure.axes for text in (*axes.texts, axes.title)] + [figure._suptitle]
    extents = [text.get_window_extent(canvas.get_renderer()) for text in texts]
    for number, one in enumerate(extents):
        assert one.x0 >= 0 and one.x1 <= figure.bbox.x1 and one.y0 >= 0 and one.y1 <= figure.bbox.y1
        for other in extents[:number]:  # one dot of rounding
            assert one.x1 <= other.x0 + 1 or other.x1 <= one.x0 + 1 or one.y1 <= other.y0 + 1 or other.y1 <= one.y0 + 1


def plain_views():
    """Two views that are the image itself, normalised."""
    return Views([v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])] * 2)


def test_the_part_that_a_mask_hides_is_gray_and_the_rest_is_unchanged():
    masked = MaskedView(plain_views().transforms[0], cells=4, hidden=6)
    figure = draw_views([sample(None, image=noise(32, 32))], masked, MEAN, STD, "")
    _, view, visible = (pixels_of(axes) for axes in figure.axes)
    hidden = (visible != view).any(axis=2)
    assert hidden.sum() == pytest.approx(6 * 64, abs=8) and np.ptp(visible[hidden]) == 0
    cells = hidden.reshape(4, 8, 4, 8).mean(axis=(1, 3))
    assert ((cells > 0.9).sum(), (cells == 0).sum()) == (6, 10)
    with pytest.raises(ConfigError, match=r"torch.int64 of shape \(3,\)"):
        draw_views([sample(None)], lambda image: (torch.zeros(3, dtype=torch.long),), MEAN, STD, "")


@pytest.mark.parametrize("name", PRETEXT_METHODS.list())
def test_every_pretext_method_shows_its_views(tiny_config, at_scenes, name):
    cfg = tiny_config()
    cfg.pretext = load_config(f"common/pretext/{name}.py").pretext
    cfg.pretext.update(narrow_widths({"name": name}))
    if name in ("mae", "simmim"):
        cfg.backbone = L(build_backbone)(name="test_vit", class_token=False, global_pool="avg")
        cfg.bilevel.shared_stage = None
    before = random_states()
    figure = views_figure(cfg, images=2, seed=3)
    assert random_states() == before
    assert len(figure.axes) == 2 * (1 + {"dino": 10}.get(name, 2))
    if name == "simclr":
        again, other = views_figure(cfg, images=2, seed=3), views_figure(cfg, images=2, seed=4)
        pairs = zip(figure.axes, again.axes, strict=True)
        assert all(np.array_equal(pixels_of(one), pixels_of(two)) for one, two in pairs)
        assert not np.array_equal(pixels_of(figure.axes[1]), pixels_of(other.axes[1]))


@pytest.mark.slow
def test_data_of_a_config_has_the_boxes_of_its_annotations(tiny_config, at_scenes):
    cfg = tiny_config()
    before = random_states()
    figure = data_figure(cfg, "test", images=4, seed=1)
    assert random_states() == before
    dataset = build_datasets(cfg, {"test"})["test"]
    index_of = {dataset.source(i).rsplit("/", 1)[1]: i for i in range(len(dataset))}
    assert len(figure.axes) == 4
    for axes in figure.axes:
        (name,) = {text.get_text() for text in axes.texts} & index_of.keys()
        image, target = dataset[index_of[name]]
        assert np.array_equal(pixels_of(axes), np.asarray(image))
        assert rectangles(axes) == [pytest.approx(box) for box in target["boxes"].tolist()]
    assert len(data_figure(cfg, "pretext", images=99).axes) == 24


def test_an_image_that_cannot_be_decoded_is_named(tiny_config, scenes_copy, monkeypatch):
    root, folder = scenes_copy
    monkeypatch.setenv("BISSL_ZOO_DATASETS", str(root))
    bad = folder / "JPEGImages" / f"{(folder / 'ImageSets/Main/test.txt').read_text().split()[0]}.jpg"
    bad.write_bytes(b"no image")
    with pytest.raises(DatasetError, match=bad.name):
        data_figure(tiny_config(), "test")


@pytest.mark.slow
def test_predicted_boxes_are_those_of_the_model_of_the_run(finished, at_scenes):
    cfg = load_run_config(finished)
    cfg.train.init = str(finished)
    before = random_states()
    figure = predictions_figure(cfg, images=3, seed=1, threshold=0.06)
    assert random_states() == before
    context = open_context(cfg, "test", roles={"test"})
    backbone, task = (part.eval() for part in build_downstream(context, load_init(str(finished), cfg, True)[0]))
    dataset = context.data["test"]
    index_of = {dataset.source(i).rsplit("/", 1)[1]: i for i in range(len(dataset))}
    panels = figure.axes[:9]  # the truth, from pretrained, from bissl
    pairs = list(zip(panels[::3], panels[2::3], strict=True))
    for truth, predicted in pairs:
        (name,) = {text.get_text() for text in truth.texts} & index_of.keys()
        image, target = task.transform(train=False)(*dataset[index_of[name]])
        output = task.predict(backbone, [image])[0]
        expected = output["boxes"][output["scores"] >= 0.06]
        assert rectangles(truth) == [pytest.approx(box) for box in target["boxes"].tolist()]
        assert sorted(rectangles(predicted)) == [pytest.approx(box, abs=1e-3) for box in sorted(expected.tolist())]


def test_predictions_of_classes_have_the_probabilities_of_the_model():
    trunk, _ = build_backbone(name="test_resnet").split("c3")
    task = Classification(trunk, CLASSES, image_size=32)

    class Noise(torch.utils.data.Dataset):
        def __len__(self):
            return 3

        def __getitem__(self, index):
            return noise(40, 40, index), index

    predictions = predict(trunk, task, Noise(), [0, 2], torch.device("cpu"), batch_size=1)
    transform = task.transform(train=False)
    images = torch.stack([transform(noise(40, 40, index), 0)[0] for index in (0, 2)])
    expected = task.eval().predict(trunk.eval(), images).softmax(dim=1)
    assert [one.score for one in predictions] == pytest.approx([expected[0, 0].item(), expected[1, 2].item()])


def test_predictions_need_a_fine_tuned_model(tiny_config, at_scenes, tmp_path):
    with pytest.raises(CheckpointError, match="Predictions need a fine-tuned model"):
        predictions_figure(tiny_config())
    save_file(build_backbone(name="test_resnet").state_dict(), tmp_path / "plain.safetensors")
    with pytest.raises(ZooError, match="There is no fine-tuned model"):
        predictions_figure(tiny_config(train__init=tmp_path / "plain.safetensors"))


@pytest.mark.parametrize(("suffix", "begin"), [("png", b"\x89PNG"), ("pdf", b"%PDF"), ("svg", b"<?xml")])
def test_figures_are_written_in_the_format_of_their_suffix(tmp_path, suffix, begin):
    figure = draw_samples([sample(None, index) for index in range(3)], None, "title $x_1$")
    path = tmp_path / "new" / f"figure.{suffix.upper()}"
    save_figure(figure, path)
    assert path.read_bytes().startswith(begin) and [*path.parent.iterdir()] == [path]
    if suffix == "png":
        with Image.open(path) as image:
            assert image.size == pytest.approx(figure.get_size_inches() * DPI, abs=1)
