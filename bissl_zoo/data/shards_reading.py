"""Reading shards: the bytes of chosen samples, and the order in which a training stream wants them."""

import io
import itertools
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from bissl_zoo.data.remote_files import is_remote, local_path, open_file
from bissl_zoo.data.shards_index import Shard, images_in, open_tar, telling
from bissl_zoo.errors import DatasetError

#: how often a remote shard is tried, and the first pause between two tries in seconds, which doubles
ATTEMPTS, PAUSE = 4, 1.0


class Stored(NamedTuple):
    """A sample as it lies in a shard: the bytes of an image file, and where they come from, in words."""

    where: str
    content: bytes


def read_samples(shard: Shard, numbers: Sequence[int]) -> Iterator[tuple[int, Stored]]:
    """The samples `numbers` of a shard, which ascend, each with its number. A remote shard is tried several times.

    Raises:
        DatasetError: the shard is missing, truncated, damaged, or another one than the index counted.
    """
    done, attempt = 0, 1
    while done < len(numbers):
        try:
            for number, sample in _read_once(shard, numbers[done:]):
                yield number, sample
                done, attempt = done + 1, 1
        except DatasetError as error:
            if not is_remote(shard.address) or attempt == ATTEMPTS or isinstance(error.__cause__, FileNotFoundError):
                raise
            time.sleep(PAUSE * 2 ** (attempt - 1))
            attempt += 1


def _read_once(shard: Shard, numbers: Sequence[int]) -> Iterator[tuple[int, Stored]]:
    remote, wanted, number = is_remote(shard.address), iter(numbers), -1
    following = next(wanted)
    with telling(shard.address):
        if not remote:
            _check_size(shard)
        with open_file(shard.address) as stream, open_tar(stream, seekable=not remote) as tar:
            for number, member in enumerate(images_in(tar)):
                if number == following:
                    content = tar.extractfile(member).read()
                    yield number, Stored(f"'{member.name}' in shard {shard.address}", content)
                    following = next(wanted, None)
                    if following is None:
                        return
    raise DatasetError(
        f"Shard {shard.address} holds {number + 1} images, but the index says {shard.samples}. Make the index anew "
        "with tools/prepare_data.py --index-shards."
    )


def _check_size(shard: Shard) -> None:
    size = local_path(shard.address).stat().st_size
    if size != shard.bytes:
        raise DatasetError(
            f"Shard {shard.address} has {size:,} bytes, but the index says {shard.bytes:,}: it is truncated, or has "
            "changed since. Fetch it again, or make the index anew with tools/prepare_data.py --index-shards."
        )


def sample_offsets(shard: Shard) -> np.ndarray:
    """Where the headers of a local shard's samples begin, (samples,) int64."""
    with telling(shard.address), open_file(shard.address) as stream, open_tar(stream, seekable=True) as tar:
        _check_size(shard)
        return np.fromiter((member.offset for member in images_in(tar)), dtype=np.int64)


def read_at(shard: Shard, offset: int) -> Stored:
    """The sample whose header begins at `offset` of a local shard."""
    with telling(shard.address), open_file(shard.address) as stream:
        stream.seek(offset)
        with open_tar(stream, seekable=True) as tar:
            member = next(images_in(tar))
            return Stored(f"'{member.name}' in shard {shard.address}", tar.extractfile(member).read())


class Piece(NamedTuple):
    """The samples `start` to `stop` (exclusive) of shard number `shard`."""

    shard: int
    start: int
    stop: int


def epoch_bounds(total: int, epoch: int, consumer: int, consumers: int) -> tuple[int, int]:
    """Which run, first and last (exclusive), of an epoch's `total` samples one of several consumers reads."""
    turn = (consumer + epoch) % consumers  # by turns, or the runs of one would be longer in every epoch
    return turn * total // consumers, (turn + 1) * total // consumers


def epoch_share(samples: np.ndarray, seed: int, epoch: int, first: int, last: int) -> list[Piece]:
    """What a consumer with these bounds reads in an epoch, in the order in which it lies.

    The shards stand in an order drawn for the epoch, and their samples, one after the other, are cut into equal runs.
    So no sample is read twice, and all consumers come to the end of an epoch together; a shard where two runs meet is
    read by both.

    Args:
        samples: of each shard, (shards,).
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
    """A permutation of `range(count)`, (count,) int64, as a shuffle buffer makes it.

    The buffer holds the next `buffer` samples; each step takes one of them at random and fills its place with the
    following sample. So no sample comes more than `buffer - 1` steps before its turn.
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


def stand_ins(shards: Sequence[Shard], broken: int, numbers: Sequence[int]) -> Iterator[tuple[int, Stored]]:
    """Samples of other shards in the place of those `numbers` of a broken one.

    Which ones depends on the numbers and on which shards are broken, and not on what was read before.

    Raises:
        DatasetError: no shard can be read.
    """
    left = list(numbers)
    problem: DatasetError | None = None
    for step in range(1, len(shards)):
        other = shards[(broken + step) % len(shards)]
        try:
            # what lies beyond the end of a smaller shard begins again at its front
            for turn, run in itertools.groupby(list(left), key=lambda number, size=other.samples: number // size):
                for number, sample in read_samples(other, [number % other.samples for number in run]):
                    yield turn * other.samples + number, sample
                    left.pop(0)
        except DatasetError as error:
            problem = error
        if not left:
            return
    raise DatasetError(f"No shard can stand in for {shards[broken].address}: {problem or 'it is the only one'}")


class _Content(io.BytesIO):
    """Bytes that a decoder's message calls by their size."""

    def __repr__(self) -> str:
        return f"of {len(self.getbuffer()):,} bytes"


def as_file(sample: Stored) -> io.BytesIO:
    """The bytes of a sample as a file."""
    return _Content(sample.content)
