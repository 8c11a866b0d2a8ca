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
    return positive_cross_entropy(similarity_logits(z, temperature))


def similarity_logits(z: Tensor, temperature: float) -> Tensor:
    """Return cosine similarities over the temperature, `(2N, D)` -> `(2N, W * 2N)`, -inf between a row and itself.

    They are computed in float32 under autocast too: 8 bits do not resolve them.
    """
    with torch.autocast(z.device.type, enabled=False):
        z = functional.normalize(z.to(torch.promote_types(z.dtype, torch.float32)), dim=1)
        candidates = gather_with_gradient(z)
        anchors = torch.arange(len(z), device=z.device) + get_rank() * len(z)
        is_self = functional.one_hot(anchors, len(candidates)).bool()
        return (z @ candidates.T / temperature).masked_fill(is_self, float("-inf"))


def positive_cross_entropy(logits: Tensor) -> Tensor:
    """Return the cross entropy of the other view of each image, convex in the `(2N, W * 2N)` logits."""
    anchors = torch.arange(len(logits), device=logits.device)
    positives = (anchors + len(logits) // 2) % len(logits) + get_rank() * len(logits)
    return functional.cross_entropy(logits, positives)


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
        return self.outer(self.outputs(backbone, views))

    def outputs(self, backbone: Backbone, views: tuple[Tensor, ...]) -> tuple[Tensor]:
        """Return the similarity logits `(2N, W * 2N)`."""
        z = torch.cat([self.projector(self.embed(backbone, view)) for view in views])
        return (similarity_logits(z, self.temperature),)

    def outer(self, outputs: tuple[Tensor]) -> dict[str, Tensor]:
        """Return `{"nt_xent": scalar}`, convex in the logits."""
        return {"nt_xent": positive_cross_entropy(outputs[0])}
