"""A stage's training batches, and which samples the newest of them holds."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader

from bissl_zoo.data.batches import to_device
from bissl_zoo.data.loaders import PlacedSampler


class Batches:
    """Endless batches on the run's device.

    The samples of a batch need not travel with it: a training stream is a function of its seed and the batch's number.

    Args:
        loader: of training batches, as :func:`bissl_zoo.data.loaders.build_train_loader` makes it.
        start_step: number of batches already taken by an earlier part of the run.
        on_device: makes what is left to be made of a batch once it is there.

    Attributes:
        taken: batches taken since the beginning of the stage.
        bad: the samples that this process could not use so far: what names each, and what is wrong with it.
    """

    def __init__(
        self,
        loader: DataLoader,
        start_step: int,
        device: torch.device,
        on_device: Callable[[Any], Any] | None = None,
    ) -> None:
        self.taken = start_step
        self.bad: dict[str, str] = getattr(loader, "bad", {})
        self.dataset = getattr(loader.dataset, "dataset", None)
        self._sampler = loader.sampler if isinstance(loader.sampler, PlacedSampler) else None
        self._stream = _moved(loader, device, on_device)  # alone holds the loader, and with it the workers

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        batch = next(self._stream)
        self.taken += 1
        return batch

    def close(self) -> None:
        """End the loader's workers."""
        self._stream.close()

    def newest(self) -> list[int] | None:
        """Numbers of the samples in this process's part of the newest batch; None of data that is read in a stream."""
        return None if self._sampler is None else self._sampler.batch(self.taken - 1)


def _moved(loader: DataLoader, device: torch.device, on_device: Callable[[Any], Any] | None) -> Iterator[Any]:
    for batch in loader:
        batch = to_device(batch, device)
        yield on_device(batch) if on_device else batch
