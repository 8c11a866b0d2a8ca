import errno
import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import platformdirs
import pytest
from faulty_server import Answer, FaultyServer

from bissl_zoo.errors import ZooError
from bissl_zoo.zoo import cache as cache_module
from bissl_zoo.zoo.cache import ATTEMPTS, TOTAL_ATTEMPTS, Cache, default_cache, is_offline
from bissl_zoo.zoo.stores import Missing, Store, Transient
from bissl_zoo.zoo.stores.folder import FolderStore
from bissl_zoo.zoo.stores.http import HttpStore

REPOSITORY = Path(__file__).resolve().parents[2]
FILE = "name/model.safetensors"
CONTENT = random.Random(0).randbytes(300_000)
SIZE, SHA256 = len(CONTENT), hashlib.sha256(CONTENT).hexdigest()
BUSY = Transient("memory://zoo is busy.")


class ScriptedStore(Store):
    """Files in memory; the n-th read follows `plan[n]`: an error, other content, or the number of bytes it yields."""

    location = "memory://zoo"

    def __init__(self):
        self.files, self.plan, self.starts = {FILE: CONTENT}, [], []

    def read(self, path, start=0):
        self.starts.append(start)
        step = self.plan.pop(0) if self.plan else None
        if isinstance(step, Exception):
            raise step
        if path not in self.files:
            raise Missing(path)
        content = step if isinstance(step, bytes) else self.files[path]
        end = start + step if isinstance(step, int) else len(content)
        for position in range(start, end, 10_000):
            yield content[position : min(end, position + 10_000)]
        if isinstance(step, int):
            raise Transient("memory://zoo ended early.")


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in ("BISSL_ZOO_CACHE", "BISSL_ZOO_OFFLINE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def store():
    return ScriptedStore()


@pytest.fixture
def waits():
    """Seconds between the attempts of the cache."""
    return []


@pytest.fixture
def cache(tmp_path, waits):
    return Cache(tmp_path / "cache", sleep=waits.append)


def fetch(cache, store, sha256=SHA256, size=SIZE):
    return cache.fetch(store, FILE, sha256, size)


def error_of(call, *arguments, **options):
    with pytest.raises(ZooError) as raised:
        call(*arguments, **options)
    return str(raised.value)


def blob(cache):
    return cache.root / "blobs" / SHA256[:2] / SHA256


def partial(cache, content=None):
    """Return the path of the incomplete file; write `content` if given."""
    path = cache.root / "partial" / SHA256
    if content is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return path


def files(cache):
    return sorted(str(path.relative_to(cache.root)) for path in cache.root.rglob("*") if path.is_file())


def test_a_file_is_downloaded_once_and_stored_under_its_digest(store, cache):
    assert fetch(cache, store) == blob(cache) and blob(cache).read_bytes() == CONTENT
    assert fetch(cache, store) == blob(cache) == cache.fetch(ScriptedStore(), "other", SHA256, SIZE)
    assert store.starts == [0]
    assert files(cache) == [f"blobs/{SHA256[:2]}/{SHA256}", f"locks/{SHA256}"]
    store.files["empty"] = b""
    assert cache.fetch(store, "empty", hashlib.sha256(b"").hexdigest(), 0).read_bytes() == b""


def test_a_local_file_is_verified_and_not_copied(tmp_path, cache):
    local = tmp_path / "zoo" / FILE
    local.parent.mkdir(parents=True)
    store = FolderStore(tmp_path / "zoo")
    assert "not on disk" in error_of(fetch, cache, store)
    local.write_bytes(CONTENT)
    assert fetch(cache, store) == local
    local.write_bytes(CONTENT[:-1])
    assert f"{local} differs" in (message := error_of(fetch, cache, store)) and f"found {SIZE - 1}" in message
    local.write_bytes(CONTENT[:-1] + bytes([CONTENT[-1] ^ 1]))
    message = error_of(fetch, cache, store)
    assert SHA256 in message and hashlib.sha256(local.read_bytes()).hexdigest() in message
    assert local.exists() and not cache.root.exists()


def test_an_interrupted_download_resumes(store, cache, waits, caplog):
    store.plan = [BUSY, 100_000, BUSY, 50_000, 10_000]
    assert fetch(cache, store).read_bytes() == CONTENT
    assert store.starts == [0, 0, 100_000, 100_000, 150_000, 160_000]
    assert len(waits) == len(caplog.records) == 5 and "Attempt 2 follows" in caplog.text
    assert not partial(cache).exists()


def test_waits_double_vary_and_restart_after_progress(store, cache, waits):
    store.plan = [*[BUSY] * 4, 10, *[BUSY] * 3]
    fetch(cache, store)
    for wait, middle in zip(waits, [1, 2, 4, 8, 1, 2, 4, 8], strict=True):
        assert 0.75 * middle <= wait <= 1.25 * middle
    assert len(set(waits)) == 8


def test_the_number_of_attempts_is_limited_and_received_bytes_are_kept(store, cache):
    store.plan = [100_000, *[BUSY] * 20]
    message = error_of(fetch, cache, store)
    assert f"after {ATTEMPTS} attempts" in message and "100,000 of 300,000 bytes" in message
    assert partial(cache).read_bytes() == CONTENT[:100_000]
    store.plan = [10] * 100
    assert f"after {TOTAL_ATTEMPTS} attempts" in error_of(fetch, cache, store)


def test_a_server_may_ask_to_wait_within_limits(store, cache, waits):
    for seconds in (40, 100_000):
        busy = Transient("busy")
        busy.retry_after = seconds
        store.plan.append(busy)
    fetch(cache, store)
    assert waits == [40, cache_module._LONGEST_ASKED_WAIT_S]


def test_a_download_and_a_small_file_are_limited_in_seconds(store, cache, monkeypatch):
    clock = iter(range(0, 10**9, 400))
    monkeypatch.setattr(cache_module.time, "monotonic", lambda: next(clock))
    assert "the limit is 900 (BISSL_ZOO_MAX_SECONDS" in error_of(fetch, cache, store)
    monkeypatch.setenv("BISSL_ZOO_MAX_SECONDS", "300")
    assert "the limit is 300" in error_of(store.read_index, FILE)


@pytest.mark.parametrize("content", [CONTENT[:-1], CONTENT + b"x", bytes(SIZE)], ids=["shorter", "longer", "other"])
def test_a_file_that_differs_from_the_index_is_an_error_and_not_stored(store, cache, content):
    store.plan = [content] * TOTAL_ATTEMPTS
    message = error_of(fetch, cache, store)
    assert f"{store.location}/{FILE}" in message and not blob(cache).exists()
    expected = {SIZE - 1: "ended after 299,999", SIZE + 1: "larger than its limit, the 300,000", SIZE: SHA256}
    assert expected[len(content)] in message
    store.plan = []
    assert fetch(cache, store).read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("content", "starts"), [(CONTENT, []), (CONTENT[:1000], [1000]), (CONTENT + b"x", [0])], ids=["all", "part", "more"]
)
def test_an_incomplete_file_is_used_as_far_as_it_fits(store, cache, content, starts):
    partial(cache, content)
    assert fetch(cache, store).read_bytes() == CONTENT and store.starts == starts


