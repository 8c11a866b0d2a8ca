"""Samples on their way into batches: seeded draws, retries, replacements for unreadable samples, lost workers."""

import contextlib
import logging
import random
import signal
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from bissl_zoo.errors import DatasetError

logger = logging.getLogger(__name__)

#: seconds before a sample that could not be read is tried again
RETRY_PAUSE = 0.2
#: consecutive samples that cannot be read before the run ends
MAX_SKIPPED_IN_A_ROW = 1000
#: samples listed in one message
MAX_NAMED = 5
#: seconds to wait for a killed worker; one in an uninterruptible read ends when the read does
KILL_TIMEOUT = 5.0

_workers: "weakref.WeakSet[BaseProcess]" = weakref.WeakSet()  # running workers of all loaders of this process


@contextlib.contextmanager
def temporary_seed(*key: int) -> Iterator[None]:
    """Seed Python, NumPy and torch (CPU) with the non-negative integers `key`; restore their states afterwards.

    Draws inside are a function of `key` alone, so they are the same in every worker process and in a resumed run.
    """
    seed, small = np.random.SeedSequence(key).generate_state(2, np.uint64).tolist()
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(small % 2**32)
    torch.default_generator.manual_seed(seed % 2**63)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


class TransformedDataset(Dataset):
    """A data set of `(PIL image, target)` with `transform(image, target)` applied to each sample."""

    def __init__(self, dataset: Dataset, transform: Callable[[Any, Any], Any]) -> None:
        self.dataset = dataset
        self.transform = transform

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        return self.transform(*self.dataset[index])


class Drawn(NamedTuple):
    """A sample, or a batch of them, as workers send it.

    Attributes:
        value: the transformed sample or collated batch; None if it is left out.
        skipped: (name, problem) of each sample that could not be read.
        error: message of the DatasetError that ends the loop; empty if there is none.
    """

    value: Any = None
    skipped: Sequence[tuple[str, str]] = ()
    error: str = ""


class Collate:
    """Collate `Drawn` samples into one `Drawn` batch of those that are not left out."""

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self.collate = collate

    def __call__(self, samples: list[Drawn]) -> Drawn:
        error = next((sample.error for sample in samples if sample.error), "")
        values = [sample.value for sample in samples if sample.value is not None]
        skipped = [entry for sample in samples for entry in sample.skipped]
        return Drawn(self.collate(values) if values and not error else None, skipped, error)


class _ReadableSamples(TransformedDataset):
    """Transformed samples that are read a second time if the first time fails."""

    def __init__(self, dataset: Dataset, transform: Callable[[Any, Any], Any], on_bad: str) -> None:
        super().__init__(dataset, transform)
        self.on_bad = on_bad
        self._failed: set[int] = set()

    def _load(self, index: int, key: tuple[int, ...] = ()) -> Any:
        """Read sample `index` and transform it, with draws that are a function of `key` if it is given."""
        for is_last_try in (self.on_bad == "error" or index in self._failed, True):
            try:
                sample = self.dataset[index]
                with temporary_seed(*key) if key else contextlib.nullcontext():
                    return self.transform(*sample)
            except DatasetError:
                if is_last_try:
                    self._failed.add(index)
                    raise
            time.sleep(RETRY_PAUSE)

    def _name(self, index: int) -> str:
        return self.dataset.source(index) if hasattr(self.dataset, "source") else f"sample {index}"


class DrawnSamples(_ReadableSamples):
    """Samples of a training stream, indexed by `(place, index)`.

    Random draws for a sample are a function of `seed` and its place in the stream. With `on_bad="skip"` so are the
    samples that replace one that cannot be read.
    """

    def __init__(self, dataset: Dataset, transform: Callable[[Any, Any], Any], seed: int, on_bad: str) -> None:
        super().__init__(dataset, transform, on_bad)
        self.seed = seed

    def __getitem__(self, placed: tuple[int, int]) -> Drawn:
        place, index = placed
        skipped: list[tuple[str, str]] = []
        for attempt in range(1, MAX_SKIPPED_IN_A_ROW + 1):
            try:
                return Drawn(self._load(index, (self.seed, place)), skipped)
            except DatasetError as error:
                if self.on_bad == "error":
                    return Drawn(error=f"{error} Or set on_bad=skip of this loader to train on another sample instead.")
                skipped.append((self._name(index), str(error)))
            index = int(np.random.default_rng((self.seed, place, attempt)).integers(len(self)))
        return Drawn(
            error=f"{MAX_SKIPPED_IN_A_ROW:,} samples in a row cannot be read; the first: {skipped[0][1]} "
            "Check that the disk is mounted."
        )


class OrderedSamples(_ReadableSamples):
    """Samples of a test set by index; one that cannot be read is an error, or left out with `on_bad="skip"`."""

    def __getitem__(self, index: int) -> Drawn:
        try:
            return Drawn(self._load(index))
        except DatasetError as error:
            if self.on_bad == "error":
                return Drawn(error=f"{error} Or set on_bad=skip of this loader to leave it out and report the count.")
            return Drawn(skipped=[(self._name(index), str(error))])


