"""A zoo in a folder."""

import contextlib
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from bissl_zoo.errors import ZooError
from bissl_zoo.files import follow, fsync, sha256_of, write_atomically
from bissl_zoo.zoo.card import PAGE_FILE, render_page
from bissl_zoo.zoo.index import CURATED_FILE, INDEX_FILE, Index, is_name, parse_index, pin
from bissl_zoo.zoo.locks import locked, try_lock
from bissl_zoo.zoo.stores import Draft, Missing, Store

LOCK_FILE = ".lock"
MARKER_FILE = ".publishing"  # in the folder of an entry until the index lists it
LOCK_TIMEOUT_S = 120.0
_DRAFT = ".draft-"
_TEMPORARY = re.compile(r"\.(index\.json|MODEL_ZOO\.md)-[0-9a-f]{32}")
_BLOCK = 1 << 20


class FolderStore(Store):
    """A folder; publishers to it share a kernel lock on `.lock`.

    An entry is written to a hidden draft folder, whose marker file its publisher keeps locked. Then, under the lock of
    the zoo, the copies are compared with their digests, the draft is renamed, and the index is replaced atomically.
    Readers need no lock: they see the entry when the index lists it. A killed publisher leaves a draft with an unlocked
    marker, or a folder with a marker that the index does not list; the next publisher removes both.
    """

    writable = True

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root).expanduser()
        self.location = str(self.root)

    def local_path(self, path: str) -> Path:
        """Return the file itself; raise `ZooError` for a link that leads out of the zoo."""
        local = self.root / path
        try:
            inside = local.resolve().is_relative_to(self.root.resolve())
        except (OSError, RuntimeError) as error:  # RuntimeError: circular links, up to Python 3.12
            raise ZooError(f"{local} cannot be read: {error}.") from error
        if not inside:
            raise ZooError(f"{local} is a link that leads out of the zoo {self.root}; it is not followed.")
        return local

    def read(self, path: str, start: int = 0) -> Iterator[bytes]:
        """See :class:`Store`."""
        local = self.local_path(path)
        try:
            with open(local, "rb", opener=follow) as stream:
                stream.seek(start)
                while block := stream.read(_BLOCK):
                    yield block
        except (FileNotFoundError, NotADirectoryError) as error:
            raise Missing(f"{local} does not exist.") from error
        except OSError as error:
            raise ZooError(f"{local} cannot be read: {error.strerror or error}.") from error

    def publish(self, draft: Draft) -> str:
        """See :class:`Store`."""
        with self._writing(sum(file.stat().st_size for file in draft.folder.iterdir())):
            self.root.mkdir(parents=True, exist_ok=True)
            with self._locked():
                self._clean(self._index())
                pending = self.root / f"{_DRAFT}{secrets.token_hex(8)}"
                pending.mkdir()
                marker = try_lock(pending / MARKER_FILE)
            try:
                for file in draft.folder.iterdir():
                    _copy(file, pending)
                with self._locked():
                    return self._list(draft, pending)
            finally:
                if marker is not None:
                    os.close(marker)
                shutil.rmtree(pending, ignore_errors=True)  # it was renamed unless something failed

    def _list(self, draft: Draft, pending: Path) -> str:
        """Give the copied entry its name and add it to the index; the caller holds the lock."""
        index = self._index()
        self._clean(index, keep=pending)
        name = index.next_name(draft.base, [path.name for path in self.root.iterdir() if is_name(path.name)])
        record = draft.complete(name)
        if draft.once and (existing := index.find_same(draft.base, record["files"])):
            return existing
        for file in sorted(record["files"]):
            if not (pending / file).exists():  # a file that depends on the name
                _copy(draft.folder / file, pending)
            if sha256_of(pending / file) != record["files"][file]["sha256"]:
                raise ZooError(f"{pending / file} differs from what was written. Check the disk of {self.root}.")
        fsync(pending)
        os.rename(pending, self.root / name)
        fsync(self.root)
        index = index.add(name, record)
        try:
            write_atomically(self.root / INDEX_FILE, index.to_bytes())
        except BaseException:
            if name not in self._index().records:
                shutil.rmtree(self.root / name, ignore_errors=True)
            raise
        (self.root / name / MARKER_FILE).unlink()
        self._write_page(index)
        return name

    def remove(self, name: str) -> None:
        """See :class:`Store`. The name is not used again."""
        with self._writing(0), self._locked():
            index = self._index()
            if name not in index.records:
                raise ZooError(f"{self.location} lists no entry '{name}', so nothing was removed.")
            index = index.remove(name)
            write_atomically(self.root / INDEX_FILE, index.to_bytes())
            self._write_page(index)
            self._remove_folder(name)

    def _clean(self, index: Index, keep: Path | None = None) -> None:
        """Remove what interrupted publishers and removals left; the caller holds the lock."""
        known, removed = {*index.records, *self._index(CURATED_FILE).records}, set(map(pin, index.removed))
        for path in list(self.root.iterdir()):
            if path.name.startswith(_DRAFT):
                if path != keep and _abandoned(path):
                    shutil.rmtree(path)
            elif _TEMPORARY.fullmatch(path.name):
                path.unlink()
            elif is_name(path.name) and path.is_dir() and not path.is_symlink():
                marked = (path / MARKER_FILE).is_file()
                if path.name not in known and (marked or pin(path.name) in removed):
                    shutil.rmtree(path)
                elif marked:
                    (path / MARKER_FILE).unlink()

    def _remove_folder(self, name: str) -> None:
        folder = self.root / name
        if folder.is_symlink():
            raise ZooError(f"'{name}' is no longer listed, but {folder} is a link, which was not removed.")
        try:
            shutil.rmtree(folder)
        except FileNotFoundError:
            return
        except OSError as error:
            raise ZooError(
                f"'{name}' is no longer listed, but its files remain: {error}. The next publication removes them."
            ) from error

    def _index(self, file: str = INDEX_FILE) -> Index:
        return parse_index(self.read_index(file), str(self.root / file))

    def _write_page(self, index: Index) -> None:
        write_atomically(self.root / PAGE_FILE, render_page(index))

    def _locked(self) -> contextlib.AbstractContextManager[None]:
        return locked(self.root / LOCK_FILE, f"change {self.root}", LOCK_TIMEOUT_S)

    @contextlib.contextmanager
    def _writing(self, size: int) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            existing = next(folder for folder in [self.root, *self.root.absolute().parents] if folder.exists())
            raise ZooError(
                f"{error.filename or self.root} cannot be written: {error.strerror or error}. The entry has "
                f"{size / 2**20:.1f} MiB; {shutil.disk_usage(existing).free / 2**20:.1f} MiB are free."
            ) from error


def _copy(file: Path, folder: Path) -> None:
    fsync(Path(shutil.copyfile(file, folder / file.name)))


def _abandoned(draft: Path) -> bool:
    """Return True if no process has locked the marker of a draft."""
    descriptor = try_lock(draft / MARKER_FILE)
    if descriptor is not None:
        os.close(descriptor)
    return descriptor is not None
