"""Copies of what was fetched from zoos elsewhere, each under its sha256 and compared with it on every use."""

import contextlib
import errno
import hashlib
import logging
import os
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import platformdirs
import portalocker

from bissl_zoo.errors import ZooError
from bissl_zoo.zoo.download import Download, retrying
from bissl_zoo.zoo.stores.store import Content, Store

SILENT_WAIT_S = 3.0
_MIB = 1 << 20

logger = logging.getLogger(__name__)


def default_cache() -> "Cache":
    """The cache in $BISSL_ZOO_CACHE, else in the user's cache directory."""
    return Cache(os.environ.get("BISSL_ZOO_CACHE") or platformdirs.user_cache_path("bissl_zoo", appauthor=False))


def is_offline() -> bool:
    """Whether BISSL_ZOO_OFFLINE forbids the network."""
    value = os.environ.get("BISSL_ZOO_OFFLINE", "")
    if value.lower() in ("1", "true"):
        return True
    if value.lower() in ("", "0", "false"):
        return False
    raise ZooError(f"BISSL_ZOO_OFFLINE is {value!r}. Set it to 1 to use only what is on this machine, else to 0.")


class Cache:
    """A folder of files by digest, which any number of processes may share; it may be deleted at any time between uses.

        blobs/AB/ABCD...    whole files by sha256
        partial/ABCD...     what has arrived of one, which the next attempt continues
        locks/ABCD...       held by the process that fetches it
        indexes/...         the last copy of each index read, by the sha256 of its address

    Args:
        sleep: called with seconds between attempts.
    Raises:
        ZooError: from every method, with the file, the address, and what to do.
    """

    def __init__(self, root: str | os.PathLike[str], sleep: Callable[[float], None] = time.sleep) -> None:
        self.root = Path(root).expanduser().absolute()
        self._sleep = sleep

    def fetch(self, store: Store, path: str, sha256: str, size: int) -> Path:
        """A file of a store on this machine, compared with its size (bytes) and sha256 (64 hex digits).

        Of the processes that want a file one fetches it. What a store keeps on this machine is not copied.
        """
        local = store.local_path(path)
        if local is not None:
            problem = _difference(local, sha256, size, follow=True)
            if problem:
                raise ZooError(
                    f"{local} is not what was published: {problem}. Copy the entry again from where it came, or "
                    "publish it again; do not use this copy."
                )
            return local
        blob = self.root / "blobs" / sha256[:2] / sha256
        if os.path.lexists(blob):
            self._verify(blob, sha256, size)
            return blob
        address = f"{store.location}/{path}"
        if is_offline():
            raise ZooError(
                f"{address} is not in the cache {self.root}, and BISSL_ZOO_OFFLINE forbids fetching it. Unset that "
                "once where there is a network."
            )
        with self._lock(sha256, address):
            fetched_meanwhile = os.path.lexists(blob)
            if not fetched_meanwhile:
                self._download(store, path, sha256, size, blob)
        if fetched_meanwhile:
            self._verify(blob, sha256, size)
        return blob

    def read_index(self, store: Store, path: str, limit: int) -> Content | None:
        """A small file of a store as it is now, or offline as it was when it was last read; None where there is none.

        Args:
            limit: bytes that it may have.
        """
        if store.local_path(path) is not None:
            return store.read(path, limit)
        address = f"{store.location}/{path}"
        copy = self.root / "indexes" / hashlib.sha256(address.encode()).hexdigest()
        if is_offline():
            kept = _read(copy)
            if kept is None:
                raise ZooError(
                    f"{address} has never been read on this machine with the cache {self.root}, and BISSL_ZOO_OFFLINE "
                    "forbids reading it. Unset that once where there is a network."
                )
            return Content(kept, hashlib.sha256(kept).hexdigest()) if kept else None
        try:
            found = retrying(lambda: store.read(path, limit), sleep=self._sleep)
        except ZooError as error:
            if _read(copy) is None:
                raise
            raise ZooError(f"{error} BISSL_ZOO_OFFLINE=1 works with what was read here before.") from error
        self._keep(copy, found.content if found else b"")
        return found

    def _download(self, store: Store, path: str, sha256: str, size: int, blob: Path) -> None:
        partial = self.root / "partial" / sha256
        with self._writing(partial, size):
            blob.parent.mkdir(parents=True, exist_ok=True)
            with _open_partial(partial) as stream:
                download = Download(stream, size)
                if shutil.disk_usage(self.root).free < size - download.received:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                download.complete(store, path, self._sleep)
                stream.flush()
                os.fsync(stream.fileno())
            if download.sha256 != sha256:
                partial.unlink()
                raise ZooError(
                    f"{store.location}/{path} is not what the zoo's index lists: expected sha256 {sha256}, found "
                    f"{download.sha256}. The copy was removed. Fetch it again; where that brings the same, the file or "
                    "the index there is damaged or was exchanged: tell whoever keeps this zoo."
                )
            os.replace(partial, blob)

    def _verify(self, blob: Path, sha256: str, size: int) -> None:
        problem = _difference(blob, sha256, size, follow=False)
        if not problem:
            return
        try:
            with self._lock(sha256, str(blob)), self._writing(blob, 0):
                # another process may have found the same and fetched the file again
                if _difference(blob, sha256, size, follow=False):
                    blob.unlink(missing_ok=True)
        except ZooError as error:
            raise ZooError(f"{blob} is damaged: {problem}. It could not be removed: {error}") from error
        raise ZooError(f"{blob} is damaged: {problem}. It was removed; the next call fetches it anew.")

    def _keep(self, copy: Path, content: bytes) -> None:
        """Have `copy` hold `content`, of which none stands for a file that the store does not have."""
        if _read(copy) == content:
            return
        pending = copy.with_name(f"{copy.name}.{secrets.token_hex(4)}")
        with self._writing(copy, len(content)):
            copy.parent.mkdir(parents=True, exist_ok=True)
            try:
                with open(pending, "xb") as stream:
                    stream.write(content)
                    stream.flush()
                    os.fsync(stream.fileno())
                os.replace(pending, copy)
            finally:
                pending.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _lock(self, sha256: str, awaited: str) -> Iterator[None]:
        """Held by one process or thread; one that waits for long says for what."""
        file = self.root / "locks" / sha256
        with self._writing(file, 0):
            file.parent.mkdir(parents=True, exist_ok=True)
            lock = portalocker.Lock(str(file), "a", timeout=SILENT_WAIT_S, opener=_open_unlinked)
            try:
                lock.acquire()
            except portalocker.LockException:
                logger.warning("Waiting for another process to fetch %s. It holds %s.", awaited, file)
                lock = portalocker.Lock(
                    str(file), "a", flags=portalocker.LockFlags.EXCLUSIVE, opener=_open_unlinked
                )  # without a limit, since it may be hours of fetching; the lock of a process that dies is freed
                try:
                    lock.acquire()
                except portalocker.LockException as error:
                    raise OSError(f"it cannot be locked ({error})") from error
        try:
            yield
        finally:
            lock.release()

    @contextlib.contextmanager
    def _writing(self, file: Path, size: int) -> Iterator[None]:
        """What the file system refuses becomes a `ZooError`; nothing is removed."""
        try:
            yield
        except OSError as error:
            existing = next(folder for folder in file.parents if folder.exists())
            missing = size - (file.lstat().st_size if os.path.lexists(file) else 0)
            room = (
                f" It takes {missing / _MIB:.1f} MiB more, and {shutil.disk_usage(existing).free / _MIB:.1f} MiB are "
                "free there: make room, and what has arrived is continued."
            )
            raise ZooError(
                f"{file} cannot be written: {error.strerror or error}.{room if missing > 0 else ''} BISSL_ZOO_CACHE "
                "names another folder for the cache."
            ) from error


