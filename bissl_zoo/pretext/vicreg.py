"""VICReg (Bardes, Ponce and LeCun, arXiv 2105.04906)."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from bissl_zoo.backbones import Backbone, Tail
from bissl_zoo.data.views import two_views
from bissl_zoo.distributed import gather_with_gradient
from bissl_zoo.pretext.barlow_twins import off_diagonal_squares
from bissl_zoo.pretext.heads import mlp
from bissl_zoo.pretext.method import PretextMethod
from bissl_zoo.registry import PRETEXT_METHODS


def variance_loss(z: Tensor, epsilon: float = 1e-4) -> Tensor:
    """Return the hinge loss on the standard deviations of the columns of `z (N, D)` (arXiv 2105.04906, equation 1)."""
    return functional.relu(1 - standard_deviations(z, epsilon)).mean()


def standard_deviations(z: Tensor, epsilon: float = 1e-4) -> Tensor:
    """Return `sqrt(var + epsilon)` of the columns, `(N, D)` -> `(D,)`."""
    return (z.var(dim=0) + epsilon).sqrt()


def covariance_loss(z: Tensor) -> Tensor:
    """Return the sum of squared covariances of different columns of `z (N, D)`, divided by D (equation 4)."""
    centered = (z - z.mean(dim=0)) / (len(z) - 1) ** 0.5
    return off_diagonal_squares(centered, centered) / z.shape[1]


def vicreg_losses(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the unweighted terms of arXiv 2105.04906, equation 6, scaled as in the authors' code.

    The variance term is the mean over the two views, and the distance the mean over features, where the paper uses
    sums (equation 5).

    Args:
        first, second: `(N, D)` projections of the two views.
    Returns:
        Scalars: invariance over this rank's rows, and variance and covariance over the batch of all ranks.
    """
    gathered = [gather_with_gradient(view) for view in (first, second)]
    variance = sum(variance_loss(view) for view in gathered) / 2
    covariance = sum(covariance_loss(view) for view in gathered)
    return functional.mse_loss(first, second), variance, covariance


@PRETEXT_METHODS.register("vicreg")
class VICReg(PretextMethod):
    """Match the two views of an image, with variance and covariance regularization against collapse.

    Args:
        backbone, tail: see :class:`PretextMethod`.
        projector: widths of the expander after the embedding.
        invariance, variance, covariance: weights of the terms, the paper's lambda, mu and nu.
        augmentation: the paper's views at 96 pixels by default.
    """

    def __init__(
        self,
        backbone: Backbone,
        tail: Tail,
        projector: Sequence[int] = (8192, 8192, 8192),
        invariance: float = 25.0,
        variance: float = 25.0,
        covariance: float = 1.0,
        augmentation: Callable[[Any], tuple[Tensor, ...]] | None = None,
    ) -> None:
        views = augmentation or two_views(
            aspect_ratio=(3 / 4, 4 / 3), blur_probability=(0.5, 0.5), solarize_probability=(0.1, 0.1)
        )
        super().__init__(backbone, tail, views)
        self.projector = mlp([tail.num_features, *projector])
        self.invariance, self.variance, self.covariance = invariance, variance, covariance

    def losses(self, backbone: Backbone, views: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """Return weighted scalars `invariance`, `variance` and `covariance` for two views `(N, 3, S, S)`."""
        first, second = (self.projector(self.embed(backbone, view)) for view in views)
        invariance, variance, covariance = vicreg_losses(first, second)
        return {
            "invariance": self.invariance * invariance,
            "variance": self.variance * variance,
            "covariance": self.covariance * covariance,
        }

    def outputs(self, backbone: Backbone, views: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return the residual `(N, D)`, the standard deviations `(2, D)` and the covariance matrices `(2, D, D)`."""
        first, second = (self.projector(self.embed(backbone, view)) for view in views)
        everything = [gather_with_gradient(view) for view in (first, second)]
        deviations = torch.stack([standard_deviations(view) for view in everything])
        covariances = torch.stack([torch.cov(view.T) for view in everything])
        return first - second, deviations, covariances

    def outer(self, outputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """Return the three weighted terms, convex in the outputs."""
        residual, deviations, covariances = outputs
        off_diagonal = covariances.square().sum() - covariances.diagonal(dim1=1, dim2=2).square().sum()
        return {
            "invariance": self.invariance * residual.square().mean(),
            "variance": self.variance * functional.relu(1 - deviations).mean(),
            "covariance": self.covariance * off_diagonal / covariances.shape[1],
        }
