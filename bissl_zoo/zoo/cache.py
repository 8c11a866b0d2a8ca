"""Local copies of remote files, stored by sha256 and verified before every use."""

import errno
import hashlib
import itertools
import logging
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO, TypeVar

import platformdirs
from tqdm import tqdm

from bissl_zoo.errors import ZooError
from bissl_zoo.files import NotAFile, open_plain, write_atomically
from bissl_zoo.limits import limit, stated
from bissl_zoo.zoo.locks import locked
from bissl_zoo.zoo.stores import Store, Transient

#: limits of one fetch: attempts in a row without a new byte, attempts, and the bytes that take a second at most
ATTEMPTS, TOTAL_ATTEMPTS = 5, 50
MIN_RATE = 16 << 10
_LONGEST_WAIT_S, _LONGEST_ASKED_WAIT_S = 30.0, 120.0
_PROGRESS_FROM = 8 << 20
_BLOCK = 1 << 20

logger = logging.getLogger(__name__)
T = TypeVar("T")


def default_cache() -> "Cache":
    """Return the cache in $BISSL_ZOO_CACHE, or in the user's cache directory."""
    return Cache(os.environ.get("BISSL_ZOO_CACHE") or platformdirs.user_cache_path("bissl_zoo", appauthor=False))


def is_offline() -> bool:
    """Return True if BISSL_ZOO_OFFLINE forbids network access."""
    value = os.environ.get("BISSL_ZOO_OFFLINE", "").lower()
    if value not in ("", "0", "false", "1", "true"):
        raise ZooError(f"BISSL_ZOO_OFFLINE is {value!r}. Set it to 1 to use only local files, otherwise to 0.")
    return value in ("1", "true")


def retrying(
    attempt: Callable[[], T], received: Callable[[], int] = lambda: 0, sleep: Callable[[float], None] = time.sleep
) -> T:
    """Return the result of the first attempt that does not raise `Transient`, waiting longer after each failure.

    Args:
        received: number of bytes received; an attempt with new bytes resets the count of failures.
        sleep: called with seconds.
    Raises:
        ZooError: after `ATTEMPTS` failures in a row without a new byte, or `TOTAL_ATTEMPTS`.
    """
    best, failures = received(), 0
    for number in itertools.count(1):
        try:
            return attempt()
        except Transient as error:
            failures = 1 if received() > best else failures + 1
            best = max(best, received())
            if failures == ATTEMPTS or number == TOTAL_ATTEMPTS:
                raise ZooError(f"{error} Gave up after {number} attempts.") from error
            # the system's generator: the random state of a run must not change, and forked processes share theirs
            wait = min(2.0 ** (failures - 1), _LONGEST_WAIT_S) * random.SystemRandom().uniform(0.75, 1.25)
            wait = max(wait, min(error.retry_after, _LONGEST_ASKED_WAIT_S))
            logger.warning("%s Attempt %d follows in %.1f s.", error, number + 1, wait)
            sleep(wait)
    raise AssertionError


class Cache:
    """A folder of files by sha256, shared by any number of processes; it may be deleted between uses.

        blobs/AB/ABCD...    complete files
        partial/ABCD...     incomplete files, which the next fetch resumes
        locks/ABCD...       locked by the process that fetches the file
        indexes/...         the last copy of each index, by the sha256 of its address

    Args:
        sleep: called with the seconds to wait between attempts.
    """

    def __init__(self, root: str | os.PathLike[str], sleep: Callable[[float], None] = time.sleep) -> None:
        self.root = Path(root).expanduser().absolute()
        self._sleep = sleep

    def fetch(self, store: Store, path: str, sha256: str, size: int) -> Path:
        """Return a verified local file of a store; of several processes, one downloads it.

        Raises:
            ZooError: the file is damaged, cannot be read or stored, or a limit of the download is exceeded.
        """
        local = store.local_path(path)
        if local is not None:
            if problem := _difference(local, sha256, size, follow=True):
                raise ZooError(f"{local} differs from what was published: {problem}. Do not use it; copy it again.")
            return local
        blob = self.root / "blobs" / sha256[:2] / sha256
        if not os.path.lexists(blob):
            address = f"{store.location}/{path}"
            if is_offline():
                raise ZooError(
                    f"{address} is not in the cache {self.root}, and BISSL_ZOO_OFFLINE forbids downloads. Unset it."
                )
            with self._lock(sha256, address):
                if not os.path.lexists(blob):
                    self._download(store, path, sha256, size, blob)
                    return blob
        if problem := _difference(blob, sha256, size):
            with self._lock(sha256, str(blob)), self._writing(blob):
                if _difference(blob, sha256, size):  # another process may have replaced it
                    blob.unlink(missing_ok=True)
            raise ZooError(f"{blob} was damaged: {problem}. It was removed; the next call downloads it again.")
        return blob

    def read_index(self, store: Store, path: str) -> bytes | None:
        """Return an index file of a store, offline its last copy; None if the store does not have it."""
        if store.local_path(path) is not None:
            return store.read_index(path)
        address = f"{store.location}/{path}"
        copy = self.root / "indexes" / hashlib.sha256(address.encode()).hexdigest()
        last = _read(copy)  # empty if the store did not have the file
        if is_offline():
            if last is None:
                raise ZooError(f"{address} is not in the cache {self.root}. Unset BISSL_ZOO_OFFLINE to read it.")
            return last or None
        try:
            content = retrying(lambda: store.read_index(path), sleep=self._sleep)
        except ZooError as error:
            if last is None:
                raise
            raise ZooError(f"{error} BISSL_ZOO_OFFLINE=1 works with the last copy.") from error
        if last != (content or b""):
            with self._writing(copy):
                write_atomically(copy, content or b"")
        return content

    def _download(self, store: Store, path: str, sha256: str, size: int, blob: Path) -> None:
        partial = self.root / "partial" / sha256
        with self._writing(partial, size):
            blob.parent.mkdir(parents=True, exist_ok=True)
            partial.parent.mkdir(parents=True, exist_ok=True)
            with _open_partial(partial) as stream:
                download = _Download(store, path, stream, size)
                if shutil.disk_usage(self.root).free < size - download.received:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                download.run(self._sleep)
                stream.flush()
                os.fsync(stream.fileno())
            if (received := download.digest.hexdigest()) != sha256:
                partial.unlink()
                raise ZooError(
                    f"{store.location}/{path} differs from the index: expected sha256 {sha256}, received {received}. "
                    "The copy was removed. Try again; if it fails again, report it to the owner of the zoo."
                )
            os.replace(partial, blob)

    @contextmanager
    def _lock(self, sha256: str, address: str) -> Iterator[None]:
        file = self.root / "locks" / sha256
        with ExitStack() as stack:
            with self._writing(file):
                file.parent.mkdir(parents=True, exist_ok=True)
                stack.enter_context(locked(file, f"download {address}"))
            yield

    @contextmanager
    def _writing(self, file: Path, size: int = 0) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            existing = next(folder for folder in file.parents if folder.exists())
            missing = (size - (file.lstat().st_size if os.path.lexists(file) else 0)) / 2**20
            free = shutil.disk_usage(existing).free / 2**20
            space = f" {missing:.1f} MiB are missing and {free:.1f} MiB are free; make room, and the download resumes."
            raise ZooError(
                f"{file} cannot be written: {error.strerror or error}.{space if missing > 0 else ''} BISSL_ZOO_CACHE "
                "names another cache folder."
            ) from error


