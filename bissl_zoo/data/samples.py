"""Samples as a loader takes them: read, drawn for their place in the stream, and replaced where they cannot be used."""

import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import Dataset, IterableDataset

from bissl_zoo.data.draws import drawn_for
from bissl_zoo.data.workers import name_samples
from bissl_zoo.errors import DatasetError

#: seconds before a sample that failed is read once more
PAUSE = 0.2
#: so many samples in a row that cannot be used are no accident
MOST_BAD = 1000
_REPLACE = "Or set on_bad=skip of this loader, to train on another sample in its place."
_LEAVE_OUT = "Or set on_bad=skip of this loader, to leave it out of the figures, which then say so."


class TransformedDataset(Dataset):
    """A data set of `(PIL image, target)` seen through `transform(image, target)`."""

    def __init__(self, dataset: Dataset, transform: Callable[[Any, Any], Any]) -> None:
        self.dataset = dataset
        self.transform = transform

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        return self.transform(*self.dataset[index])


class Drawn(NamedTuple):
    """A sample as it leaves its data set for a batch.

    Attributes:
        sample: as the transform makes it; None of one that is left out.
        bad: the samples that could not be used on the way: what names each, and what is wrong with it.
    """

    sample: Any
    bad: tuple[tuple[str, str], ...] = ()


class Collate:
    """`Drawn` samples to a batch and the bad ones among them; None for a batch of which all are left out."""

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self.collate = collate

    def __call__(self, drawn: list[Drawn]) -> tuple[Any, list[tuple[str, str]]]:
        kept = [one.sample for one in drawn if one.sample is not None]
        return self.collate(kept) if kept else None, [bad for one in drawn for bad in one.bad]


class _Samples(TransformedDataset):
    """Reads samples within a time, and those that fail for the first time once more.

    Args:
        timeout: seconds after which a sample that is still being read cannot be used; 0 for none.
    """

    def __init__(
        self, dataset: Dataset, transform: Callable[[Any, Any], Any], on_bad: str = "skip", timeout: float = 0
    ) -> None:
        super().__init__(dataset, transform)
        self.on_bad, self.timeout = on_bad, timeout
        self._failed: set[int] = set()

    def _read(self, index: int) -> tuple[Any, Any]:
        if not self.timeout:
            return self.dataset[index]
        answer: SimpleQueue = SimpleQueue()
        # a thread that hangs is left behind, and ends with its process
        threading.Thread(target=_answer, args=(self.dataset, index, answer), daemon=True).start()
        try:
            sample, error = answer.get(timeout=self.timeout)
        except Empty:
            name = name_samples([index], self.dataset).partition(": ")[2]
            raise DatasetError(
                f"Sample {name} was not read within timeout={self.timeout:g} seconds; the file system may be gone."
            ) from None
        if error is not None:
            raise error
        return sample

    def _try_again(self, index: int, take: Callable[[int], Any]) -> Any:
        """`take(index)`, and once more after a pause where the sample fails for the first time."""
        try:
            return take(index)
        except DatasetError:
            if index in self._failed:
                raise
        time.sleep(PAUSE)
        try:
            return take(index)
        except DatasetError:
            self._failed.add(index)
            raise

    def _name(self, index: int) -> str:
        source = getattr(self.dataset, "source", None)
        return source(index) if source else f"sample {index}"


class DrawnSamples(_Samples):
    """The samples of a training stream, asked for by `(place, index)`.

    What is drawn at random for one is a function of `seed` and its place in the stream, and so are, one after another,
    the samples that take the place of one that cannot be used.

    Raises:
        DatasetError: a sample cannot be used and none may take its place, or `MOST_BAD` could not in a row.
    """

    def __init__(
        self,
        dataset: Dataset,
        transform: Callable[[Any, Any], Any],
        seed: int,
        on_bad: str = "skip",
        timeout: float = 0,
    ) -> None:
        super().__init__(dataset, transform, on_bad, timeout)
        self.seed = seed

    def __getitem__(self, placed: tuple[int, int]) -> Drawn:
        place, index = placed
        take = partial(self._draw, place)
        if self.on_bad == "error":
            try:
                return Drawn(take(index))
            except DatasetError as error:
                raise DatasetError(f"{error} {_REPLACE}") from error
        bad: list[tuple[str, str]] = []
        for attempt in range(1, MOST_BAD + 1):
            try:
                return Drawn(self._try_again(index, take), tuple(bad))
            except DatasetError as error:
                bad.append((self._name(index), str(error)))
            index = int(np.random.default_rng((self.seed, place, attempt)).integers(len(self)))
        raise DatasetError(
            f"{MOST_BAD:,} samples in a row cannot be used; the first of them: {bad[0][1]} Is their disk still there?"
        )

    def _draw(self, place: int, index: int) -> Any:
        sample = self._read(index)
        with drawn_for(self.seed, place):
            return self.transform(*sample)


class OrderedSamples(_Samples):
    """The samples of a test set by their numbers; one that cannot be used is an error, or left out.

    Raises:
        DatasetError: a sample cannot be used and is not to be left out.
    """

    def __getitem__(self, index: int) -> Drawn:
        if self.on_bad == "error":
            try:
                return Drawn(self._take(index))
            except DatasetError as error:
                raise DatasetError(f"{error} {_LEAVE_OUT}") from error
        try:
            return Drawn(self._try_again(index, self._take))
        except DatasetError as error:
            return Drawn(None, ((self._name(index), str(error)),))

    def _take(self, index: int) -> Any:
        return self.transform(*self._read(index))


class DrawnStream(IterableDataset):
    """A stream of `(place, (PIL image, target))`, a place being whole numbers, seen through a transform likewise.

    A stream that replaces what is bad has `bad`, a dict of what it met so far: what names each, and what is wrong.
    """

    def __init__(self, stream: IterableDataset, transform: Callable[[Any, Any], Any], seed: int) -> None:
        self.stream, self.transform, self.seed = stream, transform, seed

    def __iter__(self) -> Iterator[Drawn]:
        told = 0
        for place, sample in self.stream:
            with drawn_for(self.seed, *place):
                drawn = self.transform(*sample)
            bad = getattr(self.stream, "bad", {})
            yield Drawn(drawn, tuple(islice(bad.items(), told, None)))
            told = len(bad)


def _answer(dataset: Dataset, index: int, answer: SimpleQueue) -> None:
    """Put the sample, or the error that came in its place."""
    try:
        answer.put((dataset[index], None))
    except Exception as error:  # to be raised where the answer is waited for
        answer.put((None, error))
