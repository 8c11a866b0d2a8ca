"""One process at a time writes to a run directory."""

import contextlib
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import portalocker

from bissl_zoo.errors import CheckpointError, ConfigError

LOCK_FILE = "run.lock"
#: seconds to wait for a lock, longer than `runs list` holds one to look at it
PATIENCE = 0.5

_EXCLUSIVE = portalocker.LockFlags.EXCLUSIVE | portalocker.LockFlags.NON_BLOCKING
_SHARED = portalocker.LockFlags.SHARED | portalocker.LockFlags.NON_BLOCKING
#: a forked process, such as a loader's worker, inherits the lock; it closes these so as not to outlive the run with it
_held: set[IO[str]] = set()
os.register_at_fork(after_in_child=lambda: [file.close() for file in _held])


@contextlib.contextmanager
def run_lock(folder: Path, lock: bool = True) -> Iterator[None]:
    """Hold the lock of the run directory `folder`, and create the directory if necessary.

    The lock is the kernel's, on the open file `run.lock`: it is released when the process ends in any way, and holds
    across containers and while the process is stopped.

    Args:
        lock: False for a file system without locks (`train.lock=False`); the user excludes other processes.
    Raises:
        CheckpointError: another process holds it.
        ConfigError: the directory cannot be written, or its file system has no locks.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = _locked(folder / LOCK_FILE) if lock else None
    except OSError as error:
        raise ConfigError(f"train.output_dir '{folder}' cannot be written: {error.strerror}.") from error
    if file is None:
        yield
        return
    _held.add(file)
    try:
        yield
    finally:
        _held.discard(file)
        with contextlib.suppress(OSError):  # while it is locked: a process that waits for it looks at the name again
            os.unlink(folder / LOCK_FILE)
        file.close()


def _locked(path: Path) -> IO[str]:
    """Open a lock file, lock it, and write the name of this process into it."""
    deadline = time.monotonic() + PATIENCE
    while True:
        file = open(path, "a+")
        try:
            portalocker.lock(file, _EXCLUSIVE)
            if path.exists() and os.path.samestat(os.stat(path), os.fstat(file.fileno())):
                file.truncate(0)
                file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
                file.flush()
                return file
            file.close()  # the process that held it has just removed it
        except portalocker.AlreadyLocked as error:
            holder = _holder(file)
            file.close()
            if time.monotonic() > deadline:
                raise CheckpointError(
                    f"The run in {path.parent} is being written by {holder}. Stop that process, or give another "
                    "train.output_dir."
                ) from error
        except portalocker.LockException as error:
            file.close()
            raise ConfigError(
                f"The file system of {path.parent} has no file locks ({error}), so that two runs could write to this "
                "directory. Give another train.output_dir, or train.lock=False if no other process uses this one."
            ) from error
        time.sleep(0.05)


def _holder(file: IO[str]) -> str:
    file.seek(0)
    return file.read(200).strip() or "another process"


def writer_of(folder: Path) -> str | None:
    """Return the process that holds the lock of a run directory, as text, or None; never waits."""
    try:
        with open(folder / LOCK_FILE, errors="replace") as file:
            try:
                portalocker.lock(file, _SHARED)
            except portalocker.AlreadyLocked:
                return _holder(file)
            except portalocker.LockException:  # no locks here, so that no process holds one
                return None
    except OSError:
        return None
    return None