class _Download:
    """A file that is received and hashed; the first bytes may already be in `stream`."""

    def __init__(self, store: Store, path: str, stream: BinaryIO, size: int) -> None:
        self.store, self.path, self.size = store, path, size
        self.received, self.digest = 0, hashlib.sha256()
        self._stream = stream
        self._deadline = time.monotonic() + limit("SECONDS") + size / MIN_RATE
        while block := stream.read(_BLOCK):
            self._count(block)
        if self.received > size:
            self._restart()

    def run(self, sleep: Callable[[float], None]) -> None:
        """Receive the missing bytes; on an error the received ones are kept."""
        large = self.size >= _PROGRESS_FROM
        bar = tqdm(
            total=self.size,
            initial=self.received,
            desc=self.path,
            unit="B",
            unit_scale=True,
            unit_divisor=1024,
            disable=None if large else True,  # None: unless the output is not a terminal
        )
        if large and bar.disable:
            logger.info("Downloading %s/%s (%.1f MiB).", self.store.location, self.path, self.size / 2**20)
        with bar:
            try:
                retrying(lambda: self._receive(bar), lambda: self.received, sleep)
            except ZooError as error:
                raise ZooError(f"{error} {self.received:,} of {self.size:,} bytes were received and kept.") from error

    def _receive(self, bar: tqdm) -> None:
        address = f"{self.store.location}/{self.path}"
        if self.received == self.size:
            return
        for block in self.store.read(self.path, self.received):
            if self.received + len(block) > self.size:
                self._restart()
                raise ZooError(f"{address} is larger than its limit, the {self.size:,} bytes in the index.")
            if time.monotonic() > self._deadline:
                raise ZooError(f"{address} is too slow: {stated('SECONDS')}, plus one per {MIN_RATE:,} bytes.")
            self._stream.write(block)
            self._count(block)
            bar.update(len(block))
        if self.received < self.size:
            raise Transient(f"{address} ended after {self.received:,} of {self.size:,} bytes.")

    def _count(self, block: bytes) -> None:
        self.digest.update(block)
        self.received += len(block)

    def _restart(self) -> None:
        self._stream.seek(0)
        self._stream.truncate()
        self.received, self.digest = 0, hashlib.sha256()


def _open_partial(partial: Path) -> BinaryIO:
    try:
        return os.fdopen(open_plain(str(partial), os.O_RDWR | os.O_CREAT), "r+b")
    except NotAFile as error:
        partial.unlink()
        raise ZooError(f"{partial} was removed: {error}. The next call downloads the file again.") from error


def _read(copy: Path) -> bytes | None:
    try:
        with open(copy, "rb", opener=open_plain) as stream:
            return stream.read()
    except (FileNotFoundError, NotAFile):
        return None
    except OSError as error:
        raise ZooError(f"{copy} cannot be read: {error.strerror}.") from error


def _difference(path: Path, sha256: str, size: int, follow: bool = False) -> str:
    """Return how a file differs from its size and sha256; empty if it does not."""
    try:
        with os.fdopen(open_plain(str(path), os.O_RDONLY, follow), "rb") as stream:
            if (actual := os.fstat(stream.fileno()).st_size) != size:
                return f"expected {size} bytes, found {actual}"
            digest = hashlib.sha256()
            while block := stream.read(_BLOCK):
                digest.update(block)
    except FileNotFoundError:
        return "the index lists it, but it is not on disk"
    except NotAFile as error:
        return str(error)
    except OSError as error:
        raise ZooError(f"{path} cannot be read: {error.strerror}.") from error
    return "" if digest.hexdigest() == sha256 else f"expected sha256 {sha256}, found {digest.hexdigest()}"
