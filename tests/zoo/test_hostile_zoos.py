"""Zoos that lie: whatever an index or a file holds, the outcome is one error, and nothing runs or leaves its folder."""

import io
import json
import pickle
import shutil
import threading
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from tiny_entries import publish_tiny

from bissl_zoo.errors import BisslZooError, ZooError
from bissl_zoo.progress.console import printable
from bissl_zoo.zoo import commands, create_backbone, get_config, get_entry, list_backbones
from bissl_zoo.zoo.cache import Cache
from bissl_zoo.zoo.hub import Zoo
from bissl_zoo.zoo.index import INDEX_LIMIT, Index, parse_index
from bissl_zoo.zoo.names import sha256_of
from bissl_zoo.zoo.page import render_page
from bissl_zoo.zoo.serve import ZooServer

SHA256 = "0" * 64
ESCAPES = "\x1b[2J\x1b]0;owned\x07\x9b31m\u202egnp.exe\r\x08"


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    root = tmp_path_factory.mktemp("published") / "zoo"
    facts = {"pretext": "simclr", "metrics": {"top1": [0.5, 0.7]}, "seeds": [0, 1]}
    publish_tiny(root, config="train: {seed: 0}\n", **facts)
    return root


@pytest.fixture
def folder(published, tmp_path):
    return Path(shutil.copytree(published, tmp_path / "zoo"))


@pytest.fixture(params=["folder", "http"])
def zoo(request, folder, tmp_path, monkeypatch):
    """The same zoo as a folder, and as what a web server offers, with a cache of its own."""
    cache = Cache(tmp_path / "cache", sleep=lambda seconds: None)
    if request.param == "folder":
        yield Zoo(folder, cache=cache)
        return
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with ZooServer(folder, port=0) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield Zoo(server.address, cache=cache)
        server.shutdown()


@pytest.fixture
def untouched(tmp_path, folder):
    """Call it at the end: nothing was written beside the zoo and the cache."""
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


def vouch(folder, file, content):
    """Replace a file of `tiny`, with the digest that makes it a published one."""
    path = folder / "tiny" / file
    path.write_bytes(content)
    facts = {"sha256": sha256_of(path), "size": len(content)}
    edit_index(folder, lambda index: index["entries"]["tiny"]["files"].update({file: facts}))


def uses(zoo):
    """Everything that reads a zoo, by what it is called."""
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


def outcomes(zoo):
    """What each use came to: an error, or None."""
    found = {}
    for name, use in uses(zoo).items():
        try:
            use()
            found[name] = None
        except BisslZooError as error:
            found[name] = error
    return found


def entry_of(**changes):
    return {"architecture": "test_resnet", "metrics": {}, "files": {}, **changes}


def index_of(records, **more):
    return json.dumps({"format": 1, "entries": records, **more}).encode()


def files_of(name, **changes):
    return {name: {"sha256": SHA256, "size": 1, **changes}}


