"""Names and the index: every invalid index is one error; every valid one is listed, rendered and written again."""

import json
from argparse import Namespace

import pytest

from bissl_zoo.errors import ZooError
from bissl_zoo.zoo import Zoo, commands
from bissl_zoo.zoo.card import render_page
from bissl_zoo.zoo.index import Index, check_name, is_name, parse_index, pin, split_version

SHA256 = "0" * 64


def entry_of(**changes):
    return {"architecture": "test_resnet", "metrics": {}, "files": {}, **changes}


def index_of(records, **more):
    return json.dumps({"format": 1, "entries": records, **more}).encode()


def files_of(name, **changes):
    return {name: {"sha256": SHA256, "size": 1, **changes}}


BAD_INDEXES = {
    "not JSON": b"\x80\x04N.",
    "format true": b'{"format": true, "entries": []}',
    "deeply nested": b'{"format": 1, "entries": ' + b'{"a":' * 100_000 + b"1" + b"}" * 100_001,
    "NaN": b'{"format": 1, "entries": {}, "x": NaN}',
    "an infinite number": b'{"format": 1, "entries": {}, "x": 1e999}',
    "half a surrogate pair": b'{"format": 1, "entries": {}, "x": "\\ud800"}',
    "another encoding": json.dumps({"format": 1, "entries": {}}).encode("utf-16"),
    "removed is an object": index_of({}, removed={"tiny": 1}),
    "removed holds paths": index_of({}, removed=["../../etc"]),
    "entries is a list": index_of([]),
    "name with folders": index_of({"../../tiny": entry_of()}),
    "a long name": index_of({"x" * 5000: entry_of()}),
    "architecture is a number": index_of({"tiny": entry_of(architecture=5)}),
    "pretext is a list": index_of({"tiny": entry_of(pretext=["simclr"])}),
    "a metric is a number": index_of({"tiny": entry_of(metrics={"AP": 0.5})}),
    "a mean is text": index_of({"tiny": entry_of(metrics={"AP": {"mean": "0.5"}})}),
    "values are a number": index_of({"tiny": entry_of(metrics={"AP": {"mean": 1, "std": 1, "values": 3}})}),
    "a mean beyond floats": index_of({"tiny": entry_of(metrics={"AP": {"mean": 10**400}})}),
    "files are a list": index_of({"tiny": entry_of(files=["model.safetensors"])}),
    "a file elsewhere": index_of({"tiny": entry_of(files=files_of("../../outside"))}),
    "a file with NUL": index_of({"tiny": entry_of(files=files_of("a\0b"))}),
    "negative size": index_of({"tiny": entry_of(files=files_of("a", size=-1))}),
    "size is true": index_of({"tiny": entry_of(files=files_of("a", size=True))}),
    "size above the limit": index_of({"tiny": entry_of(files=files_of("a", size=10**400))}),
    "a digest that is a path": index_of({"tiny": entry_of(files=files_of("a", sha256="../" * 21 + "x"))}),
}


def test_names_are_one_plain_path_component():
    for text in ("a", "resnet50.simclr_x-1@2", "0", "A" * 100, "a@999999"):
        assert is_name(text) and check_name(text) is None
    for text in ("../a", "a/b", "a\\b", ".hidden", "", "/a", "a@0", "a@", "ti\nny", "x" * 101, "é", "c:\\x", 3, None):
        assert not is_name(text)
        with pytest.raises(ZooError, match="is not a valid entry name"):
            check_name(text)


def test_versions_of_names():
    assert split_version("x@2") == ("x", 2) and split_version("x") == ("x", 1)
    assert pin("x") == "x@1" and pin("x@2") == "x@2"
    index = Index({"x": {}, "x@2": {}, "y": {}}, ("z@4",))
    assert [index.next_name(base) for base in ("x", "y", "z", "new")] == ["x@3", "y@2", "z@5", "new"]
    assert index.next_name("x", others=["x@7"]) == "x@8"


def test_a_removed_entry_keeps_its_name():
    index = Index().add("x", entry_of()).remove("x")
    again = parse_index(index.to_bytes(), "index.json")
    assert again.removed == ("x",) and again.records == {} and again.next_name("x") == "x@2"


def test_the_newest_version_with_the_same_weights_and_config_is_found():
    files = {**files_of("model.safetensors"), **files_of("train_config.yaml")}
    index = Index({"x": entry_of(files=files), "x@2": entry_of(files={**files, **files_of("entry.json", size=3)})})
    assert index.find_same("x", {**files, **files_of("entry.json", size=9)}) == "x@2"
    assert index.find_same("x", {**files, **files_of("model.safetensors", size=9)}) is None
    assert index.find_same("y", files) is None


def test_the_number_of_entries_is_limited(monkeypatch):
    monkeypatch.setenv("BISSL_ZOO_MAX_ENTRIES", "2")
    records = {name: entry_of() for name in ("a", "b")}
    assert len(parse_index(index_of(records), "index.json").records) == 2
    with pytest.raises(ZooError, match="lists 3 entries; the limit is 2"):
        parse_index(index_of(records, removed=["c"]), "index.json")


@pytest.mark.parametrize("content", BAD_INDEXES.values(), ids=BAD_INDEXES)
def test_an_invalid_index_is_one_short_error(content):
    with pytest.raises(ZooError) as raised:
        parse_index(content, "index.json")
    message = str(raised.value)
    assert "index.json" in message and len(message) < 2000 and "\n" not in message


def test_unknown_keys_of_an_index_are_kept():
    record = entry_of(extra={"a": [1]}, metrics={"AP": {"mean": None}})
    assert parse_index(index_of({"tiny": record}, comment="x"), "index.json").records == {"tiny": record}


hypothesis = pytest.importorskip("hypothesis", reason="fuzzing needs hypothesis: pip install hypothesis")
st = hypothesis.strategies

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
    max_examples=30,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(hypothesis.HealthCheck),
)


def consume(index, place):
    """List, render and write a parsed index."""
    page = render_page(index)
    page.encode("utf-8")
    again = parse_index(index.to_bytes(), "again")
    assert (again.records, again.removed) == (index.records, index.removed)
    place.mkdir(exist_ok=True)
    (place / "index.json").write_bytes(index.to_bytes())
    for as_json in (False, True):
        arguments = dict(filter="*", pretext=None, task=None, architecture="*", metric=None, json=as_json)
        assert commands.list_entries(Namespace(**arguments), Zoo(place)) == 0
    return page


@settings
@hypothesis.given(
    records=st.dictionaries(st.sampled_from(["x", "x@2", "y"]), good_records, min_size=1, max_size=3),
)
def test_any_valid_record_is_one_row_of_the_page(tmp_path_factory, records):
    try:
        index = parse_index(Index(records).to_bytes(), "fuzz")
    except (UnicodeEncodeError, ZooError):
        hypothesis.reject()
    page = consume(index, tmp_path_factory.getbasetemp() / "fuzz")
    lines = page.splitlines()
    assert sum(line.startswith("| [") for line in page.split("\n")) == len(records), lines
