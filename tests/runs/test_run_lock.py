"""One run per directory: who is refused, whose lock is stale, and what is left behind."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from bissl_zoo.errors import CheckpointError
from bissl_zoo.runs import lock as module
from bissl_zoo.runs.lock import LOCK_FILE, run_lock

HOLD = """
import sys, time
from pathlib import Path
from bissl_zoo.runs.lock import run_lock
with run_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the folder."""
    with subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_second_run_is_refused_while_the_first_lives_and_goes_on_when_it_was_killed(tmp_path, holder):
    with pytest.raises(CheckpointError, match=f"written by process {holder.pid} on {socket.gethostname()}"):
        with run_lock(tmp_path):
            pytest.fail("two runs in one directory")
    assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == holder.pid
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    said = []
    with run_lock(tmp_path, said.append):
        assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == os.getpid()
    assert said == [f"taking over {tmp_path} from process {holder.pid} on {socket.gethostname()}, which is gone"]
    assert not list(tmp_path.iterdir())


def test_a_process_of_the_same_number_that_began_later_is_another_one(tmp_path):
    lock = {"id": "x", "host": socket.gethostname(), "pid": os.getpid(), "started": "1"}
    (tmp_path / LOCK_FILE).write_text(json.dumps(lock))
    with run_lock(tmp_path, lambda line: None):
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": 3}'])
def test_a_lock_that_was_cut_short_is_stale(tmp_path, content, monkeypatch):
    monkeypatch.setattr(module, "WRITTEN", 0.01)
    (tmp_path / LOCK_FILE).write_text(content)
    with run_lock(tmp_path, lambda line: None):
        pass
    assert not list(tmp_path.iterdir())


def of_another_machine(folder):
    path = folder / LOCK_FILE
    path.write_text(json.dumps({"id": "x", "host": "elsewhere", "pid": 7, "started": "1"}))
    return path


def test_a_run_of_another_machine_that_shows_signs_of_life_keeps_its_directory(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "HEARTBEAT", 0.5)
    path = of_another_machine(tmp_path)
    beats = threading.Timer(0.3, lambda: os.utime(path, (1, 1)))
    beats.start()
    with pytest.raises(CheckpointError, match="written by process 7 on elsewhere"):
        with run_lock(tmp_path, lambda line: None):
            pytest.fail("two runs in one directory")
    assert path.exists()


def test_a_run_of_another_machine_without_a_sign_of_life_is_taken_over(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "HEARTBEAT", 0.05)
    of_another_machine(tmp_path)
    said = []
    with run_lock(tmp_path, said.append):
        pass
    assert "waiting for a sign of life" in said[0] and "which is gone" in said[1]


def test_a_lock_that_is_held_shows_signs_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "HEARTBEAT", 0.05)
    with run_lock(tmp_path):
        path = tmp_path / LOCK_FILE
        os.utime(path, (1, 1))
        deadline = time.monotonic() + 10
        while path.stat().st_mtime == 1:
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_of_many_that_find_a_stale_lock_one_gets_it(tmp_path):
    (tmp_path / LOCK_FILE).write_text(json.dumps({"id": "x", "host": socket.gethostname(), "pid": 1, "started": "no"}))
    start, end, outcomes = threading.Barrier(8), threading.Event(), []

    def contend():
        start.wait()
        try:
            with run_lock(tmp_path, lambda line: None):
                outcomes.append("held")
                end.wait(30)
        except CheckpointError:
            outcomes.append("refused")
        if len(outcomes) == 8:
            end.set()

    threads = [threading.Thread(target=contend) for _ in range(8)]
    for thread in threads:
        thread.start()
    while len(outcomes) < 8:
        time.sleep(0.01)
    end.set()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["held"] + ["refused"] * 7