BAD_INDEXES = {
    "no JSON": b"\x80\x04N.",
    "an array": b"[]",
    "of the future": b'{"format": 2, "entries": {}}',
    "format true": b'{"format": true, "entries": []}',
    "deeply nested": b'{"format": 1, "entries": ' + b'{"a":' * 100_000 + b"1" + b"}" * 100_001,
    "a huge integer": b'{"format": 1, "entries": {}, "x": ' + b"9" * 10_000 + b"}",
    "NaN": b'{"format": 1, "entries": {}, "x": NaN}',
    "an infinite number": b'{"format": 1, "entries": {}, "x": 1e999}',
    "half a surrogate pair": b'{"format": 1, "entries": {}, "x": "\\ud800"}',
    "another encoding": json.dumps({"format": 1, "entries": {}}).encode("utf-16"),
    "removed is text": index_of({}, removed="tiny"),
    "removed is an object": index_of({}, removed={"tiny": 1}),
    "removed holds numbers": index_of({}, removed=[1]),
    "removed holds paths": index_of({}, removed=["../../etc"]),
    "entries is a list": index_of([]),
    "name with folders": index_of({"../../tiny": entry_of()}),
    "absolute name": index_of({"/etc/passwd": entry_of()}),
    "a name without end": index_of({"x" * 5000: entry_of()}),
    "a format without end": b'{"format": "' + b"x" * 5000 + b'"}',
    "a metric without end": index_of({"tiny": entry_of(metrics={"x" * 5000: 1})}),
    "a file without end": index_of({"tiny": entry_of(files=files_of("x" * 5000))}),
    "hidden name": index_of({".lock": entry_of()}),
    "name of two lines": index_of({"tiny\nother": entry_of()}),
    "a record of text": index_of({"tiny": "x"}),
    "architecture is a number": index_of({"tiny": entry_of(architecture=5)}),
    "pretext is a list": index_of({"tiny": entry_of(pretext=["simclr"])}),
    "task is an object": index_of({"tiny": entry_of(task={})}),
    "created is a number": index_of({"tiny": entry_of(created=20260101)}),
    "metrics are a list": index_of({"tiny": entry_of(metrics=[1])}),
    "a metric is a number": index_of({"tiny": entry_of(metrics={"AP": 0.5})}),
    "a mean is text": index_of({"tiny": entry_of(metrics={"AP": {"mean": "0.5"}})}),
    "a mean is true": index_of({"tiny": entry_of(metrics={"AP": {"mean": True}})}),
    "a spread is a list": index_of({"tiny": entry_of(metrics={"AP": {"mean": 1, "std": [1]}})}),
    "values are a number": index_of({"tiny": entry_of(metrics={"AP": {"mean": 1, "std": 1, "values": 3}})}),
    "a mean no float reaches": index_of({"tiny": entry_of(metrics={"AP": {"mean": 10**400}})}),
    "files are a list": index_of({"tiny": entry_of(files=["model.safetensors"])}),
    "a file elsewhere": index_of({"tiny": entry_of(files=files_of("../../outside"))}),
    "an absolute file": index_of({"tiny": entry_of(files=files_of("/etc/passwd"))}),
    "a file of another drive": index_of({"tiny": entry_of(files=files_of("c:\\x"))}),
    "a file with NUL": index_of({"tiny": entry_of(files=files_of("a\0b"))}),
    "negative size": index_of({"tiny": entry_of(files=files_of("a", size=-1))}),
    "size is a float": index_of({"tiny": entry_of(files=files_of("a", size=1.0))}),
    "size is true": index_of({"tiny": entry_of(files=files_of("a", size=True))}),
    "size without bounds": index_of({"tiny": entry_of(files=files_of("a", size=10**400))}),
    "a digest that is a path": index_of({"tiny": entry_of(files=files_of("a", sha256="../" * 21 + "x"))}),
    "an upper-case digest": index_of({"tiny": entry_of(files=files_of("a", sha256="A" * 64))}),
}


@pytest.mark.parametrize("content", BAD_INDEXES.values(), ids=BAD_INDEXES)
def test_an_index_that_lies_is_one_error_for_every_use(zoo, folder, untouched, content):
    (folder / "index.json").write_bytes(content)
    for name, error in outcomes(zoo).items():
        assert isinstance(error, ZooError), name
        assert "index.json" in str(error) and len(str(error)) < 2000
        assert "\n" not in str(error)
    untouched()


def test_an_index_beyond_all_measure_is_not_read(zoo, folder):
    with open(folder / "index.json", "r+b") as stream:
        stream.truncate(100 << 20)
    with pytest.raises(ZooError, match=f"more than {INDEX_LIMIT:,} bytes"):
        list_backbones(zoo=zoo)


def test_of_a_key_that_is_there_twice_one_is_meant_and_its_digest_holds(zoo, folder):
    record = json.loads((folder / "index.json").read_text())["entries"]["tiny"]
    other = {**record, "files": {**record["files"], "model.safetensors": {"sha256": SHA256, "size": 1}}}
    twice = f'{{"format": 1, "entries": {{"tiny": {json.dumps(record)}, "tiny": {json.dumps(other)}}}}}'
    (folder / "index.json").write_text(twice)
    with pytest.raises(ZooError, match="expected|longer than the 1 bytes"):
        create_backbone("tiny", zoo=zoo)
    assert get_entry("tiny", zoo=zoo)["name"] == "tiny"


