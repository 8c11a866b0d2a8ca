import json
import re
import shlex

import pytest
from omegaconf import OmegaConf
from original_layouts import WRITERS
from PIL import Image

from bissl_zoo.config import LazyCall as L
from bissl_zoo.config import LazyConfig
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
        return OmegaConf.create({"dataloader": loaders})

    return build


def open_sets(cfg):
    return build_datasets(cfg, set(cfg.dataloader))


def follow_advice(cfg):
    """Type what the refusal says; the data sets then open. Returns the refusal's text and what was typed."""
    with pytest.raises(DatasetError) as caught:
        open_sets(cfg)
    advice, typed = str(caught.value).split("\n")
    typed = shlex.split(typed)
    return advice, typed, open_sets(LazyConfig.apply_overrides(cfg, typed))


def test_a_class_that_the_test_split_lacks_is_mended_by_what_the_message_says(config, tmp_path, caplog):
    class_folders(tmp_path / "mine", train="a b c", test="a c")
    advice, typed, data = follow_advice(config(train={}, test={}))
    assert "dataloader.train has the classes 'a', 'b', 'c' and dataloader.test 'a', 'c'." in advice
    assert "dataloader.test lacks 'b'." in advice and "train lacks" not in advice
    assert typed == ['+dataloader.test.dataset.classes=["a", "b", "c"]']
    assert data["test"].classes == ["a", "b", "c"] and [label for _, label in data["test"]] == [0, 2]
    assert f"{tmp_path}/mine/test has no images of 1 of the 3 classes: b" in caplog.text


def test_what_the_training_split_lacks_is_named_for_it_and_both_lists_change_where_both_lack_one(config, tmp_path):
    class_folders(tmp_path / "mine", train="a", test="a b", val="a 1")
    assert follow_advice(config(train={}, test={}))[1] == ['+dataloader.train.dataset.classes=["a", "b"]']
    wanted = '["1", "a", "b"]'
    cfg = config(val={"classes": None}, test={})
    advice, typed, data = follow_advice(cfg)
    assert "dataloader.test lacks '1'" in advice and "dataloader.val lacks 'b'" in advice
    assert typed == [f"dataloader.val.dataset.classes={wanted}", f"+dataloader.test.dataset.classes={wanted}"]
    assert data["val"].classes == data["test"].classes == json.loads(wanted)


def test_names_are_quoted_for_the_shell_and_the_override(config, tmp_path):
    names = ["007", "it's, one", "yes", "Ärger: x"]
    class_folders(tmp_path / "mine", train=names, test=["007"])
    assert set(follow_advice(config(train={}, test={}))[2]["test"].classes) == set(names)


def test_another_order_is_told_as_such(config, tmp_path):
    class_folders(tmp_path / "mine", train="a b", test="a b")
    advice, typed, data = follow_advice(config(train={}, test={"classes": ["b", "a"]}))
    assert "in another order" in advice and typed == ['dataloader.test.dataset.classes=["a", "b"]']


def test_many_classes_are_not_written_out(config, tmp_path):
    names = [f"class{number:03d}" for number in range(200)]
    class_folders(tmp_path / "mine", train=names, test=names[1:])
    with pytest.raises(DatasetError) as caught:
        open_sets(config(train={}, test={}))
    message = str(caught.value)
    assert len(message) < 1200 and "... (200 in all)" in message and "dataloader.test lacks 'class000'" in message
    assert re.search(r'\+dataloader.test.dataset.classes=\["class000", "class001", "class002", ...\]', message)


def test_sets_of_fixed_classes_are_not_told_to_take_others(config, tmp_path):
    for name in ("dtd", "flowers102"):
        WRITERS[name](tmp_path)
    cfg = OmegaConf.create({"dataloader": {}})
    for role, name in (("train", "dtd"), ("test", "flowers102")):
        cfg.dataloader[role] = {"dataset": L(build_dataset)(name=name, split=role)}
    with pytest.raises(DatasetError, match="The classes of '(dtd|flowers102)' are fixed") as caught:
        open_sets(cfg)
    assert ".classes=" not in str(caught.value)


@pytest.mark.parametrize("same", [{"split": "test"}, {"root": "link", "split": "../mine/test"}, {"root": "mine/test"}])
def test_validation_images_are_not_those_of_the_test(config, tmp_path, same):
    class_folders(tmp_path / "mine", train="a b", test="a b")
    (tmp_path / "link").mkdir()
    same = {"split": "", **same}
    with pytest.raises(ConfigError, match="dataloader.val and dataloader.test are the same samples"):
        open_sets(config(train={}, val=same, test={}))
    open_sets(config(train={}, val={"split": "train"}, test={}))


def test_folders_elsewhere_with_files_of_the_same_names_are_others(config, tmp_path, monkeypatch):
    class_folders(tmp_path / "mine", train="a b", val="a b", test="a b")
    monkeypatch.setenv("BISSL_ZOO_DATASETS", str(tmp_path / "elsewhere"))
    away = {"root": str(tmp_path / "mine")}
    open_sets(config(train=away, val=away, test=away))
    with pytest.raises(ConfigError, match="the same samples"):
        open_sets(config(train=away, val={**away, "split": "test"}, test=away))


def test_named_sets_are_told_apart_by_their_samples(config, tmp_path):
    WRITERS["dtd"](tmp_path)
    cfg = OmegaConf.create({"dataloader": {}})
    for role, split in (("val", "test"), ("test", "test")):
        cfg.dataloader[role] = {"dataset": L(build_dataset)(name="dtd", split=split)}
    with pytest.raises(ConfigError, match="the same samples"):
        open_sets(cfg)
    cfg.dataloader.val.dataset.split = "val"
    open_sets(cfg)
