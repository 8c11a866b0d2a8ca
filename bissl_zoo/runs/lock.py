"""One process writes to a run directory at a time."""

import contextlib
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import portalocker

from bissl_zoo.errors import CheckpointError, ConfigError

logger = logging.getLogger(__name__)

LOCK_FILE = "run.lock"

#: seconds between signs of life of a run, and how many of them may be missed
HEARTBEAT, MISSED = 15.0, 4
#: seconds after which a lock that was made has been written
WRITTEN = 1.0


@contextlib.contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Hold `folder` for this process, and show a sign of life every 15 seconds.

    A lock that a dead process left is taken over: on this machine at once, of another machine (where a node was lost)
    once it has shown no sign of life for a minute.

    Raises:
        CheckpointError: another process that lives holds it.
        ConfigError: the folder cannot be made or written.
    """
    path, mine = folder / LOCK_FILE, uuid.uuid4().hex
    try:
        _acquire(path, mine)
    except OSError as error:
        raise ConfigError(f"train.output_dir '{folder}' cannot be written: {error.strerror}.") from error
    ended = threading.Event()
    heart = threading.Thread(target=_beat, args=(path, mine, ended), daemon=True)
    heart.start()
    try:
        yield
    finally:
        ended.set()
        heart.join()
        if read_lock(path).get("id") == mine:
            path.unlink()


def _acquire(path: Path, mine: str) -> None:
    facts = {"id": mine, "host": socket.gethostname(), "pid": os.getpid(), "started": started_at(os.getpid())}
    path.parent.mkdir(parents=True, exist_ok=True)
    with _alone_in(path.parent):
        if path.exists():
            holder = read_lock(path)
            if not holder:  # perhaps not written yet
                time.sleep(WRITTEN)
                holder = read_lock(path)
            if _lives(path, holder):
                raise CheckpointError(
                    f"The run in {path.parent} is being written by process {holder['pid']} on {holder['host']}. Stop "
                    "that one, or give another train.output_dir."
                )
            logger.info(
                f"taking over {path.parent} from process {holder.get('pid')} on {holder.get('host')}, which is gone"
            )
            path.unlink()
        handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        os.write(handle, json.dumps(facts).encode())
        os.close(handle)


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Look at a lock and take it in one piece: two processes may find the same one stale.

    Some file systems of clusters have no such locks; there both may have it, if they begin within the same millisecond.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(portalocker.LockException):
            portalocker.lock(handle, portalocker.LockFlags.EXCLUSIVE)
        yield
    finally:
        os.close(handle)


def _lives(path: Path, holder: dict) -> bool:
    """Whether the process that a lock names runs; of another machine's, whether it shows a sign of life."""
    if not holder:
        return False
    if holder["host"] == socket.gethostname():
        return holder["started"] is not None and started_at(holder["pid"]) == holder["started"]
    logger.info(f"{path.parent} was written by process {holder['pid']} on {holder['host']}; waiting for a sign of life")
    seen, deadline = _mtime(path), time.monotonic() + HEARTBEAT * MISSED
    while time.monotonic() < deadline:
        if _mtime(path) != seen:
            return path.exists()
        time.sleep(HEARTBEAT / 20)
    return False


def _beat(path: Path, mine: str, ended: threading.Event) -> None:
    while not ended.wait(HEARTBEAT):
        with contextlib.suppress(OSError):  # a file system that does not answer now may at the next beat
            if read_lock(path).get("id") == mine:
                os.utime(path)


def read_lock(path: Path) -> dict:
    """What a lock says; nothing where there is none, or none that can be read."""
    try:
        facts = json.loads(path.read_text())
        return facts if {"id", "host", "pid", "started"} <= facts.keys() else {}
    except (OSError, ValueError, AttributeError, RecursionError):
        return {}


def _mtime(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except OSError:
        return None


def started_at(pid: int) -> str | None:
    """When a process of this machine began, in a form that tells it from a later one of its number; None if it is gone.

    Where the system has no /proc, a process that answers has begun at an unknown time.
    """
    if Path("/proc/self/stat").exists():
        try:
            # the name in parentheses may hold anything; the start time is the 20th field after it
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
        except (OSError, IndexError):
            return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        return "unknown"
    return "unknown"
