"""Loaders: an endless seeded stream of training batches, sharded over ranks, and one pass over an evaluation set."""

import signal
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from bissl_zoo.data.draws import drawn_for
from bissl_zoo.distributed import get_rank, get_world_size
from bissl_zoo.errors import ConfigError, did_you_mean

Sample = tuple[Any, Any]
#: who may make the views of pretext data
VIEWS_ON = ("workers", "device")


class TransformedDataset(Dataset):
    """A data set of `(PIL image, target)` seen through `transform(image, target)`."""

    def __init__(self, dataset: Dataset, transform: Callable[[Any, Any], Any]) -> None:
        self.dataset = dataset
        self.transform = transform

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        return self.transform(*self.dataset[index])


class DrawnSamples(TransformedDataset):
    """The samples of a training stream, asked for by `(place, index)`.

    What is drawn at random for one is a function of `seed` and its place in the stream.
    """

    def __init__(self, dataset: Dataset, transform: Callable[[Any, Any], Any], seed: int) -> None:
        super().__init__(dataset, transform)
        self.seed = seed

    def __getitem__(self, placed: tuple[int, int]) -> Any:
        place, index = placed
        with drawn_for(self.seed, place):
            return super().__getitem__(index)


class DrawnStream(IterableDataset):
    """A stream of `(place, (PIL image, target))`, a place being whole numbers, seen through a transform likewise."""

    def __init__(self, stream: IterableDataset, transform: Callable[[Any, Any], Any], seed: int) -> None:
        self.stream, self.transform, self.seed = stream, transform, seed

    def __iter__(self) -> Iterator[Any]:
        for place, sample in self.stream:
            with drawn_for(self.seed, *place):
                drawn = self.transform(*sample)
            yield drawn


class TrainingSampler(Sampler[int]):
    """An endless stream of sample numbers: each epoch is a permutation drawn from `seed` and the epoch's number.

    The stream is cut into global batches of `batch_size`, of which each rank takes its own part, so what is drawn at a
    step does not depend on the number of ranks. It starts at a step, so that a resumed run goes on with the next batch.
    """

    def __init__(self, size: int, batch_size: int, seed: int, start_step: int = 0) -> None:
        self.size, self.batch_size, self.seed, self.start_step = size, batch_size, seed, start_step

    def __iter__(self) -> Iterator[int]:
        return (index for _, index in self.places())

    def places(self) -> Iterator[tuple[int, int]]:
        """The same stream as `(place, index)`, places counted over all ranks from the beginning of the run."""
        rank, world = get_rank(), get_world_size()
        share = self.batch_size // world
        position = self.start_step * self.batch_size
        epoch, permutation = -1, torch.empty(0, dtype=torch.long)
        while True:
            for offset in range(rank * share, (rank + 1) * share):
                wanted, index = divmod(position + offset, self.size)
                if wanted != epoch:
                    epoch = wanted
                    generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
                    permutation = torch.randperm(self.size, generator=generator)
                yield position + offset, int(permutation[index])
            position += self.batch_size


class PlacedSampler(Sampler[tuple[int, int]]):
    """The places of a training stream and their sample numbers, for :class:`DrawnSamples`."""

    def __init__(self, sampler: TrainingSampler) -> None:
        self.sampler = sampler

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return self.sampler.places()


def build_train_loader(
    dataset: Dataset,
    batch_size: int,
    transform: Callable[[Any, Any], Any],
    collate: Callable[[list[Any]], Any] | None = None,
    num_workers: int = 0,
    seed: int = 0,
    start_step: int = 0,
    pin_memory: bool = False,
    views_on: str = "workers",
) -> DataLoader:
    """Endless loader of training batches.

    Args:
        dataset: items `(PIL image, target)`. One that is to be read in a stream has `stream`, as
            :class:`bissl_zoo.data.shards.ShardDataset` does, which then decides the order.
        transform: what it draws at random for a sample depends on `seed` and the sample's place in the stream alone.
        batch_size: samples per step over all ranks; each rank loads its share.
        start_step: number of batches already taken by an earlier part of the run.
        views_on: of pretext data, who makes the views: `workers`, or `device`, where the workers only cut the crops and
            :func:`bissl_zoo.engine.build.pretext_batches` does the rest in batch. The loader itself is the same.
    Raises:
        ConfigError: the batch does not divide among the ranks; `views_on` is something else; or there are fewer shards
            than processes that read them.
    """
    if views_on not in VIEWS_ON:
        hint = did_you_mean(str(views_on), VIEWS_ON)
        raise ConfigError(f"views_on is '{views_on}'; accepted are {' and '.join(VIEWS_ON)}.{hint}")
    world = get_world_size()
    if batch_size % world or batch_size < 1:
        raise ConfigError(
            f"batch_size={batch_size} is the batch over all ranks and must be a multiple of the {world} ranks."
        )
    if hasattr(dataset, "stream"):
        stream = dataset.stream(batch_size // world, seed, start_step, num_workers, get_rank(), world)
        samples, sampler = DrawnStream(stream, transform, seed), None
    else:
        samples = DrawnSamples(dataset, transform, seed)
        sampler = PlacedSampler(TrainingSampler(len(dataset), batch_size, seed, start_step))
    return DataLoader(
        samples,
        batch_size=batch_size // world,
        sampler=sampler,
        collate_fn=collate,
        num_workers=num_workers,
        pin_memory=pin_memory,
        persistent_workers=num_workers > 0,
        worker_init_fn=leave_stopping_to_the_run,
        generator=torch.Generator().manual_seed(seed + get_rank()),
    )


def build_test_loader(
    dataset: Dataset,
    batch_size: int,
    transform: Callable[[Any, Any], Any],
    collate: Callable[[list[Any]], Any] | None = None,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> DataLoader:
    """One pass over `dataset` in order, `batch_size` samples per rank at a time; rank r reads samples r, r + W, ..."""
    return DataLoader(
        TransformedDataset(dataset, transform),
        batch_size=batch_size,
        sampler=list(range(get_rank(), len(dataset), get_world_size())),
        collate_fn=collate,
        num_workers=num_workers,
        pin_memory=pin_memory,
        worker_init_fn=leave_stopping_to_the_run,
    )


def leave_stopping_to_the_run(worker: int) -> None:
    """Have a worker ignore the signals that ask a run to stop: it is needed until the run has come to its step's end.

    Schedulers and terminals send them to every process. A worker ends by itself when its parent is gone.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
