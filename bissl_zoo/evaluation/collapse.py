"""Metrics that detect collapsed embeddings without labels."""

import math

import torch
from torch import Tensor
from torch.nn import functional

from bissl_zoo.errors import BisslZooError

#: number of rows per block of pairs, which bounds memory
_ROWS = 1024


@torch.no_grad()
def collapse_metrics(first: Tensor, second: Tensor) -> dict[str, float]:
    """Return all metrics of this module for embeddings `(N, D)` of two views of N images.

    `std` and `effective_rank` are computed on the first view; `uniformity` is the mean over both views.

    Raises:
        BisslZooError: the embeddings are empty, not finite, or of different shapes.
    """
    return {
        "effective_rank": effective_rank(first),
        "std": normalized_std(first),
        "alignment": alignment(first, second),
        "uniformity": (uniformity(first) + uniformity(second)) / 2,
    }


@torch.no_grad()
def normalized_std(embeddings: Tensor) -> float:
    """Return the standard deviation of l2-normalized embeddings `(N, D)`, mean over dimensions, times sqrt(D).

    SimSiam (arXiv 2011.10566, section 4.1) compares it with 1 / sqrt(D). It is 0 if all embeddings have the same
    direction, and 1 if they are spread evenly around the origin. Features pooled after a ReLU are not negative and
    therefore stay below 1: a falling value indicates collapse, not its level.
    """
    z = _unit(embeddings)
    return z.std(dim=0, correction=0).mean().item() * math.sqrt(z.shape[1])


@torch.no_grad()
def effective_rank(embeddings: Tensor) -> float:
    """Return the effective rank of embeddings `(N, D)`: RankMe (arXiv 2210.02885, equation 1).

    It is the exponential of the entropy of the normalized singular values, between 1 and min(N, D). N should exceed D;
    the paper uses N = 25,600. The paper's 1e-7 inside the logarithm is omitted, since 0 log 0 is defined as 0.
    """
    _check(embeddings, 1)
    values = torch.linalg.svdvals(embeddings.double())
    if values[0] == 0:  # all embeddings are zero, which is constant
        return 1.0
    return torch.special.entr(values / values.sum()).sum().exp().item()


@torch.no_grad()
def alignment(first: Tensor, second: Tensor) -> float:
    """Return the mean squared distance between l2-normalized embeddings `(N, D)` of two views.

    Wang and Isola (arXiv 2005.10242), section 4.1.1 with alpha = 2: 0 for equal views, 2 for independent ones, at
    most 4.

    Raises:
        BisslZooError: the shapes differ.
    """
    if first.shape != second.shape:
        raise BisslZooError(f"Alignment: the views have shapes {tuple(first.shape)} and {tuple(second.shape)}.")
    return (_unit(first) - _unit(second)).square().sum(dim=1).mean().item()


@torch.no_grad()
def uniformity(embeddings: Tensor, t: float = 2.0) -> float:
    """Return the logarithm of the mean Gaussian potential over pairs of l2-normalized embeddings `(N, D)`.

    Wang and Isola (arXiv 2005.10242), section 4.1.2: 0 if all embeddings are equal, and lower the more evenly they
    cover the sphere; about -2t for uniform points in high dimensions.

    Raises:
        BisslZooError: fewer than two embeddings.
    """
    _check(embeddings, 2)
    z = _unit(embeddings)
    total = z.new_zeros(())
    for start in range(0, len(z), _ROWS):
        squares = (2 - 2 * z[start : start + _ROWS] @ z[start:].T).clamp(min=0)
        total += (-t * squares).exp().triu(diagonal=1).sum()
    return (total / (len(z) * (len(z) - 1) / 2)).log().item()


def _unit(embeddings: Tensor) -> Tensor:
    _check(embeddings, 1)
    return functional.normalize(embeddings.double(), dim=1)


def _check(embeddings: Tensor, minimum: int) -> None:
    if embeddings.ndim != 2 or len(embeddings) < minimum:
        raise BisslZooError(f"Embeddings must be (N, D) with N >= {minimum}, not {tuple(embeddings.shape)}.")
    if not torch.isfinite(embeddings).all():
        raise BisslZooError("An embedding is NaN or infinite; the network has diverged.")
