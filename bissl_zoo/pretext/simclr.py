"""SimCLR (Chen et al., arXiv 2002.05709)."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from bissl_zoo.backbones import Backbone, Tail
from bissl_zoo.distributed import gather_with_gradient, get_rank
from bissl_zoo.pretext.heads import mlp
from bissl_zoo.pretext.method import PretextMethod
from bissl_zoo.registry import PRETEXT_METHODS


def nt_xent(z: Tensor, temperature: float) -> Tensor:
    """Return the normalized temperature-scaled cross entropy, NT-Xent (arXiv 2002.05709, equation 1).

    Args:
        z: `(2N, D)` projections, not normalized; rows i and N + i are the two views of image i.
        temperature: temperature of the softmax.
    Returns:
        Scalar, the mean over this rank's 2N anchors; each is compared with the projections of all ranks.
    """
    z = functional.normalize(z, dim=1)
    candidates = gather_with_gradient(z)
    anchors = torch.arange(len(z), device=z.device)
    offset = get_rank() * len(z)
    similarity = z @ candidates.T / temperature
    is_self = functional.one_hot(anchors + offset, len(candidates)).bool()
    similarity = similarity.masked_fill(is_self, float("-inf"))
    positives = (anchors + len(z) // 2) % len(z) + offset
    return functional.cross_entropy(similarity, positives)


@PRETEXT_METHODS.register("simclr")
class SimCLR(PretextMethod):
    """Identify the other view of an image among all views of the batch.

    Args:
        backbone, tail: see :class:`PretextMethod`.
        projector: widths of the projection head after the embedding.
        temperature: temperature of the softmax over cosine similarities.
        augmentation: see :class:`PretextMethod`.
    """

    def __init__(
        self,
        backbone: Backbone,
        tail: Tail,
        projector: Sequence[int] = (256, 256, 256),
        temperature: float = 0.5,
        augmentation: Callable[[Any], tuple[Tensor, ...]] | None = None,
    ) -> None:
        super().__init__(backbone, tail, augmentation)
        self.projector = mlp([tail.num_features, *projector])
        self.temperature = temperature

    def losses(self, backbone: Backbone, views: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """Return `{"nt_xent": scalar}` for two views `(N, 3, S, S)`; batch norm uses the statistics of each view."""
        z = torch.cat([self.projector(self.embed(backbone, view)) for view in views])
        return {"nt_xent": nt_xent(z, self.temperature)}
