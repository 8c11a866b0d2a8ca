"""Hostile entries: any content of a file is one error; nothing is run, and nothing is written outside the cache."""

import io
import json
import pickle
import shutil
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from tiny_entries import publish_tiny

from bissl_zoo.errors import BisslZooError, ZooError, printable
from bissl_zoo.files import sha256_of
from bissl_zoo.zoo import commands, create_backbone, get_config, get_entry, list_backbones
from bissl_zoo.zoo.cache import Cache
from bissl_zoo.zoo.hub import Zoo
from bissl_zoo.zoo.index import MAX_INDEX_BYTES

SHA256 = "0" * 64
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


def edit_index(folder, edit):
    content = json.loads((folder / "index.json").read_text())
    edit(content)
    (folder / "index.json").write_text(json.dumps(content))


def replace_file(folder, file, content):
    """Replace a file of `tiny` and its digest in the index."""
    path = folder / "tiny" / file
    path.write_bytes(content)
    record = {"sha256": sha256_of(path), "size": len(content)}
    edit_index(folder, lambda index: index["entries"]["tiny"]["files"].update({file: record}))


def uses(zoo):
    """Return every function that reads a zoo, by name."""
    arguments = dict(filter="*", pretext=None, task=None, architecture=None, metric=None, json=False, name="tiny")
    return {
        "list_backbones": lambda: list_backbones(metric="*", zoo=zoo),
        "create_backbone": lambda: create_backbone("tiny", zoo=zoo),
        "get_entry": lambda: get_entry("tiny", zoo=zoo),
        "get_config": lambda: get_config("tiny", zoo=zoo),
        "list": lambda: commands.list_entries(Namespace(**arguments), zoo),
        "list --json": lambda: commands.list_entries(Namespace(**{**arguments, "json": True}), zoo),
        "show": lambda: commands.show(Namespace(**arguments), zoo),
        "card": lambda: commands.card(Namespace(**arguments), zoo),
        "fetch": lambda: commands.fetch(Namespace(**arguments, to=None), zoo),
    }


def test_an_index_above_the_size_limit_is_not_read(zoo, folder):
    with open(folder / "index.json", "r+b") as stream:
        stream.truncate(100 << 20)
    with pytest.raises(ZooError, match=f"limit of {MAX_INDEX_BYTES:,} bytes"):
        list_backbones(zoo=zoo)


def test_a_size_of_ten_gigabytes_reserves_no_space(zoo, folder, tmp_path):
    record = {"sha256": SHA256, "size": 10 << 30}
    edit_index(folder, lambda index: index["entries"]["tiny"]["files"].update({"model.safetensors": record}))
    with pytest.raises(ZooError):
        create_backbone("tiny", zoo=zoo)
    taken = sum(path.stat().st_blocks * 512 for path in tmp_path.rglob("*") if path.is_file())
    assert taken < 8 << 20


def test_a_link_in_an_entry_that_leads_out_is_not_followed(zoo, folder, tmp_path):
    secret = tmp_path / "cache-secret"
    secret.write_text('{"format": 1}')
    (folder / "tiny" / "entry.json").unlink()
    (folder / "tiny" / "entry.json").symlink_to(secret)
    record = {"sha256": sha256_of(secret), "size": secret.stat().st_size}
    edit_index(folder, lambda index: index["entries"]["tiny"]["files"].update({"entry.json": record}))
    with pytest.raises(ZooError, match="leads out of the zoo"):
        get_entry("tiny", zoo=zoo)
    (folder / "index.json").unlink()
    (folder / "index.json").symlink_to(secret)
    with pytest.raises(ZooError, match="leads out of the zoo"):
        list_backbones(zoo=zoo)


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
        "a header that is cut short": header(a=small)[:20],
        "a header that is no JSON": (4).to_bytes(8, "little") + b"\x80\x04N.",
        "tensors beyond the end": header(a=huge) + b"\0" * 8,
        "a shape that is not its bytes": header(a={**small, "shape": [1 << 40]}) + b"\0" * 4,
        "a negative offset": header(a={**small, "data_offsets": [-4, 0]}) + b"\0" * 4,
        "a dtype that is not known": header(a={**small, "dtype": "F1"}) + b"\0" * 4,
        "overlapping tensors": header(a=small, b=small) + b"\0" * 4,
        "no tensors": header(),
        "another tensor": header(a=small) + b"\0" * 4,
        "empty": b"",
    }


@pytest.mark.parametrize("kind", list(hostile_weights(Path("canary"))))
def test_hostile_weights_are_one_error_and_nothing_is_run(zoo, folder, tmp_path, untouched, kind):
    canary = tmp_path / "canary"
    replace_file(folder, "model.safetensors", hostile_weights(canary)[kind])
    with pytest.raises(ZooError, match="not valid safetensors|do not fit"):
        create_backbone("tiny", zoo=zoo)
    assert not canary.exists()
    untouched()


