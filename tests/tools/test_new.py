"""`bissl new`: the config that it writes for each layout, and what it refuses."""

import shutil

import pytest
import torch
from command_line import load_tool
from page_data import scenes_as_coco, scenes_as_voc
from PIL import Image

from bissl_zoo.cli.new import config_text, roles_of
from bissl_zoo.config import LazyConfig
from bissl_zoo.engine.build import build_datasets
from bissl_zoo.errors import DatasetError, ZooError

ROLES = {"pretext", "train", "test"}


def images(folder, count=3):
    folder.mkdir(parents=True)
    for number in range(count):
        Image.new("RGB", (48, 32), (90 * number, 80, 30)).save(folder / f"{number}.jpg")


@pytest.fixture
def written(tmp_path):
    """Return the config that is written for a folder, and its data sets."""

    def call(*arguments, **options):
        (tmp_path / "mine.py").write_text(config_text("mine", *arguments, **options))
        cfg = LazyConfig.load(tmp_path / "mine.py")
        return cfg, build_datasets(cfg, ROLES)

    return call


def test_splits_of_class_folders_get_the_classes_of_both_and_smaller_batches(written, tmp_path):
    for name in ("train/cat", "train/dog", "valid/cat", "more/a/b"):
        images(tmp_path / "pets" / name)
    cfg, data = written(tmp_path / "pets")
    assert data["train"].classes == data["test"].classes == ["cat", "dog"]
    assert [len(data[role]) for role in ("pretext", "train", "test")] == [6, 6, 3]
    assert cfg.dataloader.pretext.batch_size == cfg.dataloader.train.batch_size == 6
    assert cfg.task.name == "classification" and cfg.train.output_dir == "runs/mine"
    cfg, data = written(tmp_path / "pets", unlabelled=tmp_path / "pets" / "more", weights="timm:resnet50.a1_in1k")
    assert len(data["pretext"]) == 3 and data["pretext"].classes is None
    assert (cfg.backbone.name, cfg.train.init) == ("resnet50", "timm:resnet50.a1_in1k")
    assert list(cfg.train.stages) == ["bissl", "finetune"]


def test_a_transformer_is_built_for_the_size_of_the_images_and_a_file_names_its_architecture(written, tmp_path):
    for name in ("train/cat", "train/dog", "val/cat"):
        images(tmp_path / "pets" / name, 1)
    cfg, _ = written(tmp_path / "pets", weights="timm:vit_small_patch14_dinov2.lvd142m")
    assert cfg.backbone.img_size == cfg.task.image_size == cfg.pretext.augmentation.size == 98  # 7 patches of 14
    torch.save({"blocks.0.norm1.weight": torch.ones(4)}, tmp_path / "vit.pth")
    with pytest.raises(ZooError, match="cannot be inferred.*--backbone"):
        config_text("mine", tmp_path / "pets", weights=str(tmp_path / "vit.pth"))


def test_class_folders_alone_are_divided_and_test_images_are_not_pretrained_on(written, tmp_path):
    for name in ("cat", "dog"):
        images(tmp_path / "pets" / name, 10)
    _, data = written(tmp_path / "pets")
    files = {role: {dataset.source(i) for i in range(len(dataset))} for role, dataset in data.items()}
    assert len(files["train"]) == 16 and len(files["test"]) == 4 and not files["train"] & files["test"]
    assert files["pretext"] == files["train"]


@pytest.mark.slow
def test_boxes_in_both_layouts_get_the_same_anchors(written, scenes, tmp_path):
    scenes_as_voc(scenes, tmp_path / "voc")
    scenes_as_coco(scenes, tmp_path / "coco")
    shutil.rmtree(tmp_path / "voc/VOCdevkit/VOC2007/SegmentationClass", ignore_errors=True)
    (cfg, voc), (other, coco) = written(tmp_path / "voc"), written(tmp_path / "coco")
    assert len(voc["train"]) == len(coco["train"]) == 16 and len(voc["test"]) == len(coco["test"]) == 8
    assert cfg.task.anchor_sizes == other.task.anchor_sizes and cfg.task.min_size == other.task.min_size == 64
    areas = [(box[2:] - box[:2]).prod() for box in coco["train"].boxes]
    assert min(areas) ** 0.5 <= cfg.task.anchor_sizes[0] <= cfg.task.anchor_sizes[-1] <= max(areas) ** 0.5 + 1


@pytest.mark.parametrize(
    ("names", "train", "test"),
    [
        (["instances_train2017", "instances_val2017"], "instances_train2017", "instances_val2017"),
        (["train/_annotations.coco", "valid/_annotations.coco"], "train/_annotations.coco", "valid/_annotations.coco"),
        (["VOC2007 train", "VOC2007 trainval", "VOC2007 val", "VOC2007 test"], "VOC2007 trainval", "VOC2007 test"),
    ],
)
def test_splits_are_recognised_by_the_words_in_their_names(tmp_path, names, train, test):
    roles = roles_of({name: {"name": "coco_detection", "root": name} for name in names}, tmp_path)
    assert {role: arguments["root"] for role, arguments in roles.items()} == {"train": train, "test": test}


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ({"images": {"name": "image_folder", "labelled": False}}, "without labels.*--unlabelled"),
        ({"a": {"name": "coco_detection"}, "b": {"name": "coco_detection"}}, "none of the splits a, b is called train"),
        ({"train": {"name": "coco_detection"}}, "one split, train. Divide it"),
    ],
)
def test_data_that_cannot_be_trained_and_tested_on_is_refused(tmp_path, splits, message):
    with pytest.raises(DatasetError, match=message):
        roles_of(splits, tmp_path)


def test_the_command_writes_a_file_once(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("my pets/cat", "my pets/dog"):
        images(tmp_path / name)
    tool = load_tool("new")
    assert tool.cli(["--data", "my pets"]) == 0 and "bissl train --config-file my_pets.py" in capsys.readouterr().out
    assert tool.cli(["--data", "my pets"]) == 1 and "my_pets.py: cannot write" in capsys.readouterr().err
    assert tool.cli(["--data", "nowhere"]) == 1 and "The layout of" in capsys.readouterr().err
