"""Unlabelled images in WebDataset shards: an endless training stream, and the index that counts samples.

A shard is an uncompressed tar file. Each image in it is a sample; captions, labels and other members are ignored. An
`index.json` beside the shards, or anywhere else, gives the samples, bytes and sha256 of each.
"""

import contextlib
import hashlib
import io
import itertools
import json
import math
import os
import re
import tarfile
import time
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import aiohttp
import fsspec
import numpy as np
from PIL import Image
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from bissl_zoo.data.datasets.catalog import IMAGE_EXTENSIONS, datasets_root, load_image
from bissl_zoo.data.samples import MAX_SKIPPED_IN_A_ROW
from bissl_zoo.errors import ConfigError, DatasetError, shorten
from bissl_zoo.files import follow
from bissl_zoo.limits import limit, stated
from bissl_zoo.registry import DATASETS

INDEX_FILE = "index.json"
#: attempts to read a remote shard, and the first pause between two of them in seconds, which doubles
ATTEMPTS, PAUSE = 4, 1.0
INDEX_FORMAT = 1
_RANGE = re.compile(r"\{(\d{1,18})\.\.(\d{1,18})\}", re.ASCII)


class Shard(NamedTuple):
    """One shard as its index describes it; `samples` counts its images."""

    address: str
    samples: int
    bytes: int
    sha256: str | None = None

    @property
    def name(self) -> str:
        """The file name."""
        return self.address.rpartition("/")[2]


class Stored(NamedTuple):
    """The bytes of an image file, and a name for it in messages."""

    name: str
    content: bytes

    def decode(self) -> Image.Image:
        """Decode the image; raise `DatasetError` if that fails."""
        return load_image(io.BytesIO(self.content), name=self.name)


@DATASETS.register("shards")
class ShardDataset(Dataset):
    """The images in WebDataset shards, local or remote, without labels.

    Training reads them as a stream (:meth:`stream`). `dataset[i]` reads one image of a local shard.

    Args:
        urls: addresses of shards ending in `.tar`, or of folders whose `index.json` lists them; one or a list.
            `{000000..000146}` is a range. Paths are relative to the datasets root; other addresses begin with http://,
            s3://, gs:// or another protocol of fsspec.
        index: the `index.json` of all shards; None for the one beside each shard.
        on_bad: "skip" to replace an image that cannot be decoded by the next one, or "error".
        shuffle_buffer: image files that each worker holds to draw from.

    Raises:
        DatasetError: no shards, or an index that is missing, unreadable or incomplete.
    """

    classes = None

    def __init__(
        self,
        urls: str | Sequence[str],
        index: str | None = None,
        on_bad: str = "skip",
        shuffle_buffer: int = 1000,
    ):
        self.shards = find_shards(urls, index)
        self.samples = np.array([shard.samples for shard in self.shards], dtype=np.int64)
        self.on_bad, self.shuffle_buffer = on_bad, shuffle_buffer
        self._ends = self.samples.cumsum()
        self._offsets: dict[int, list[int]] = {}

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> tuple[Image.Image, None]:
        index = range(len(self))[index]
        number = int(np.searchsorted(self._ends, index, side="right"))
        shard, first = self.shards[number], int(self._ends[number] - self.samples[number])
        if is_remote(shard.address):
            raise DatasetError(
                f"Shard {shard.address} is remote and is only read as a stream. Copy it to this machine to read single "
                "images, or turn off what needs them, such as the probe (train.probe.period=0)."
            )
        with naming(shard.address), open(shard.address, "rb", opener=follow) as file:
            if number not in self._offsets:
                with open_tar(file, stream=False) as tar:
                    self._offsets[number] = [member.offset for member in images_in(tar)]
                _check_count(shard, len(self._offsets[number]))
            file.seek(self._offsets[number][index - first])
            with open_tar(file, stream=False) as tar:
                stored = _stored(shard, tar, next(images_in(tar)))
        return stored.decode(), None

    def digest(self) -> str:
        """Return the sha256 of the list of shards: each name with its samples and its digest or size."""
        lines = [f"{shard.name} {shard.samples} {shard.sha256 or shard.bytes}" for shard in self.shards]
        return hashlib.sha256("\n".join(sorted(lines)).encode("utf-8", "surrogateescape")).hexdigest()

    def stream(
        self, batch_size: int, seed: int, start_step: int = 0, num_workers: int = 0, rank: int = 0, world: int = 1
    ) -> "ShardStream":
        """Return the endless stream of training images of one rank, for a loader with `num_workers`.

        Args:
            batch_size: samples of a batch of this rank.
            start_step: number of batches that an earlier part of the run has taken.
        Raises:
            ConfigError: fewer shards than processes that read them.
        """
        consumers = world * max(1, num_workers)
        if consumers > len(self.shards):
            raise ConfigError(
                f"{len(self.shards)} shards cannot feed {consumers} readers ({world} ranks with {max(1, num_workers)} "
                "workers each). Use fewer workers (num_workers), or pack the images into more shards "
                "(bissl data --to-shards ... --samples-per-shard)."
            )
        return ShardStream(self, batch_size, seed, start_step, rank, world)


