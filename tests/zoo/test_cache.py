import fcntl
import hashlib
import logging
import os
import pty
import random
import resource
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path

import platformdirs
import portalocker
import pytest
from faulty_server import Answer, FaultyServer

from bissl_zoo.errors import ZooError
from bissl_zoo.zoo import cache as cache_module
from bissl_zoo.zoo import download
from bissl_zoo.zoo.cache import Cache, default_cache, is_offline
from bissl_zoo.zoo.download import ATTEMPTS, TOTAL_ATTEMPTS
from bissl_zoo.zoo.stores.folder import FolderStore
from bissl_zoo.zoo.stores.http import HttpStore
from bissl_zoo.zoo.stores.store import Content

REPOSITORY = Path(__file__).resolve().parents[2]
FILE = "name/model.safetensors"
CONTENT = random.Random(0).randbytes(3_000_000)
SIZE, SHA256 = len(CONTENT), hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "BISSL_ZOO_CACHE", "BISSL_ZOO_OFFLINE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def server():
    with FaultyServer() as server:
        server.files[f"/{FILE}"] = CONTENT
        yield server


@pytest.fixture
def store(server):
    return HttpStore(server.address)


@pytest.fixture
def waits():
    """Seconds that the cache would have slept."""
    return []


@pytest.fixture
def cache(tmp_path, waits):
    return Cache(tmp_path / "cache", sleep=waits.append)


def plan(server, *answers):
    server.plans[f"/{FILE}"] = list(answers)


def fetch(cache, store, sha256=SHA256, size=SIZE):
    return cache.fetch(store, FILE, sha256, size)


def error_of(call, *arguments, **options):
    with pytest.raises(ZooError) as raised:
        call(*arguments, **options)
    return str(raised.value)


def blob(cache):
    return cache.root / "blobs" / SHA256[:2] / SHA256


def partial(cache, content=None):
    """Where the first part of the file is kept; made to hold `content` where that is given."""
    path = cache.root / "partial" / SHA256
    if content is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return path


def files(cache):
    return sorted(str(path.relative_to(cache.root)) for path in cache.root.rglob("*") if path.is_file())


def test_a_file_is_fetched_once_and_lies_under_its_digest(server, store, cache):
    path = fetch(cache, store)
    assert path == blob(cache) and path.read_bytes() == CONTENT
    assert fetch(cache, store) == path
    assert cache.fetch(HttpStore("http://elsewhere.invalid"), "other", SHA256, SIZE) == path
    assert len(server.requests) == 1 and server.sent == SIZE
    assert files(cache) == [f"blobs/{SHA256[:2]}/{SHA256}", f"locks/{SHA256}"]


def test_an_empty_file_is_fetched(server, store, cache):
    server.files["/empty"] = b""
    assert cache.fetch(store, "empty", hashlib.sha256(b"").hexdigest(), 0).read_bytes() == b""


def test_a_file_of_this_machine_is_compared_and_not_copied(tmp_path, cache):
    (tmp_path / "zoo" / "name").mkdir(parents=True)
    local = tmp_path / "zoo" / FILE
    store = FolderStore(tmp_path / "zoo")
    assert "not on disk" in error_of(fetch, cache, store)
    local.write_bytes(CONTENT)
    assert fetch(cache, store) == local
    local.write_bytes(CONTENT[:-1])
    assert f"{local} is not what was published: expected {SIZE} bytes, found {SIZE - 1}" in error_of(
        fetch, cache, store
    )
    changed = CONTENT[:-1] + bytes([CONTENT[-1] ^ 1])
    local.write_bytes(changed)
    message = error_of(fetch, cache, store)
    assert SHA256 in message and hashlib.sha256(changed).hexdigest() in message
    assert local.exists() and not cache.root.exists()


def test_an_interrupted_download_is_continued_where_it_broke_off(server, store, cache, waits, caplog):
    plan(
        server,
        Answer(status=503),
        Answer(sends=1_000_000),
        Answer(raw=b"", end="reset"),
        Answer(sends=500_000),
        Answer(headers={"Content-Length": "1600000"}),
    )
    assert fetch(cache, store).read_bytes() == CONTENT
    assert server.ranges() == [None, None, "bytes=1000000-", "bytes=1000000-", "bytes=1500000-"]
    assert server.sent == SIZE
    assert not partial(cache).exists()
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == len(waits) == 5
    assert "answered 503" in told[0] and "Attempt 2 follows" in told[0] and "broke off 2,000,000 bytes" in told[1]


