"""Rankings of all samples for one class, the basis of precision-recall curves."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

#: maximum number of classes with which scores are kept for rankings: 200 float32 scores of 50,000 images are 40 MB
MOST_RANKED = 200


def ranking(scores: Tensor, positive: Tensor) -> tuple[np.ndarray, int]:
    """Return `positive (M,)`, bool, sorted by falling score, and the number of positives.

    Equal scores keep their order. These are arguments of :func:`bissl_zoo.evaluation.detection.average_precision`.
    """
    return positive[scores.argsort(descending=True, stable=True)].numpy(), int(positive.sum())


def order_of_set(counts: Sequence[int]) -> Tensor:
    """Return the permutation int64 `(N,)` that sorts concatenated samples of all ranks into the order of the test set.

    Args:
        counts: number of samples of each rank; rank r of W has samples r, r + W, ...
    """
    places = [rank + len(counts) * torch.arange(count) for rank, count in enumerate(counts)]
    return torch.cat(places).argsort()
