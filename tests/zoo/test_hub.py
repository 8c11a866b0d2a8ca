import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from tiny_entries import publish_tiny

from bissl_zoo.errors import ZooError
from bissl_zoo.zoo import create_backbone, default_zoo, get_entry, list_backbones, load_entry_weights
from bissl_zoo.zoo.hub import Zoo
from bissl_zoo.zoo.names import sha256_of

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A zoo with `tiny`, `tiny@2` and `other`, never written to by a test."""
    root = tmp_path_factory.mktemp("zoo")
    for seed, name in enumerate(["tiny", "tiny", "other"]):
        head = {"weight": torch.full((2,), float(seed))}
        facts = {"pretext": "simclr", "metrics": {"top1": [0.5, 0.7]}, "seeds": [0, 1]}
        publish_tiny(root, name, seed, pretext_head=head, **facts)
    return root


@pytest.fixture
def zoo(published, tmp_path):
    """A copy that a test may damage."""
    return Path(shutil.copytree(published, tmp_path / "zoo"))


def edit_index(zoo, edit):
    content = json.loads((zoo / "index.json").read_text())
    edit(content)
    (zoo / "index.json").write_text(json.dumps(content))


def test_listing_filters_by_pattern_and_sorts_versions_as_numbers(zoo):
    edit_index(zoo, lambda index: index["entries"].update({"tiny@10": index["entries"]["tiny"]}))
    assert list_backbones(zoo=zoo) == ["other", "tiny", "tiny@2", "tiny@10"]
    assert list_backbones("*t*r", zoo=zoo) == ["other"]


def test_an_empty_or_absent_zoo_lists_nothing(tmp_path):
    assert list_backbones(zoo=tmp_path) == []
    assert list_backbones(zoo=tmp_path / "absent") == []
    with pytest.raises(ZooError, match="It holds no entries"):
        get_entry("tiny", zoo=tmp_path / "absent")


def test_folders_outside_the_index_are_not_listed(zoo):
    shutil.copytree(zoo / "tiny", zoo / ".publishing-1-ab")
    shutil.copytree(zoo / "tiny", zoo / "half")
    assert list_backbones(zoo=zoo) == ["other", "tiny", "tiny@2"]
    with pytest.raises(ZooError, match="Unknown zoo entry 'half'"):
        create_backbone("half", zoo=zoo)


def test_a_curated_entry_is_listed_below_what_was_published(zoo):
    index = json.loads((zoo / "index.json").read_text())["entries"]
    curated = {"format": 1, "entries": {"curated": index["other"], "tiny": {**index["tiny"], "architecture": "old"}}}
    (zoo / "curated.json").write_text(json.dumps(curated))
    assert list_backbones(zoo=zoo) == ["curated", "other", "tiny", "tiny@2"]
    assert Zoo(zoo).find("tiny@1").record["architecture"] == "test_resnet"
    with pytest.raises(ZooError, match="in the zoo's index but not on disk"):
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
    newest = create_backbone("tiny", zoo=published).state_dict()
    assert not torch.equal(newest["layer1.0.conv1.weight"], stored["layer1.0.conv1.weight"])


def test_not_pretrained_gives_the_architecture_with_other_weights(published):
    torch.manual_seed(9)
    backbone = create_backbone("tiny", pretrained=False, zoo=published)
    stored = load_entry_weights("tiny", zoo=published)
    assert backbone.name == "test_resnet"
    assert not torch.equal(backbone.state_dict()["layer1.0.conv1.weight"], stored["layer1.0.conv1.weight"])


def test_not_pretrained_takes_a_timm_architecture_and_pretrained_says_so(published):
    assert create_backbone("test_convnext", pretrained=False, zoo=published).name == "test_convnext"
    with pytest.raises(ZooError, match="pretrained=False builds it with random weights"):
        create_backbone("test_convnext", zoo=published)


def test_an_unknown_name_names_the_nearest_and_what_there_is(published):
    with pytest.raises(ZooError, match=r"Did you mean 'other'\? It holds: other, tiny, tiny@2\."):
        create_backbone("othr", zoo=published)


@pytest.mark.parametrize(
    "name", ["../tiny", "a/b", "a\\b", ".hidden", "", "/tiny", "tiny@0", "tiny@", "ti\nny", "x" * 101]
)
def test_names_that_could_leave_the_zoo_are_refused(published, name):
    for use in (create_backbone, get_entry, load_entry_weights, lambda name, zoo: Zoo(zoo).find(name)):
        with pytest.raises(ZooError, match="is not a name for a zoo entry"):
            use(name, zoo=published)


def test_a_changed_byte_is_refused_with_both_digests(zoo):
    path = zoo / "tiny@2" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    expected = sha256_of(path)
    path.write_bytes(content)
    with pytest.raises(ZooError) as caught:
        create_backbone("tiny", zoo=zoo)
    for part in (str(path), expected, sha256_of(path), "Copy the entry again"):
        assert part in str(caught.value)


def test_a_truncated_file_is_refused_with_both_sizes(zoo):
    path = zoo / "tiny@2" / "model.safetensors"
    size = path.stat().st_size
    os.truncate(path, size - 100)
    with pytest.raises(ZooError, match=f"expected {size} bytes, found {size - 100}"):
        create_backbone("tiny", zoo=zoo)


@pytest.mark.parametrize("file", ["entry.json", "config.json"])
def test_the_json_files_of_an_entry_are_checked_too(zoo, file):
    path = zoo / "tiny@2" / file
    path.write_bytes(path.read_bytes().replace(b"test_resnet", b"test_resnex"))
    with pytest.raises(ZooError, match=f"{file} is not what was published: expected sha256"):
        get_entry("tiny", zoo=zoo) if file == "entry.json" else create_backbone("tiny", zoo=zoo)


def test_a_file_that_the_entry_does_not_have_is_told_with_those_it_has(published):
    with pytest.raises(ZooError, match=r"has no file 'task_head\.safetensors'\. It has: README\.md, config\.json"):
        load_entry_weights("tiny", "task_head.safetensors", zoo=published)


def register_bytes(zoo, content):
    """Make the index vouch for other bytes, as a careless or hostile publisher would."""
    path = zoo / "tiny@2" / "model.safetensors"
    path.write_bytes(content)
    facts = {"sha256": sha256_of(path), "size": len(content)}
    edit_index(zoo, lambda index: index["entries"]["tiny@2"]["files"].update({"model.safetensors": facts}))


def test_what_is_no_safetensors_is_refused_even_if_the_index_vouches_for_it(zoo):
    real = (zoo / "tiny" / "model.safetensors").read_bytes()
    torch.save({"a": torch.zeros(1)}, zoo / "pickle")
    for content in ((zoo / "pickle").read_bytes(), b"", real[:-100], (1 << 60).to_bytes(8, "little") + real[8:]):
        register_bytes(zoo, content)
        with pytest.raises(ZooError, match="cannot be read as safetensors"):
            create_backbone("tiny", zoo=zoo)


def test_weights_of_another_architecture_are_refused_with_counts(zoo):
    edit_index(zoo, lambda index: index["entries"]["tiny@2"].update(architecture="test_convnext"))
    with pytest.raises(ZooError, match=r"0 of \d+ tensors match; \d+ missing: stem.*; \d+ unexpected: bn1"):
        create_backbone("tiny", zoo=zoo)


def test_an_architecture_that_this_timm_lacks_is_told_with_the_version_to_install(zoo):
    edit_index(zoo, lambda index: index["entries"]["tiny@2"].update(architecture="resnet_of_2040"))
    with pytest.raises(ZooError, match=f"'resnet_of_2040', which timm.*published with timm {timm.__version__}"):
        create_backbone("tiny", zoo=zoo)


def set_files(files):
    return lambda index: index["entries"]["tiny"].update(files=files)


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        (lambda index: index.update(format=2), "format 2; this bissl_zoo reads up to 1. Upgrade"),
        (lambda index: index.pop("format"), "format None, where 1 was expected"),
        (lambda index: index.pop("entries"), "'entries' is missing"),
        (lambda index: index["entries"].update({"../x": index["entries"]["tiny"]}), "'../x' is not a name"),
        (lambda index: index["entries"].update(tiny=3), "the record of 'tiny' has no 'architecture'"),
        (set_files(None), "has no 'files'"),
        (set_files({"../../x": {"sha256": "0" * 64, "size": 1}}), "'../../x', which is not a plain file name"),
        (set_files({"model.safetensors": {"sha256": "0", "size": 1}}), "no usable sha256 and size"),
        (set_files({"model.safetensors": {"sha256": "0" * 64, "size": "1"}}), "no usable sha256 and size"),
    ],
)
def test_an_index_that_cannot_be_trusted_is_refused(zoo, edit, told):
    edit_index(zoo, edit)
    with pytest.raises(ZooError) as caught:
        list_backbones(zoo=zoo)
    assert str(caught.value).startswith(str(zoo / "index.json")) and told in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"null"])
def test_an_index_that_is_no_json_object_is_refused(tmp_path, content):
    (tmp_path / "index.json").write_bytes(content)
    with pytest.raises(ZooError, match=r"index\.json .*Restore the file from a copy"):
        list_backbones(zoo=tmp_path)


def test_the_environment_chooses_the_zoo_and_an_argument_wins(published, tmp_path, monkeypatch):
    monkeypatch.setenv("BISSL_ZOO", str(published))
    assert list_backbones() == ["other", "tiny", "tiny@2"]
    assert list_backbones(zoo=tmp_path) == []
    monkeypatch.setenv("BISSL_ZOO", "htps://example.org/zoo")
    with pytest.raises(ZooError, match="Did you mean 'https'"):
        list_backbones()


def test_a_checkout_has_its_own_zoo_and_an_installation_the_users(tmp_path, monkeypatch):
    monkeypatch.delenv("BISSL_ZOO", raising=False)
    assert str(default_zoo()) == str(REPOSITORY / "model_zoo")

    shutil.copytree(
        REPOSITORY / "bissl_zoo", tmp_path / "site" / "bissl_zoo", ignore=shutil.ignore_patterns("__pycache__")
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "XDG_DATA_HOME": str(tmp_path / "data")}
    code = "from bissl_zoo.zoo import default_zoo; print(default_zoo())"
    command = [sys.executable, "-c", code]
    found = subprocess.run(command, env=environment, cwd=tmp_path, check=True, capture_output=True, text=True).stdout
    assert Path(found.strip()).name == "model_zoo"
    assert not Path(found.strip()).is_relative_to(REPOSITORY)
    if sys.platform == "linux":
        assert Path(found.strip()) == tmp_path / "data" / "bissl_zoo" / "model_zoo"