def cut(path):
    path.write_bytes(CONTENT[:-1])


def flip(path):
    path.write_bytes(CONTENT[:5] + bytes([CONTENT[5] ^ 4]) + CONTENT[6:])


def link(path):
    path.rename(path.with_name("target"))
    path.symlink_to(path.with_name("target"))


def pipe(path):
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("damage", [cut, flip, link, pipe])
def test_a_damaged_copy_is_named_removed_and_downloaded_again(store, cache, monkeypatch, damage):
    damage(fetch(cache, store))
    monkeypatch.setenv("BISSL_ZOO_OFFLINE", "1")
    assert f"{blob(cache)} was damaged" in error_of(fetch, cache, store)
    assert not os.path.lexists(blob(cache))
    monkeypatch.setenv("BISSL_ZOO_OFFLINE", "0")
    assert fetch(cache, store).read_bytes() == CONTENT and not blob(cache).is_symlink()


@pytest.mark.parametrize("kind", ["partial", "locks"])
def test_a_link_in_the_cache_is_not_written_through(tmp_path, store, cache, kind):
    (tmp_path / "target").write_bytes(b"mine")
    planted = cache.root / kind / SHA256
    planted.parent.mkdir(parents=True)
    planted.symlink_to(tmp_path / "target")
    message = error_of(fetch, cache, store)
    assert str(planted) in message and "link" in message
    assert (tmp_path / "target").read_bytes() == b"mine" and store.starts == []


def test_a_full_disk_is_reported_before_and_during_a_download(store, cache, monkeypatch):
    message = error_of(fetch, cache, store, size=1 << 60)
    assert "are free" in message and str(cache.root) in message and "BISSL_ZOO_CACHE" in message and store.starts == []

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(cache_module.os, "fsync", full)
    assert "No space left" in error_of(fetch, cache, store)
    assert partial(cache).read_bytes() == CONTENT
    monkeypatch.undo()
    assert fetch(cache, store).read_bytes() == CONTENT


def test_a_cache_that_cannot_be_created_is_named(tmp_path, store):
    (tmp_path / "file").write_text("")
    message = error_of(fetch, Cache(tmp_path / "file"), store)
    assert "cannot be written: Not a directory" in message and "BISSL_ZOO_CACHE" in message


