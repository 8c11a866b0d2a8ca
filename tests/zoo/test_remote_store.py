import os
import sys

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from iopath.common.file_io import PathHandler

from bissl_zoo.errors import ZooError
from bissl_zoo.zoo.stores import remote
from bissl_zoo.zoo.stores.remote import BUILT_IN, RemoteStore, ZooPathManager
from bissl_zoo.zoo.stores.store import Transient, WritableStore


class ShelfHandler(PathHandler):
    """`shelf://x` is the file x of a folder; `broken` there raises what a library might."""

    def __init__(self, root):
        super().__init__()
        self.root, self.broken = root, OSError("out of order")

    def _get_supported_prefixes(self):
        return ["shelf://"]

    def _open(self, path, mode="r", buffering=-1, **kwargs):
        name = path.removeprefix("shelf://")
        if name.endswith("broken"):
            raise self.broken
        return open(self.root / name, mode)


@pytest.fixture
def shelf(monkeypatch, tmp_path):
    """The handler, registered in a path manager that lasts for the test."""
    manager = ZooPathManager()
    monkeypatch.setattr(remote, "PATH_MANAGER", manager)
    handler = ShelfHandler(tmp_path)
    manager.register_handler(handler)
    return handler


@pytest.fixture
def memory():
    files = fsspec.filesystem("memory")
    yield files
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


def put(place, path, content):
    if isinstance(place, ShelfHandler):
        target = place.root / "zoo" / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
    else:
        place.pipe(f"/zoo/{path}", content)


@pytest.fixture(params=["shelf", "memory"])
def place(request):
    """Where files are put, and a store on it."""
    return request.getfixturevalue(request.param), RemoteStore(f"{request.param}://zoo/")


def drain(store, path, offset=0):
    with store.open(path, offset) as body:
        return body.start, b"".join(body.blocks)


def test_files_are_read_whole_and_from_the_middle(place):
    files, store = place
    content = os.urandom(3 << 20)
    put(files, "x@2/model.safetensors", content)
    assert drain(store, "x@2/model.safetensors") == (0, content)
    assert drain(store, "x@2/model.safetensors", 2_000_001) == (2_000_001, content[2_000_001:])
    assert drain(store, "x@2/model.safetensors", len(content)) == (len(content), b"")


def test_an_index_is_read_as_it_is_now(place):
    files, store = place
    assert store.read("index.json", 10) is None
    put(files, "index.json", b"1")
    first = store.read("index.json", 10)
    put(files, "index.json", b"22")
    second = store.read("index.json", 10)
    assert (first.content, second.content) == (b"1", b"22")
    assert first.tag != second.tag


def test_a_file_above_the_limit_is_refused(place):
    files, store = place
    put(files, "index.json", b"12345")
    assert store.read("index.json", 5).content == b"12345"
    with pytest.raises(ZooError, match="zoo/index.json has more than 4 bytes"):
        store.read("index.json", 4)


def test_opening_a_missing_file_names_it(place):
    _, store = place
    with pytest.raises(ZooError, match="://zoo/x/model does not exist"):
        drain(store, "x/model")


def test_the_whole_of_a_place_can_be_a_zoo(shelf, memory):
    (shelf.root / "index.json").write_bytes(b"shelf")
    memory.pipe("/index.json", b"memory")
    for scheme in ("shelf", "memory"):
        assert RemoteStore(f"{scheme}://").read("index.json", 10).content == scheme.encode()


def test_a_stream_that_cannot_begin_in_the_middle_begins_at_the_start(shelf, tmp_path, monkeypatch):
    put(shelf, "model", b"content")
    read_end, write_end = os.pipe()
    os.write(write_end, b"content")
    os.close(write_end)
    monkeypatch.setattr(shelf, "_open", lambda *args, **kwargs: os.fdopen(read_end, "rb"))
    assert drain(RemoteStore("shelf://zoo"), "model", 3) == (0, b"content")


class Refusal(Exception):
    """As client libraries raise them, with the status of the answer."""

    def __init__(self, status):
        super().__init__(f"answered {status}")
        self.status = status


@pytest.mark.parametrize(
    ("error", "transient"),
    [
        (ConnectionResetError("reset"), True),
        (TimeoutError("late"), True),
        (Refusal(503), True),
        (Refusal(429), True),
        (Refusal(403), False),
        (PermissionError("not yours"), False),
    ],
)
def test_what_a_library_raises_is_told_and_known_for_passing_or_not(shelf, error, transient):
    shelf.broken = error
    store = RemoteStore("shelf://zoo")
    for use in (lambda: store.read("broken", 10), lambda: drain(store, "broken")):
        with pytest.raises(ZooError, match=f"shelf://zoo/broken cannot be read: {type(error).__name__}") as caught:
            use()
        assert isinstance(caught.value, Transient) == transient


def test_what_the_reader_of_a_body_raises_is_not_taken_for_the_places(place):
    files, store = place
    put(files, "model", b"content")
    with pytest.raises(OSError, match="disk full"), store.open("model"):
        raise OSError("disk full")


def test_a_handler_of_ones_own_goes_before_fsspec(shelf, memory, monkeypatch):
    monkeypatch.setattr(shelf, "_get_supported_prefixes", lambda: ["memory://zoo"])
    remote.PATH_MANAGER.register_handler(shelf)
    monkeypatch.setattr(shelf, "_open", lambda path, *args, **kwargs: open(shelf.root / "handled", "rb"))
    (shelf.root / "handled").write_bytes(b"handled")
    memory.pipe("/other/index.json", b"fsspec")
    assert RemoteStore("memory://zoo").read("index.json", 10).content == b"handled"
    assert RemoteStore("memory://other").read("index.json", 10).content == b"fsspec"


def test_a_library_that_is_missing_is_named_with_our_extra_where_there_is_one(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    monkeypatch.setitem(sys.modules, "adlfs", None)
    with pytest.raises(ZooError, match=r'gs://bucket/zoo needs .*pip install "bissl_zoo\[gs\]"'):
        RemoteStore("gs://bucket/zoo")
    with pytest.raises(ZooError, match="az://container needs .*adlfs"):
        RemoteStore("az://container")


def test_an_unknown_scheme_lists_what_is_accepted(shelf):
    with pytest.raises(ZooError) as caught:
        RemoteStore("self://zoo")
    message = str(caught.value)
    assert "'self://' of 'self://zoo' is not known. Did you mean 'shelf'?" in message
    assert ", ".join(f"{scheme}://" for scheme in sorted([*BUILT_IN, "shelf"])) in message
    assert "fsspec" in message and "PATH_MANAGER" in message


def test_a_password_is_not_shown(memory):
    store = RemoteStore("memory://user:hidden@zoo")
    assert store.location == "memory://zoo"
    with pytest.raises(ZooError, match="^'nope://' of 'nope://host' is not known") as caught:
        RemoteStore("nope://user:hidden@host")
    assert "hidden" not in str(caught.value)


def test_it_is_for_reading_only(memory):
    assert not isinstance(RemoteStore("memory://zoo"), WritableStore)