class ShardStream(IterableDataset):
    """Endless `((consumer, turn), (image, None))` of one rank; each worker reads its own share of every epoch.

    The order is a pure function of seed, rank, worker and epoch, for a given number of ranks and workers. Loaders take
    batches from their workers in turn, so `start_step` determines how many samples each worker has delivered. Those are
    drawn again without being read, and reading continues with the shards that the shuffle buffer still needs.

    Attributes:
        skipped: name -> problem of the images that could not be decoded since the iterator was made.
    """

    def __init__(
        self, dataset: ShardDataset, batch_size: int, seed: int, start_step: int, rank: int, world: int
    ) -> None:
        self.dataset, self.batch_size, self.seed, self.start_step = dataset, batch_size, seed, start_step
        self.rank, self.world = rank, world
        self.skipped: dict[str, str] = {}

    def __iter__(self) -> Iterator[tuple[tuple[int, int], tuple[Image.Image, None]]]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        # a loader always begins with its first worker, which therefore takes the part of the one whose turn it is
        part = (self.start_step + worker) % workers
        self.skipped = {}
        delivered = len(range(part, self.start_step, workers)) * self.batch_size
        consumer = self.rank * workers + part
        samples = self._samples(consumer, self.world * workers, delivered)
        ahead: deque[Stored] = deque()
        for turn in itertools.count(delivered):
            # an image that cannot be decoded is replaced by the next good one, which comes again in its own turn
            for place in range(MAX_SKIPPED_IN_A_ROW):
                if place == len(ahead):
                    ahead.append(next(samples))
                if (image := self._decode(ahead[place])) is not None:
                    break
            else:
                raise DatasetError(
                    f"{MAX_SKIPPED_IN_A_ROW:,} images in a row cannot be decoded. Check the shards with "
                    "bissl data --check."
                )
            ahead.popleft()
            yield (consumer, turn), (image, None)

    def _decode(self, stored: Stored) -> Image.Image | None:
        try:
            return stored.decode()
        except DatasetError as error:
            if self.dataset.on_bad == "error":
                raise DatasetError(f'{error} Or pass on_bad="skip" to train on another image instead.') from error
            self.skipped.setdefault(stored.name, str(error))
            return None

    def _samples(self, consumer: int, consumers: int, delivered: int) -> Iterator[Stored]:
        """Yield the endless samples of one consumer, without the first `delivered`."""
        for epoch in itertools.count():
            first, last = epoch_bounds(len(self.dataset), epoch, consumer, consumers)
            if delivered >= last - first:
                delivered -= last - first
                continue
            rng = np.random.default_rng([self.seed, epoch, 1 + consumer])
            order = buffered_order(last - first, self.dataset.shuffle_buffer, rng)
            pending = np.ones(len(order), dtype=bool)
            pending[order[:delivered]] = False
            arriving = self._read(epoch_share(self.dataset.samples, self.seed, epoch, first, last), pending)
            buffer: dict[int, Stored] = {}
            for position in order[delivered:].tolist():
                while position not in buffer:
                    buffer.update([next(arriving)])
                yield buffer.pop(position)
            delivered = 0

    def _read(self, pieces: list["Piece"], pending: np.ndarray) -> Iterator[tuple[int, Stored]]:
        """Yield the pending samples of a share with their positions in it, in the order of the shards."""
        begin = 0
        for piece in pieces:
            length = piece.stop - piece.start
            numbers = (np.flatnonzero(pending[begin : begin + length]) + piece.start).tolist()
            for number, sample in read_samples(self.dataset.shards[piece.shard], numbers):
                yield begin + number - piece.start, sample
            begin += length


# the order of the stream


class Piece(NamedTuple):
    """The samples `start` to `stop` (exclusive) of shard number `shard`."""

    shard: int
    start: int
    stop: int


def epoch_bounds(total: int, epoch: int, consumer: int, consumers: int) -> tuple[int, int]:
    """Return the first and last (exclusive) of an epoch's `total` samples that one of several consumers reads."""
    turn = (consumer + epoch) % consumers  # rotated, or the same consumers would have the longer runs in every epoch
    return turn * total // consumers, (turn + 1) * total // consumers


