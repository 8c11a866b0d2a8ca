"""A zoo in a folder of this machine, or of a file system that it mounts."""

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import portalocker

from bissl_zoo.errors import ZooError
from bissl_zoo.zoo.stores.store import Body, Conflict, Content, WritableStore

LOCK_TIMEOUT_S = 120
_LOCK_FILE = ".lock"
_PENDING_FILE = ".pending"  # one name, as only the holder of the lock writes it
_BLOCK = 1 << 20


class FolderStore(WritableStore):
    """Files below a folder; replacing one is a rename under a lock that all publishers to the folder share."""

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root).expanduser()
        self.location = str(self.root)

    def local_path(self, path: str) -> Path:
        """The file itself; `ZooError` where a link leads out of the zoo."""
        local = self.root / path
        try:
            inside = local.resolve().is_relative_to(self.root.resolve())
        except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle, up to Python 3.12
            raise ZooError(f"{local} cannot be read: {error}.") from error
        if not inside:
            raise ZooError(f"{local} is a link that leads out of the zoo {self.root}; it is not followed.")
        return local

    def read(self, path: str, limit: int) -> Content | None:
        """See :class:`Store`."""
        local = self.local_path(path)
        try:
            with _reading(local), open(local, "rb") as stream:
                content = stream.read(limit + 1)
        except _Absent:
            return None
        if len(content) > limit:
            raise ZooError(f"{local} has more than {limit:,} bytes, which is too much for what it should be.")
        return Content(content, hashlib.sha256(content).hexdigest())

    @contextlib.contextmanager
    def open(self, path: str, offset: int = 0) -> Iterator[Body]:
        """See :class:`Store`."""
        local = self.local_path(path)
        with contextlib.ExitStack() as stack:
            with _reading(local):
                stream = stack.enter_context(open(local, "rb"))
                stream.seek(offset)
            yield Body(offset, _blocks(local, stream))

    def create(self, path: str, source: Path | bytes) -> None:
        """See :class:`WritableStore`. The folder that a first file opens is claimed by it."""
        with self._writing(path, source):
            self.root.mkdir(parents=True, exist_ok=True)
            target = self.local_path(path)
            target.parent.mkdir(exist_ok=True)
            try:
                with open(target, "xb") as stream:
                    _copy(source, stream)
            except FileExistsError as error:
                raise Conflict(f"{target} exists already.") from error
            _sync_names(target.parent)

    def replace(self, path: str, content: bytes, tag: str | None) -> None:
        """See :class:`WritableStore`."""
        with self._writing(path, content):
            self.root.mkdir(parents=True, exist_ok=True)
            with portalocker.Lock(str(self.root / _LOCK_FILE), "a", timeout=LOCK_TIMEOUT_S):
                present = self.read(path, limit=1 << 30)
                if (present.tag if present else None) != tag:
                    raise Conflict(f"{self.root / path} was changed by another process.")
                pending = self.root / _PENDING_FILE
                pending.unlink(missing_ok=True)  # of a killed publisher
                try:
                    with open(pending, "xb") as stream:
                        _copy(content, stream)
                    os.replace(pending, self.root / path)
                finally:
                    pending.unlink(missing_ok=True)
                _sync_names(self.root)

    def folders(self) -> list[str]:
        """See :class:`WritableStore`."""
        if not self.root.is_dir():
            return []
        with _reading(self.root):
            folders = [path for path in self.root.iterdir() if path.is_dir() and not path.name.startswith(".")]
            # an empty one is what a publisher leaves that was killed before its first file, and free for the next
            return sorted(path.name for path in folders if path.is_symlink() or any(path.iterdir()))

    def remove_folder(self, name: str) -> None:
        """See :class:`WritableStore`."""
        folder = self.root / name
        if folder.is_symlink():
            raise ZooError(f"{folder} is a link, and what it leads to is not removed. Remove the link yourself.")
        with _removing(folder), contextlib.suppress(FileNotFoundError):
            # hidden files last: while it is there, a claim says whose the rest is
            for path in sorted(folder.iterdir(), key=lambda path: path.name.startswith(".")):
                path.unlink(missing_ok=True)
            folder.rmdir()

    def remove(self, path: str) -> None:
        """See :class:`WritableStore`."""
        with _removing(self.root / path):
            self.local_path(path).unlink(missing_ok=True)

    @contextlib.contextmanager
    def _writing(self, path: str, source: Path | bytes) -> Iterator[None]:
        try:
            yield
        except portalocker.LockException as error:
            lock = self.root / _LOCK_FILE
            raise ZooError(f"Another process has held {lock} for {LOCK_TIMEOUT_S} s; try again later.") from error
        except OSError as error:
            size = len(source) if isinstance(source, bytes) else source.stat().st_size
            existing = next(folder for folder in (self.root / path).absolute().parents if folder.exists())
            free = shutil.disk_usage(existing).free
            raise ZooError(
                f"{self.root / path} cannot be written: {error.strerror}. It needs {size / 2**20:.1f} MiB and "
                f"{free / 2**20:.1f} MiB are free there; make room, or name another zoo with BISSL_ZOO."
            ) from error


class _Absent(ZooError):
    """There is no such file."""


@contextlib.contextmanager
def _reading(local: Path) -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, NotADirectoryError) as error:
        raise _Absent(f"{local} does not exist.") from error
    except OSError as error:
        raise ZooError(f"{local} cannot be read: {error.strerror}.") from error


@contextlib.contextmanager
def _removing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ZooError(f"{path} cannot be removed: {error.strerror}.") from error


def _blocks(local: Path, stream: BinaryIO) -> Iterator[bytes]:
    while True:
        with _reading(local):
            block = stream.read(_BLOCK)
        if not block:
            return
        yield block


def _copy(source: Path | bytes, target: BinaryIO) -> None:
    if isinstance(source, bytes):
        target.write(source)
    else:
        with open(source, "rb") as stream:
            shutil.copyfileobj(stream, target, _BLOCK)
    target.flush()
    os.fsync(target.fileno())


def _sync_names(folder: Path) -> None:
    """Bring a folder's list of names to the disk, on systems that can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