def test_what_an_index_says_beyond_what_is_needed_is_let_be(zoo, folder):
    edit_index(folder, lambda index: index["entries"]["tiny"].update(extra={"a": [1]}, metrics={"AP": {"mean": None}}))
    edit_index(folder, lambda index: index.update(comment="x"))
    assert set(outcomes(zoo).values()) == {None}
    edit_index(folder, lambda index: [index["entries"]["tiny"].pop(key) for key in ("metrics", "pretext", "created")])
    assert outcomes(zoo)["list"] is None and outcomes(zoo)["list_backbones"] is None


def test_a_size_of_ten_gigabytes_takes_no_room_before_they_have_come(zoo, folder, tmp_path):
    facts = {"sha256": SHA256, "size": 10 << 30}
    edit_index(folder, lambda index: index["entries"]["tiny"]["files"].update({"model.safetensors": facts}))
    with pytest.raises(ZooError):
        create_backbone("tiny", zoo=zoo)
    taken = sum(path.stat().st_blocks * 512 for path in tmp_path.rglob("*") if path.is_file())
    assert taken < 8 << 20


def test_a_link_in_an_entry_that_leads_out_is_not_followed(zoo, folder, tmp_path):
    secret = tmp_path / "cache-secret"
    secret.write_text('{"format": 1}')
    (folder / "tiny" / "entry.json").unlink()
    (folder / "tiny" / "entry.json").symlink_to(secret)
    facts = {"sha256": sha256_of(secret), "size": secret.stat().st_size}
    edit_index(folder, lambda index: index["entries"]["tiny"]["files"].update({"entry.json": facts}))
    with pytest.raises(ZooError, match="leads out of the zoo|404"):
        get_entry("tiny", zoo=zoo)
    (folder / "index.json").unlink()
    (folder / "index.json").symlink_to(secret)
    if zoo.stores[0].local_path("x"):
        with pytest.raises(ZooError, match="leads out of the zoo"):
            list_backbones(zoo=zoo)
    else:
        assert list_backbones(zoo=zoo) == []