MODEL_ARGS = {
    "unknown": {"no_such_argument": 1},
    "a wrong type": {"in_chans": "three"},
    "a class": {"__class__": "os.system"},
    "a target": {"_target_": "os.system", "_args_": ["touch canary"]},
    "another backbone": {"name": "test_convnext"},
    "another architecture": {"architecture": "resnet18"},
    "a checkpoint": {"checkpoint_path": "/etc/passwd"},
    "weights from elsewhere": {"pretrained": True},
    "weights from a folder": {"pretrained": True, "pretrained_cfg": {"file": "canary.pth"}},
    "negative": {"in_chans": -1},
    "another shape": {"in_chans": 1},
    "an activation": {"act_layer": "os.system"},
    "stages": {"out_features": [[]]},
    "a list": ["in_chans"],
    "text": "in_chans",
    "null": None,
    "nested": {"block_args": {"a": {"b": []}}},
}


@pytest.mark.parametrize("arguments", MODEL_ARGS.values(), ids=MODEL_ARGS)
def test_hostile_model_arguments_are_one_error_and_nothing_is_run(
    zoo, folder, tmp_path, untouched, monkeypatch, arguments
):
    torch.save({"a": Bomb(tmp_path / "canary")}, folder / "canary.pth")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    config = json.loads((folder / "tiny" / "config.json").read_text())
    replace_file(folder, "config.json", json.dumps({**config, "model_args": arguments}).encode())
    with pytest.raises(BisslZooError):
        create_backbone("tiny", zoo=zoo)
    assert not (tmp_path / "canary").exists() and not (folder / "canary").exists()
    untouched()


def test_a_model_too_large_for_any_machine_is_one_error(zoo, folder):
    config = json.loads((folder / "tiny" / "config.json").read_text())
    replace_file(folder, "config.json", json.dumps({**config, "model_args": {"in_chans": 1 << 50}}).encode())
    with pytest.raises(BisslZooError):
        create_backbone("tiny", zoo=zoo)


@pytest.mark.parametrize("file", ["entry.json", "config.json", "train_config.yaml"])
def test_a_text_file_above_the_size_limit_is_refused(zoo, folder, file):
    (folder / "tiny" / file).write_bytes(b" " * (5 << 20))
    replace_file(folder, file, (folder / "tiny" / file).read_bytes())
    use = {"entry.json": get_entry, "config.json": create_backbone, "train_config.yaml": get_config}[file]
    with pytest.raises(ZooError, match=f"{file} of zoo entry 'tiny' has 5,242,880 bytes; the limit is 4,194,304"):
        use("tiny", zoo=zoo)


NOT_OBJECTS = [b"[]", b"{", b"\x80\x04N.", b"[" * 100_000]


@pytest.mark.parametrize("content", NOT_OBJECTS)
def test_a_config_json_that_is_not_an_object_is_one_error(zoo, folder, content):
    replace_file(folder, "config.json", content)
    with pytest.raises(ZooError, match="JSON"):
        create_backbone("tiny", zoo=zoo)


@pytest.mark.parametrize("content", [*NOT_OBJECTS, b'{"format": 7}', b'{"format": 1}', b'{"format": 1, "versions": 3}'])
def test_invalid_metadata_are_one_error(zoo, folder, content):
    replace_file(folder, "entry.json", content)
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
    replace_file(folder, "train_config.yaml", text)
    try:
        cfg = get_config("tiny", zoo=zoo)
    except BisslZooError as error:
        assert "\x1b" not in str(error)
    else:
        assert text.startswith("a: ") and not cfg  # a section that no run reads
    assert not (tmp_path / "canary").exists()
    untouched()


def test_text_of_a_zoo_is_escaped_for_the_terminal(zoo, folder, capsys):
    metadata = json.loads((folder / "tiny" / "entry.json").read_text()) | {"notes": ESCAPES, ESCAPES: 1}
    replace_file(folder, "entry.json", json.dumps(metadata, ensure_ascii=False).encode())
    replace_file(folder, "README.md", f"# Card\n\n\tindented {ESCAPES}\n".encode())
    hostile = {"pretext": ESCAPES, "solver": ESCAPES, "metrics": {ESCAPES: {"mean": 0.5}}}
    edit_index(folder, lambda index: index["entries"]["tiny"].update(hostile))
    for name, use in uses(zoo).items():
        if name in ("list", "list --json", "show", "card"):
            use()
            out = capsys.readouterr().out
            assert not [c for c in out if c not in "\n\t" and not c.isprintable()], name
            assert "owned" in out
            if name == "list --json":
                assert json.loads(out)["tiny"]["pretext"] == ESCAPES
            if name == "card":
                assert "\tindented \\u001b[2J" in out
    edit_index(folder, lambda index: index["entries"]["tiny"].update(architecture=ESCAPES))
    with pytest.raises(ZooError) as caught:
        create_backbone("tiny", zoo=zoo)
    assert not set(printable(str(caught.value))) & set("\x1b\x9b\x07\x08\r\u202e")


def test_a_card_that_is_not_utf8_is_printed_with_replacements(zoo, folder, capsys):
    replace_file(folder, "README.md", b"# Card \xff\xfe\n")
    uses(zoo)["card"]()
    assert "# Card \ufffd\ufffd" in capsys.readouterr().out


def test_an_entry_is_copied_into_its_own_folder_only(zoo, folder, tmp_path):
    target = tmp_path / "cache" / "copies"
    copied = zoo.find("tiny").copy_to(target)
    assert copied == target / "tiny" and {path.name for path in target.iterdir()} == {"tiny"}
    assert {path.name for path in copied.iterdir()} == set(zoo.find("tiny").record["files"])
    assert not any(path.is_symlink() for path in copied.iterdir())
