"""Barlow Twins (Zbontar et al., arXiv 2103.03230)."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.nn import functional

from bissl_zoo.backbones import Backbone, Tail
from bissl_zoo.data.views import two_views
from bissl_zoo.distributed import gather_with_gradient
from bissl_zoo.pretext.heads import mlp
from bissl_zoo.pretext.method import PretextMethod
from bissl_zoo.registry import PRETEXT_METHODS


def off_diagonal_squares(a: Tensor, b: Tensor) -> Tensor:
    """Return the sum of the squared off-diagonal entries of `a.T @ b` for two `(N, D)` tensors, a scalar.

    The sum over all entries equals `sum((a @ a.T) * (b @ b.T))`, which needs less memory than `(D, D)` if the head is
    wider than the batch, as published heads are.
    """
    rows, width = a.shape
    total = (a.T @ b).square().sum() if width < rows else ((a @ a.T) * (b @ b.T)).sum()
    return total - (a * b).sum(dim=0).square().sum()


def cross_correlation_losses(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Compare the cross-correlation matrix of two views with the identity (arXiv 2103.03230, equation 1).

    Args:
        first, second: `(N, D)` projections of the two views; the statistics are over the batch of all ranks.
    Returns:
        The invariance term (diagonal) and the redundancy term (off-diagonal): scalars, equal on every rank.
    """
    a, b = (_standardized(gather_with_gradient(view)) for view in (first, second))
    return ((a * b).sum(dim=0) - 1).square().sum(), off_diagonal_squares(a, b)


def _standardized(z: Tensor) -> Tensor:
    """Standardize the columns of `z (N, D)` to mean 0 and, up to the epsilon of batch norm, norm 1."""
    return functional.batch_norm(z, None, None, training=True) / len(z) ** 0.5


@PRETEXT_METHODS.register("barlow_twins")
class BarlowTwins(PretextMethod):
    """Make each feature equal in both views and uncorrelated with all other features.

    Args:
        backbone, tail: see :class:`PretextMethod`.
        projector: widths of the projection head after the embedding.
        redundancy: weight of the redundancy term, the paper's lambda.
        augmentation: BYOL's asymmetric views at 96 pixels by default, as in the paper.
    """

    def __init__(
        self,
        backbone: Backbone,
        tail: Tail,
        projector: Sequence[int] = (8192, 8192, 8192),
        redundancy: float = 0.005,
        augmentation: Callable[[Any], tuple[Tensor, ...]] | None = None,
    ) -> None:
        super().__init__(backbone, tail, augmentation or two_views(aspect_ratio=(3 / 4, 4 / 3)))
        self.projector = mlp([tail.num_features, *projector])
        self.redundancy = redundancy

    def losses(self, backbone: Backbone, views: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """Return `{"invariance": scalar, "redundancy": scalar}`, the latter weighted, for two views `(N, 3, S, S)`."""
        first, second = (self.projector(self.embed(backbone, view)) for view in views)
        invariance, redundancy = cross_correlation_losses(first, second)
        return {"invariance": invariance, "redundancy": self.redundancy * redundancy}

    def outputs(self, backbone: Backbone, views: tuple[Tensor, ...]) -> tuple[Tensor]:
        """Return the cross-correlation matrix `(D, D)` of the batch of all ranks."""
        first, second = (self.projector(self.embed(backbone, view)) for view in views)
        a, b = (_standardized(gather_with_gradient(view)) for view in (first, second))
        return (a.T @ b,)

    def outer(self, outputs: tuple[Tensor]) -> dict[str, Tensor]:
        """Return the two terms, quadratic in the matrix."""
        (correlation,) = outputs
        diagonal = correlation.diagonal()
        redundancy = correlation.square().sum() - diagonal.square().sum()
        return {"invariance": (diagonal - 1).square().sum(), "redundancy": self.redundancy * redundancy}
