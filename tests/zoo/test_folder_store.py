"""Publishing into a folder: kills, races, full disks and missing locks; what is left behind is cleaned."""

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import portalocker
import pytest
from tiny_entries import publish_draft

from bissl_zoo.errors import ZooError
from bissl_zoo.zoo.card import PAGE_FILE, render_page
from bissl_zoo.zoo.commands import verify
from bissl_zoo.zoo.hub import Zoo, list_backbones
from bissl_zoo.zoo.index import INDEX_FILE, parse_index
from bissl_zoo.zoo.locks import try_lock
from bissl_zoo.zoo.stores import folder as folder_module
from bissl_zoo.zoo.stores import open_store
from bissl_zoo.zoo.stores.folder import LOCK_FILE, MARKER_FILE, FolderStore

FILES = {"model.safetensors", "entry.json", "train_config.yaml"}


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    root = tmp_path_factory.mktemp("published") / "zoo"
    publish_draft(root)
    return root


@pytest.fixture
def zoo(published, tmp_path):
    return Path(shutil.copytree(published, tmp_path / "zoo"))


def assert_complete(zoo, names):
    """Assert that a zoo lists these entries, that every file matches, and that nothing else is left."""
    entries = Zoo(zoo).entries()
    assert set(entries) == set(names)
    for entry in entries.values():
        assert FILES == set(entry.record["files"])
        for file in entry.record["files"]:
            entry.file(file)
    assert list(verify(open_store(zoo))) == []
    assert {path.name for path in Path(zoo).iterdir()} - {LOCK_FILE} == {*names, INDEX_FILE, PAGE_FILE}
    index = parse_index((zoo / INDEX_FILE).read_bytes(), "index")
    assert (zoo / PAGE_FILE).read_text() == render_page(index)


def test_files_are_read_from_any_byte(tmp_path):
    store = FolderStore(tmp_path)
    (tmp_path / "x").write_bytes(b"12345")
    assert b"".join(store.read("x", 2)) == b"345"
    assert store.read_index("absent") is None and store.read_index("x") == b"12345"


@pytest.mark.parametrize("kind", ["fifo", "directory"])
def test_an_index_that_is_not_a_regular_file_does_not_hang(tmp_path, kind):
    os.mkfifo(tmp_path / INDEX_FILE) if kind == "fifo" else (tmp_path / INDEX_FILE).mkdir()
    with pytest.raises(ZooError, match="index.json cannot be read"):
        list_backbones(zoo=tmp_path)


