"""WebDataset shards: where they are, and the index that counts their samples.

A shard is an uncompressed tar file. Each image in it is a sample; captions, labels and other members are passed over.
"""

import contextlib
import glob
import hashlib
import json
import os
import re
import tarfile
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from bissl_zoo.data.datasets.catalog import IMAGE_EXTENSIONS, datasets_root
from bissl_zoo.data.remote_files import is_remote, local_path, open_file
from bissl_zoo.errors import BisslZooError, DatasetError

INDEX_FILE = "index.json"
_FORMAT = 1
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


class Shard(NamedTuple):
    """One shard as the index has it; `sha256` is None where only its headers have been read."""

    address: str
    samples: int
    bytes: int
    sha256: str | None = None

    @property
    def name(self) -> str:
        """Its file name."""
        return self.address.rpartition("/")[2]


def expand(urls: str | Sequence[str]) -> list[str]:
    """Addresses without braces: `a-{000..002}.tar` means a-000.tar, a-001.tar, a-002.tar, as in WebDataset.

    What is neither remote nor an absolute path lies below the datasets root.

    Raises:
        DatasetError: another use of braces.
    """
    found: list[str] = []
    for url in [urls] if isinstance(urls, str) else list(urls):
        plain = _expand_ranges(str(url))
        if any(set("{}") & set(address) for address in plain):
            raise DatasetError(f"'{url}': braces hold a range of numbers, such as shard-{{000000..000146}}.tar.")
        found += [address if is_remote(address) else str(datasets_root() / local_path(address)) for address in plain]
    return found


def _expand_ranges(url: str) -> list[str]:
    match = _RANGE.search(url)
    if match is None:
        return [url]
    first, last = match.groups()
    if int(first) > int(last):
        raise DatasetError(f"'{url}': the range {match[0]} runs backwards.")
    width = len(first) if first.startswith("0") else 0
    heads = [f"{url[: match.start()]}{number:0{width}}" for number in range(int(first), int(last) + 1)]
    tails = _expand_ranges(url[match.end() :])
    return [head + tail for head in heads for tail in tails]


def find_shards(urls: str | Sequence[str], index: str | None = None) -> list[Shard]:
    """The shards at `urls`, as :class:`ShardDataset` takes them, in the order given, counted by their index.

    Raises:
        DatasetError: nothing there, an unreadable index, or remote shards without one.
    """
    indexes: dict[str, dict[str, Shard]] = {}

    def indexed(folder: str) -> dict[str, Shard]:
        if folder not in indexes:
            indexes[folder] = read_index(expand(index)[0] if index else f"{folder}/{INDEX_FILE}", bool(index))
        return indexes[folder]

    addresses: list[str] = []
    for address in expand(urls):
        folder = address.rstrip("/")
        addresses += [address] if address.endswith(".tar") else shards_in(folder, indexed(folder))
    if len(set(addresses)) < len(addresses):
        raise DatasetError(f"Shard {next(a for a in addresses if addresses.count(a) > 1)} is named more than once.")
    missing = [a for a in addresses if a.rpartition("/")[2] not in indexed(a.rpartition("/")[0])]
    for address in missing:
        indexed(address.rpartition("/")[0])[address.rpartition("/")[2]] = _counted(address, index)
    if not index:
        for folder in {address.rpartition("/")[0] for address in missing}:
            write_index(Path(folder), indexes[folder].values())
    return [indexed(a.rpartition("/")[0])[a.rpartition("/")[2]]._replace(address=a) for a in addresses]


def shards_in(folder: str, indexed: Iterable[str] = ()) -> list[str]:
    """Addresses of the shards of a folder: those of its index, and where it is local, all that end in `.tar`.

    Raises:
        DatasetError: there are none, or a remote folder has no index.
    """
    names = set(indexed)
    if not is_remote(folder):
        if not os.path.isdir(folder):
            raise DatasetError(f"There is no folder of shards {folder}. Name a folder, or shards that end in .tar.")
        names |= {os.path.basename(path) for path in glob.glob(f"{glob.escape(folder)}/*.tar")}
    if not names:
        raise DatasetError(f"{folder} {_no_index(folder)}" if is_remote(folder) else f"{folder} holds no .tar files.")
    return [f"{folder}/{name}" for name in sorted(names)]


def _counted(address: str, index: str | None) -> Shard:
    if is_remote(address) or index:
        where = index or f"{address.rpartition('/')[0]}/{INDEX_FILE}"
        raise DatasetError(f"Shard {address}: {where} {_no_index(address)}")
    return scan_shard(address)


def _no_index(urls: str) -> str:
    return (
        "does not count its samples. Make an index with\n"
        f"  python tools/prepare_data.py --index-shards '{urls}' --out DIR\n"
        f'(every shard by its .tar address), and put it beside the shards, or pass index="DIR/{INDEX_FILE}".'
    )


