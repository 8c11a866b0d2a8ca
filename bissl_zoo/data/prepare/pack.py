"""Making WebDataset shards of a folder of images, indexing shards from elsewhere, and checking them."""

import hashlib
import io
import math
import os
import re
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from bissl_zoo.data.datasets.catalog import load_image, require_folder
from bissl_zoo.data.datasets.folder import ImageFolder
from bissl_zoo.data.remote_files import is_remote, local_path
from bissl_zoo.data.shards_index import (
    INDEX_FILE,
    Shard,
    digest_shard,
    expand,
    read_index,
    shards_in,
    write_index,
)
from bissl_zoo.data.shards_reading import as_file, read_samples
from bissl_zoo.errors import DatasetError

_LONGEST_KEY = 90  # with its extension, a name that every tar format holds in one header


class Packed(NamedTuple):
    """What packing came to; `skipped` says of each image left out what is wrong with it."""

    shards: list[Shard]
    skipped: list[str]


class _Mapped(Dataset):
    """`function` of each of `items`, for a loader's workers."""

    def __init__(self, function: Callable[[Any], Any], items: Sequence[Any]) -> None:
        self.function, self.items = function, items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.function(self.items[index])


def _in_workers(function: Callable[[Any], Any], items: Sequence[Any], num_workers: int) -> Iterator[Any]:
    """`function` of each item, in order, a few ahead of what is taken."""
    samples = _Mapped(function, items)
    # a loader without a generator of its own draws from the global one
    generator = torch.Generator()
    return iter(DataLoader(samples, batch_size=None, num_workers=num_workers, collate_fn=_as_is, generator=generator))


def _as_is(item: Any) -> Any:
    return item


def pack_folder(
    folder: str,
    out: str | os.PathLike,
    name: str,
    samples_per_shard: int | None = None,
    shard_bytes: int | None = None,
    seed: int = 0,
    on_bad: str = "error",
    num_workers: int = 4,
) -> Packed:
    """Pack the images at any depth of a folder into `out/NAME-000000.tar` and so on, in an order drawn with `seed`.

    Files go in as they are, under keys that are unique and free of dots; each is decoded once to know that it can be.
    A shard is there whole or not at all, and the index comes last. The same images and arguments give the same bytes.

    Args:
        samples_per_shard, shard_bytes: a shard is full with this many images, or before it outgrows this many bytes.
        on_bad: "error", or "skip" to leave out images that do not decode.
    Raises:
        DatasetError: no images, one that does not decode, an `out` that is not empty or cannot be written.
    """
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise DatasetError(f"The name '{name}' of the shards is to consist of letters, digits, _ and -.")
    images = ImageFolder(folder, labelled=False)
    order = np.random.default_rng(seed).permutation(len(images)).tolist()
    files = [images.source(index) for index in order]
    out = Path(out)
    skipped: list[str] = []
    try:
        out.mkdir(parents=True, exist_ok=True)
        if any(out.iterdir()):
            raise DatasetError(f"{out.absolute()} is not empty. Name another folder, or empty this one first.")
        writer = _ShardWriter(out, name, samples_per_shard, shard_bytes)
        progress = tqdm(zip(files, _in_workers(_checked, files, num_workers), strict=True), total=len(files))
        for file, (content, problem) in progress:
            if not problem:
                writer.add(os.path.relpath(file, images.root), content)
                continue
            if on_bad == "error":
                raise DatasetError(
                    f"{problem} {out.absolute()} holds the shards before it and no index: empty it. "
                    "Or pass --on-bad skip to leave such images out."
                )
            skipped.append(problem)
        shards = writer.close()
        if not shards:
            raise DatasetError(f"None of the {len(files)} images below {images.root} decodes.")
        write_index(out, shards)
    except OSError as error:
        raise DatasetError(f"The shards cannot be written to {out.absolute()}: {error}.") from error
    return Packed(shards, skipped)


def _checked(file: str) -> tuple[bytes, str]:
    """The bytes of an image file, and what is wrong with it."""
    try:
        content = Path(file).read_bytes()
        load_image(io.BytesIO(content), name=file)
        return content, ""
    except (OSError, DatasetError) as error:
        return b"", str(error)


