"""Kernel locks on files."""

import contextlib
import errno
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path

import portalocker

from bissl_zoo.errors import ZooError
from bissl_zoo.files import open_plain

SILENT_WAIT_S = 3.0
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)

logger = logging.getLogger(__name__)


def try_lock(file: Path) -> int | None:
    """Lock a file, which is created if necessary; return its descriptor, or None if another process holds the lock.

    The kernel frees the lock when the descriptor is closed or the process ends. With BISSL_ZOO_NO_LOCKS=1 nothing is
    locked.

    Raises:
        ZooError: the file system has no locks.
        OSError: the file cannot be opened.
    """
    descriptor = open_plain(str(file), os.O_RDWR | os.O_CREAT)
    if os.environ.get("BISSL_ZOO_NO_LOCKS") == "1":
        return descriptor
    try:
        portalocker.lock(descriptor, portalocker.LockFlags.EXCLUSIVE | portalocker.LockFlags.NON_BLOCKING)
    except portalocker.AlreadyLocked:
        os.close(descriptor)
        return None
    except portalocker.LockException as error:
        os.close(descriptor)
        cause = error.args[0] if error.args else error
        if getattr(cause, "errno", None) in _NO_LOCKS:
            raise ZooError(
                f"The file system of {file.parent} has no locks ({cause}). Use another folder, or set "
                "BISSL_ZOO_NO_LOCKS=1 and make sure that only one process at a time writes there."
            ) from error
        raise OSError(getattr(cause, "errno", None), f"it cannot be locked: {cause}", str(file)) from error
    return descriptor


@contextlib.contextmanager
def locked(file: Path, purpose: str, timeout: float | None = None) -> Iterator[None]:
    """Hold the lock of a file; wait for the process that holds it.

    Args:
        purpose: completes the log line "Waiting for another process to ...".
        timeout: seconds, None to wait without a limit.
    Raises:
        ZooError: the timeout passed, or the file system has no locks.
        OSError: the file cannot be opened.
    """
    start, logged = time.monotonic(), False
    while (descriptor := try_lock(file)) is None:
        waited = time.monotonic() - start
        if timeout is not None and waited > timeout:
            raise ZooError(f"Another process has held {file} for {timeout:g} s. Try again later.")
        if waited > SILENT_WAIT_S and not logged:
            logger.warning("Waiting for another process to %s. It holds %s.", purpose, file)
            logged = True
        time.sleep(0.02)
    try:
        yield
    finally:
        os.close(descriptor)
