"""Maps of features: what is embedded, from which backbones, and the metrics beside the maps."""

import shutil

import numpy as np
import pytest
import torch
from digit_images import write_digit_folder
from image_figures import random_states, words
from original_layouts import write_voc2007_classification
from PIL import Image
from torch.utils.data import Dataset
from torchvision.transforms import v2

from bissl_zoo.backbones import merge_split_states
from bissl_zoo.config import LazyCall as L
from bissl_zoo.config import LazyConfig
from bissl_zoo.downstream import Classification, FasterRCNN, MultilabelClassification
from bissl_zoo.engine.build import Weights, build_datasets
from bissl_zoo.engine.checks import open_context
from bissl_zoo.engine.stages import Bissl, PretextWarmup
from bissl_zoo.errors import CheckpointError
from bissl_zoo.evaluation import knn_accuracy
from bissl_zoo.registry import build_backbone, build_dataset
from bissl_zoo.report.embeddings import (
    Objects,
    draw_embeddings,
    embedding,
    load_stages,
    project,
    square_around,
)
from bissl_zoo.report.visualize import embeddings_figure
from bissl_zoo.runs.checkpoint import Checkpointer, load_checkpoint
from bissl_zoo.runs.directory import load_run_config

CLASSES = ["cat", "_dog", "price $5 and $6"]


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """Handwritten digits as an image folder: 60 to train, 40 to test, of 4 classes."""
    return write_digit_folder(tmp_path_factory.mktemp("digits"))


@pytest.fixture
def labelled(tiny_config, digits):
    """Return the tiny config with digits of one class per image."""
    cfg = tiny_config()
    cfg.task = L(Classification)(image_size=32)
    for role in ("train", "test"):
        cfg.dataloader[role].dataset = L(build_dataset)(name="image_folder", root=str(digits), split=role)
    return cfg


def clusters(distance, count=30, width=16):
    generator = torch.Generator().manual_seed(0)
    centres = torch.eye(3, width) * distance
    labels = torch.arange(3).repeat_interleave(count)
    return centres[labels] + torch.randn(3 * count, width, generator=generator), labels


@pytest.mark.slow  # scikit-learn starts a process to count cores
def test_maps_of_one_seed_are_equal_and_keep_clusters_apart():
    features, labels = clusters(20.0)
    before = random_states()
    points = project(features, seed=1)
    assert random_states() == before
    assert points.shape == (90, 2) and np.array_equal(points, project(features, seed=1))
    distances = np.linalg.norm(points[:, None] - points[None], axis=2) + np.diag([np.inf] * 90)
    assert (labels[distances.argmin(axis=1)] == labels).float().mean() > 0.95


def test_a_collapsed_network_is_one_point_and_its_title_says_so():
    features, labels = torch.ones(12, 8), torch.arange(12) % 3
    one = embedding("flat", features, labels, features, labels)
    assert np.ptp(one.points) == 0
    assert draw_embeddings([one], CLASSES, "").axes[0].get_title() == "flat\nkNN 0.333   all features are equal"


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


@pytest.mark.slow
def test_a_run_with_a_bissl_stage_has_two_maps_with_their_own_knn(finished, at_scenes, labelled):
    cfg = labelled
    before = random_states()
    result = embeddings_figure(cfg, [str(finished)])
    assert random_states() == before
    data = build_datasets(cfg, {"train", "test"})
    titles = [axes.get_title() for axes in result.figure.axes]
    for title, name, stage in zip(titles, ("pretrained", "bissl"), ("pretrain", "bissl"), strict=True):
        state = stage_state(finished, stage)
        parts = [part for role in ("train", "test") for part in features_by_hand(state, "test_resnet", data[role])]
        knn = knn_accuracy(*parts, k=20)["top1"]
        assert title == f"finished: {name}\nkNN {knn:.3f}"
    assert sum(len(points.get_offsets()) for points in result.figure.axes[0].collections) == 40
    assert any("k = 20, 60 neighbours from dataloader.train" in word for word in words(result.figure))


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_run_whose_stage_is_not_finished_has_no_maps(run_copy):
    shutil.rmtree(run_copy / "checkpoints" / "bissl")
    with pytest.raises(CheckpointError, match="no checkpoint of the stage bissl"):
        load_stages(str(run_copy))


@pytest.mark.slow
def test_images_of_several_classes_are_on_the_map_and_not_in_the_metrics(finished, labelled, tmp_path, monkeypatch):
    write_voc2007_classification(tmp_path)
    monkeypatch.setenv("BISSL_ZOO_DATASETS", str(tmp_path))
    cfg = labelled
    cfg.task = L(MultilabelClassification)(image_size=32)
    for role, split in {"train": "trainval", "test": "test"}.items():
        cfg.dataloader[role].dataset = L(build_dataset)(name="voc2007_classification", split=split)
    result = embeddings_figure(cfg, [str(finished)])
    data = build_datasets(cfg, {"train", "test"})
    counts = {role: [int((target == 1).sum()) for _, target in found] for role, found in data.items()}
    assert set(counts["test"]) == {1, 2} and len(result.classes) == 21
    first = result.embeddings[0]
    for label, count in zip(first.labels, counts["test"], strict=True):
        assert result.classes[label] == "no single class" if count > 1 else label < 20
    alone = {role: [place for place, count in enumerate(found) if count == 1] for role, found in counts.items()}
    only = [[(data[role][place][0], int(data[role][place][1].argmax())) for place in alone[role]]
            for role in ("train", "test")]  # fmt: skip
    state = stage_state(finished, "pretrain")
    parts = [part for one in only for part in features_by_hand(state, "test_resnet", one)]
    assert first.knn == knn_accuracy(*parts, k=20)["top1"]
    shown = words(result.figure)
    assert "no single class" in shown
    assert any(f"metrics: {len(alone['test'])} of 15 have a single class" in word for word in shown)


class Boxes(Dataset):
    """Two images with boxes of different colours."""

    classes = CLASSES

    def __len__(self):
        return 2

    def __getitem__(self, index):
        image = Image.new("RGB", (40, 30), (index, 0, 0))
        image.paste((0, 200, 0), (4, 4, 18, 18))
        boxes = torch.tensor([[4.0, 4, 18, 18], [30, 0, 40, 30], [0, 0, 2, 2]])
        difficult = torch.tensor([False, False, True])
        return image, {"boxes": boxes, "labels": torch.tensor([1, 2, 0]), "difficult": difficult}


def test_crops_are_squares_around_boxes_and_difficult_objects_are_left_out():
    trunk, _ = build_backbone(name="test_resnet").split("c3")
    crops = Objects(Boxes(), FasterRCNN(trunk, CLASSES, box_head=8), [0, 1])
    assert len(crops) == 4 and [crops[i][1] for i in range(4)] == [1, 2, 1, 2]
    crop, _ = crops[0]
    assert crop.size == (16, 16)  # 14 / 0.875, of which a central crop keeps the box
    assert np.array_equal(np.asarray(crop)[1:15, 1:15], np.full((14, 14, 3), (0, 200, 0)))
    assert crops[1][0].size == (30, 30)
    assert square_around((30, 0, 40, 30), (40, 30)) == (10, 0, 40, 30)
    assert square_around((0, 0, 0.2, 0.3), (40, 30)) == (0, 0, 1, 1)
