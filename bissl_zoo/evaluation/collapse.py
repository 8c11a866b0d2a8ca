"""Whether embeddings have collapsed: monitors that need no labels."""

import math

import torch
from torch import Tensor
from torch.nn import functional

from bissl_zoo.errors import BisslZooError

#: rows of a block of pairs, so that memory stays bounded
_ROWS = 1024


@torch.no_grad()
def collapse_figures(first: Tensor, second: Tensor) -> dict[str, float]:
    """All figures of this module, of embeddings `(N, D)` of two views of N images.

    `std` and `effective_rank` are those of the first view, `uniformity` the mean of both views'.

    Raises:
        BisslZooError: as the functions do.
    """
    return {
        "effective_rank": effective_rank(first),
        "std": normalized_std(first),
        "alignment": alignment(first, second),
        "uniformity": (uniformity(first) + uniformity(second)) / 2,
    }


@torch.no_grad()
def normalized_std(embeddings: Tensor) -> float:
    """Deviation of l2-normalised embeddings `(N, D)`, mean over dimensions, times sqrt(D).

    From SimSiam (arXiv 2011.10566, section 4.1), where it is compared with 1 / sqrt(D). It is 0 where all embeddings
    point one way, and 1 where they spread evenly about the origin. Features that are pooled after a ReLU have no
    negative half, and stay below 1 in the best of health: their fall is the sign, not their level.
    """
    z = _unit(embeddings)
    return z.std(dim=0, correction=0).mean().item() * math.sqrt(z.shape[1])


@torch.no_grad()
def effective_rank(embeddings: Tensor) -> float:
    """Exponential of the entropy of the singular values' shares (RankMe, arXiv 2210.02885, equation 1), `(N, D)`.

    Between 1 and min(N, D); the paper takes N = 25,600, and N should exceed D. Its 1e-7 beside each share, which only
    keeps the logarithm from 0, is left out: 0 log 0 is 0.
    """
    _check(embeddings, 1)
    values = torch.linalg.svdvals(embeddings.double())
    if values[0] == 0:  # embeddings that are all zero, as constant as can be
        return 1.0
    return torch.special.entr(values / values.sum()).sum().exp().item()


@torch.no_grad()
def alignment(first: Tensor, second: Tensor) -> float:
    """Mean squared distance of l2-normalised embeddings `(N, D)` of two views (Wang and Isola, arXiv 2005.10242).

    Section 4.1.1 with alpha = 2: from 0, where the views are as one, to 4; 2 where they know nothing of each other.

    Raises:
        BisslZooError: the shapes differ.
    """
    if first.shape != second.shape:
        raise BisslZooError(f"Alignment: the views have shapes {tuple(first.shape)} and {tuple(second.shape)}.")
    return (_unit(first) - _unit(second)).square().sum(dim=1).mean().item()


@torch.no_grad()
def uniformity(embeddings: Tensor, t: float = 2.0) -> float:
    """Logarithm of the mean Gaussian potential of all pairs of l2-normalised embeddings `(N, D)`, N > 1.

    Wang and Isola (arXiv 2005.10242), section 4.1.2: 0 where all embeddings are equal, and the lower the more evenly
    they cover the sphere; about -2t for points drawn evenly in many dimensions.

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


def _check(embeddings: Tensor, least: int) -> None:
    if embeddings.ndim != 2 or len(embeddings) < least:
        raise BisslZooError(f"Embeddings are (N, D) with N >= {least}; these are {tuple(embeddings.shape)}.")
    if not torch.isfinite(embeddings).all():
        raise BisslZooError("An embedding is NaN or infinite; the network has diverged.")
