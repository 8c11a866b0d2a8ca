import uuid

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from bissl_zoo.errors import ZooError
from bissl_zoo.zoo.stores import Missing, Transient, open_store
from bissl_zoo.zoo.stores.fsspec import FsspecStore


@pytest.fixture
def files():
    return fsspec.filesystem("memory")


@pytest.fixture
def place(files):
    location = f"memory://{uuid.uuid4().hex}"
    yield location
    if files.exists(location):
        files.rm(location, recursive=True)


def test_files_are_read_from_any_byte_and_always_as_they_are_now(files, place):
    content = bytes(range(256)) * 10_000
    files.pipe(f"{place}/x@2/model.safetensors", content)
    store = open_store(place)
    assert isinstance(store, FsspecStore) and store.location == place and not store.writable
    assert b"".join(store.read("x@2/model.safetensors")) == content
    assert b"".join(store.read("x@2/model.safetensors", 1_500_001)) == content[1_500_001:]
    for version in (b"1", b"22"):
        files.pipe(f"{place}/index.json", version)
        assert store.read_index("index.json") == version


def test_a_missing_file_is_named_and_a_large_one_refused(files, place, monkeypatch):
    store = open_store(place)
    assert store.read_index("index.json") is None
    with pytest.raises(Missing, match=f"{place}/x/y does not exist"):
        list(store.read("x/y"))
    files.pipe(f"{place}/index.json", b"12345")
    monkeypatch.setenv("BISSL_ZOO_MAX_INDEX_BYTES", "4")
    with pytest.raises(ZooError, match="the limit is 4"):
        store.read_index("index.json")


class Refusal(Exception):
    def __init__(self, status):
        super().__init__("refused")
        self.status = status


@pytest.mark.parametrize("error", [ConnectionResetError(), Refusal(503), Refusal(403)])
def test_errors_of_a_library_become_errors_of_the_zoo(place, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(MemoryFileSystem, "open", fail)
    with pytest.raises(ZooError, match=f"{place}/x cannot be read") as raised:
        list(open_store(place).read("x"))
    assert isinstance(raised.value, Transient) == (getattr(error, "status", 503) != 403)


@pytest.mark.parametrize(
    ("error", "location", "message"),
    [
        (ImportError("Install s3fs"), "s3://bucket/zoo", r'pip install "bissl_zoo\[s3\]"'),
        (ValueError("no"), "ftp://me:SECRET@host/zoo", "^ftp://host/zoo cannot be opened: ValueError: no.$"),
    ],
)
def test_an_address_that_cannot_be_opened_is_one_error_without_its_password(monkeypatch, error, location, message):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("bissl_zoo.zoo.stores.fsspec.url_to_fs", fail)
    with pytest.raises(ZooError, match=message):
        open_store(location)