def epoch_share(samples: np.ndarray, seed: int, epoch: int, first: int, last: int) -> list[Piece]:
    """Return the pieces of shards that a consumer with these bounds reads in an epoch, in reading order.

    The shards are put into an order drawn for the epoch, and their samples, one after another, are cut into equal runs.
    So no sample is read twice, and all consumers reach the end of an epoch together. A shard that two runs share is
    read by both.

    Args:
        samples: number of samples of each shard, (shards,).
    """
    order = np.random.default_rng([seed, epoch, 0]).permutation(len(samples))
    pieces, begin = [], 0
    for shard in order.tolist():
        start, stop = max(first - begin, 0), min(last - begin, int(samples[shard]))
        if start < stop:
            pieces.append(Piece(shard, start, stop))
        begin += int(samples[shard])
    return pieces


def buffered_order(count: int, buffer: int, rng: np.random.Generator) -> np.ndarray:
    """Return a permutation of `range(count)`, (count,) int64, as a shuffle buffer of `buffer` samples makes it.

    Each step takes a random sample of the buffer and puts the next one in its place. So no sample comes more than
    `buffer - 1` steps early.
    """
    held = list(range(min(buffer, count)))
    order = np.empty(count, dtype=np.int64)
    for step, draw in enumerate(rng.random(count).tolist()):
        place = int(draw * len(held))
        order[step] = held[place]
        if step + buffer < count:
            held[place] = step + buffer
        else:
            held[place] = held[-1]
            held.pop()
    return order


# reading


def read_samples(shard: Shard, numbers: Sequence[int]) -> Iterator[tuple[int, Stored]]:
    """Yield the samples `numbers` (ascending) of a shard, each with its number; retry if a remote shard fails.

    Raises:
        DatasetError: the shard is missing, truncated or damaged, or does not fit its index.
    """
    done, attempt = 0, 1
    while done < len(numbers):
        try:
            for number, stored in _read_once(shard, numbers[done:]):
                yield number, stored
                done, attempt = done + 1, 1
        except DatasetError as error:
            if not is_remote(shard.address) or attempt == ATTEMPTS or isinstance(error.__cause__, FileNotFoundError):
                raise
            time.sleep(PAUSE * 2 ** (attempt - 1))
            attempt += 1


def _read_once(shard: Shard, numbers: Sequence[int]) -> Iterator[tuple[int, Stored]]:
    remaining, number = iter(numbers), -1
    following = next(remaining)
    stream = is_remote(shard.address)
    with naming(shard.address), open_address(shard.address) as file, open_tar(file, stream) as tar:
        for number, member in enumerate(images_in(tar)):
            if number == following:
                yield number, _stored(shard, tar, member)
                following = next(remaining, None)
                if following is None:
                    return
        _check_count(shard, number + 1)


def _stored(shard: Shard, tar: tarfile.TarFile, member: tarfile.TarInfo) -> Stored:
    return Stored(f"'{member.name}' in shard {shard.address}", tar.extractfile(member).read())


def _check_count(shard: Shard, count: int) -> None:
    if count < shard.samples:
        raise DatasetError(
            f"Shard {shard.address} holds {count} images, but its index lists {shard.samples}. Copy it again, or write "
            "a new index with bissl data --index-shards."
        )


def is_remote(address: str) -> bool:
    return "://" in address


def open_address(address: str) -> IO[bytes]:
    """Open a path or an address of fsspec for reading from front to back."""
    if not is_remote(address):
        return open(address, "rb", opener=follow)  # not a pipe, which would wait
    if not address.startswith(("http://", "https://")):
        return fsspec.open(address, "rb").open()
    # a plain stream (block_size 0): the server need not know ranges; an epoch may take longer than the default limit
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=60, sock_read=60)
    files = fsspec.filesystem("http", client_kwargs={"timeout": timeout})
    return files.open(address, "rb", block_size=0, size=1)  # a size saves the request for it; a stream does not use it


@contextlib.contextmanager
def naming(address: str) -> Iterator[None]:
    """Raise errors of reading a shard or an index as a DatasetError that names it."""
    try:
        yield
    except DatasetError:
        raise
    except FileNotFoundError as error:
        raise DatasetError(f"{address} does not exist.") from error
    except Exception as error:  # each protocol raises what its library raises
        raise DatasetError(f"{address} cannot be read ({type(error).__name__}: {error}).") from error


class _Header(tarfile.TarInfo):
    """A tar header that raises if it is damaged or cut off; tarfile ends the archive there without an error."""

    @classmethod
    def frombuf(cls, buf: bytes, *args: Any) -> tarfile.TarInfo:
        try:
            return super().frombuf(buf, *args)
        except tarfile.HeaderError as error:
            if len(buf) == tarfile.BLOCKSIZE and not any(buf):  # the end of the archive
                raise
            raise tarfile.ReadError(f"truncated or damaged: {error}") from error


def open_tar(file: Any, stream: bool) -> tarfile.TarFile:
    return tarfile.open(fileobj=file, mode="r|" if stream else "r:", bufsize=1 << 20, tarinfo=_Header)