def test_waits_double_vary_and_begin_anew_after_progress(server, store, cache, waits):
    plan(server, *[Answer(status=503)] * 4, Answer(sends=10), *[Answer(status=500)] * 3)
    fetch(cache, store)
    for wait, middle in zip(waits, [1, 2, 4, 8, 1, 2, 4, 8], strict=True):
        assert 0.75 * middle <= wait <= 1.25 * middle
    assert len(set(waits)) == 8


def test_attempts_end_where_nothing_new_arrives(server, store, cache):
    plan(server, Answer(sends=1_000_000), *[Answer(status=503)] * 20)
    message = error_of(fetch, cache, store)
    assert f"{store.location}/{FILE} answered 503" in message and "1,000,000 of 3,000,000 bytes have arrived" in message
    assert len(server.requests) == ATTEMPTS
    assert partial(cache).read_bytes() == CONTENT[:1_000_000]
    plan(server)
    assert fetch(cache, store).read_bytes() == CONTENT
    assert server.ranges()[-1] == "bytes=1000000-" and server.sent == SIZE


def test_a_server_that_sends_a_little_each_time_is_given_up_in_the_end(server, store, cache):
    plan(server, *[Answer(sends=10)] * 100)
    assert f"Given up after {TOTAL_ATTEMPTS} attempts" in error_of(fetch, cache, store)
    assert len(server.requests) == TOTAL_ATTEMPTS
    assert partial(cache).read_bytes() == CONTENT[: 10 * TOTAL_ATTEMPTS]


def test_the_server_says_how_long_to_wait_within_reason(server, store, cache, waits):
    plan(server, *[Answer(status=429, headers={"Retry-After": after}) for after in ("40", "100000", "soon")])
    fetch(cache, store)
    assert waits[:2] == [40, download.LONGEST_ASKED_WAIT_S] and waits[2] <= 5


def test_a_server_without_ranges_is_read_from_the_start(server, store, cache):
    plan(server, Answer(sends=1_000_000), Answer(ranges=False, sends=500_000), Answer(ranges=False))
    assert fetch(cache, store).read_bytes() == CONTENT
    assert server.ranges() == [None, "bytes=1000000-", "bytes=500000-"]
    assert server.sent == SIZE + 1_500_000


@pytest.mark.parametrize("sends", [(1_000_000, 1_000_000), (1_000_000, 500_000)])
def test_a_server_without_ranges_that_brings_nothing_new_is_given_up(server, store, cache, sends):
    plan(server, *[Answer(ranges=False, sends=count) for count in sends * 10])
    error_of(fetch, cache, store)
    assert len(server.requests) == ATTEMPTS


def test_a_shorter_file_is_an_error(server, store, cache):
    plan(server, *[Answer(body=CONTENT[:-1])] * ATTEMPTS)
    message = error_of(fetch, cache, store)
    assert f"{store.location}/{FILE} ended after 2,999,999 of 3,000,000 bytes" in message
    assert len(server.requests) == ATTEMPTS and server.sent == SIZE - 1
    assert not blob(cache).exists()


@pytest.mark.parametrize("announced", [True, False])
def test_a_longer_file_is_not_written_beyond_its_size(server, store, cache, announced):
    headers = {} if announced else {"Content-Length": None}
    plan(server, Answer(body=CONTENT + bytes(64 << 20), headers=headers))
    message = error_of(fetch, cache, store)
    assert f"{store.location}/{FILE} is longer than the 3,000,000 bytes" in message
    assert server.sent < 32 << 20  # what fits into the buffers of two sockets
    assert partial(cache).stat().st_size == 0 and not blob(cache).exists()


def test_another_file_of_the_same_size_is_named_and_removed(server, store, cache):
    other = random.Random(1).randbytes(SIZE)
    plan(server, Answer(body=other))
    message = error_of(fetch, cache, store)
    for told in (f"{store.location}/{FILE}", SHA256, hashlib.sha256(other).hexdigest(), "Fetch it again"):
        assert told in message
    assert files(cache) == [f"locks/{SHA256}"]
    assert fetch(cache, store).read_bytes() == CONTENT