class Bomb:
    """What a pickle may do to whoever loads it: here, leave a file."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return Path.touch, (Path(self.canary),)


def header(**tensors):
    content = json.dumps(tensors).encode()
    return len(content).to_bytes(8, "little") + content


def weights_that_lie(canary):
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


@pytest.mark.parametrize("kind", list(weights_that_lie(Path("canary"))))
def test_weights_that_lie_are_one_error_and_nothing_of_them_runs(zoo, folder, tmp_path, untouched, kind):
    canary = tmp_path / "canary"
    vouch(folder, "model.safetensors", weights_that_lie(canary)[kind])
    with pytest.raises(ZooError, match="cannot be read as safetensors|do not fit"):
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
def test_arguments_of_a_model_that_lie_are_one_error_and_nothing_of_them_runs(
    zoo, folder, tmp_path, untouched, monkeypatch, arguments
):
    torch.save({"a": Bomb(tmp_path / "canary")}, folder / "canary.pth")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    config = json.loads((folder / "tiny" / "config.json").read_text())
    vouch(folder, "config.json", json.dumps({**config, "model_args": arguments}).encode())
    with pytest.raises(BisslZooError):
        create_backbone("tiny", zoo=zoo)
    assert not (tmp_path / "canary").exists() and not (folder / "canary").exists()
    untouched()


def test_a_model_of_a_size_that_no_machine_has_is_one_error(zoo, folder):
    config = json.loads((folder / "tiny" / "config.json").read_text())
    vouch(folder, "config.json", json.dumps({**config, "model_args": {"in_chans": 1 << 50}}).encode())
    with pytest.raises(BisslZooError):
        create_backbone("tiny", zoo=zoo)


@pytest.mark.parametrize("file", ["entry.json", "config.json", "train_config.yaml"])
def test_a_file_that_is_read_as_a_whole_is_refused_by_its_size(zoo, folder, file):
    (folder / "tiny" / file).write_bytes(b" " * (5 << 20))
    vouch(folder, file, (folder / "tiny" / file).read_bytes())
    use = {"entry.json": get_entry, "config.json": create_backbone, "train_config.yaml": get_config}[file]
    with pytest.raises(ZooError, match=f"{file} of zoo entry 'tiny' has 5,242,880 bytes, more than the 4,194,304"):
        use("tiny", zoo=zoo)


NO_OBJECTS = [b"[]", b"{", b"\x80\x04N.", b"[" * 100_000]


@pytest.mark.parametrize("content", NO_OBJECTS)
def test_a_config_that_lies_is_one_error(zoo, folder, content):
    vouch(folder, "config.json", content)
    with pytest.raises(ZooError, match="JSON"):
        create_backbone("tiny", zoo=zoo)


@pytest.mark.parametrize("content", [*NO_OBJECTS, b'{"format": 7}', b'{"format": 1}', b'{"format": 1, "versions": 3}'])
def test_facts_that_lie_are_one_error(zoo, folder, content):
    vouch(folder, "entry.json", content)
    if not content.startswith(b'{"format": 1'):
        with pytest.raises(ZooError, match=r"JSON|format 7; this bissl_zoo reads up to 1"):
            get_entry("tiny", zoo=zoo)
    # an architecture that is not known has them asked for timm's version
    edit_index(folder, lambda index: index["entries"]["tiny"].update(architecture="resnet_of_2040"))
    with pytest.raises(ZooError):
        create_backbone("tiny", zoo=zoo)


CONFIGS = {
    "a call": "train: {_target_: os.system, command: touch CANARY}\n",
    "a call by way of ours": "train: {_target_: bissl_zoo.data.datasets.catalog.os.system, command: touch CANARY}\n",
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
def test_a_configuration_that_lies_is_data_or_one_error(zoo, folder, tmp_path, untouched, kind):
    text = CONFIGS[kind]
    text = text if isinstance(text, bytes) else text.replace("CANARY", str(tmp_path / "canary")).encode()
    vouch(folder, "train_config.yaml", text)
    try:
        get_config("tiny", zoo=zoo)
    except BisslZooError as error:
        assert "\x1b" not in str(error)
    else:
        assert kind == "anchors that multiply"
    assert not (tmp_path / "canary").exists()
    untouched()


def test_what_a_zoo_says_cannot_steer_the_terminal(zoo, folder, capsys):
    facts = json.loads((folder / "tiny" / "entry.json").read_text())
    vouch(folder, "entry.json", json.dumps({**facts, "notes": ESCAPES, ESCAPES: 1}, ensure_ascii=False).encode())
    vouch(folder, "README.md", f"# Card\n\n\tindented {ESCAPES}\n".encode())
    hostile = {"pretext": ESCAPES, "solver": ESCAPES, "metrics": {ESCAPES: {"mean": 0.5}}}
    edit_index(folder, lambda index: index["entries"]["tiny"].update(hostile))
    for name, use in uses(zoo).items():
        if name in ("list", "list --json", "show", "card"):
            use()
            told = capsys.readouterr().out
            assert not [c for c in told if c not in "\n\t" and not c.isprintable()], name
            assert "owned" in told
            if name == "list --json":
                assert json.loads(told)["tiny"]["pretext"] == ESCAPES
            if name == "card":
                assert "\tindented \\u001b[2J" in told
    edit_index(folder, lambda index: index["entries"]["tiny"].update(architecture=ESCAPES))
    with pytest.raises(ZooError) as caught:
        create_backbone("tiny", zoo=zoo)
    assert not set(printable(str(caught.value))) & set("\x1b\x9b\x07\x08\r\u202e")


def test_a_card_that_is_no_text_is_shown_as_far_as_it_is(zoo, folder, capsys):
    vouch(folder, "README.md", b"# Card \xff\xfe\n")
    assert outcomes(zoo)["card"] is None
    assert "# Card \ufffd\ufffd" in capsys.readouterr().out


def test_an_entry_is_copied_into_its_own_folder_only(zoo, folder, tmp_path):
    target = tmp_path / "cache" / "copies"
    copied = zoo.find("tiny").copy_to(target)
    assert copied == target / "tiny" and {path.name for path in target.iterdir()} == {"tiny"}
    assert {path.name for path in copied.iterdir()} == set(zoo.find("tiny").record["files"])
    assert not any(path.is_symlink() for path in copied.iterdir())


hypothesis = pytest.importorskip("hypothesis", reason="fuzzing needs hypothesis: pip install hypothesis")
st = hypothesis.strategies

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
metric_values = st.fixed_dictionaries(
    {}, optional={key: json_values | st.lists(st.floats(), max_size=3) for key in ("mean", "std", "values")}
)
file_facts = st.fixed_dictionaries(
    {}, optional={"sha256": st.just(SHA256) | json_values, "size": st.integers() | json_values}
)
record_values = st.fixed_dictionaries(
    {},
    optional={
        **{key: st.text(max_size=8) | json_values for key in ("architecture", "pretext", "task", "solver", "created")},
        "metrics": st.dictionaries(st.text(max_size=8), metric_values | json_values, max_size=3) | json_values,
        "files": st.dictionaries(st.sampled_from(["a", "../a", "b.json"]), file_facts, max_size=2) | json_values,
    },
)
index_values = st.fixed_dictionaries(
    {"format": st.sampled_from([1, 1, 1, 1, 2, None, "1"])},
    optional={
        "entries": st.dictionaries(st.sampled_from(["x", "x@2", "y", "..", "a/b"]), record_values, max_size=3)
        | json_values,
        "removed": st.lists(st.sampled_from(["z", "..", 3]), max_size=2) | json_values,
    },
)
good_records = st.fixed_dictionaries(
    {"architecture": st.text(), "files": st.dictionaries(st.just("a"), st.just({"sha256": SHA256, "size": 3}))},
    optional={
        **{key: st.none() | st.text() for key in ("pretext", "task", "solver", "created")},
        "metrics": st.dictionaries(
            st.text(),
            st.fixed_dictionaries(
                {},
                optional={
                    "mean": st.none() | st.integers() | st.floats(allow_nan=False, allow_infinity=False),
                    "std": st.none() | st.floats(allow_nan=False, allow_infinity=False),
                    "values": st.lists(st.integers(), max_size=3),
                },
            ),
            max_size=3,
        ),
    },
)
settings = hypothesis.settings(
    max_examples=200,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(hypothesis.HealthCheck),
)


def consume(index, place):
    """List, show as a page and write again what was parsed."""
    page = render_page(index)
    page.encode("utf-8")
    again = parse_index(index.to_bytes(), "again")
    assert (again.records, again.removed) == (index.records, index.removed)
    place.mkdir(exist_ok=True)
    (place / "index.json").write_bytes(index.to_bytes())
    for as_json in (False, True):
        wanted = dict(filter="*", pretext=None, task=None, architecture="*", metric=None, json=as_json)
        assert commands.list_entries(Namespace(**wanted), Zoo(place)) == 0
    return page


@settings
@hypothesis.given(content=st.binary(max_size=60) | index_values.map(lambda value: json.dumps(value).encode()))
def test_any_index_is_read_and_shown_or_refused(tmp_path_factory, content):
    try:
        index = parse_index(content, "fuzz")
    except ZooError:
        return
    consume(index, tmp_path_factory.getbasetemp() / "fuzz")


@settings
@hypothesis.given(
    records=st.dictionaries(st.sampled_from(["x", "x@2", "y"]), good_records, min_size=1, max_size=3),
)
def test_any_record_that_is_sound_is_shown_on_whole_lines(tmp_path_factory, records):
    try:
        index = parse_index(Index(records).to_bytes(), "fuzz")
    except (UnicodeEncodeError, ZooError):
        hypothesis.reject()
    page = consume(index, tmp_path_factory.getbasetemp() / "fuzz")
    lines = page.splitlines()
    assert sum(line.startswith("| [") for line in page.split("\n")) == len(records), lines