def images_in(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Yield the headers of a shard's samples, in order."""
    while (member := tar.next()) is not None:
        tar.members.clear()  # or every header stays in memory
        name = os.path.basename(member.name)
        is_image = os.path.splitext(name)[1].lower() in IMAGE_EXTENSIONS and not name.startswith(".")
        if is_image and member.isreg() and not member.issparse():
            yield member


# the index


def expand(urls: str | Sequence[str]) -> list[str]:
    """Return addresses without braces: `a-{000..002}.tar` means a-000.tar, a-001.tar, a-002.tar, as in WebDataset.

    Paths are made absolute below the datasets root.

    Raises:
        DatasetError: another use of braces, or more than `limits.SHARDS` addresses.
    """
    addresses: list[str] = []
    urls = [urls] if isinstance(urls, str) else urls
    count = sum(_count_addresses(str(url)) for url in urls)
    if count > limit("SHARDS"):
        raise DatasetError(
            f"The addresses '{shorten([str(url) for url in urls])}' are {count:,} shards; {stated('SHARDS')}."
        )
    for url in urls:
        for address in _expand_ranges(str(url)):
            if set("{}") & set(address):
                raise DatasetError(f"'{url}': braces hold a range of numbers, such as shard-{{000000..000146}}.tar.")
            path = address.removeprefix("file://")
            addresses.append(path if is_remote(path) else str(datasets_root() / Path(path).expanduser()))
    return addresses


def _count_addresses(url: str) -> int:
    return math.prod(max(int(last) - int(first) + 1, 1) for first, last in _RANGE.findall(url))


def _expand_ranges(url: str) -> list[str]:
    match = _RANGE.search(url)
    if match is None:
        return [url]
    first, last = match.groups()
    if int(first) > int(last):
        raise DatasetError(f"'{url}': the range {match[0]} runs backwards.")
    width = len(first) if first.startswith("0") else 0
    heads = [f"{url[: match.start()]}{number:0{width}}" for number in range(int(first), int(last) + 1)]
    return [head + tail for head in heads for tail in _expand_ranges(url[match.end() :])]


def find_shards(urls: str | Sequence[str], index: str | None = None) -> list[Shard]:
    """Return the shards at `urls`, as :class:`ShardDataset` takes them, in the given order, counted by their index.

    Raises:
        DatasetError: an index that is missing, unreadable or lacks a shard, or a shard that is given twice.
    """
    indexes: dict[str, dict[str, Shard]] = {}
    shards: list[Shard] = []
    for address in expand(urls):
        folder, _, name = (address if address.endswith(".tar") else f"{address.rstrip('/')}/").rpartition("/")
        where = expand(index)[0] if index else f"{folder}/{INDEX_FILE}"
        if where not in indexes:
            indexes[where] = read_index(where)
        listed = indexes[where]
        if name and name not in listed:
            raise DatasetError(f"Shard {address} is not in {where}. {_how_to_index(address)}")
        shards += [listed[key]._replace(address=f"{folder}/{key}") for key in ([name] if name else sorted(listed))]
    addresses = [shard.address for shard in shards]
    if len(set(addresses)) < len(addresses):
        raise DatasetError(f"Shard {next(a for a in addresses if addresses.count(a) > 1)} is given more than once.")
    return shards


def _how_to_index(address: str) -> str:
    return (
        f"Write an index with\n  bissl data --index-shards '{address}' --out DIR\n"
        f'and put it beside the shards, or pass index="DIR/{INDEX_FILE}".'
    )


def read_index(address: str) -> dict[str, Shard]:
    """Return the shards that an `index.json` lists, by name.

    Raises:
        DatasetError: the file is missing, cannot be read, or has another format.
    """
    try:
        with naming(address), open_address(address) as file:
            data = file.read(limit("INDEX_BYTES") + 1)
        if len(data) > limit("INDEX_BYTES"):
            raise ValueError(f"it is too large; {stated('INDEX_BYTES')}")
        content = json.loads(data)
        if content["format"] != INDEX_FORMAT:
            raise ValueError(f"its format is {content['format']}, not {INDEX_FORMAT}")
        shards = [Shard(*(entry[key] for key in ("name", "samples", "bytes", "sha256"))) for entry in content["shards"]]
        for shard in shards:
            if "/" in shard.address or not shard.address.endswith(".tar") or shard.samples < 1:
                raise ValueError(f"invalid entry {shard}")
    except DatasetError as error:
        raise DatasetError(f"{error} {_how_to_index(address.rpartition('/')[0])}") from error
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DatasetError(
            f"{address} is not an index of shards ({error}). {_how_to_index(address.rpartition('/')[0])}"
        ) from error
    return {shard.address: shard for shard in shards}
