import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from tiny_entries import edit_index, publish_tiny

from bissl_zoo.engine.init import load_init, zoo_of
from bissl_zoo.errors import ZooError
from bissl_zoo.files import sha256_of
from bissl_zoo.zoo import create_backbone, default_zoo, get_config, get_entry, list_backbones, load_entry_weights
from bissl_zoo.zoo.hub import Zoo

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A zoo with `tiny`, `tiny@2` and `other`; read-only."""
    root = tmp_path_factory.mktemp("zoo")
    for seed, name in enumerate(["tiny", "tiny", "other"]):
        head = {"weight": torch.full((2,), float(seed))}
        metadata = {"pretext": "simclr", "metrics": {"top1": [0.5, 0.7]}, "seeds": [0, 1]}
        publish_tiny(root, name, seed, pretext_head=head, **metadata)
    return root


@pytest.fixture
def zoo(published, tmp_path):
    """A writable copy."""
    return Path(shutil.copytree(published, tmp_path / "zoo"))


def test_listing_filters_by_pattern_and_sorts_versions_as_numbers(zoo):
    edit_index(zoo, lambda index: index["entries"].update({"tiny@10": index["entries"]["tiny"]}))
    assert list_backbones(zoo=zoo) == ["other", "tiny", "tiny@2", "tiny@10"]
    assert list_backbones("*t*r", zoo=zoo) == ["other"]
    assert list_backbones(["tiny*", "o*"], exclude_filters="*@*", zoo=zoo) == ["other", "tiny"]
    assert list_backbones("resnet1?t", pretrained=False, exclude_filters=["*0t"], zoo=zoo) == ["resnet14t"]


def test_an_empty_or_absent_zoo_lists_nothing(tmp_path):
    assert list_backbones(zoo=tmp_path) == []
    assert list_backbones(zoo=tmp_path / "absent") == []
    with pytest.raises(ZooError, match="It has no entries"):
        get_entry("tiny", zoo=tmp_path / "absent")


def test_a_curated_entry_is_listed_below_what_was_published(zoo):
    index = json.loads((zoo / "index.json").read_text())["entries"]
    curated = {"format": 1, "entries": {"curated": index["other"], "tiny": {**index["tiny"], "architecture": "old"}}}
    (zoo / "curated.json").write_text(json.dumps(curated))
    assert list_backbones(zoo=zoo) == ["curated", "other", "tiny", "tiny@2"]
    assert Zoo(zoo).find("tiny@1").record["architecture"] == "test_resnet"
    with pytest.raises(ZooError, match="not on disk"):
        create_backbone("curated", zoo=zoo)


def test_a_name_without_version_means_the_newest(published):
    def head(name):
        return load_entry_weights(name, "pretext_head.safetensors", zoo=published)["weight"][0].item()

    assert [head("tiny"), head("tiny@2"), head("tiny@1")] == [1, 1, 0]
    assert get_entry("tiny", zoo=published)["name"] == "tiny@2"
    assert Zoo(published).find("tiny").location == str(published / "tiny@2")
    with pytest.raises(ZooError, match="Unknown zoo entry 'tiny@3'"):
        get_entry("tiny@3", zoo=published)


def test_pretrained_loads_the_weights_in_eval_mode(published):
    backbone = create_backbone("tiny@1", zoo=published, out_features=["c3", "c2"])
    assert not backbone.training
    assert backbone.out_features == ("c3", "c2")
    stored = load_entry_weights("tiny@1", zoo=published)
    assert backbone.state_dict().keys() == stored.keys()
    assert all(torch.equal(value, stored[key]) for key, value in backbone.state_dict().items())
    for other in (create_backbone("tiny", zoo=published), create_backbone("tiny@1", pretrained=False, zoo=published)):
        assert other.name == "test_resnet"
        assert not torch.equal(other.state_dict()["layer1.0.conv1.weight"], stored["layer1.0.conv1.weight"])


def test_an_architecture_is_only_built_without_pretrained_weights(published):
    assert create_backbone("test_convnext", pretrained=False, zoo=published).name == "test_convnext"
    with pytest.raises(ZooError, match="Use pretrained=False for random"):
        create_backbone("cspresnet50d", zoo=published)


def test_an_unknown_name_suggests_the_nearest_and_an_invalid_one_is_refused(published):
    with pytest.raises(ZooError, match=r"Did you mean 'other'\? It has: other, tiny, tiny@2\."):
        create_backbone("othr", zoo=published)
    for use in (create_backbone, get_entry, load_entry_weights):
        with pytest.raises(ZooError, match="is not a valid entry name"):
            use("../tiny", zoo=published)


def test_a_changed_byte_is_refused_with_both_digests(zoo):
    path = zoo / "tiny@2" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    expected = sha256_of(path)
    path.write_bytes(content)
    with pytest.raises(ZooError) as caught:
        create_backbone("tiny", zoo=zoo)
    for part in (str(path), expected, sha256_of(path), "copy it again"):
        assert part in str(caught.value)


def test_a_file_that_the_entry_lacks_is_an_error_with_those_it_has(published):
    with pytest.raises(ZooError, match=r"has no file 'task_head\.safetensors'\. It has: README\.md, config\.json"):
        load_entry_weights("tiny", "task_head.safetensors", zoo=published)


def test_weights_of_another_architecture_are_refused_with_counts(zoo):
    edit_index(zoo, lambda index: index["entries"]["tiny@2"].update(architecture="test_convnext"))
    with pytest.raises(ZooError, match=r"no backbone of this architecture.*It has \d+ tensors: bn1"):
        create_backbone("tiny", zoo=zoo)


def test_the_default_zoo_is_that_of_the_checkout_or_of_the_user(tmp_path, monkeypatch):
    monkeypatch.delenv("BISSL_ZOO", raising=False)
    assert str(default_zoo()) == str(REPOSITORY / "model_zoo")
    monkeypatch.setattr("bissl_zoo.zoo.hub.__file__", str(tmp_path / "site" / "bissl_zoo" / "zoo" / "hub.py"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    assert not Path(str(default_zoo())).is_relative_to(REPOSITORY)
    if sys.platform == "linux":
        assert str(default_zoo()) == str(tmp_path / "data" / "bissl_zoo" / "model_zoo")


def publish(zoo, name, seed, **metadata):
    publish_tiny(zoo, name, seed, config=f"train: {{seed: {seed}}}\n", **metadata)


@pytest.fixture(scope="module")
def two_zoos(tmp_path_factory):
    """Two zoos that both have `both`: the first in one version, the second in two."""
    root = tmp_path_factory.mktemp("zoos")
    publish(root / "first", "both", 1, pretext="simclr", task="detection", metrics={"AP50 (bissl)": 0.4}, seeds=[1])
    publish(root / "first", "mine", 2, pretext="byol")
    publish(root / "second", "both", 3)
    publish(root / "second", "both", 4)
    publish(root / "second", "theirs", 5, pretext="simclr", task="segmentation", metrics={"mIoU": 0.4}, seeds=[5])
    return root


@pytest.fixture
def zoos(two_zoos, tmp_path):
    """Writable copies of the folders `first` and `second`."""
    return Path(shutil.copytree(two_zoos, tmp_path / "zoos"))


def seed_of(name, zoo=None):
    return get_config(name, zoo=zoo).train.seed


def test_for_a_name_in_several_zoos_the_first_wins_with_all_versions(zoos):
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


def test_the_environment_may_name_several_zoos(zoos, monkeypatch):
    monkeypatch.setenv("BISSL_ZOO", f" {zoos / 'first'} ,{zoos / 'second'},, ")
    assert str(default_zoo()) == f"{zoos / 'first'}, {zoos / 'second'}"
    assert list_backbones() == ["both", "mine", "theirs"] and seed_of("theirs") == 5
    assert list_backbones(zoo=zoos / "second") == ["both", "both@2", "theirs"]  # an argument wins
    publish(None, "both", 7)
    assert default_zoo().find("both").location == str(zoos / "first" / "both@2")
    assert get_entry("both")["name"] == "both@2"


def test_a_run_starts_from_an_entry_of_any_zoo_in_its_config(zoos, tiny_config):
    cfg = tiny_config(train__zoo=f"['{zoos / 'first'}','{zoos / 'second'}']")
    assert str(zoo_of(cfg)) == f"{zoos / 'first'}, {zoos / 'second'}"
    for name, place in (("theirs", "second"), ("both", "first")):
        weights, parents = load_init(f"zoo:{name}", cfg)
        expected = create_backbone(name, zoo=zoos / place).state_dict()
        assert parents[0]["name"] == f"{name}@1"
        assert parents[0]["sha256"] == Zoo(zoos / place).find(name).record["files"]["model.safetensors"]["sha256"]
        state = {**weights.backbone, **(weights.tail or {})}
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[key], value) for key, value in expected.items())
    with pytest.raises(ZooError, match="Unknown zoo entry 'nothing'"):
        load_init("zoo:nothing", cfg)
    assert str(zoo_of(tiny_config(train__zoo=zoos / "first"))) == str(zoos / "first")  # one needs no brackets


@pytest.mark.parametrize(
    ("patterns", "names"),
    [
        ({}, ["both", "both@2", "mine", "theirs"]),
        ({"filter": "*@2"}, ["both@2"]),
        ({"pretext": "b?ol"}, ["mine"]),
        ({"pretext": "None"}, []),
        ({"task": "?*"}, ["theirs"]),
        ({"task": "detection"}, []),
        ({"architecture": "resnet*"}, []),
        ({"metric": "*"}, ["theirs"]),
        ({"filter": "m*", "pretext": "simclr"}, []),
    ],
)
def test_filters_use_the_first_entry_of_each_name(two_zoos, patterns, names):
    assert list_backbones(**patterns, zoo=Zoo(two_zoos / "second", two_zoos / "first")) == names
