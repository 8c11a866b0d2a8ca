"""Zoos side by side: who is meant by a name, on the web and in folders, with a network and without."""

import os
import shutil
import threading
from pathlib import Path

import pytest
import torch
from tiny_entries import publish_tiny

from bissl_zoo.engine.init import load_init, zoo_of
from bissl_zoo.errors import ZooError
from bissl_zoo.zoo import create_backbone, default_zoo, get_config, get_entry, list_backbones
from bissl_zoo.zoo.hub import Zoo
from bissl_zoo.zoo.serve import ZooServer


def publish(zoo, name, seed, **metadata):
    publish_tiny(zoo, name, seed, config=f"train: {{seed: {seed}}}\n", **metadata)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Two zoos that both have `both`: the first in one version, the second in two."""
    root = tmp_path_factory.mktemp("zoos")
    publish(root / "first", "both", 1, pretext="simclr", task="detection", metrics={"AP50 (bissl)": 0.4}, seeds=[1])
    publish(root / "first", "mine", 2, pretext="byol")
    publish(root / "second", "both", 3)
    publish(root / "second", "both", 4)
    publish(root / "second", "theirs", 5, pretext="simclr", task="segmentation", metrics={"mIoU": 0.4}, seeds=[5])
    return root


@pytest.fixture
def zoos(published, tmp_path):
    """The folders `first` and `second`, to be changed as a test likes."""
    return Path(shutil.copytree(published, tmp_path / "zoos"))


@pytest.fixture
def web(zoos, monkeypatch, tmp_path):
    """A server of the folder `second`, with an empty cache on this side."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("BISSL_ZOO_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("BISSL_ZOO_OFFLINE", raising=False)
    with ZooServer(zoos / "second", port=0) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server
        server.shutdown()


def seed_of(name, zoo=None):
    return get_config(name, zoo=zoo).train.seed


def test_a_name_means_all_versions_of_the_first_zoo_that_has_it(zoos):
    both = Zoo(zoos / "first", zoos / "second")
    assert list_backbones(zoo=both) == ["both", "mine", "theirs"]
    assert [seed_of(name, both) for name in ("both", "both@1", "mine", "theirs")] == [1, 1, 2, 5]
    with pytest.raises(ZooError, match=r"Unknown zoo entry 'both@2' in .*first, .*second\. Did you mean 'both'"):
        both.find("both@2")
    turned = Zoo(zoos / "second", zoos / "first")
    assert list_backbones(zoo=turned) == ["both", "both@2", "mine", "theirs"]
    assert [seed_of(name, turned) for name in ("both", "both@1", "both@2", "mine")] == [4, 3, 4, 2]
    assert {entry.location for entry in turned.versions("both")} == {
        str(zoos / "second" / "both"),
        str(zoos / "second" / "both@2"),
    }


def test_the_environment_may_name_several_with_commas(zoos, monkeypatch):
    monkeypatch.setenv("BISSL_ZOO", f" {zoos / 'first'} ,{zoos / 'second'},, ")
    assert str(default_zoo()) == f"{zoos / 'first'}, {zoos / 'second'}"
    assert list_backbones() == ["both", "mine", "theirs"] and seed_of("theirs") == 5
    assert publish_entry_here().location == str(zoos / "first" / "both@2")
    assert get_entry("both")["name"] == "both@2"


def publish_entry_here():
    publish(None, "both", 7)
    return Zoo(*os.environ["BISSL_ZOO"].replace(" ", "").strip(",").split(",")).find("both")


def test_a_folder_and_the_web_together(zoos, web, monkeypatch):
    monkeypatch.setenv("BISSL_ZOO", f"{zoos / 'first'},{web.address}")
    assert list_backbones() == ["both", "mine", "theirs"]
    assert seed_of("both") == 1 and seed_of("theirs") == 5
    found = create_backbone("theirs").state_dict()
    expected = create_backbone("theirs", zoo=zoos / "second").state_dict()
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    assert default_zoo().find("theirs").location == f"{web.address}/theirs"


def test_without_a_network_what_was_read_before_is_there_and_the_rest_says_so(zoos, web, monkeypatch):
    monkeypatch.setenv("BISSL_ZOO", f"{zoos / 'first'},{web.address}")
    create_backbone("theirs")
    seed_of("theirs")
    web.shutdown()
    web.server_close()
    monkeypatch.setenv("BISSL_ZOO_OFFLINE", "1")
    assert list_backbones() == ["both", "mine", "theirs"] and seed_of("theirs") == 5
    assert create_backbone("theirs").name == "test_resnet" and create_backbone("mine").name == "test_resnet"
    with pytest.raises(ZooError, match="theirs/entry.json is not in the cache .*BISSL_ZOO_OFFLINE forbids fetching"):
        get_entry("theirs")
    monkeypatch.setenv("BISSL_ZOO", f"{zoos / 'first'},http://127.0.0.1:9/never")
    with pytest.raises(ZooError, match="has never been read on this machine"):
        list_backbones()
    monkeypatch.setenv("BISSL_ZOO_OFFLINE", "perhaps")
    with pytest.raises(ZooError, match="Set it to 1"):
        list_backbones()


def test_a_run_starts_from_an_entry_of_any_zoo_that_its_config_names(zoos, web, tiny_config):
    cfg = tiny_config(train__zoo=f"['{zoos / 'first'}','{web.address}']")
    assert str(zoo_of(cfg)) == f"{zoos / 'first'}, {web.address}"
    for name, place in (("theirs", "second"), ("both", "first")):
        weights, ancestors = load_init(f"zoo:{name}", cfg)
        expected = create_backbone(name, zoo=zoos / place).state_dict()
        assert ancestors[0]["name"] == f"{name}@1"
        assert ancestors[0]["sha256"] == Zoo(zoos / place).find(name).record["files"]["model.safetensors"]["sha256"]
        found = {**weights.backbone, **(weights.tail or {})}
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], value) for key, value in expected.items())
    with pytest.raises(ZooError, match="Unknown zoo entry 'nothing'"):
        load_init("zoo:nothing", cfg)
    assert str(zoo_of(tiny_config(train__zoo=zoos / "first"))) == str(zoos / "first")  # one needs no brackets


@pytest.mark.parametrize(
    ("wanted", "names"),
    [
        ({}, ["both", "both@2", "mine", "theirs"]),
        ({"filter": "both*"}, ["both", "both@2"]),
        ({"filter": "*@2"}, ["both@2"]),
        ({"pretext": "simclr"}, ["theirs"]),
        ({"pretext": "b?ol"}, ["mine"]),
        ({"task": "seg*"}, ["theirs"]),
        ({"task": "detection"}, []),
        ({"architecture": "test_*"}, ["both", "both@2", "mine", "theirs"]),
        ({"architecture": "resnet*"}, []),
        ({"metric": "mIoU"}, ["theirs"]),
        ({"metric": "AP50*"}, []),
        ({"metric": "*"}, ["theirs"]),
        ({"filter": "t*", "pretext": "simclr", "task": "*", "metric": "m*"}, ["theirs"]),
        ({"filter": "m*", "pretext": "simclr"}, []),
    ],
)
def test_filters_look_at_what_each_name_means_here(published, wanted, names):
    assert list_backbones(**wanted, zoo=Zoo(published / "second", published / "first")) == names


def test_what_an_entry_does_not_state_is_not_called_none(published):
    zoo = Zoo(published / "second")
    assert list_backbones(task="?*", zoo=zoo) == ["theirs"]
    assert list_backbones(pretext="None", zoo=zoo) == list_backbones(task="[Nn]*", zoo=zoo) == []
