"""Files: atomic writes, digests, regular files only, JSON with a size limit, and errors of a full or failing disk."""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import stat
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from bissl_zoo.errors import CheckpointError

#: the largest JSON file that `read_json` reads, in bytes
JSON_LIMIT = 1 << 26
#: full, over a quota or limit, failing, read-only, or on a server that does not answer: errors that may go away
DISK_ERRORS = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.ESTALE, errno.ETIMEDOUT}
)

Result = TypeVar("Result")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary file beside `path`; on success, flush it to disk and rename it to `path` in one step.

    Readers see the old or the new content, never a part. On an error the temporary file is removed and `path` is
    unchanged.

    Raises:
        OSError: the file cannot be written or renamed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}-{uuid.uuid4().hex}")
    try:
        yield temporary
        fsync(temporary)
        os.replace(temporary, path)
        fsync(path.parent)
    finally:
        with contextlib.suppress(OSError):  # it exists only if something failed
            temporary.unlink()


@contextlib.contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; on success it takes the place of `path`, on an error it is removed.

    Raises:
        OSError: the folder cannot be written or renamed.
    """
    temporary = path.with_name(f".{path.name}-{uuid.uuid4().hex}")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for file in temporary.iterdir():
            fsync(file)
        if path.exists():
            os.replace(path, old := temporary.with_suffix(".old"))
            os.replace(temporary, path)
            shutil.rmtree(old)
        else:
            os.replace(temporary, path)
        fsync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace a file in one step, see :func:`replacing`.

    Raises:
        OSError: the file cannot be written; it is unchanged.
    """
    with replacing(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def fsync(path: Path) -> None:
    """Flush a file or a directory to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file's bytes as 64 lower-case hex digits.

    Raises:
        OSError: the file cannot be read, or is not a regular file.
    """
    digest = hashlib.sha256()
    with open(path, "rb", opener=follow) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def is_sha256(value: Any) -> bool:
    """Return True for a string of 64 lower-case hex digits."""
    return isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value) is not None


class NotAFile(OSError):
    """A link, a directory or a pipe in the place of a file."""


def open_plain(path: str, flags: int, follow: bool = False) -> int:
    """Return a descriptor of a regular file; usable as the `opener` of `open`.

    Raises:
        NotAFile: a pipe, a device, a directory, or a link unless `follow`.
    """
    flags |= getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)  # do not wait for the writer of a pipe
    try:
        descriptor = os.open(path, flags if follow else flags | getattr(os, "O_NOFOLLOW", 0), 0o666)
    except OSError as error:
        if os.path.islink(path) and not follow:
            raise NotAFile("it is a link, which is not followed") from error
        raise
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    raise NotAFile("it is not a regular file")


def follow(path: str, flags: int) -> int:
    """Open a regular file as :func:`open_plain` does, also through a link; the `opener` of files to read."""
    return open_plain(path, flags, follow=True)


def read_json(path: Path, limit: int = JSON_LIMIT) -> dict[str, Any]:
    """Read a JSON object from a regular file of at most `limit` bytes.

    Raises:
        OSError: the file cannot be read, or is not a regular file.
        ValueError: it is too large, not JSON, or not an object.
    """
    with open(path, "rb", opener=follow) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise ValueError(f"it has more than {limit:,} bytes")
    loaded = parse_json(content)
    if not isinstance(loaded, dict):
        raise ValueError(f"it holds {type(loaded).__name__}, not an object")
    with _depth_is_a_value_error():
        json.dumps(loaded, ensure_ascii=False).encode()  # an escaped half surrogate pair parses but cannot be written
    return loaded


def parse_json(text: str | bytes, **options: Any) -> Any:
    """Parse JSON from an untrusted source.

    Args:
        options: arguments of `json.loads`.
    Raises:
        ValueError: it is not JSON, or nested too deeply.
    """
    with _depth_is_a_value_error():
        return json.loads(text, **options)


@contextlib.contextmanager
def _depth_is_a_value_error() -> Iterator[None]:
    try:
        yield
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


# ------------------------------------------------------------------------------------------------ errors of the disk


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
