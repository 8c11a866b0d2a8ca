"""A zoo in a folder: what is written is there, what leads out of it is not followed, what fails is told."""

import os
import threading
from pathlib import Path

import portalocker
import pytest

from bissl_zoo.errors import ZooError
from bissl_zoo.zoo.stores import folder as module
from bissl_zoo.zoo.stores.folder import FolderStore
from bissl_zoo.zoo.stores.store import Conflict

ROOT = pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read and write everything")


@pytest.fixture
def root(tmp_path):
    return tmp_path / "zoo"


@pytest.fixture
def store(root):
    return FolderStore(root)


@pytest.fixture
def outside(tmp_path):
    """A folder beside the zoo with a file in it."""
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "mine").write_text("mine")
    return folder


def test_what_was_created_is_read_and_opened_at_any_byte(store, tmp_path):
    (tmp_path / "source").write_bytes(b"from a file")
    store.create("x@2/a", b"from memory")
    store.create("x@2/b", tmp_path / "source")
    assert store.read("x@2/a", 100).content == b"from memory"
    with store.open("x@2/b", 5) as body:
        assert (body.start, b"".join(body.blocks)) == (5, b"a file")
    assert store.folders() == ["x@2"]
    assert store.read("x@2/c", 100) is None and store.read("y/a", 100) is None and store.read("x@2/a/b", 100) is None


def test_creating_twice_is_a_conflict_and_keeps_the_first(store):
    store.create("x/a", b"first")
    with pytest.raises(Conflict, match="exists already"):
        store.create("x/a", b"second")
    assert store.read("x/a", 100).content == b"first"


def test_replacing_takes_the_tag_of_what_is_there(store):
    store.replace("index.json", b"1", None)
    for tag in (None, "0" * 64):
        with pytest.raises(Conflict, match="changed by another process"):
            store.replace("index.json", b"2", tag)
    store.replace("index.json", b"2", store.read("index.json", 10).tag)
    assert store.read("index.json", 10).content == b"2"


def test_of_many_that_replace_at_once_none_is_lost(store):
    store.replace("count", b"0", None)

    def add_ten():
        for _ in range(10):
            while True:
                seen = store.read("count", 100)
                try:
                    store.replace("count", str(int(seen.content) + 1).encode(), seen.tag)
                    break
                except Conflict:
                    continue

    threads = [threading.Thread(target=add_ten) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert store.read("count", 100).content == b"40"


def test_a_file_larger_than_it_should_be_is_refused_before_it_is_read_whole(store, root):
    root.mkdir()
    with open(root / "index.json", "wb") as stream:
        stream.truncate(1 << 40)
    with pytest.raises(ZooError, match="has more than 1,000 bytes"):
        store.read("index.json", 1000)


def test_links_out_of_the_zoo_are_neither_read_nor_written_nor_removed(store, root, outside):
    root.mkdir()
    (root / "entry").symlink_to(outside)
    (root / "file").symlink_to(outside / "mine")
    (root / "absolute").symlink_to("/")
    uses = [
        lambda: store.read("entry/mine", 100),
        lambda: store.read("file", 100),
        lambda: store.open("entry/mine").__enter__(),
        lambda: store.local_path("absolute/etc"),
        lambda: store.create("entry/new", b"x"),
        lambda: store.remove("entry/mine"),
        lambda: store.remove_folder("entry"),
    ]
    for use in uses:
        with pytest.raises(ZooError, match=r"is a link"):
            use()
    assert [path.name for path in outside.iterdir()] == ["mine"] and (outside / "mine").read_text() == "mine"
    assert "entry" in store.folders()  # so that no publisher takes the name


def test_a_link_in_a_circle_is_one_message(store, root):
    root.mkdir()
    (root / "circle").symlink_to(root / "circle")
    for use in (lambda: store.read("circle", 10), lambda: store.create("circle/a", b"x")):
        with pytest.raises(ZooError, match="circle"):
            use()


def test_what_a_killed_publisher_left_half_written_is_replaced_and_not_followed(store, root, outside):
    root.mkdir()
    (root / ".pending").symlink_to(outside / "mine")
    store.replace("index.json", b"1", None)
    assert (outside / "mine").read_text() == "mine" and (root / "index.json").read_bytes() == b"1"
    assert not (root / "index.json").is_symlink() and not (root / ".pending").exists()


def test_removing_takes_only_what_is_there(store, root):
    store.create("x/a", b"1")
    store.create("x/.publishing", b"2")
    store.remove("x/a")
    store.remove("x/a")
    store.remove_folder("x")
    store.remove_folder("x")
    assert store.folders() == [] and not (root / "x").exists()


def test_a_folder_with_more_than_files_in_it_is_not_removed(store, root):
    store.create("x/a", b"1")
    (root / "x" / "deeper").mkdir()
    with pytest.raises(ZooError, match="deeper|x cannot be removed"):
        store.remove_folder("x")
    assert (root / "x" / "deeper").is_dir()


def test_the_claim_goes_last_so_that_it_says_whose_the_rest_is(store, root, monkeypatch):
    for name in (".publishing", "a", "b"):
        store.create(f"x/{name}", b"1")
    removed = []
    unlink = Path.unlink
    monkeypatch.setattr(Path, "unlink", lambda path, **_: (removed.append(path.name), unlink(path))[1])
    store.remove_folder("x")
    assert sorted(removed[:2]) == ["a", "b"] and removed[2:] == [".publishing"]


def test_empty_and_hidden_folders_are_nobodys(store, root):
    for name in ("empty", ".hidden", "full"):
        (root / name).mkdir(parents=True)
    (root / ".hidden" / "a").write_text("1")
    (root / "full" / "a").write_text("1")
    assert store.folders() == ["full"]


def test_a_zoo_that_is_a_file_is_told_with_the_room_there_is(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ZooError, match=r"cannot be written: .*MiB are free there"):
        FolderStore(tmp_path / "file" / "zoo").create("x/a", b"1")
    assert FolderStore(tmp_path / "file").read("index.json", 10) is None


def test_a_lock_that_is_never_freed_is_told(store, root, monkeypatch):
    monkeypatch.setattr(module, "LOCK_TIMEOUT_S", 0.1)
    root.mkdir()
    with portalocker.Lock(str(root / ".lock"), "a"):
        with pytest.raises(ZooError, match=r"Another process has held .*\.lock"):
            store.replace("index.json", b"1", None)
    store.replace("index.json", b"1", None)


@ROOT
def test_what_may_not_be_read_or_removed_is_told(store, root):
    store.create("x/a", b"1")
    (root / "x").chmod(0)
    try:
        for use in (
            lambda: store.read("x/a", 1),
            store.folders,
            lambda: store.remove("x/a"),
            lambda: store.remove_folder("x"),
        ):
            with pytest.raises(ZooError, match="Permission denied"):
                use()
    finally:
        (root / "x").chmod(0o700)