class _NotAFile(OSError):
    """A link or something else in the place of a file."""


def _open_unlinked(path: str, flags: int, follow: bool = False) -> int:
    """A descriptor of a plain file and nothing else, for `open`'s `opener`."""
    # not waiting for whoever would write into a pipe
    flags |= getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        descriptor = os.open(path, flags if follow else flags | getattr(os, "O_NOFOLLOW", 0), 0o666)
    except OSError as error:
        if os.path.islink(path) and not follow:
            raise _NotAFile("it is a link, which the cache does not follow") from error
        raise
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    raise _NotAFile("it is not a plain file")


def _open_partial(partial: Path) -> BinaryIO:
    partial.parent.mkdir(parents=True, exist_ok=True)
    try:
        return os.fdopen(_open_unlinked(str(partial), os.O_RDWR | os.O_CREAT), "r+b")
    except _NotAFile as error:
        partial.unlink()
        raise ZooError(f"{partial} was not used: {error}. It was removed; the next call fetches anew.") from error


def _read(copy: Path) -> bytes | None:
    try:
        with open(copy, "rb", opener=_open_unlinked) as stream:
            return stream.read()
    except (FileNotFoundError, _NotAFile):
        return None
    except OSError as error:
        raise ZooError(f"{copy} cannot be read: {error.strerror}.") from error


def _difference(path: Path, sha256: str, size: int, follow: bool) -> str:
    """How a file differs from what it should be, an empty string where it does not."""
    try:
        with os.fdopen(_open_unlinked(str(path), os.O_RDONLY, follow), "rb") as stream:
            found_size = os.fstat(stream.fileno()).st_size
            if found_size != size:
                return f"expected {size} bytes, found {found_size}"
            digest = hashlib.sha256()
            while block := stream.read(_MIB):
                digest.update(block)
    except FileNotFoundError:
        return "it is in the zoo's index but not on disk"
    except _NotAFile as error:
        return str(error)
    except OSError as error:
        raise ZooError(f"{path} cannot be read: {error.strerror}.") from error
    found = digest.hexdigest()
    return "" if found == sha256 else f"expected sha256 {sha256}, found {found}"
