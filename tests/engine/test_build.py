"""Data sets of a config: their classes must agree, and validation images must not be test images."""

import pytest
from omegaconf import OmegaConf
from PIL import Image

from bissl_zoo.config import LazyCall as L
from bissl_zoo.config import load_config
from bissl_zoo.engine.build import build_datasets
from bissl_zoo.errors import ConfigError, DatasetError
from bissl_zoo.registry import build_dataset


def class_folders(root, **classes):
    """`train="a b"` -> root/train/a/0.jpg, root/train/b/0.jpg."""
    for split, names in classes.items():
        for name in names if isinstance(names, list) else names.split():
            (root / split / name).mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(root / split / name / "0.jpg")


@pytest.fixture
def config(tmp_path, monkeypatch):
    """A config that reads two splits: `config(test=dict(split="val"))`, of image folders unless it says otherwise."""
    monkeypatch.setenv("BISSL_ZOO_DATASETS", str(tmp_path))

    def build(**roles):
        sets = {role: dict(name="image_folder", root="mine", split=role) | changed for role, changed in roles.items()}
        loaders = {role: {"dataset": L(build_dataset)(**arguments)} for role, arguments in sets.items()}
        return OmegaConf.create({"train": load_config("common/train.py").train, "dataloader": loaders})

    return build


def open_sets(cfg):
    return build_datasets(cfg, set(cfg.dataloader))


@pytest.mark.parametrize(
    ("folders", "changed", "parts"),
    [
        ({"train": "a b c", "test": "a c"}, {}, ["dataloader.train has the classes 'a', 'b', 'c'", "test lacks 'b'"]),
        ({"train": "a 1", "test": "a b"}, {}, ["dataloader.test lacks '1'", "dataloader.train lacks 'b'"]),
        ({"train": "a b", "test": "a b"}, {"classes": ["b", "a"]}, ["Only the order differs"]),
    ],
)
def test_data_sets_with_other_classes_are_refused_with_the_difference(config, tmp_path, folders, changed, parts):
    class_folders(tmp_path / "mine", **folders)
    with pytest.raises(DatasetError) as caught:
        open_sets(config(train={}, test=changed))
    assert all(part in str(caught.value) for part in [*parts, "dataloader.test.dataset.classes=["])


@pytest.mark.parametrize("same", [{"split": "test"}, {"root": "link", "split": "../mine/test"}, {"root": "mine/test"}])
def test_validation_on_the_test_images_is_refused(config, tmp_path, same):
    class_folders(tmp_path / "mine", train="a b", test="a b")
    (tmp_path / "link").mkdir()
    same = {"split": "", **same}
    with pytest.raises(ConfigError, match="dataloader.val and dataloader.test are the same samples"):
        open_sets(config(train={}, val=same, test={}))
    open_sets(config(train={}, val={"split": "train"}, test={}))


def test_other_folders_with_the_same_file_names_are_accepted(config, tmp_path, monkeypatch):
    class_folders(tmp_path / "mine", train="a b", val="a b", test="a b")
    monkeypatch.setenv("BISSL_ZOO_DATASETS", str(tmp_path / "elsewhere"))
    away = {"root": str(tmp_path / "mine")}
    open_sets(config(train=away, val=away, test=away))
    with pytest.raises(ConfigError, match="the same samples"):
        open_sets(config(train=away, val={**away, "split": "test"}, test=away))