def test_a_damaged_first_part_is_found_at_the_end(server, store, cache):
    partial(cache, bytes(1000))
    assert "expected sha256" in error_of(fetch, cache, store)
    assert server.ranges() == ["bytes=1000-"]
    assert fetch(cache, store).read_bytes() == CONTENT


def test_a_first_part_that_is_the_whole_file_needs_no_request(server, store, cache):
    partial(cache, CONTENT)
    assert fetch(cache, store).read_bytes() == CONTENT
    assert server.requests == []


def test_a_first_part_that_is_too_long_is_thrown_away(server, store, cache):
    partial(cache, CONTENT + b"x")
    assert fetch(cache, store).read_bytes() == CONTENT
    assert server.ranges() == [None]


def cut(path):
    path.write_bytes(CONTENT[:-1])


def flip(path):
    path.write_bytes(CONTENT[:5] + bytes([CONTENT[5] ^ 4]) + CONTENT[6:])


def link(path):
    target = path.with_name("target")
    target.write_bytes(CONTENT)
    path.unlink()
    path.symlink_to(target)


def pipe(path):
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("damage", [cut, flip, link, pipe])
@pytest.mark.parametrize("offline", [True, False])
def test_a_damaged_copy_is_found_removed_and_fetched_anew(server, store, cache, monkeypatch, damage, offline):
    damage(fetch(cache, store))
    monkeypatch.setenv("BISSL_ZOO_OFFLINE", str(int(offline)))
    assert f"{blob(cache)} is damaged" in error_of(fetch, cache, store)
    assert not os.path.lexists(blob(cache))
    monkeypatch.setenv("BISSL_ZOO_OFFLINE", "0")
    assert fetch(cache, store).read_bytes() == CONTENT
    assert not blob(cache).is_symlink() and len(server.requests) == 2


@pytest.mark.parametrize("kind", ["partial", "locks"])
def test_a_link_in_the_cache_is_not_written_through(tmp_path, server, store, cache, kind):
    target = tmp_path / "target"
    target.write_bytes(b"mine")
    planted = cache.root / kind / SHA256
    planted.parent.mkdir(parents=True)
    planted.symlink_to(target)
    message = error_of(fetch, cache, store)
    assert str(planted) in message and "link" in message
    assert target.read_bytes() == b"mine" and server.requests == []


def test_a_full_disk_is_told_before_anything_is_fetched(server, store, cache):
    message = error_of(fetch, cache, store, size=1 << 60)
    assert f"{1 << 40}.0 MiB more" in message and "are free there" in message and str(cache.root) in message
    assert "BISSL_ZOO_CACHE" in message and server.requests == []


def test_a_disk_that_fills_up_keeps_what_has_arrived(server, store, cache):
    whole = cache.root / "blobs" / "ab" / "abcd"
    whole.parent.mkdir(parents=True)
    whole.write_bytes(b"whole")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        message = error_of(fetch, cache, store)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(partial(cache)) in message and "1.9 MiB more" in message
    assert partial(cache).read_bytes() == CONTENT[: 1 << 20] and whole.read_bytes() == b"whole"
    assert fetch(cache, store).read_bytes() == CONTENT
    assert server.ranges() == [None, "bytes=1048576-"]


def test_a_cache_that_cannot_be_made_is_named(tmp_path, store):
    (tmp_path / "file").write_text("")
    message = error_of(fetch, Cache(tmp_path / "file"), store)
    assert "cannot be written: Not a directory" in message and "BISSL_ZOO_CACHE" in message


def test_the_random_numbers_of_a_run_do_not_move(server, store, cache):
    plan(server, Answer(status=503))
    random.seed(0)
    fetch(cache, store)
    moved = random.random()
    random.seed(0)
    assert moved == random.random()


def test_off_a_terminal_a_large_file_is_one_line(server, store, cache, caplog, capfd, monkeypatch):
    caplog.set_level(logging.INFO)
    fetch(cache, store)
    assert caplog.records == []
    monkeypatch.setattr(download, "SHOWN_FROM", 1000)
    server.files["/large"] = b"x" * 2000
    cache.fetch(store, "large", hashlib.sha256(b"x" * 2000).hexdigest(), 2000)
    assert [record.getMessage() for record in caplog.records] == [f"Fetching {store.location}/large (0.0 MiB)."]
    assert capfd.readouterr() == ("", "")