def test_links_out_of_the_zoo_are_not_followed(zoo, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_text("mine")
    (zoo / "link").symlink_to(outside)
    (zoo / "circle").symlink_to(zoo / "circle")
    with pytest.raises(ZooError, match="leads out of the zoo"):
        list(open_store(zoo).read("link/file"))
    with pytest.raises(ZooError, match="circle"):
        list(open_store(zoo).read("circle"))
    publish_draft(zoo, seed=1)
    assert (outside / "file").read_text() == "mine" and (zoo / "link").is_symlink()


def test_a_foreign_folder_is_kept_and_its_name_skipped(zoo):
    (zoo / "tiny@2").mkdir()
    (zoo / "tiny@2" / "notes").write_text("mine")
    assert publish_draft(zoo, seed=1) == "tiny@3"
    assert (zoo / "tiny@2" / "notes").exists()


def test_curated_entries_are_not_leftovers(zoo):
    os.rename(zoo / INDEX_FILE, zoo / "curated.json")
    (zoo / PAGE_FILE).unlink()
    assert publish_draft(zoo, seed=1) == "tiny@2" and list_backbones(zoo=zoo) == ["tiny", "tiny@2"]


def leave_draft(zoo):
    shutil.copytree(zoo / "tiny", zoo / ".draft-0123")
    (zoo / ".draft-0123" / MARKER_FILE).touch()


def leave_unlisted(zoo):
    shutil.copytree(zoo / "tiny", zoo / "tiny@2")
    (zoo / "tiny@2" / MARKER_FILE).touch()


def leave_marker(zoo):
    (zoo / "tiny" / MARKER_FILE).touch()


def leave_temporary(zoo):
    (zoo / f".index.json-{'0' * 32}").write_text("{")


def leave_old_page(zoo):
    (zoo / PAGE_FILE).write_text("old")


@pytest.mark.parametrize("leave", [leave_draft, leave_unlisted, leave_marker, leave_temporary, leave_old_page])
def test_leftovers_are_cleaned_by_the_next_publisher_and_take_no_name(zoo, leave):
    leave(zoo)
    assert publish_draft(zoo, seed=1) == "tiny@2"
    assert_complete(zoo, {"tiny", "tiny@2"})


def test_the_draft_of_a_living_publisher_is_kept(zoo):
    leave_draft(zoo)
    descriptor = try_lock(zoo / ".draft-0123" / MARKER_FILE)
    assert publish_draft(zoo, seed=1) == "tiny@2" and (zoo / ".draft-0123").is_dir()
    os.close(descriptor)
    publish_draft(zoo, seed=2)
    assert_complete(zoo, {"tiny", "tiny@2", "tiny@3"})


def test_a_removed_name_is_not_used_again_and_a_killed_removal_is_completed(zoo):
    copy = shutil.copytree(zoo / "tiny", zoo.with_name("copy"))
    open_store(zoo).remove("tiny")
    assert_complete(zoo, set())
    shutil.copytree(copy, zoo / "tiny")
    assert publish_draft(zoo) == "tiny@2"
    assert_complete(zoo, {"tiny@2"})
    with pytest.raises(ZooError, match="lists no entry 'tiny'"):
        open_store(zoo).remove("tiny")


def test_an_entry_whose_files_are_gone_can_be_removed(zoo):
    shutil.rmtree(zoo / "tiny")
    open_store(zoo).remove("tiny")
    assert_complete(zoo, set())


@pytest.mark.parametrize("damage", ["flip", "cut", "delete"])
def test_verify_names_a_damaged_file(zoo, damage):
    file = zoo / "tiny" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[1000] ^= 1
    {"flip": lambda: file.write_bytes(content), "cut": lambda: os.truncate(file, 10), "delete": file.unlink}[damage]()
    ((where, problem),) = verify(open_store(zoo))
    assert where == "tiny/model.safetensors"
    assert {"flip": "sha256", "cut": "has 10 bytes", "delete": "does not exist"}[damage] in problem


def test_a_copy_that_differs_is_not_listed(zoo, monkeypatch):
    def copy(source, target):
        Path(target).write_bytes(Path(source).read_bytes()[:-1] + b"?")
        return target

    monkeypatch.setattr(folder_module.shutil, "copyfile", copy)
    with pytest.raises(ZooError, match="differs from what was written"):
        publish_draft(zoo, seed=1)
    monkeypatch.undo()
    assert_complete(zoo, {"tiny"})


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("function", ["fsync", "sha256_of", "write_atomically"])
def test_a_failure_at_any_step_leaves_the_zoo_unchanged(zoo, monkeypatch, error, function):
    def fail(*_):
        raise error

    monkeypatch.setattr(folder_module, function, fail)
    with pytest.raises((ZooError, KeyboardInterrupt)) as raised:
        publish_draft(zoo, seed=1)
    if isinstance(raised.value, ZooError):
        assert "No space left" in str(raised.value) and "MiB are free" in str(raised.value)
    monkeypatch.undo()
    assert_complete(zoo, {"tiny"})


def test_a_file_system_without_locks_needs_an_explicit_option(tmp_path, monkeypatch):
    def no_locks(*_):
        raise portalocker.LockException(OSError(errno.ENOLCK, "No locks available"))

    monkeypatch.setattr(portalocker, "lock", no_locks)
    with pytest.raises(ZooError, match="has no locks.*BISSL_ZOO_NO_LOCKS=1"):
        publish_draft(tmp_path / "zoo")
    monkeypatch.setenv("BISSL_ZOO_NO_LOCKS", "1")
    assert publish_draft(tmp_path / "zoo") == "tiny"


def test_a_lock_that_is_never_released_is_an_error(zoo, monkeypatch):
    monkeypatch.setattr(folder_module, "LOCK_TIMEOUT_S", 0.05)
    descriptor = try_lock(zoo / LOCK_FILE)
    with pytest.raises(ZooError, match=r"has held .*\.lock for 0.05 s"):
        publish_draft(zoo, seed=1)
    os.close(descriptor)


#: forks a child for each kill; the child counts its changes of the zoo and dies before the n-th
KILLS = """
import os, shutil, signal, sys
from tiny_entries import publish_draft
from bissl_zoo.zoo.stores import open_store

CHANGES = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate"}
base, action, step = sys.argv[1], sys.argv[2], int(sys.argv[3])
publish_draft(base + "-warm")  # imports everything once
for number in range(1, 1000, step):
    zoo = f"{base}-{number}"
    if os.path.isdir(base):
        shutil.copytree(base, zoo)
    child = os.fork()
    if child == 0:
        count = 0
        def watch(event, arguments):
            global count
            if event == "open":
                change = arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            else:
                change = event in CHANGES
            if change and any(isinstance(a, (str, os.PathLike)) and os.fspath(a).startswith(zoo) for a in arguments):
                count += 1
                if count == number:
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(watch)
        publish_draft(zoo, seed=1) if action == "publish" else open_store(zoo).remove("tiny")
        os._exit(0)
    killed = os.WIFSIGNALED(os.waitpid(child, 0)[1])
    print(zoo, flush=True)
    if not killed:
        break
"""


def run(code, *arguments):
    support = Path(__file__).parents[1] / "support"
    paths = [str(support), str(support.parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def kill_each(zoo, action, step=1):
    """Return the zoos left by a kill at each `step`-th change, and one without a kill."""
    process = run(KILLS, zoo, action, step)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0
    return [Path(line) for line in out.splitlines()]


@pytest.mark.slow
def test_a_publisher_killed_at_any_step_leaves_a_complete_zoo(zoo):
    zoos = kill_each(zoo, "publish")
    assert len(zoos) > 15
    for place in zoos:
        listed = set(list_backbones(zoo=place))
        assert listed in ({"tiny"}, {"tiny", "tiny@2"})
        for name in listed:
            assert all(Zoo(place).find(f"{name}@1" if name == "tiny" else name).file(file) for file in FILES)
        name = publish_draft(place, seed=2)
        assert name == f"tiny@{len(listed) + 1}"
        assert_complete(place, {*listed, name})
    assert list_backbones(zoo=zoos[-1]) == ["tiny", "tiny@2", "tiny@3"]


@pytest.mark.slow
def test_the_first_publisher_of_a_zoo_may_be_killed_at_any_step(tmp_path):
    for place in kill_each(tmp_path / "zoo", "publish", step=4):
        listed = set(list_backbones(zoo=place))
        name = publish_draft(place, seed=2)
        assert name == ("tiny@2" if listed else "tiny")
        assert_complete(place, {*listed, name})


@pytest.mark.slow
def test_a_removal_killed_at_any_step_is_completed_by_the_next_publisher(zoo):
    publish_draft(zoo, seed=1)
    zoos = kill_each(zoo, "remove")
    assert len(zoos) > 8
    for place in zoos:
        listed = set(list_backbones(zoo=place))
        assert publish_draft(place, seed=2) == "tiny@3"
        assert_complete(place, {*listed, "tiny@3"})


#: publishes until it is killed; writes each name that it got
PUBLISHER = """
import os, sys
from tiny_entries import publish_draft
seed = int(sys.argv[2])
while True:
    os.write(1, publish_draft(sys.argv[1], seed=seed).encode() + b"\\n")
    seed += 12
"""


@pytest.mark.slow
def test_twelve_concurrent_publishers_with_kills_lose_nothing(tmp_path):
    zoo, names = tmp_path / "zoo", []
    processes = [run(PUBLISHER, zoo, seed) for seed in range(12)]
    try:
        for process in processes:
            names.append(process.stdout.readline().strip())
            process.kill()  # at any of its steps, while the others publish
    finally:
        for process in processes:
            process.kill()
            names += process.communicate()[0].split()
    assert len(names) >= 12 and len(set(names)) == len(names), "two publishers got the same name"
    names.append(publish_draft(zoo, seed=99))  # cleans what the others left
    listed = set(list_backbones(zoo=zoo))
    assert set(names) <= listed and len(listed) <= len(names) + 12
    assert_complete(zoo, listed)
