"""Unlabelled images in WebDataset shards: a data set to draw from, and an endless stream of training images."""

import hashlib
import itertools
import logging
from collections import deque
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from bissl_zoo.data.datasets.catalog import load_image, load_pixels
from bissl_zoo.data.remote_files import is_remote
from bissl_zoo.data.shards_index import find_shards
from bissl_zoo.data.shards_reading import (
    Piece,
    Stored,
    as_file,
    buffered_order,
    epoch_bounds,
    epoch_share,
    read_at,
    read_samples,
    sample_offsets,
    stand_ins,
)
from bissl_zoo.errors import ConfigError, DatasetError
from bissl_zoo.registry import DATASETS

logger = logging.getLogger(__name__)

#: so many samples in a row that do not decode are no accident
_MOST_BROKEN = 1000
_SKIP = 'Or pass on_bad="skip" to train on other samples in its place.'


@DATASETS.register("shards")
class ShardDataset(Dataset):
    """The images in WebDataset shards, local or remote, without labels; each image member is a sample.

    Training reads them as a stream (:meth:`stream`). An index reads one sample: quick where shards are local and have
    been looked through once, and for a few samples only where they are remote, as it reads the shard up to the sample.

    Args:
        urls: addresses of shards ending in `.tar`, or folders of them, one or a list; `{000000..000146}` is a range.
            Paths lie below the datasets root; other addresses begin with http://, s3://, gs:// or what else fsspec or
            a handler of iopath opens.
        index: an `index.json` that counts their samples; None for the one beside each shard. Local shards that it does
            not list are counted and entered there.
        on_bad: "skip" for another sample in the place of one that is missing or does not decode, or "error".
        shuffle_buffer: samples, as files, that each worker holds to draw from.
        as_tensor: images are `(3, H, W)` uint8 rather than PIL's, see `ImageFolder`.

    Attributes:
        skipped: members and shards that were broken so far, and the problem of each; tells: whether to warn of it. A
            stream begins anew with it, and leaves the warning to its loader.

    Raises:
        DatasetError: no shards, no index of remote ones, or an index that cannot be read.
    """

    classes = None

    def __init__(
        self,
        urls: str | Sequence[str],
        index: str | None = None,
        on_bad: str = "skip",
        shuffle_buffer: int = 1000,
        as_tensor: bool = False,
    ):
        if on_bad not in ("error", "skip"):
            raise DatasetError(f'Shards: on_bad is "{on_bad}"; it is "error" or "skip".')
        if shuffle_buffer < 1:
            raise DatasetError(f"Shards: shuffle_buffer is {shuffle_buffer}; it must be at least 1.")
        self.shards = find_shards(urls, index)
        self.samples = np.array([shard.samples for shard in self.shards], dtype=np.int64)
        self.on_bad, self.shuffle_buffer = on_bad, shuffle_buffer
        self._load = load_pixels if as_tensor else load_image
        self._ends = self.samples.cumsum()
        self._offsets: dict[int, np.ndarray] = {}
        self.skipped: dict[str, str] = {}
        self.tells = True

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> tuple[Image.Image | Tensor, None]:
        index = range(len(self))[index]
        for following in range(index, index + min(len(self), _MOST_BROKEN)):
            shard = int(np.searchsorted(self._ends, following % len(self), side="right"))
            number = following % len(self) - int(self._ends[shard] - self.samples[shard])
            if (image := self.decode(self._stored(shard, number))) is not None:
                return image, None
        raise _too_many_broken()

    def _stored(self, shard: int, number: int) -> Stored:
        if is_remote(self.shards[shard].address):
            return next(self.read(shard, [number]))[1]
        try:
            if shard not in self._offsets:
                self._offsets[shard] = sample_offsets(self.shards[shard])
            return read_at(self.shards[shard], int(self._offsets[shard][number]))
        except (DatasetError, IndexError):  # told, or another sample found, by the reading that names what is wrong
            return next(self.read(shard, [number]))[1]

    def digest(self) -> str:
        """The sha256 of the list of shards: their names with their digests, or their sizes where nobody hashed them."""
        lines = [f"{shard.name} {shard.samples} {shard.sha256 or shard.bytes}" for shard in self.shards]
        return hashlib.sha256("\n".join(sorted(lines)).encode("utf-8", "surrogateescape")).hexdigest()

    def read(self, shard: int, numbers: Sequence[int]) -> Iterator[tuple[int, Stored]]:
        """The samples `numbers`, which ascend, of a shard, or what stands in for them where it is broken.

        Raises:
            DatasetError: the shard is broken and nothing may stand in, or nothing can.
        """
        done = 0
        try:
            for number, sample in read_samples(self.shards[shard], numbers):
                yield number, sample
                done += 1
        except DatasetError as error:
            self._broken(error, self.shards[shard].address)
            yield from stand_ins(self.shards, shard, numbers[done:])

    def decode(self, sample: Stored) -> Image.Image | Tensor | None:
        """The image of a sample; None where it is broken and may be replaced.

        Raises:
            DatasetError: it is broken and may not be replaced.
        """
        try:
            return self._load(as_file(sample), name=sample.where)
        except DatasetError as error:
            self._broken(error, sample.where)
            return None

    def _broken(self, error: DatasetError, what: str) -> None:
        if self.on_bad == "error":
            raise DatasetError(f"{error} {_SKIP}") from error
        if what not in self.skipped:
            self.skipped[what] = str(error)
            if self.tells:
                logger.warning("%s Other samples take its place (%d bad so far).", error, len(self.skipped))

    def stream(
        self, batch_size: int, seed: int, start_step: int = 0, num_workers: int = 0, rank: int = 0, world: int = 1
    ) -> "ShardStream":
        """The endless stream of training images of one rank, for a loader with these workers.

        Args:
            batch_size: samples of a batch of this rank.
            start_step: number of batches already taken by an earlier part of the run.
        Raises:
            ConfigError: fewer shards than processes that read them.
        """
        consumers = world * max(1, num_workers)
        if consumers > len(self.shards):
            raise ConfigError(
                f"{len(self.shards)} shards cannot feed {consumers} readers ({world} ranks with {max(1, num_workers)} "
                "workers each). Take fewer workers (num_workers), or pack the images into more shards "
                "(tools/prepare_data.py --to-shards ... --samples-per-shard)."
            )
        return ShardStream(self, batch_size, seed, start_step, rank, world)


