"""Pack a folder of images into WebDataset shards, index shards, and check them."""

import hashlib
import io
import itertools
import json
import os
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import IO, TypeVar

import numpy as np
from torch.utils.data import DataLoader
from tqdm import tqdm

from bissl_zoo.data.datasets.catalog import IMAGE_EXTENSIONS, load_image
from bissl_zoo.data.datasets.folder import ImageFolder
from bissl_zoo.data.shards import (
    INDEX_FILE,
    INDEX_FORMAT,
    Shard,
    expand,
    images_in,
    is_remote,
    naming,
    open_address,
    open_tar,
    read_index,
    read_samples,
)
from bissl_zoo.errors import DatasetError
from bissl_zoo.files import fsync, sha256_of, write_atomically

#: longest member name without its extension, so that every tar format stores it in one header
_MAX_KEY = 90

Item, Result = TypeVar("Item"), TypeVar("Result")


def pack_folder(
    folder: str,
    out: str | os.PathLike,
    name: str,
    samples_per_shard: int = 10_000,
    seed: int = 0,
    on_bad: str = "error",
    num_workers: int = 4,
) -> tuple[list[Shard], list[str]]:
    """Pack the images at any depth of a folder into `out/NAME-000000.tar` and so on, in an order drawn with `seed`.

    Files are copied byte for byte, under unique names; each is decoded once as a check. A shard is renamed into place
    when it is complete, and the index is written last. The same images and arguments give the same bytes.

    Args:
        on_bad: "error", or "skip" to leave out images that cannot be decoded.
    Returns:
        The shards, and the problem of each image that was left out.
    Raises:
        DatasetError: no images, one that cannot be decoded, or an `out` that is not empty or cannot be written.
    """
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise DatasetError(f"The name '{name}' of the shards may only have letters, digits, _ and -.")
    images, out = ImageFolder(folder, labelled=False), Path(out)
    files = [images.source(index) for index in np.random.default_rng(seed).permutation(len(images)).tolist()]
    contents = DataLoader(files, batch_size=None, collate_fn=_read_checked, num_workers=num_workers)
    skipped: list[str] = []

    def readable() -> Iterator[tuple[str, bytes]]:
        for file, (content, problem) in zip(files, tqdm(contents, total=len(files), unit="image"), strict=True):
            if not problem:
                yield os.path.relpath(file, images.root), content
            elif on_bad == "skip":
                skipped.append(problem)
            else:
                raise DatasetError(
                    f"{problem} Pass --on-bad skip to leave such images out. {out.absolute()} holds the shards before "
                    "it and no index: empty it first."
                )

    shards: list[Shard] = []
    try:
        out.mkdir(parents=True, exist_ok=True)
        if any(out.iterdir()):
            raise DatasetError(f"{out.absolute()} is not empty. Choose another folder, or empty this one.")
        remaining = readable()
        while (first := next(remaining, None)) is not None:
            group = itertools.chain([first], itertools.islice(remaining, samples_per_shard - 1))
            path = out / f"{name}-{len(shards):06d}.tar"
            shards.append(_write_shard(path, enumerate(group, start=len(shards) * samples_per_shard)))
        if not shards:
            raise DatasetError(f"None of the {len(files)} images below {images.root} can be decoded.")
        write_index(out, shards)
    except OSError as error:
        raise DatasetError(f"The shards cannot be written to {out.absolute()} ({error}).") from error
    return shards, skipped


def _read_checked(file: str) -> tuple[bytes, str]:
    """Return the bytes of an image file, or its problem."""
    try:
        content = Path(file).read_bytes()
        load_image(io.BytesIO(content), name=file)
        return content, ""
    except (OSError, DatasetError) as error:
        return b"", str(error)


def _write_shard(path: Path, images: Iterable[tuple[int, tuple[str, bytes]]]) -> Shard:
    """Write a tar file of numbered images (relative path, content), under a temporary name until it is complete."""
    temporary, samples = path.with_name(f".{path.name}.part"), 0
    with tarfile.open(temporary, "w", format=tarfile.PAX_FORMAT) as tar:
        for number, (name, content) in images:
            stem, extension = os.path.splitext(name)
            key = f"{number:09d}_{re.sub(r'[^A-Za-z0-9_-]+', '-', stem)}"[:_MAX_KEY]
            header = tarfile.TarInfo(key + extension.lower())
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))
            samples += 1
    fsync(temporary)
    os.replace(temporary, path)
    return Shard(str(path), samples, path.stat().st_size, sha256_of(path))


