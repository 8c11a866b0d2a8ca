import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import yaml

from bissl_zoo.config import LazyConfig
from bissl_zoo.engine.checks import check_config
from bissl_zoo.engine.publishing import publish_run, published, without_local_folders
from bissl_zoo.engine.runner import run
from bissl_zoo.errors import BisslZooError, CheckpointError, ConfigError
from bissl_zoo.runs.directory import read_metadata, read_results
from bissl_zoo.zoo import Zoo, get_config, get_entry

pytestmark = pytest.mark.slow


def test_a_run_is_published_later_into_another_zoo_with_all_that_it_left(run_copy, tmp_path):
    entry = publish_run(run_copy, name="mine", zoo=Zoo(tmp_path / "zoo"))
    metadata = get_entry("mine", zoo=tmp_path / "zoo")
    results = json.loads((run_copy / "results.json").read_text())
    assert metadata["metrics"]["AP50 (bissl)"]["mean"] == results["bissl"]["AP50"]
    assert metadata["metrics"]["AP50 (pretrained)"]["mean"] == results["pretrained"]["AP50"]
    assert (metadata["pretext"], metadata["task"], metadata["seeds"]) == ("simclr", "faster_rcnn", [0])
    assert metadata["wall_time_s"] == read_metadata(run_copy)["wall_time_s"] > 0 and "CPU" in metadata["hardware"]
    assert {"pretext_head.safetensors", "task_head.safetensors"} <= set(metadata["files"])
    assert published(run_copy) == entry
    assert "median" in metadata["notes"] and metadata["notes"] in (run_copy / "log.txt").read_text()
    assert metadata["notes"] in (tmp_path / "zoo" / "mine" / "README.md").read_text()
    trained, taken = LazyConfig.load(run_copy / "config.yaml"), get_config("mine", zoo=tmp_path / "zoo")
    assert all(taken[name] == trained[name] for name in ("pretext", "task", "solver", "bilevel", "finetune"))
    assert taken.train.publish.zoo is None and taken.train.output_dir != trained.train.output_dir


def test_publishing_again_makes_a_version_and_the_weights_are_the_same(run_copy, tmp_path):
    first, second = (publish_run(run_copy, name="mine", zoo=Zoo(tmp_path / "zoo")) for _ in range(2))
    assert (first.name, second.name) == ("mine", "mine@2") and first.sha256 == second.sha256


def test_the_samples_of_every_data_set_are_counted_and_their_list_has_a_digest(finished, scenes):
    metadata = read_metadata(finished)["datasets"]
    assert {role: found["samples"] for role, found in metadata.items()} == {"pretext": 24, "train": 16, "test": 8}
    devkit = next(scenes.glob("*/VOCdevkit/VOC2007"))
    ids = (devkit / "ImageSets" / "Main" / "test.txt").read_text().split()
    names = sorted(os.path.relpath(devkit / "JPEGImages" / f"{image_id}.jpg", scenes) for image_id in ids)
    assert metadata["test"]["sample_list_sha256"] == hashlib.sha256("\n".join(names).encode()).hexdigest()


@pytest.mark.parametrize(
    ("name", "backbone", "right"),
    [
        ("resnet18.mine", "test_resnet", "train.publish.name=test_resnet.mine"),
        ("resnet18", "resnet50", "train.publish.name=resnet50,"),
    ],
)
def test_an_entry_that_is_named_after_another_network_is_refused(tiny_config, name, backbone, right):
    cfg = tiny_config(train__publish__name=name, backbone__name=backbone)
    with pytest.raises(ConfigError, match=f"no resnet18 but {backbone}. Set {right}"):
        check_config(cfg, "test")
    cfg.train.stages = ["finetune"]  # publishes nothing
    check_config(cfg, "test")
    for accepted in (right.split("=")[1].strip(","), "cells.resnet18", "mine", None):
        cfg = tiny_config(backbone__name=backbone)
        cfg.train.publish.name = accepted
        check_config(cfg, "test")


def test_a_run_that_only_fine_tunes_publishes_nothing(finished, tiny_config, at_scenes, tmp_path):
    settings = dict(train__stages="[finetune]", train__output_dir=tmp_path / "tuned", train__init=finished)
    assert run(tiny_config(**settings), "test")["entry"] is None
    with pytest.raises(CheckpointError, match="holds no checkpoint of a stage that leaves a backbone"):
        publish_run(tmp_path / "tuned", name="mine", zoo=Zoo(tmp_path / "zoo"))