def test_on_a_terminal_a_bar_shows_size_and_rate(store, cache, monkeypatch):
    monkeypatch.setattr(download, "SHOWN_FROM", 1000)
    partial(cache, CONTENT[:1_000_000])
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
    with open(follower, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        fetch(cache, store)
        monkeypatch.undo()
        shown = os.read(leader, 1 << 16).decode()
    os.close(leader)
    assert FILE in shown and "100%" in shown and "2.86M/2.86M" in shown and "B/s]" in shown


def test_the_cache_is_where_the_environment_says(monkeypatch, tmp_path):
    assert default_cache().root == platformdirs.user_cache_path("bissl_zoo", appauthor=False)
    monkeypatch.setenv("BISSL_ZOO_CACHE", str(tmp_path / "here"))
    assert default_cache().root == tmp_path / "here"


@pytest.mark.parametrize(
    "value, meant", [("1", True), ("true", True), ("True", True), ("0", False), ("", False), ("false", False)]
)
def test_offline_is_read_strictly(monkeypatch, value, meant):
    monkeypatch.setenv("BISSL_ZOO_OFFLINE", value)
    assert is_offline() is meant


@pytest.mark.parametrize("value", ["yes", "2", "of", " 1"])
def test_offline_that_could_mean_anything_is_an_error(monkeypatch, value, server, store, cache):
    monkeypatch.setenv("BISSL_ZOO_OFFLINE", value)
    assert f"BISSL_ZOO_OFFLINE is {value!r}" in error_of(fetch, cache, store)
    assert "BISSL_ZOO_OFFLINE" in error_of(cache.read_index, store, "index.json", 100)
    assert server.requests == []


def test_offline_serves_what_is_there_and_asks_for_nothing(monkeypatch, server, store, cache):
    path = fetch(cache, store)
    monkeypatch.setenv("BISSL_ZOO_OFFLINE", "1")
    assert fetch(cache, store) == path
    message = error_of(cache.fetch, store, "other", hashlib.sha256(b"").hexdigest(), 0)
    assert f"{store.location}/other is not in the cache {cache.root}" in message and "BISSL_ZOO_OFFLINE" in message
    assert len(server.requests) == 1


INDEX = Content(b"{}", hashlib.sha256(b"{}").hexdigest())


def test_an_index_is_read_each_time_and_offline_as_it_was(monkeypatch, server, store, cache):
    server.files["/index.json"] = b"old"
    cache.read_index(store, "index.json", 100)
    server.files["/index.json"] = b"{}"
    assert cache.read_index(store, "index.json", 100) == INDEX
    assert cache.read_index(store, "curated.json", 100) is None
    monkeypatch.setenv("BISSL_ZOO_OFFLINE", "1")
    server.files["/index.json"] = b"new"
    assert cache.read_index(store, "index.json", 100) == INDEX
    assert cache.read_index(store, "curated.json", 100) is None
    other = HttpStore(f"{server.address}/other")
    assert f"{other.location}/index.json has never been read" in error_of(cache.read_index, other, "index.json", 100)
    assert len(server.requests) == 3
    assert len(list((cache.root / "indexes").iterdir())) == 2


def test_an_index_that_cannot_be_read_is_not_replaced_by_its_copy(server, store, cache, waits):
    server.plans["/index.json"] = [Answer(status=503)] * ATTEMPTS
    assert "BISSL_ZOO_OFFLINE" not in error_of(cache.read_index, store, "index.json", 100)
    server.files["/index.json"] = b"{}"
    server.plans["/index.json"] = [Answer(status=503), Answer(sends=1)]
    assert cache.read_index(store, "index.json", 100) == INDEX
    server.plans["/index.json"] = [Answer(status=503)] * ATTEMPTS
    assert "BISSL_ZOO_OFFLINE=1 works with what was read" in error_of(cache.read_index, store, "index.json", 100)
    assert len(waits) == 2 * (ATTEMPTS - 1) + 2
    server.plans["/index.json"] = [Answer(status=403)]
    assert "BISSL_ZOO_OFFLINE=1 works with what was read" in error_of(cache.read_index, store, "index.json", 100)


def test_an_index_above_the_limit_leaves_the_copy_alone(monkeypatch, server, store, cache):
    server.files["/index.json"] = b"{}"
    cache.read_index(store, "index.json", 2)
    server.files["/index.json"] = b"{  }"
    assert "more than 2 bytes" in error_of(cache.read_index, store, "index.json", 2)
    monkeypatch.setenv("BISSL_ZOO_OFFLINE", "1")
    assert cache.read_index(store, "index.json", 2) == INDEX


def test_a_link_in_the_place_of_an_index_is_not_followed(tmp_path, monkeypatch, server, store, cache):
    server.files["/index.json"] = b"{}"
    cache.read_index(store, "index.json", 2)
    [copy] = (cache.root / "indexes").iterdir()
    copy.unlink()
    copy.symlink_to(tmp_path / "target")
    (tmp_path / "target").write_bytes(b"{}")
    monkeypatch.setenv("BISSL_ZOO_OFFLINE", "1")
    assert "has never been read" in error_of(cache.read_index, store, "index.json", 2)
    monkeypatch.setenv("BISSL_ZOO_OFFLINE", "0")
    cache.read_index(store, "index.json", 2)
    assert not copy.is_symlink() and copy.read_bytes() == b"{}"


def test_the_index_of_a_folder_is_read_there(tmp_path, monkeypatch, cache):
    (tmp_path / "index.json").write_bytes(b"{}")
    monkeypatch.setenv("BISSL_ZOO_OFFLINE", "1")
    assert cache.read_index(FolderStore(tmp_path), "index.json", 100) == INDEX
    assert cache.read_index(FolderStore(tmp_path), "curated.json", 100) is None
    assert not cache.root.exists()


PROGRAM = """
import hashlib, logging, os, sys
from bissl_zoo.zoo.cache import Cache
from bissl_zoo.zoo.stores.http import HttpStore

logging.basicConfig(format="%(message)s")
address, root, file, sha256, size, processes = sys.argv[1:]
children = []
for _ in range(int(processes) - 1):
    child = os.fork()
    if child == 0:
        children = []
        break
    children.append(child)
path = Cache(root).fetch(HttpStore(address), file, sha256, int(size))
os.write(1, f"{path} {hashlib.sha256(path.read_bytes()).hexdigest()}\\n".encode())
os._exit(any(os.waitpid(child, 0)[1] for child in children))  # at once: torch, eight times, takes long to leave
"""


def start(server, cache, processes=1):
    """So many processes, of which each fetches the file and says where it is and its digest."""
    arguments = [server.address, cache.root, FILE, SHA256, SIZE, processes]
    paths = filter(None, [os.environ.get("PYTHONPATH"), str(REPOSITORY)])
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
    )


