"""Samples as a loader takes them: read, drawn for their place in the stream, and replaced where they cannot be used."""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from queue import Empty, SimpleQueue
from typing import Any

import numpy as np
from torch.utils.data import Dataset, IterableDataset

from bissl_zoo.data.draws import drawn_for
from bissl_zoo.data.workers import name_samples
from bissl_zoo.errors import DatasetError

logger = logging.getLogger(__name__)

#: seconds before a sample that failed is read once more
PAUSE = 0.2
#: so many samples in a row that cannot be used are no accident
MOST_BAD = 1000
_SKIP = "Or set on_bad=skip of this loader, to train on another sample in its place."


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

    What is drawn at random for one is a function of `seed` and its place in the stream, and so are, one after another,
    the samples that take the place of one that cannot be used.

    Args:
        timeout: seconds after which a sample that is still being read cannot be used; 0 for none.
    Raises:
        DatasetError: a sample cannot be used and none may take its place, or `MOST_BAD` could not in a row.
    """

    def __init__(
        self,
        dataset: Dataset,
        transform: Callable[[Any, Any], Any],
        seed: int,
        on_bad: str = "error",
        timeout: float = 0,
    ) -> None:
        super().__init__(dataset, transform)
        self.seed, self.on_bad, self.timeout = seed, on_bad, timeout
        self._bad: set[int] = set()

    def __getitem__(self, placed: tuple[int, int]) -> Any:
        place, index = placed
        if self.on_bad == "error":
            try:
                return self._draw(place, index)
            except DatasetError as error:
                raise DatasetError(f"{error} {_SKIP}") from error
        for attempt in range(1, MOST_BAD + 1):
            try:
                return self._draw_again(place, index)
            except DatasetError as error:
                self._tell(index, error)
            index = int(np.random.default_rng((self.seed, place, attempt)).integers(len(self)))
        raise DatasetError(f"{MOST_BAD:,} samples in a row cannot be used; they were named. Is their disk still there?")

    def _draw(self, place: int, index: int) -> Any:
        sample = self._read(index)
        with drawn_for(self.seed, place):
            return self.transform(*sample)

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

    def _draw_again(self, place: int, index: int) -> Any:
        """As `_draw`, and once more after a pause where a sample fails for the first time."""
        try:
            return self._draw(place, index)
        except DatasetError:
            if index in self._bad:
                raise
        time.sleep(PAUSE)
        return self._draw(place, index)

    def _tell(self, index: int, error: DatasetError) -> None:
        if index not in self._bad:
            self._bad.add(index)
            logger.warning("%s Other samples take its place (%d bad so far).", error, len(self._bad))


class DrawnStream(IterableDataset):
    """A stream of `(place, (PIL image, target))`, a place being whole numbers, seen through a transform likewise."""

    def __init__(self, stream: IterableDataset, transform: Callable[[Any, Any], Any], seed: int) -> None:
        self.stream, self.transform, self.seed = stream, transform, seed

    def __iter__(self) -> Iterator[Any]:
        for place, sample in self.stream:
            with drawn_for(self.seed, *place):
                drawn = self.transform(*sample)
            yield drawn


def _answer(dataset: Dataset, index: int, answer: SimpleQueue) -> None:
    """Put the sample, or the error that came in its place."""
    try:
        answer.put((dataset[index], None))
    except Exception as error:  # to be raised where the answer is waited for
        answer.put((None, error))
