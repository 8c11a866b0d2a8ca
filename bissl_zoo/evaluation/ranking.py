"""Rankings of the samples of a whole set for one class, from which precision over recall is told."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

#: classes up to which scores are kept for the sake of rankings alone, and curves and confusions are told: 200 float32
#: of 50,000 images are 40 MB
MOST_RANKED = 200


def ranking(scores: Tensor, right: Tensor) -> tuple[np.ndarray, int]:
    """Whether each sample is right, bool (M,), the best score first, equal ones as given; and how many are.

    As :func:`bissl_zoo.evaluation.detection.average_precision` takes it.
    """
    return right[scores.argsort(descending=True, stable=True)].numpy(), int(right.sum())


def order_of_set(counts: Sequence[int]) -> Tensor:
    """The order in which samples, rank after rank, are those of the test set, int64 (N,).

    Args:
        counts: samples of each rank; rank r of W has read the samples r, r + W, ...
    """
    places = [rank + len(counts) * torch.arange(count) for rank, count in enumerate(counts)]
    return torch.cat(places).argsort()
