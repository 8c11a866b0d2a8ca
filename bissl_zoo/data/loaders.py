"""Loaders: an endless seeded stream of training batches, sharded over ranks, and one pass over an evaluation set."""

import signal
from collections.abc import Callable, Collection, Iterator
from itertools import islice
from typing import Any

import torch
from torch.utils.data import Dataset, Sampler, default_collate

from bissl_zoo.data.samples import Collate, DrawnSamples, DrawnStream, OrderedSamples
from bissl_zoo.data.workers import Loader
from bissl_zoo.distributed import STOP_SIGNALS, get_rank, get_world_size
from bissl_zoo.errors import ConfigError, did_you_mean

#: who may make the views of pretext data
AUGMENT_ON = ("workers", "device")
#: what may happen to a sample that cannot be used
ON_BAD = ("error", "skip")


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

    def batch(self, step: int) -> list[int]:
        """The numbers of the samples in this rank's part of batch `step`, counted from the beginning of the run."""
        stream = self.sampler
        there = TrainingSampler(stream.size, stream.batch_size, stream.seed, step)
        return list(islice(there, stream.batch_size // get_world_size()))


class EvaluationSampler(Sampler[int]):
    """This rank's part of the numbers of a test set, in order."""

    def __init__(self, size: int, batch_size: int) -> None:
        self.numbers, self.batch_size = range(get_rank(), size, get_world_size()), batch_size

    def __len__(self) -> int:
        return len(self.numbers)

    def __iter__(self) -> Iterator[int]:
        return iter(self.numbers)

    def batch(self, step: int) -> list[int]:
        """The numbers of the samples in this rank's batch `step`."""
        return list(self.numbers[step * self.batch_size : (step + 1) * self.batch_size])


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
    """Endless loader of training batches.

    Args:
        dataset: items `(PIL image, target)`. One that is to be read in a stream has `stream`, as
            :class:`bissl_zoo.data.shards.ShardDataset` does, which then decides the order.
        transform: what it draws at random for a sample depends on `seed` and the sample's place in the stream alone.
        batch_size: samples per step over all ranks; each rank loads its share.
        start_step: number of batches already taken by an earlier part of the run.
        augment_on: where the views of pretext data are made: `workers`, or `device`: workers only cut the crops and
            :func:`bissl_zoo.engine.build.pretext_batches` does the rest in batch. The loader itself is the same.
        on_bad: `skip` takes another sample in the place of one that raises DatasetError, also when it is read once more
            a moment later. Which one is a function of the seed and the place, so a resumed run takes the same ones as
            long as the same files are bad. Each bad one is named once, and counted (`Loader.bad`). `error` ends the run
            there. Data sets with a `stream` have an `on_bad` of their own.
        timeout: seconds after which a sample that is still being read is a bad one, if that happens twice; 0 waits for
            ever. With `on_bad="error"` it is of a batch: after so long without one the run ends with the names of its
            samples, so let it be more than the workers' start or any batch takes. That needs workers, as nothing ends
            a read from within its process. The worker that hangs is killed; the kernel lets some reads (of disks that
            fail, for one) outlast even that, and then the process itself ends only when they do. Of data sets with a
            `stream` it is of a batch as well.
    Raises:
        ConfigError: the batch does not divide among the ranks; `augment_on`, `on_bad` or `timeout` is something else or
            not for this data set or these workers; or there are fewer shards than processes that read them.
    """
    _check_choice("augment_on", augment_on, AUGMENT_ON)
    _check_choice("on_bad", on_bad, ON_BAD)
    streamed = hasattr(dataset, "stream")
    one_by_one = on_bad == "skip" and not streamed
    _check_timeout(timeout, num_workers or one_by_one)
    world = get_world_size()
    if batch_size % world or batch_size < 1:
        raise ConfigError(
            f"batch_size={batch_size} is the batch over all ranks and must be a multiple of the {world} ranks."
        )
    if streamed:
        if on_bad != "skip":
            raise ConfigError(
                f"on_bad={on_bad}: data that is read in a stream has its own. Set it there, as in "
                f"dataloader.pretext.dataset.on_bad={on_bad}."
            )
        stream = dataset.stream(batch_size // world, seed, start_step, num_workers, get_rank(), world)
        samples, sampler = DrawnStream(stream, transform, seed), None
    else:
        samples = DrawnSamples(dataset, transform, seed, on_bad, timeout if one_by_one else 0)
        sampler = PlacedSampler(TrainingSampler(len(dataset), batch_size, seed, start_step))
    return Loader(
        samples,
        start_step=start_step,
        instead="Other samples take its place",
        timeout=0 if one_by_one else timeout,
        batch_size=batch_size // world,
        sampler=sampler,
        collate_fn=Collate(collate or default_collate),
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
    on_bad: str = "error",
    timeout: float = 0,
) -> Loader:
    """One pass over `dataset` in order, `batch_size` samples per rank at a time; rank r reads samples r, r + W, ...

    Args:
        on_bad: `error`, since figures of fewer images are other figures; or `skip`, which leaves out samples that raise
            DatasetError, also when they are read once more a moment later. They are named and counted (`Loader.bad`),
            and an evaluation gives their number beside its figures.
        timeout: as of :func:`build_train_loader`.
    Raises:
        ConfigError: `on_bad` or `timeout` is something else, or not for these workers.
    """
    _check_choice("on_bad", on_bad, ON_BAD)
    one_by_one = on_bad == "skip"
    _check_timeout(timeout, num_workers or one_by_one)
    return Loader(
        OrderedSamples(dataset, transform, on_bad, timeout if one_by_one else 0),
        instead="It is left out",
        batch_size=batch_size,
        sampler=EvaluationSampler(len(dataset), batch_size),
        timeout=0 if one_by_one else timeout,
        collate_fn=Collate(collate or default_collate),
        num_workers=num_workers,
        pin_memory=pin_memory,
        worker_init_fn=leave_stopping_to_the_run,
    )


def _check_choice(name: str, value: Any, choices: Collection[str]) -> None:
    if value not in choices:
        hint = did_you_mean(str(value), choices)
        raise ConfigError(f"{name} is '{value}'; accepted are {' and '.join(choices)}.{hint}")


def _check_timeout(timeout: Any, can_be_kept: int | bool) -> None:
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or not 0 <= timeout < float("inf"):
        raise ConfigError(f"timeout is {timeout!r}; it must be a number of seconds, or 0 to wait for ever.")
    if timeout and not can_be_kept:
        raise ConfigError(
            f"timeout={timeout:g} needs num_workers of 1 or more: without workers the run itself would hang in the "
            "read, and nothing would be left to tell the time."
        )


def leave_stopping_to_the_run(worker: int) -> None:
    """Have a worker ignore the signals that ask a run to stop: it is needed until the run has come to its step's end.

    Schedulers and terminals send them to every process. A worker ends by itself when its parent is gone.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