def write_index(folder: Path, shards: Iterable[Shard]) -> Path:
    """Write `index.json` into a folder, atomically, and return its path."""
    entries = [
        json.dumps({"name": shard.name, "samples": shard.samples, "bytes": shard.bytes, "sha256": shard.sha256})
        for shard in sorted(shards, key=lambda shard: shard.name)
    ]
    lines = ",\n".join(f"  {entry}" for entry in entries)
    write_atomically(folder / INDEX_FILE, f'{{"format": {INDEX_FORMAT}, "shards": [\n{lines}\n]}}\n')
    return folder / INDEX_FILE


class _Hashing:
    """A file that is hashed as it is read."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.sha256, self.bytes = file, hashlib.sha256(), 0

    def read(self, count: int) -> bytes:
        block = self.file.read(count)
        self.sha256.update(block)
        self.bytes += len(block)
        return block


def scan_shard(address: str) -> Shard:
    """Count the samples of a shard and hash its bytes, in one pass.

    Raises:
        DatasetError: it is missing, damaged, or holds no images.
    """
    with naming(address), open_address(address) as raw:
        file = _Hashing(raw)
        with open_tar(file, stream=True) as tar:
            samples = sum(1 for _ in images_in(tar))
        while file.read(1 << 20):
            pass
    if not samples:
        raise DatasetError(f"Shard {address} holds no images ({', '.join(sorted(IMAGE_EXTENSIONS))}).")
    return Shard(address, samples, file.bytes, file.sha256.hexdigest())


def index_shards(urls: str | Sequence[str], out: str | os.PathLike | None = None, num_workers: int = 4) -> Path:
    """Read shards from end to end and write their `index.json` to `out`, or beside them if they share a local folder.

    Raises:
        DatasetError: a shard that cannot be read, or no place to write to.
    """
    addresses: list[str] = []
    for address in expand(urls):
        local = sorted(str(path) for path in Path(address).glob("*.tar")) if not is_remote(address) else []
        addresses += [address] if address.endswith(".tar") else local
    if not addresses:
        raise DatasetError(f"There are no shards at {urls}. Name local folders, or shards by addresses ending in .tar.")
    folders = {address.rpartition("/")[0] for address in addresses}
    if out is None and (len(folders) > 1 or is_remote(addresses[0])):
        raise DatasetError("The shards are remote or in several folders. Pass --out DIR for the index.")
    if len({address.rpartition("/")[2] for address in addresses}) < len(addresses):
        raise DatasetError("Two shards have the same name. Index each folder with its own --out.")
    return write_index(Path(out or folders.pop()), _in_threads(scan_shard, addresses, num_workers))


def check_shards(folder: str | os.PathLike, num_workers: int = 4) -> tuple[list[Shard], list[str]]:
    """Compare the shards of a folder with its index, byte for byte, and decode every image.

    Returns:
        The shards, and a list of problems.
    Raises:
        DatasetError: there is no index.
    """
    folder = Path(folder).absolute()
    index = read_index(str(folder / INDEX_FILE))
    shards = [shard._replace(address=str(folder / name)) for name, shard in index.items()]
    unlisted = sorted({path.name for path in folder.glob("*.tar")} - index.keys())
    problems = [f"Shard {folder / name} is not in {INDEX_FILE}." for name in unlisted]
    return shards, problems + [problem for found in _in_threads(_problems, shards, num_workers) for problem in found]


def _in_threads(function: Callable[[Item], Result], items: Sequence[Item], num_workers: int) -> list[Result]:
    with ThreadPool(max(1, num_workers)) as pool:
        return list(tqdm(pool.imap(function, items), total=len(items), unit="shard"))


def _problems(shard: Shard) -> list[str]:
    problems = []
    try:
        present = scan_shard(shard.address)
        for key in ("samples", "bytes", "sha256"):
            value, expected = getattr(present, key), getattr(shard, key)
            if expected is not None and value != expected:
                problems.append(f"Shard {shard.address}: {key} {value}, but {INDEX_FILE} has {expected}.")
        for _, stored in read_samples(present, range(present.samples)):
            try:
                stored.decode()
            except DatasetError as error:
                problems.append(str(error))
    except DatasetError as error:
        problems.append(str(error))
    return problems
