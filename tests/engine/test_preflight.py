"""Errors that would end a run later, or spoil it, are reported before the run directory exists."""

import random

import numpy as np
import pytest
import torch
from PIL import Image

from bissl_zoo.engine.checks import check_parts, open_context
from bissl_zoo.engine.preflight import class_counts, describe, preflight
from bissl_zoo.engine.resume import random_state
from bissl_zoo.engine.stages import plan_stages
from bissl_zoo.engine.trainer import Weights
from bissl_zoo.errors import BisslZooError, CheckpointError, DatasetError
from bissl_zoo.pretext import SimCLR
from bissl_zoo.registry import PRETEXT_METHODS


def check(cfg, initial=None):
    """Do all checks of a run that starts."""
    context, initial = open_context(cfg, "test"), initial or Weights()
    check_parts(context, initial)
    preflight(context, initial, plan_stages(context, initial))


@pytest.fixture(scope="module")
def broken():
    """Register a method whose loss raises."""

    class Broken(SimCLR):
        def losses(self, backbone, views):
            raise RuntimeError("shapes differ\n  at line 7")

    PRETEXT_METHODS.register("broken")(Broken)
    yield
    PRETEXT_METHODS._obj_map.pop("broken")


REFUSED = {
    "a pretext batch of one image": (
        {"dataloader__pretext__batch_size": 1},
        "pretrain fails in SimCLR on a batch of 1",
    ),
    "views without pixels": ({"pretext__augmentation__size": 0}, "augmentation.size is 0"),
    "a learning rate in words": ({"optimizer__finetune__lr": "fast"}, "optimizer.finetune.lr is 'fast'"),
    "a negative temperature": ({"pretext__temperature": -1}, "pretext.temperature is -1"),
    "crops without area": ({"pretext__augmentation__crop_scale": "[0,0]"}, r"crop_scale is \[0, 0\]"),
    "a momentum of 2": ({"optimizer__lower__momentum": 2}, "momentum is 2"),
    "a method that raises": (
        {"pretext__name": "broken"},
        "in Broken on a batch of 2 from dataloader.pretext.*shapes di",
    ),
}


@pytest.mark.parametrize("changed, message", REFUSED.values(), ids=REFUSED)
def test_what_fails_in_training_is_one_message_before_it(tiny_config, at_scenes, broken, changed, message):
    with pytest.raises(BisslZooError, match=message) as raised:
        check(tiny_config(**changed))
    assert "\n" not in str(raised.value)


WARNED = {
    "a batch beyond the set": ({"dataloader__pretext__batch_size": 5000}, "more than the 24 images"),
    "too many workers": ({"dataloader__train__num_workers": 200}, "200 processes on "),
    "classes without objects": ({}, "dataloader.test has no objects of"),
}


@pytest.mark.parametrize("changed, message", WARNED.values(), ids=WARNED)
def test_what_only_looks_wrong_is_a_warning(tiny_config, at_scenes, caplog, changed, message):
    check(tiny_config(train__stages="[finetune]", **changed) if "train" in str(changed) else tiny_config(**changed))
    assert message in caplog.text


def images_of(devkit, split):
    return sorted((devkit / "JPEGImages").glob(f"{split}_*.jpg"))


@pytest.mark.parametrize("kind", ["of one colour", "equal"])
def test_images_that_teach_nothing_are_refused(tiny_config, scenes_copy, monkeypatch, kind):
    root, devkit = scenes_copy
    monkeypatch.setenv("BISSL_ZOO_DATASETS", str(root))
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[: 0 if kind == "of one colour" else 30] = 255
    for file in images_of(devkit, "unlabeled"):
        Image.fromarray(pixels).save(file, quality=100)
    with pytest.raises(DatasetError, match=f"dataloader.pretext: all of 8 sampled images are {kind}"):
        check(tiny_config())


def test_a_test_set_without_objects_is_refused(tiny_config, scenes_copy, monkeypatch):
    root, devkit = scenes_copy
    monkeypatch.setenv("BISSL_ZOO_DATASETS", str(root))
    for file in (devkit / "Annotations").glob("test_*.xml"):
        head, _, rest = file.read_text().partition("<object>")
        file.write_text(head + rest.rpartition("</object>")[2])
    with pytest.raises(DatasetError, match="dataloader.test has 8 images and no objects to evaluate on"):
        check(tiny_config(train__stages="[finetune]"))


def test_nan_in_the_initial_weights_is_refused(tiny_config, at_scenes):
    cfg = tiny_config(train__init="weights.safetensors")
    with pytest.raises(CheckpointError, match="weights.safetensors: 'conv1.weight' of the backbone contains NaN"):
        preflight(open_context(cfg, "test"), Weights(backbone={"conv1.weight": torch.tensor([1.0, float("nan")])}), [])


def test_the_preflight_changes_neither_the_random_state_nor_the_weights(tiny_config, at_scenes, tmp_path):
    cfg = tiny_config(train__stages="[pretrain,bissl,finetune]", train__output_dir=str(tmp_path / "run"))
    context = open_context(cfg, "test")
    stages = plan_stages(context, Weights())
    weights = stages[0].build(context, Weights()).result()
    before = {name: value.clone() for name, value in weights.backbone.items()}
    random.seed(3)
    state = random_state(context.device)
    preflight(context, weights, stages)
    after = random_state(context.device)
    assert state["python"] == after["python"] and torch.equal(state["torch"], after["torch"])
    assert torch.equal(state["numpy"][1], after["numpy"][1]) and state["numpy"][2] == after["numpy"][2]
    assert all(torch.equal(before[name], value) for name, value in weights.backbone.items())
    assert context.cfg == cfg and not (tmp_path / "run").exists()


def test_a_dry_run_without_data_describes_the_rest_and_lists_every_missing_set(
    tiny_config, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("BISSL_ZOO_DATASETS", str(tmp_path))
    call = "{_target_: bissl_zoo.registry.build_dataset, name: %s}"
    cfg = tiny_config(dataloader__train__dataset=call % "cifar10", dataloader__test__dataset=call % "stl10")
    with pytest.raises(DatasetError) as raised:
        describe(cfg, "test")
    message, out = str(raised.value), capsys.readouterr().out
    for role, name in (("train", "cifar10"), ("test", "stl10")):
        assert f"dataloader.{role}" in message and f"bissl data {name}" in message
    assert "shared backbone" in out and "pretext view" in out and "finetune" in out


def test_a_missing_extra_is_named_before_missing_data(tiny_config, tmp_path, monkeypatch):
    monkeypatch.setenv("BISSL_ZOO_DATASETS", str(tmp_path))
    monkeypatch.setitem(__import__("sys").modules, "detectron2", None)
    task = "{_target_: bissl_zoo.registry.build_task, name: detectron2_faster_rcnn}"
    with pytest.raises(BisslZooError, match="needs Detectron2"):
        describe(tiny_config(task=task), "test")


def test_objects_are_counted_by_class(tiny_config, at_scenes):
    data = open_context(tiny_config(), "test").data
    assert class_counts(data["pretext"]) is None
    labels = torch.cat([data["train"].target(index)["labels"] for index in range(len(data["train"]))])
    assert class_counts(data["train"]).tolist() == torch.bincount(labels, minlength=10).tolist()