class DrawnStream(IterableDataset):
    """Transformed samples of a stream of `(place, (PIL image, target))`, where `place` is a tuple of integers.

    Args:
        stream: with an attribute `skipped`, a dict of name to problem of the samples that could not be read so far.
        seed: random draws for a sample are a function of it and the place.
    """

    def __init__(self, stream: IterableDataset, transform: Callable[[Any, Any], Any], seed: int) -> None:
        self.stream, self.transform, self.seed = stream, transform, seed

    def __iter__(self) -> Iterator[Drawn]:
        reported, samples = 0, iter(self.stream)
        while True:
            try:
                place, sample = next(samples)
            except DatasetError as error:
                yield Drawn(error=str(error))
                return
            with temporary_seed(self.seed, *place):
                value = self.transform(*sample)
            yield Drawn(value, list(islice(self.stream.skipped.items(), reported, None)))
            reported = len(self.stream.skipped)


class Loader(DataLoader):
    """A `DataLoader` over `Drawn` batches that yields their values and records the samples that were skipped.

    Its workers ignore the signals that stop a run, so they are killed when the iterator or this process ends.
    `timeout` is that of `DataLoader`, in seconds per batch of a worker; 0 waits forever.

    Args:
        on_skip: what happens to a sample that cannot be read, as a sentence for the warning.

    Attributes:
        skipped: name -> problem of the samples that could not be read so far. They arrive with the batch they were
            drawn for, so the content after a batch does not depend on the number of workers.
    """

    def __init__(self, *args: Any, on_skip: str = "", **options: Any) -> None:
        self.on_skip = on_skip
        self.skipped: dict[str, str] = {}
        super().__init__(*args, **options)

    def __iter__(self) -> Iterator[Any]:
        """Yield the batches, except those of which no sample is left.

        Raises:
            DatasetError: a sample cannot be read and may not be skipped, or a worker died or did not answer in time.
        """
        batches = super().__iter__()
        workers = getattr(batches, "_workers", [])
        if workers:
            _workers.update(workers)
            Finalize(batches, kill, (workers,), exitpriority=0)
        while True:
            begun = time.monotonic()
            try:
                batch = next(batches)
            except StopIteration:
                return
            except (RuntimeError, KeyboardInterrupt) as error:
                lost = lost_worker(error)
                if lost is None and isinstance(error, RuntimeError) and 0 < self.timeout <= time.monotonic() - begun:
                    lost = DatasetError(
                        f"No batch came within timeout={self.timeout:g} seconds. Check the file system, or raise it."
                    )
                kill(workers)
                if lost is None:
                    raise
                raise lost from error
            for name, problem in batch.skipped:
                if name not in self.skipped:
                    self.skipped[name] = problem
                    logger.warning("%s %s (%d skipped so far).", problem, self.on_skip, len(self.skipped))
            if batch.error:
                raise DatasetError(batch.error)
            if batch.value is not None:
                yield batch.value


def name_samples(numbers: Sequence[int], dataset: Any) -> str:
    """Return e.g. `8 samples: 3 (a.jpg), 7 (b.jpg) and 6 more`, with files if the data set has `source(index)`."""
    source = getattr(dataset, "source", None)
    names = [f"{number} ({source(number)})" if source else f"{number}" for number in numbers[:MAX_NAMED]]
    more = f" and {len(numbers) - MAX_NAMED} more" if len(numbers) > MAX_NAMED else ""
    return f"{len(numbers)} samples: {', '.join(names)}{more}"


def lost_worker(error: BaseException) -> DatasetError | None:
    """Return a DatasetError if `error` is torch's report that a loader's worker died, else None.

    torch raises a RuntimeError from a signal handler, in any line of the main thread. The workers' exit codes
    distinguish it from other RuntimeErrors.
    """
    dead = [worker for worker in _workers if worker.exitcode]  # None: running; 0: a normal end
    if not dead or not isinstance(error, RuntimeError):
        return None
    code = dead[0].exitcode
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with status {code}"
    return DatasetError(
        f"Data worker (pid {dead[0].pid}) {how}. SIGKILL usually means out of memory: "
        "use fewer workers (num_workers) or give the job more memory. Then continue with --resume."
    )


def kill(workers: Iterable[BaseProcess]) -> None:
    """Kill worker processes, whatever they wait for."""
    for worker in workers:
        _workers.discard(worker)
        with contextlib.suppress(RuntimeError):  # torch's signal handler reports this death, too
            worker.kill()
            worker.join(KILL_TIMEOUT)


# batches of any nesting: tensors in lists, tuples and dicts


def map_tensors(function: Callable[[Tensor], Any], batch: Any) -> Any:
    """Return a batch with `function` applied to each tensor in it; other values stay."""
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, dict):
        return {key: map_tensors(function, value) for key, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        return type(batch)(map_tensors(function, value) for value in batch)
    return batch


def to_device(batch: Any, device: torch.device) -> Any:
    """Return the batch with its tensors on `device`."""
    return map_tensors(lambda tensor: tensor.to(device, non_blocking=True), batch)


def split_samples(batch: Any, parts: int) -> list[Any]:
    """Return `parts` batches of B / parts samples, in order, from a batch whose tensors are `(B, ...)`."""
    if parts == 1:
        return [batch]

    def part(number: int) -> Any:
        return map_tensors(lambda tensor: tensor.tensor_split(parts)[number], batch)

    return [part(number) for number in range(parts)]


def first_samples(batch: Any, count: int) -> Any:
    """Return the first `count` samples of a batch whose tensors are `(B, ...)`, such as views of a pretext method."""
    return map_tensors(lambda tensor: tensor[:count], batch)