def test_the_random_state_of_a_run_does_not_change(store, cache):
    store.plan = [BUSY]
    random.seed(0)
    fetch(cache, store)
    after = random.random()
    random.seed(0)
    assert after == random.random()


def test_the_environment_names_the_cache(monkeypatch, tmp_path):
    assert default_cache().root == platformdirs.user_cache_path("bissl_zoo", appauthor=False)
    monkeypatch.setenv("BISSL_ZOO_CACHE", str(tmp_path / "here"))
    assert default_cache().root == tmp_path / "here"


def test_offline_is_parsed_strictly(monkeypatch, store, cache):
    for value, expected in (("1", True), ("True", True), ("0", False), ("", False)):
        monkeypatch.setenv("BISSL_ZOO_OFFLINE", value)
        assert is_offline() is expected
    monkeypatch.setenv("BISSL_ZOO_OFFLINE", "yes")
    assert "BISSL_ZOO_OFFLINE" in error_of(fetch, cache, store) and store.starts == []


def test_offline_uses_copies_and_reads_nothing(monkeypatch, store, cache):
    store.files["index.json"] = b"old"
    cache.read_index(store, "index.json")
    store.files["index.json"] = b"{}"
    assert cache.read_index(store, "index.json") == b"{}"
    assert cache.read_index(store, "curated.json") is None
    path, reads = fetch(cache, store), len(store.starts)
    monkeypatch.setenv("BISSL_ZOO_OFFLINE", "1")
    store.files["index.json"] = b"new"
    assert cache.read_index(store, "index.json") == b"{}" and cache.read_index(store, "curated.json") is None
    assert fetch(cache, store) == path and len(store.starts) == reads
    for call in (lambda: cache.fetch(store, "x", "0" * 64, 0), lambda: cache.read_index(store, "x")):
        assert f"{store.location}/x is not in the cache {cache.root}" in error_of(call)


def test_an_index_that_cannot_be_read_is_an_error_and_keeps_its_copy(monkeypatch, store, cache):
    store.plan = [BUSY] * ATTEMPTS
    assert "BISSL_ZOO_OFFLINE" not in error_of(cache.read_index, store, "index.json")
    store.files["index.json"] = b"{}"
    store.plan = [BUSY, 1]
    assert cache.read_index(store, "index.json") == b"{}"
    store.files["index.json"] = b"{  }"
    monkeypatch.setenv("BISSL_ZOO_MAX_INDEX_BYTES", "2")
    assert "the limit is 2 (BISSL_ZOO_MAX_INDEX_BYTES" in error_of(cache.read_index, store, "index.json")
    store.plan = [ZooError("refused")]
    assert "BISSL_ZOO_OFFLINE=1 works" in error_of(cache.read_index, store, "index.json")
    monkeypatch.setenv("BISSL_ZOO_OFFLINE", "1")
    assert cache.read_index(store, "index.json") == b"{}"


PROGRAM = """
import hashlib, os, sys
from bissl_zoo.zoo.cache import Cache
from bissl_zoo.zoo.stores.http import HttpStore

address, root, file, sha256, size = sys.argv[1:]
path = Cache(root).fetch(HttpStore(address), file, sha256, int(size))
print(path, hashlib.sha256(path.read_bytes()).hexdigest())
"""


@pytest.fixture
def server(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with FaultyServer() as server:
        server.files[f"/{FILE}"] = CONTENT
        yield server


def start(server, cache):
    """Start a process that fetches the file and prints its path and digest."""
    paths = filter(None, [os.environ.get("PYTHONPATH"), str(REPOSITORY)])
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *map(str, [server.address, cache.root, FILE, SHA256, SIZE])],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
    )


@pytest.mark.slow
def test_eight_processes_make_one_download(server, cache):
    processes = [start(server, cache) for _ in range(8)]
    assert [process.communicate(timeout=120)[0] for process in processes] == [f"{blob(cache)} {SHA256}\n"] * 8
    assert len(server.requests) == 1 and server.sent == SIZE
    assert files(cache) == [f"blobs/{SHA256[:2]}/{SHA256}", f"locks/{SHA256}"]


@pytest.mark.slow
def test_after_a_kill_the_next_process_resumes_the_download(server, cache):
    server.plans[f"/{FILE}"] = [Answer(sends=100_000, end="stall")]
    with start(server, cache) as process:
        server.wait_until_sent(100_000)
        deadline = time.monotonic() + 60
        while not partial(cache).exists() or partial(cache).stat().st_size < 10_000:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    received = partial(cache).stat().st_size
    assert fetch(cache, HttpStore(server.address)).read_bytes() == CONTENT
    assert server.ranges() == [None, f"bytes={received}-"]
