"""One run per directory, by a lock of the kernel."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import portalocker
import pytest

from bissl_zoo.errors import CheckpointError, ConfigError
from bissl_zoo.runs.lock import LOCK_FILE, run_lock, writer_of

HOLD = """
import os, sys, time
from pathlib import Path
from bissl_zoo.runs.lock import run_lock
with run_lock(Path(sys.argv[1])):
    child = os.fork() if "fork" in sys.argv else 1
    if child:
        print("locked", child, flush=True)
    time.sleep(600)
"""


@pytest.fixture
def hold(tmp_path):
    """Start a process that holds the lock: `hold("fork", launcher=[...])`."""
    processes = []

    def start(*arguments, launcher=()):
        command = [*launcher, sys.executable, "-c", HOLD, tmp_path, *arguments]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
        processes.append(process)
        answer = process.stdout.readline().split()
        if not answer:
            pytest.skip(f"{launcher[0]} is not permitted here")
        process.child = int(answer[1])
        return process

    yield start
    for process in processes:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()


def is_refused(folder):
    try:
        with run_lock(folder):
            return False
    except CheckpointError:
        return True


def test_a_second_run_is_refused_with_the_name_of_the_first_and_nothing_remains(tmp_path):
    folder = tmp_path / "new"
    name = f"process {os.getpid()} on {socket.gethostname()}"
    with run_lock(folder):
        assert writer_of(folder) == name
        with pytest.raises(CheckpointError, match=f"written by {name}"), run_lock(folder):
            pytest.fail("two runs in one directory")
    assert writer_of(folder) is None and not list(folder.iterdir())


def test_a_file_of_any_content_is_no_lock(tmp_path):
    (tmp_path / LOCK_FILE).write_bytes(b"\xff" * 1000)
    assert writer_of(tmp_path) is None and not is_refused(tmp_path)


def test_a_file_system_without_locks_needs_an_explicit_option(tmp_path, monkeypatch):
    def refuse(*_):
        raise portalocker.LockException("No locks available")

    monkeypatch.setattr(portalocker, "lock", refuse)
    with pytest.raises(ConfigError, match="has no file locks .*train.lock=False"), run_lock(tmp_path):
        pytest.fail("not locked")
    with run_lock(tmp_path, lock=False):
        assert writer_of(tmp_path) is None


def test_a_directory_that_cannot_be_created_is_named():
    with pytest.raises(ConfigError, match="'/proc/run' cannot be written"), run_lock(Path("/proc/run")):
        pytest.fail("not locked")


def test_one_of_many_that_start_at_once_gets_the_lock_each_time(tmp_path):
    (tmp_path / LOCK_FILE).write_text("process 1 on elsewhere\n")
    start, end, outcomes = threading.Barrier(8), threading.Event(), []

    def contend():
        start.wait()
        try:
            with run_lock(tmp_path):
                outcomes.append("locked")
                end.wait(30)
        except CheckpointError:
            outcomes.append("refused")

    threads = [threading.Thread(target=contend) for _ in range(8)]
    for thread in threads:
        thread.start()
    while len(outcomes) < 8:
        time.sleep(0.01)
    end.set()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["locked"] + ["refused"] * 7


@pytest.mark.slow
def test_a_killed_process_leaves_no_lock_even_if_a_process_that_it_forked_lives_on(tmp_path, hold):
    process = hold("fork")
    assert is_refused(tmp_path)
    process.send_signal(signal.SIGKILL)
    process.wait()
    os.kill(process.child, 0)  # lives
    assert writer_of(tmp_path) is None and not is_refused(tmp_path)


@pytest.mark.slow
def test_a_stopped_process_keeps_the_lock(tmp_path, hold):
    process = hold()
    process.send_signal(signal.SIGSTOP)
    assert is_refused(tmp_path) and writer_of(tmp_path) == f"process {process.pid} on {socket.gethostname()}"
    process.send_signal(signal.SIGCONT)
    assert is_refused(tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("unshare"), reason="needs unshare")
def test_a_process_in_another_pid_and_host_namespace_keeps_the_lock(tmp_path, hold):
    hold(launcher=["unshare", "--user", "--map-root-user", "--pid", "--uts", "--fork", "--kill-child"])
    assert is_refused(tmp_path)