def test_what_is_no_finished_run_is_refused_with_what_to_do(run_copy, tmp_path):
    with pytest.raises(CheckpointError, match="no config.yaml"):
        publish_run(tmp_path)
    shutil.rmtree(run_copy / "checkpoints" / "bissl" / "step_000002")
    with pytest.raises(CheckpointError, match=r"unfinished stage \(step 1 of 2\); --resume it first"):
        publish_run(run_copy, zoo=Zoo(tmp_path / "zoo"))
    assert not (tmp_path / "zoo").exists()


def test_the_lineage_reaches_the_root(run_copy, tiny_config, at_scenes, tmp_path, monkeypatch):
    zoo = Zoo(tmp_path / "zoo")
    monkeypatch.setenv("BISSL_ZOO", str(tmp_path / "zoo"))
    names = []
    init = f"{run_copy}"
    for generation in range(2):
        folder = tmp_path / f"run{generation}"
        settings = dict(train__output_dir=folder, train__stages="[bissl]", train__init=init)
        settings |= dict(train__publish__name=f"generation{generation}", train__publish__zoo=tmp_path / "zoo")
        names.append(run(tiny_config(**settings), "test")["entry"])
        init = f"zoo:generation{generation}"
    lineage = get_entry("generation1", zoo=zoo)["lineage"]
    assert [parent["name"] for parent in lineage["parents"]] == ["generation0@1", "run (bissl)"]
    assert lineage["parent"] == names[0].sha256
    card = (Path(names[1].location) / "README.md").read_text()
    started = [line.replace("\\", "").lstrip("- ") for line in card.splitlines() if "tarted from" in line]
    assert started[0].startswith("Started from generation0@1, licence")
    assert started[1].startswith("That started from run (bissl)")


@pytest.mark.parametrize(
    "receipt",
    [
        b"\xff",
        b"[" * 100_000,
        b'{"name": "a"}',
        b'{"name": 1, "location": "b", "sha256": "c"}',
        b'{"name": "a", "location": "b", "sha256": "c", "more": "d"}',
    ],
)
def test_a_receipt_that_cannot_be_read_is_none(tmp_path, receipt):
    (tmp_path / "zoo_entry.json").write_bytes(receipt)
    assert published(tmp_path) is None


@pytest.mark.parametrize("content", [b"[1]", b'{"bissl": {"AP50": "high"}}', b"[" * 100_000])
def test_results_with_values_that_are_not_numbers_are_one_error(tmp_path, content):
    assert read_results(tmp_path) == {}
    (tmp_path / "results.json").write_bytes(b'{"bissl": {"AP50": NaN, "steps": 3}}')
    assert read_results(tmp_path)["bissl"]["steps"] == 3
    (tmp_path / "results.json").write_bytes(content)
    with pytest.raises(CheckpointError, match="results.json"):
        read_results(tmp_path)


@pytest.mark.parametrize(
    "change", [{"surprise": 1}, {"pretext": "other", "hardware": 3}, {"datasets": {"train": {}}}, {"ancestors": 3}]
)
def test_metadata_that_no_entry_can_have_publishes_nothing(run_copy, tmp_path, change):
    metadata = json.loads((run_copy / "metadata.json").read_text())
    (run_copy / "metadata.json").write_text(json.dumps(metadata | change))
    with pytest.raises(BisslZooError):
        publish_run(run_copy, name="mine", zoo=Zoo(tmp_path / "zoo"))
    assert not (tmp_path / "zoo").exists()


def test_a_published_config_does_not_show_the_users_folders():
    config = "train: {output_dir: /home/anna/mine, init: timm:resnet50.a1_in1k, seed: 0}\nsplits: [/data/x, test]\n"
    shown = yaml.safe_load(without_local_folders(config))
    assert shown["train"] == {"output_dir": "mine", "init": "timm:resnet50.a1_in1k", "seed": 0}
    assert shown["splits"] == ["x", "test"]
    relative = config.replace("/home/anna/", "").replace("/data/", "")
    assert without_local_folders(relative) == relative
