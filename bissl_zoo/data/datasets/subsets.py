"""Subsets of data sets: nested random shares, and the folds of a cross-validation."""

import hashlib
import math
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from bissl_zoo.data.datasets.catalog import sample_digest
from bissl_zoo.errors import DatasetError


class Subset(Dataset):
    """Samples of data sets of the same classes, numbered over all of them in order.

    Args:
        datasets: data sets of `(image, target)`.
        indices: sample numbers, int64 (N,).

    Attributes:
        classes: those of the data sets.
    """

    def __init__(self, datasets: Sequence[Dataset], indices: np.ndarray) -> None:
        self.datasets, self.indices, self.classes = list(datasets), indices, datasets[0].classes
        self._ends = np.cumsum([len(dataset) for dataset in datasets])

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Any:
        dataset, number = self._find(index)
        image, target = dataset[number]
        return image, _renumbered(target, index)

    def target(self, index: int) -> Any:
        """Return the target of sample `index`, without decoding its image if the data set can."""
        return _renumbered(_target(*self._find(index)), index)

    @property
    def targets(self) -> np.ndarray | None:
        """All labels, as data sets have them: int64 (N,), float32 (N, K) of several per image, or (M,) of M objects.

        None for targets of another kind.
        """
        targets = [self.target(index) for index in range(len(self))]
        if isinstance(targets[0], int):
            return np.array(targets, dtype=np.int64)
        if isinstance(targets[0], Tensor):
            return torch.stack(targets).numpy()
        if isinstance(targets[0], dict) and {"labels", "difficult"} <= targets[0].keys():
            return torch.cat([target["labels"][~target["difficult"]] for target in targets]).numpy()
        return None

    def source(self, index: int) -> str:
        """Return the name of sample `index`."""
        dataset, number = self._find(index)
        return dataset.source(number) if hasattr(dataset, "source") else f"sample {self.indices[index]}"

    def digest(self) -> str:
        """Return a sha256 of the data sets' sample lists and the chosen sample numbers."""
        lists = [sample_digest(dataset) for dataset in self.datasets]
        return hashlib.sha256(f"{lists}\n{self.indices.tolist()}".encode()).hexdigest()

    def _find(self, index: int) -> tuple[Dataset, int]:
        number = int(self.indices[index])
        place = int(np.searchsorted(self._ends, number, side="right"))
        return self.datasets[place], number - (int(self._ends[place - 1]) if place else 0)


def label_fraction(dataset: Dataset, fraction: float, seed: int) -> Subset:
    """Return the first part of a seeded order of the samples, class by class if each has one class index.

    For one seed the samples of 5 % are among those of 25 %, so that label fractions can be compared. Every class keeps
    at least one sample. Samples with several labels or boxes are drawn from the whole set.

    Args:
        dataset: a labelled data set of `(image, target)`.
        fraction: share of the samples of each class, rounded up, in (0, 1].
        seed: of the order, a non-negative integer.
    Raises:
        DatasetError: the data set has no labels, or the fraction is outside (0, 1].
    """
    if isinstance(fraction, bool) or not isinstance(fraction, (int, float)) or not 0 < fraction <= 1:
        raise DatasetError(f"train.label_fraction is {fraction!r}; use a share above 0 and up to 1, such as 0.05.")
    whole = Subset([dataset], np.arange(len(dataset)))
    # 0.07 * 100 is a bit more than 7
    chosen = [order[: math.ceil(len(order) * fraction - 1e-9)] for order in _orders(whole, seed)]
    return Subset([dataset], np.sort(np.concatenate(chosen)))


def split_fold(datasets: Sequence[Dataset], folds: int, fold: int) -> tuple[Subset, Subset]:
    """Return training and test set of one fold of a cross-validation over the samples of all data sets.

    Every sample is in the test set of exactly one fold; classes are distributed evenly if samples have one class index.

    Args:
        datasets: labelled data sets, such as the training and the test set.
        folds: number of folds, at least 2.
        fold: number of the fold, in [0, folds).
    """
    whole = Subset(datasets, np.arange(sum(len(dataset) for dataset in datasets)))
    tested = np.zeros(len(whole), dtype=bool)
    tested[np.concatenate(_orders(whole, seed=0))[fold::folds]] = True
    return Subset(datasets, np.flatnonzero(~tested)), Subset(datasets, np.flatnonzero(tested))


def without(dataset: Dataset, other: Dataset) -> Dataset:
    """Return the samples of `dataset` whose files are not in `other`; all of them if one has no files."""
    if not (hasattr(dataset, "source") and hasattr(other, "source")):
        return dataset
    left_out = {os.path.abspath(other.source(index)) for index in range(len(other))}
    kept = [index for index in range(len(dataset)) if os.path.abspath(dataset.source(index)) not in left_out]
    return dataset if len(kept) == len(dataset) else Subset([dataset], np.array(kept, dtype=np.int64))


def _orders(dataset: Subset, seed: int) -> list[np.ndarray]:
    """Return a random order of the sample numbers of each class."""
    if dataset.classes is None:
        raise DatasetError("Subsets are drawn from labelled data, but a data set has no labels.")
    labels = _class_indices(dataset)
    return [
        np.random.default_rng((seed, int(label))).permutation(np.flatnonzero(labels == label))
        for label in np.unique(labels)
    ]


def _renumbered(target: Any, index: int) -> Any:
    """Return the target; `image_id` of a detection target, which an evaluation needs to be unique, is `index`."""
    return {**target, "image_id": index} if isinstance(target, dict) and "image_id" in target else target


def _class_indices(dataset: Dataset) -> np.ndarray:
    """Return the class index of every sample, int64 (N,); zeros if samples have other targets than one class index."""
    if isinstance(_target(dataset, 0), int):
        return np.array([_target(dataset, index) for index in range(len(dataset))], dtype=np.int64)
    return np.zeros(len(dataset), dtype=np.int64)


def _target(dataset: Dataset, index: int) -> Any:
    return dataset.target(index) if hasattr(dataset, "target") else dataset[index][1]
