"""A disk that is full or fails: which errors say so, how much room there is, and trying again."""

import errno
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from bissl_zoo.errors import CheckpointError

#: full, over a quota or limit, failing, turned read-only, or on a server that is away: what may be over later
DISK_ERRORS = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.ESTALE, errno.ETIMEDOUT}
)

Result = TypeVar("Result")


class DiskError(CheckpointError):
    """The disk refused a write for one of `DISK_ERRORS`; `reason` is the part of the message that says why."""

    def __init__(self, message: str, reason: str = "") -> None:
        super().__init__(message)
        self.reason = reason


def write_error(what: str, error: OSError, path: Path, needed: int, then: str) -> CheckpointError:
    """The error that tells a person of a failed write of `needed` bytes: `what` failed, why, and what to do `then`."""
    reason = reason_of(error, path, needed)
    message = f"{what}: {reason}. {then}"
    return DiskError(message, reason) if error.errno in DISK_ERRORS else CheckpointError(message)


def reason_of(error: OSError, path: Path, needed: int) -> str:
    """Such as `No space left on device; it needs about 210 MiB, 12 MiB are free`."""
    if error.errno not in DISK_ERRORS:
        return str(error)
    reason = f"{os.strerror(error.errno)}; it needs about {in_words(needed)}"
    there = next(folder for folder in (path, *path.absolute().parents) if folder.is_dir())
    try:
        disk = os.statvfs(there)
    except OSError as unknown:
        return f"{reason}, and how much is free cannot be read ({unknown.strerror})"
    names = ", and no inode for another file" if disk.f_files and not disk.f_favail else ""
    return f"{reason}, {in_words(disk.f_bavail * disk.f_frsize)} are free{names}"


def in_words(size: int) -> str:
    """A number of bytes as `12 MiB`."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if size >= unit:
            return f"{size / unit:,.{0 if size >= 10 * unit else 1}f} {name}"
    return f"{size} bytes"


def retried(
    action: Callable[[], Result], pauses: Sequence[float], tell: Callable[[DiskError, float], None] | None = None
) -> Result:
    """What `action` returns, tried again after each of the `pauses`, in seconds, as long as the disk refuses.

    Args:
        tell: called with what was refused before each pause.
    Raises:
        DiskError: of the last try.
    """
    for pause in pauses:
        try:
            return action()
        except DiskError as error:
            if tell is not None:
                tell(error, pause)
            time.sleep(pause)
    return action()
