"""Hostile entries: any content of a file is one error; nothing is run, and nothing is written outside the cache."""

import io
import json
import pickle
import shutil
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from tiny_entries import edit_index, publish_tiny, replace_file

from bissl_zoo.errors import BisslZooError, ZooError
from bissl_zoo.zoo import commands, create_backbone, get_config, get_entry
from bissl_zoo.zoo.cache import Cache
from bissl_zoo.zoo.hub import Zoo

ESCAPES = "\x1b[2J\x1b]0;owned\x07\x9b31m\u202egnp.exe\r\x08"


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    root = tmp_path_factory.mktemp("published") / "zoo"
    metadata = {"pretext": "simclr", "metrics": {"top1": [0.5, 0.7]}, "seeds": [0, 1]}
    publish_tiny(root, config="train: {seed: 0}\n", **metadata)
    return root


@pytest.fixture
def folder(published, tmp_path):
    return Path(shutil.copytree(published, tmp_path / "zoo"))


@pytest.fixture
def zoo(folder, tmp_path):
    return Zoo(folder, cache=Cache(tmp_path / "cache"))


@pytest.fixture
def untouched(tmp_path, folder):
    """Return a check that nothing was written beside the zoo and the cache."""
    expected = {"zoo", "cache"}

    def check():
        assert {path.name for path in tmp_path.iterdir()} <= expected
        cache = tmp_path / "cache"
        known = {"blobs", "partial", "locks", "indexes"}
        assert not cache.exists() or {path.name for path in cache.iterdir()} <= known

    return check


