"""A random share of a labelled data set; smaller shares of the same seed are contained in larger ones."""

import hashlib
import math
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from bissl_zoo.data.datasets.catalog import sample_digest
from bissl_zoo.errors import DatasetError


class LabelFraction(Dataset):
    """The first part of a seeded order of a data set's samples, class by class if each has one class index.

    For one seed the samples of 5 % are among those of 25 %, so that label fractions can be compared. Every class keeps
    at least one sample. Samples with several labels or boxes are drawn from the whole set.

    Args:
        dataset: a labelled data set of `(image, target)`.
        fraction: share of the samples of each class, rounded up, in (0, 1].
        seed: of the order, a non-negative integer.

    Attributes:
        indices: sample numbers in `dataset`, ascending, int64 (N,).
        classes: those of `dataset`.

    Raises:
        DatasetError: the data set has no labels, or the fraction is outside (0, 1].
    """

    def __init__(self, dataset: Dataset, fraction: float, seed: int) -> None:
        if isinstance(fraction, bool) or not isinstance(fraction, (int, float)) or not 0 < fraction <= 1:
            raise DatasetError(f"train.label_fraction is {fraction!r}; use a share above 0 and up to 1, such as 0.05.")
        if dataset.classes is None:
            raise DatasetError("A label fraction is drawn from labelled data, but this data set has no labels.")
        self.dataset, self.classes = dataset, dataset.classes
        labels = _class_indices(dataset)
        chosen = []
        for label in np.unique(labels):
            members = np.flatnonzero(labels == label)
            order = np.random.default_rng((seed, int(label))).permutation(members)
            # 0.07 * 100 is a bit more than 7
            chosen.append(order[: math.ceil(len(members) * fraction - 1e-9)])
        self.indices = np.sort(np.concatenate(chosen))

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Any:
        return self.dataset[int(self.indices[index])]

    def target(self, index: int) -> Any:
        """Return the target of sample `index`, without decoding its image if the data set can."""
        return _target(self.dataset, int(self.indices[index]))

    def source(self, index: int) -> str:
        """Return the name of sample `index`."""
        number = int(self.indices[index])
        return self.dataset.source(number) if hasattr(self.dataset, "source") else f"sample {number}"

    def digest(self) -> str:
        """Return a sha256 of the data set's sample list and the chosen sample numbers."""
        return hashlib.sha256(f"{sample_digest(self.dataset)}\n{self.indices.tolist()}".encode()).hexdigest()


def _class_indices(dataset: Dataset) -> np.ndarray:
    """Return the class index of every sample, int64 (N,); zeros if samples have other targets than one class index."""
    if isinstance(_target(dataset, 0), int):
        return np.array([_target(dataset, index) for index in range(len(dataset))], dtype=np.int64)
    return np.zeros(len(dataset), dtype=np.int64)


def _target(dataset: Dataset, index: int) -> Any:
    read = getattr(dataset, "target", None) or getattr(dataset, "label", None) or (lambda number: dataset[number][1])
    return read(index)