class _ShardWriter:
    """Writes one tar file after the other; each has a temporary name until it is whole."""

    def __init__(self, out: Path, name: str, most_samples: int | None, most_bytes: int | None) -> None:
        self.out, self.name, self.most_samples, self.most_bytes = out, name, most_samples, most_bytes
        self.shards: list[Shard] = []
        self.total = self.samples = 0
        self.file: Any = None

    def add(self, path: str, content: bytes) -> None:
        """Append an image that has the relative path `path`."""
        if self.samples and (self.samples == self.most_samples or self._outgrown_by(len(content))):
            self.close()
        if self.file is None:
            self.address = self.out / f"{self.name}-{len(self.shards):06d}.tar"
            self.file = _Hashed(self.out / f".{self.address.name}.part")
            self.tar = tarfile.open(fileobj=self.file, mode="w|", format=tarfile.PAX_FORMAT)
        stem, extension = os.path.splitext(path)
        key = f"{self.total:09d}_{re.sub(r'[^A-Za-z0-9_-]+', '-', stem)}"[:_LONGEST_KEY]
        header = tarfile.TarInfo(key + extension.lower())
        header.size = len(content)
        self.tar.addfile(header, io.BytesIO(content))
        self.samples += 1
        self.total += 1

    def _outgrown_by(self, size: int) -> bool:
        """Whether the shard at hand would be too large with another file of `size` bytes."""
        if self.most_bytes is None:
            return False
        blocks = 1 + math.ceil(size / tarfile.BLOCKSIZE) + 2  # the header, the file, and two of zeros at the end
        whole = self.tar.offset + blocks * tarfile.BLOCKSIZE
        return math.ceil(whole / tarfile.RECORDSIZE) * tarfile.RECORDSIZE > self.most_bytes

    def close(self) -> list[Shard]:
        """Finish the shard at hand; all shards so far."""
        if self.file is not None:
            self.tar.close()
            self.file.close()
            os.replace(self.file.path, self.address)
            sha256 = self.file.sha.hexdigest()
            self.shards.append(Shard(str(self.address), self.samples, self.file.size, sha256))
            self.file, self.samples = None, 0
        return self.shards


class _Hashed:
    """A file that is hashed as it is written."""

    def __init__(self, path: Path) -> None:
        self.path, self.file, self.sha, self.size = path, open(path, "wb"), hashlib.sha256(), 0

    def write(self, block: bytes) -> None:
        self.file.write(block)
        self.sha.update(block)
        self.size += len(block)

    def close(self) -> None:
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()


def index_shards(urls: str | Sequence[str], out: str | os.PathLike | None = None, num_workers: int = 4) -> Path:
    """Read shards from end to end and write their `index.json` to `out`, or beside them where they lie in one folder.

    Raises:
        DatasetError: a shard that cannot be read, or nowhere to write to.
    """
    addresses = [
        one for address in expand(urls) for one in ([address] if address.endswith(".tar") else shards_in(address))
    ]
    folders = {address.rpartition("/")[0] for address in addresses}
    if out is None and (len(folders) > 1 or is_remote(addresses[0])):
        raise DatasetError("The shards lie elsewhere or in several folders. Say with --out where the index is to go.")
    names = {address.rpartition("/")[2] for address in addresses}
    if len(names) < len(addresses):
        raise DatasetError(
            "Two of the shards have the same name. Index each folder by itself, with an --out of its own."
        )
    shards = []
    for shard, problem in tqdm(_in_workers(_digested, addresses, num_workers), total=len(addresses), unit="shard"):
        if problem:
            raise DatasetError(problem)
        shards.append(shard)
    return write_index(Path(out) if out is not None else local_path(folders.pop()), shards)


def _digested(address: str) -> tuple[Shard | None, str]:
    try:
        return digest_shard(address), ""
    except DatasetError as error:
        return None, str(error)


def check_shards(folder: str | os.PathLike, num_workers: int = 4) -> tuple[list[Shard], list[str]]:
    """Compare the shards of a folder with its index, bytes and all, and decode every image.

    Returns:
        The shards, and everything that is wrong.
    Raises:
        DatasetError: there is no such folder, or no index in it.
    """
    folder = require_folder(folder, "Shards").absolute()
    indexed = read_index(str(folder / INDEX_FILE), required=True)
    shards = [shard._replace(address=str(folder / name)) for name, shard in indexed.items()]
    surplus = sorted({path.name for path in folder.glob("*.tar")} - indexed.keys())
    problems = [f"Shard {folder / name} is not in {INDEX_FILE}." for name in surplus]
    for found in tqdm(_in_workers(_problems, shards, num_workers), total=len(shards), unit="shard"):
        problems += found
    return shards, problems


def _problems(shard: Shard) -> list[str]:
    """What is wrong with one shard."""
    found = []
    try:
        present = digest_shard(shard.address)
        for what in ("samples", "bytes", "sha256"):
            value, expected = getattr(present, what), getattr(shard, what)
            if expected is not None and value != expected:
                found.append(f"Shard {shard.address}: {what} {value}, but {INDEX_FILE} says {expected}.")
        for _, sample in read_samples(present, range(present.samples)):
            try:
                load_image(as_file(sample), name=sample.where)
            except DatasetError as error:
                found.append(str(error))
    except DatasetError as error:
        found.append(str(error))
    return found