class ShardStream(IterableDataset):
    """Endless `(place, (PIL image, None))` for one rank; each worker of the loader has its own share of every epoch.

    The order is a pure function of seed, rank, worker and epoch, for a given number of ranks and workers. Loaders take
    batches from their workers by turns, so `start_step` tells how many samples each has delivered: their numbers are
    drawn again without reading, and reading goes on with the shards that the shuffle buffer still needs.
    """

    def __init__(
        self, dataset: ShardDataset, batch_size: int, seed: int, start_step: int = 0, rank: int = 0, world: int = 1
    ) -> None:
        self.dataset, self.batch_size, self.seed, self.start_step = dataset, batch_size, seed, start_step
        self.rank, self.world = rank, world
        self.skipped: dict[str, str] = {}

    def __iter__(self) -> Iterator[tuple[tuple[int, int], tuple[Image.Image | Tensor, None]]]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        # a loader always begins with its first worker, which so takes the part of the one whose turn it is
        part = (self.start_step + worker) % workers
        self.dataset.skipped, self.dataset.tells = self.skipped, False
        delivered = len(range(part, self.start_step, workers)) * self.batch_size
        consumer = self.rank * workers + part
        samples = self._samples(consumer, self.world * workers, delivered)
        ahead: deque[Stored] = deque()
        for turn in itertools.count(delivered):
            # a broken sample is replaced by the next good one, which comes again in its own turn
            for place in range(_MOST_BROKEN):
                if place == len(ahead):
                    ahead.append(next(samples))
                if (image := self.dataset.decode(ahead[place])) is not None:
                    break
            else:
                raise _too_many_broken()
            ahead.popleft()
            yield (consumer, turn), (image, None)

    def _samples(self, consumer: int, consumers: int, delivered: int) -> Iterator[Stored]:
        """The endless samples of one consumer, without the first `delivered`."""
        total = len(self.dataset)
        for epoch in itertools.count():
            first, last = epoch_bounds(total, epoch, consumer, consumers)
            if delivered >= last - first:
                delivered -= last - first
                continue
            pieces = epoch_share(self.dataset.samples, self.seed, epoch, first, last)
            rng = np.random.default_rng([self.seed, epoch, 1 + consumer])
            order = buffered_order(last - first, self.dataset.shuffle_buffer, rng)
            yield from self._in_order(pieces, order, delivered)
            delivered = 0

    def _in_order(self, pieces: list[Piece], order: np.ndarray, delivered: int) -> Iterator[Stored]:
        wanted = np.ones(len(order), dtype=bool)
        wanted[order[:delivered]] = False
        arriving = self._as_they_lie(pieces, wanted)
        buffer: dict[int, Stored] = {}
        for position in order[delivered:].tolist():
            while position not in buffer:
                number, sample = next(arriving)
                buffer[number] = sample
            yield buffer.pop(position)

    def _as_they_lie(self, pieces: list[Piece], wanted: np.ndarray) -> Iterator[tuple[int, Stored]]:
        """The wanted samples of a share with their positions in it, in the order of the shards."""
        begin = 0
        for piece in pieces:
            length = piece.stop - piece.start
            numbers = (np.flatnonzero(wanted[begin : begin + length]) + piece.start).tolist()
            for number, sample in self.dataset.read(piece.shard, numbers):
                yield begin + number - piece.start, sample
            begin += length


def _too_many_broken() -> DatasetError:
    return DatasetError(
        f"{_MOST_BROKEN:,} samples in a row do not decode; the first were named. Look at the shards with "
        "tools/prepare_data.py --check."
    )
