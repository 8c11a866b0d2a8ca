"""Errors of a disk that is full or fails: their message, and retries."""

import errno
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from bissl_zoo.errors import CheckpointError

#: full, over a quota or limit, failing, read-only, or on a server that does not answer: errors that may go away
DISK_ERRORS = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.ESTALE, errno.ETIMEDOUT}
)

Result = TypeVar("Result")


class DiskError(CheckpointError):
    """A write failed with one of `DISK_ERRORS`; `reason` is the part of the message that explains it."""

    def __init__(self, message: str, reason: str = "") -> None:
        super().__init__(message)
        self.reason = reason


def write_error(what: str, error: OSError, path: Path, needed: int, advice: str) -> CheckpointError:
    """Return the error to raise after a failed write of `needed` bytes: `what` failed, the reason, and `advice`."""
    reason = reason_of(error, path, needed)
    message = f"{what}: {reason}. {advice}"
    return DiskError(message, reason) if error.errno in DISK_ERRORS else CheckpointError(message)


def reason_of(error: OSError, path: Path, needed: int) -> str:
    """Return such as `No space left on device; it needs about 210 MiB, 12 MiB are free`."""
    if error.errno not in DISK_ERRORS:
        return str(error)
    reason = f"{os.strerror(error.errno)}; it needs about {format_size(needed)}"
    existing = next(folder for folder in (path, *path.absolute().parents) if folder.is_dir())
    try:
        disk = os.statvfs(existing)
    except OSError as unknown:
        return f"{reason}, free space unknown ({unknown.strerror})"
    inodes = ", and no inode for another file" if disk.f_files and not disk.f_favail else ""
    return f"{reason}, {format_size(disk.f_bavail * disk.f_frsize)} are free{inodes}"


def format_size(size: int) -> str:
    """Return a number of bytes as text such as `12 MiB`."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if size >= unit:
            return f"{size / unit:,.{0 if size >= 10 * unit else 1}f} {name}"
    return f"{size} bytes"


def retried(
    action: Callable[[], Result], pauses: Sequence[float], warn: Callable[[DiskError, float], None] | None = None
) -> Result:
    """Return what `action` returns; after a DiskError wait for the next of `pauses` (seconds) and try again.

    Args:
        warn: called with the error before each pause.
    Raises:
        DiskError: of the last try.
    """
    for pause in pauses:
        try:
            return action()
        except DiskError as error:
            if warn is not None:
                warn(error, pause)
            time.sleep(pause)
    return action()
