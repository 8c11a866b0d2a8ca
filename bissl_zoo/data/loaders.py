"""Loaders: endless seeded training batches, sharded over ranks, and one pass over an evaluation set."""

import signal
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import torch
from torch.utils.data import Dataset, Sampler, default_collate

from bissl_zoo.data.samples import Collate, DrawnSamples, DrawnStream, Loader, OrderedSamples
from bissl_zoo.distributed import STOP_SIGNALS, get_rank, get_world_size
from bissl_zoo.errors import ConfigError


class TrainingSampler(Sampler[int]):
    """An endless stream of sample numbers; each epoch is a permutation drawn from `seed` and the epoch's number.

    The stream is cut into global batches of `batch_size`, and each rank takes its part of each batch. So the samples of
    a step do not depend on the number of ranks, and a resumed run continues at `start_step` with the next batch.
    """

    def __init__(self, size: int, batch_size: int, seed: int, start_step: int = 0) -> None:
        self.size, self.batch_size, self.seed, self.start_step = size, batch_size, seed, start_step

    def __iter__(self) -> Iterator[int]:
        return (index for _, index in self.places())

    def places(self) -> Iterator[tuple[int, int]]:
        """Yield `(place, index)`; places count over all ranks from the beginning of the run."""
        rank, world = get_rank(), get_world_size()
        share = self.batch_size // world
        position = self.start_step * self.batch_size
        epoch, permutation = -1, torch.empty(0, dtype=torch.long)
        while True:
            for offset in range(rank * share, (rank + 1) * share):
                current, index = divmod(position + offset, self.size)
                if current != epoch:
                    epoch = current
                    generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
                    permutation = torch.randperm(self.size, generator=generator)
                yield position + offset, int(permutation[index])
            position += self.batch_size


class PlacedSampler(Sampler[tuple[int, int]]):
    """The `(place, index)` pairs of a training stream, for :class:`bissl_zoo.data.samples.DrawnSamples`."""

    def __init__(self, sampler: TrainingSampler) -> None:
        self.sampler = sampler

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return self.sampler.places()

    def batch(self, step: int) -> list[int]:
        """Return the sample numbers of this rank's part of batch `step`, counted from the beginning of the run."""
        stream = self.sampler
        from_step = TrainingSampler(stream.size, stream.batch_size, stream.seed, step)
        return list(islice(from_step, stream.batch_size // get_world_size()))


class EvaluationSampler(Sampler[int]):
    """This rank's sample numbers of a test set, in order: rank, rank + world size, ..."""

    def __init__(self, size: int) -> None:
        self.numbers = range(get_rank(), size, get_world_size())

    def __len__(self) -> int:
        return len(self.numbers)

    def __iter__(self) -> Iterator[int]:
        return iter(self.numbers)


def build_train_loader(
    dataset: Dataset,
    batch_size: int,
    transform: Callable[[Any, Any], Any],
    collate: Callable[[list[Any]], Any] | None = None,
    num_workers: int = 0,
    seed: int = 0,
    start_step: int = 0,
    pin_memory: bool = False,
    augment_on: str = "workers",
    on_bad: str = "skip",
    timeout: float = 0,
) -> Loader:
    """Build an endless loader of training batches.

    Args:
        dataset: samples `(PIL image, target)`. A data set with a method `stream`, such as
            :class:`bissl_zoo.data.shards.ShardDataset`, is read as a stream and decides the order.
        transform: random draws for a sample depend only on `seed` and the sample's place in the stream.
        batch_size: samples per step over all ranks; each rank loads its share.
        start_step: number of batches that an earlier part of the run has taken.
        augment_on: where the views of pretext data are made: "workers", or "device": then the workers only crop, and
            :func:`bissl_zoo.engine.build.pretext_batches` does the rest in batch. The loader itself is the same.
        on_bad: "skip" replaces a sample that raises DatasetError twice by another one. Which one is a function of the
            seed and the place, so a resumed run draws the same. Each skipped sample is logged once and counted
            (`Loader.skipped`). "error" raises. Data sets with a `stream` have their own `on_bad`.
        timeout: seconds after which a worker that delivers no batch ends the run; 0 waits forever.
    Raises:
        ConfigError: the batch does not divide among the ranks, `on_bad` does not fit the data set, or there are fewer
            shards than workers of all ranks.
    """
    world = get_world_size()
    if batch_size % world or batch_size < 1:
        raise ConfigError(
            f"batch_size={batch_size} is the batch over all ranks and must be a multiple of the {world} ranks."
        )
    if hasattr(dataset, "stream"):
        if on_bad != "skip":
            raise ConfigError(
                f"on_bad={on_bad}: a streamed data set has its own. Set dataloader.pretext.dataset.on_bad={on_bad}."
            )
        stream = dataset.stream(batch_size // world, seed, start_step, num_workers, get_rank(), world)
        samples, sampler = DrawnStream(stream, transform, seed), None
    else:
        samples = DrawnSamples(dataset, transform, seed, on_bad)
        sampler = PlacedSampler(TrainingSampler(len(dataset), batch_size, seed, start_step))
    return Loader(
        samples,
        on_skip="Another sample takes its place",
        batch_size=batch_size // world,
        sampler=sampler,
        collate_fn=Collate(collate or default_collate),
        num_workers=num_workers,
        timeout=timeout if num_workers else 0,
        pin_memory=pin_memory,
        persistent_workers=num_workers > 0,
        worker_init_fn=ignore_stop_signals,
        generator=torch.Generator().manual_seed(seed + get_rank()),
    )


def build_test_loader(
    dataset: Dataset,
    batch_size: int,
    transform: Callable[[Any, Any], Any],
    collate: Callable[[list[Any]], Any] | None = None,
    num_workers: int = 0,
    pin_memory: bool = False,
    on_bad: str = "error",
    timeout: float = 0,
) -> Loader:
    """Build a loader of one pass over `dataset` in order, `batch_size` samples per rank at a time.

    Args:
        on_bad: "error" raises for a sample that cannot be read, since results on fewer images do not compare. "skip"
            leaves it out if it fails twice; it is logged and counted (`Loader.skipped`), and the evaluation reports
            the count.
        timeout: seconds after which a worker that delivers no batch ends the run; 0 waits forever.
    """
    return Loader(
        OrderedSamples(dataset, transform, on_bad),
        on_skip="It is left out",
        batch_size=batch_size,
        sampler=EvaluationSampler(len(dataset)),
        collate_fn=Collate(collate or default_collate),
        num_workers=num_workers,
        timeout=timeout if num_workers else 0,
        pin_memory=pin_memory,
        worker_init_fn=ignore_stop_signals,
    )


def ignore_stop_signals(worker: int) -> None:
    """Let a worker ignore the signals that stop a run, which schedulers and terminals send to every process.

    The run needs its workers until the end of the step; a worker ends by itself when its parent is gone.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