def read_index(address: str, required: bool = False) -> dict[str, Shard]:
    """The shards that an `index.json` lists, by name; empty where there is none and none is `required`.

    Raises:
        DatasetError: the file cannot be read, or is no such index.
    """
    try:
        with open_file(address) as stream:
            content = stream.read()
    except FileNotFoundError as error:
        if required:
            raise DatasetError(f"There is no index of shards {address}.") from error
        return {}
    except BisslZooError:
        raise
    except Exception as error:  # handlers and implementations raise what their libraries raise
        raise DatasetError(f"{address} cannot be read: {type(error).__name__}: {error}.") from error
    try:
        found = json.loads(content)
        if found["format"] != _FORMAT:
            raise ValueError(f"format {found['format']} is not {_FORMAT}")
        return {one["name"]: _entry(one) for one in found["shards"]}
    except (ValueError, KeyError, TypeError) as error:
        raise DatasetError(
            f"{address} is no index of shards as tools/prepare_data.py writes it ({type(error).__name__}: {error}). "
            "Make it anew with --index-shards, under another name if the file is something else's."
        ) from error


def _entry(one: dict[str, Any]) -> Shard:
    shard = Shard(one["name"], int(one["samples"]), int(one["bytes"]), one["sha256"])
    if os.path.basename(shard.address) != shard.address or not shard.address.endswith(".tar") or shard.samples < 1:
        raise ValueError(f"entry {one}")
    return shard


def write_index(folder: Path, shards: Iterable[Shard]) -> Path:
    """Write `index.json` into a folder, whole or not at all.

    Raises:
        DatasetError: the folder cannot be written to.
    """
    listed = [{**shard._asdict(), "name": shard.name} for shard in sorted(shards, key=lambda shard: shard.name)]
    lines = ",\n".join(f"  {json.dumps({k: s[k] for k in ('name', 'samples', 'bytes', 'sha256')})}" for s in listed)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{INDEX_FILE}-", dir=folder) as temporary:
            path = Path(temporary) / INDEX_FILE
            path.write_text(f'{{"format": {_FORMAT}, "shards": [\n{lines}\n]}}\n', encoding="utf-8")
            os.replace(path, folder / INDEX_FILE)
    except OSError as error:
        raise DatasetError(
            f"The index of the shards cannot be written to {folder} ({error}). Write one elsewhere with "
            f'tools/prepare_data.py --index-shards ... --out DIR, and pass index="DIR/{INDEX_FILE}".'
        ) from error
    return folder / INDEX_FILE


class _Header(tarfile.TarInfo):
    """A header that is damaged or cut off is an error; tarfile takes one after the first for the end of the archive."""

    @classmethod
    def frombuf(cls, buf: bytes, *args: Any) -> tarfile.TarInfo:
        try:
            return super().frombuf(buf, *args)
        except tarfile.HeaderError as error:
            if len(buf) == tarfile.BLOCKSIZE and not any(buf):  # the end of the archive
                raise
            raise tarfile.ReadError(f"truncated or damaged: {error}") from error


def open_tar(stream: Any, seekable: bool) -> tarfile.TarFile:
    """The tar file in an open stream, which need not be able to seek."""
    return tarfile.open(fileobj=stream, mode="r:" if seekable else "r|", bufsize=1 << 20, tarinfo=_Header)


def images_in(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The headers of a shard's samples, in order."""
    while (member := tar.next()) is not None:
        tar.members.clear()  # or every header stays in memory
        name = os.path.basename(member.name)
        image = os.path.splitext(name)[1].lower() in IMAGE_EXTENSIONS and not name.startswith(".")
        if image and member.isreg() and not member.issparse():
            yield member


def scan_shard(address: str) -> Shard:
    """Count the samples of a local shard by its headers.

    Raises:
        DatasetError: missing, no tar file, truncated, or without images.
    """
    with telling(address), open_file(address) as stream, open_tar(stream, seekable=True) as tar:
        samples = sum(1 for _ in images_in(tar))
        return _counted_images(Shard(address, samples, stream.seek(0, os.SEEK_END)))


def digest_shard(address: str) -> Shard:
    """Count the samples of a shard, local or remote, and hash all its bytes in one pass.

    Raises:
        DatasetError: missing, no tar file, truncated, or without images.
    """
    with telling(address), open_file(address) as raw:
        stream = _Hashing(raw)
        with open_tar(stream, seekable=False) as tar:
            samples = sum(1 for _ in images_in(tar))
        while stream.read(1 << 20):
            pass
        return _counted_images(Shard(address, samples, stream.size, stream.sha.hexdigest()))


def _counted_images(shard: Shard) -> Shard:
    if not shard.samples:
        raise DatasetError(
            f"Shard {shard.address} holds no images. Accepted are {', '.join(sorted(e[1:] for e in IMAGE_EXTENSIONS))}."
        )
    return shard


class _Hashing:
    """A stream that hashes what is read of it."""

    def __init__(self, stream: IO[bytes]) -> None:
        self.stream, self.sha, self.size = stream, hashlib.sha256(), 0

    def read(self, count: int) -> bytes:
        block = self.stream.read(count)
        self.sha.update(block)
        self.size += len(block)
        return block


@contextlib.contextmanager
def telling(address: str) -> Iterator[None]:
    """Raise what reading a shard raises inside as a DatasetError that names it."""
    try:
        yield
    except BisslZooError:
        raise
    except FileNotFoundError as error:
        raise DatasetError(f"Shard {address} does not exist.") from error
    except Exception as error:  # handlers and implementations raise what their libraries raise
        raise DatasetError(f"Shard {address} cannot be read: {type(error).__name__}: {error}.") from error