class Bomb:
    """A pickle that creates a file when it is loaded."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return Path.touch, (Path(self.canary),)


def header(**tensors):
    content = json.dumps(tensors).encode()
    return len(content).to_bytes(8, "little") + content


def hostile_weights(canary):
    saved = io.BytesIO()
    torch.save({"a": Bomb(canary)}, saved)
    huge = {"dtype": "F32", "shape": [1 << 40, 1 << 20], "data_offsets": [0, 1 << 62]}
    small = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    return {
        "a pickle": pickle.dumps(Bomb(canary)),
        "a file of torch.save": saved.getvalue(),
        "a header of 2^60 bytes": (1 << 60).to_bytes(8, "little") + b"{}",
        "tensors beyond the end": header(a=huge) + b"\0" * 8,
        "overlapping tensors": header(a=small, b=small) + b"\0" * 4,
        "another tensor": header(a=small) + b"\0" * 4,
        "empty": b"",
    }


@pytest.mark.parametrize("kind", list(hostile_weights(Path("canary"))))
def test_hostile_weights_are_one_error_and_nothing_is_run(zoo, folder, tmp_path, untouched, kind):
    canary = tmp_path / "canary"
    replace_file(folder, "tiny", "model.safetensors", hostile_weights(canary)[kind])
    with pytest.raises(ZooError, match="not valid safetensors|no backbone of this architecture|tensors match"):
        create_backbone("tiny", zoo=zoo)
    assert not canary.exists()
    untouched()


MODEL_ARGS = {
    "a wrong type": {"in_chans": "three"},
    "too large for any machine": {"in_chans": 1 << 50},
    "a target": {"_target_": "os.system", "_args_": ["touch canary"]},
    "another backbone": {"name": "test_convnext"},
    "a checkpoint": {"checkpoint_path": "/etc/passwd"},
    "weights from a folder": {"pretrained": True, "pretrained_cfg": {"file": "canary.pth"}},
    "another shape": {"in_chans": 1},
    "an activation": {"act_layer": "os.system"},
    "a list": ["in_chans"],
}


@pytest.mark.parametrize("arguments", MODEL_ARGS.values(), ids=MODEL_ARGS)
def test_hostile_model_arguments_are_one_error_and_nothing_is_run(
    zoo, folder, tmp_path, untouched, monkeypatch, arguments
):
    torch.save({"a": Bomb(tmp_path / "canary")}, folder / "canary.pth")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    config = json.loads((folder / "tiny" / "config.json").read_text())
    replace_file(folder, "tiny", "config.json", json.dumps({**config, "model_args": arguments}).encode())
    with pytest.raises(BisslZooError):
        create_backbone("tiny", zoo=zoo)
    assert not (tmp_path / "canary").exists() and not (folder / "canary").exists()
    untouched()


@pytest.mark.parametrize("file", ["entry.json", "config.json", "train_config.yaml"])
def test_a_text_file_above_the_size_limit_is_refused(zoo, folder, file):
    replace_file(folder, "tiny", file, b" " * (5 << 20))
    use = {"entry.json": get_entry, "config.json": create_backbone, "train_config.yaml": get_config}[file]
    with pytest.raises(ZooError, match=f"{file} of zoo entry 'tiny' has 5,242,880 bytes; the limit is 4,194,304"):
        use("tiny", zoo=zoo)


@pytest.mark.parametrize("content", [b"[]", b"\x80\x04N.", b'{"format": 7}', b'{"format": 1, "versions": 3}'])
def test_invalid_metadata_are_one_error(zoo, folder, content):
    replace_file(folder, "tiny", "entry.json", content)
    if not content.startswith(b'{"format": 1'):
        with pytest.raises(ZooError, match=r"JSON|format 7; this bissl_zoo reads up to 1"):
            get_entry("tiny", zoo=zoo)
    # the error for an unknown architecture reads the version of timm
    edit_index(folder, lambda index: index["entries"]["tiny"].update(architecture="resnet_of_2040"))
    with pytest.raises(ZooError):
        create_backbone("tiny", zoo=zoo)


CONFIGS = {
    "a call": "train: {_target_: os.system, command: touch CANARY}\n",
    "a call through a module": "train: {_target_: bissl_zoo.data.datasets.catalog.os.system, command: touch CANARY}\n",
    "a call below a list": "a: [{b: {_target_: builtins.exec, _args_: ['1']}}]\n",
    "a call made of text": "a: '${oc.decode:\"{_target_: os.system, command: touch CANARY}\"}'\n",
    "a call created": "a: '${oc.create:{_target_: os.system}}'\n",
    "a call by a nested name": "a: '${${b}:x}'\nb: oc.decode\n",
    "a call that is no text": "a: {_target_: [os.system]}\n",
    "a tag of Python": "train: !!python/object/apply:os.system ['touch CANARY']\n",
    "an interpolation": "train: {seed: '${oc.env:HOME}', more: '${touch:CANARY}'}\n",
    "anchors that multiply": "a: &a [x,x,x,x,x,x,x,x,x]\n"
    + "".join(f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)),
    "deeply nested": "train: " + "[" * 5000 + "]" * 5000 + "\n",
    "no mapping": "- 1\n",
    "no YAML": "a: [\n",
    "another encoding": "a: ü\n".encode("latin-1"),
    "control characters": "a: \x1b[2J\n",
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_hostile_train_config_is_data_or_one_error(zoo, folder, tmp_path, untouched, kind):
    text = CONFIGS[kind]
    text = text if isinstance(text, bytes) else text.replace("CANARY", str(tmp_path / "canary")).encode()
    replace_file(folder, "tiny", "train_config.yaml", text)
    try:
        cfg = get_config("tiny", zoo=zoo)
    except BisslZooError as error:
        assert "\x1b" not in str(error)
    else:
        assert text.startswith(b"a: ") and not cfg  # a section that no run reads
    assert not (tmp_path / "canary").exists()
    untouched()


def test_text_of_a_zoo_is_escaped_for_the_terminal(zoo, folder, capsys):
    metadata = json.loads((folder / "tiny" / "entry.json").read_text()) | {"notes": ESCAPES, ESCAPES: 1}
    replace_file(folder, "tiny", "entry.json", json.dumps(metadata, ensure_ascii=False).encode())
    replace_file(folder, "tiny", "README.md", f"# Card\n\n\tindented {ESCAPES}\n".encode() + b"\xff")
    hostile = {"pretext": ESCAPES, "solver": ESCAPES, "metrics": {ESCAPES: {"mean": 0.5}}}
    edit_index(folder, lambda index: index["entries"]["tiny"].update(hostile))
    arguments = dict(filter="*", pretext=None, task=None, architecture=None, metric=None, name="tiny")
    for command, as_json in (("list", False), ("list", True), ("show", False), ("card", False)):
        commands.COMMANDS[command](Namespace(**arguments, json=as_json), zoo)
        out = capsys.readouterr().out
        assert not [c for c in out if c not in "\n\t" and not c.isprintable()], command
        assert "owned" in out and (not as_json or json.loads(out)["tiny"]["pretext"] == ESCAPES)
    assert "\tindented \\u001b[2J" in out and "\ufffd" in out