def test_of_eight_processes_one_fetches_and_all_have_the_file(server, cache):
    with start(server, cache, processes=8) as started:
        out, err = started.communicate(timeout=120)
    assert started.returncode == 0, err
    assert out == f"{blob(cache)} {SHA256}\n" * 8
    assert len(server.requests) == 1 and server.sent == SIZE
    assert files(cache) == [f"blobs/{SHA256[:2]}/{SHA256}", f"locks/{SHA256}"]


def test_after_a_kill_in_mid_download_the_next_process_continues(server, store, cache):
    plan(server, Answer(sends=1_000_000, end="stall"))
    with start(server, cache) as started:
        server.wait_until_sent(1_000_000)
        deadline = time.monotonic() + 60
        while not partial(cache).exists() or partial(cache).stat().st_size < 900_000:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        started.send_signal(signal.SIGKILL)
        assert started.wait() == -signal.SIGKILL
    kept = partial(cache).stat().st_size
    assert fetch(cache, store).read_bytes() == CONTENT
    assert server.ranges() == [None, f"bytes={kept}-"]
    assert server.sent == 1_000_000 + SIZE - kept


def test_a_process_that_waits_says_for_what(server, store, cache, monkeypatch, caplog):
    monkeypatch.setattr(cache_module, "SILENT_WAIT_S", 0.05)
    lock = cache.root / "locks" / SHA256
    lock.parent.mkdir(parents=True)
    found = []
    with portalocker.Lock(str(lock), "a"):
        waiting = threading.Thread(target=lambda: found.append(fetch(cache, store)))
        waiting.start()
        deadline = time.monotonic() + 60
        while not caplog.records:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert server.requests == []
    waiting.join(60)
    assert found == [blob(cache)]
    assert f"Waiting for another process to fetch {store.location}/{FILE}. It holds {lock}" in caplog.text
