"""MoCo v3 (Chen, Xie and He, arXiv 2104.02057)."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from bissl_zoo.backbones import Backbone, Tail
from bissl_zoo.data.views import two_views
from bissl_zoo.distributed import gather_with_gradient, get_rank
from bissl_zoo.pretext.heads import mlp
from bissl_zoo.pretext.method import PretextMethod
from bissl_zoo.pretext.teacher import Teacher
from bissl_zoo.registry import PRETEXT_METHODS


def info_nce_in_batch(query: Tensor, key: Tensor, temperature: float) -> Tensor:
    """Return `2 * temperature` times the InfoNCE loss within the batch (arXiv 2104.02057, algorithm 1).

    Args:
        query, key: `(N, D)`, not normalized; row i of both belongs to image i, keys are constants.
        temperature: temperature of the softmax.
    Returns:
        Scalar, the mean over this rank's queries; each is compared with the keys of all ranks.
    """
    return scaled_cross_entropy(batch_logits(query, key, temperature), temperature)


def batch_logits(query: Tensor, key: Tensor, temperature: float) -> Tensor:
    """Return the cosines of this rank's queries with the keys of all ranks over the temperature, `(N, W * N)`."""
    keys = gather_with_gradient(functional.normalize(key.detach(), dim=1))
    return functional.normalize(query, dim=1) @ keys.T / temperature


def scaled_cross_entropy(logits: Tensor, temperature: float) -> Tensor:
    """Return `2 * temperature` times the cross entropy of each query's own key, convex in the logits."""
    positives = torch.arange(len(logits), device=logits.device) + get_rank() * len(logits)
    return 2 * temperature * functional.cross_entropy(logits, positives)


@PRETEXT_METHODS.register("moco_v3")
class MoCoV3(PretextMethod):
    """Identify the teacher's key of the other view among those of the batch, in both directions.

    The heads are those of the paper's text, which the authors' code uses for vision transformers; for ResNets it uses a
    projector of two layers and temperature 1. Differences from the paper: the decay is constant (the paper raises it to
    1 along a cosine), and the patch projection of a transformer is trained (section 4.2 freezes it), since both levels
    share it.

    Args:
        backbone, tail: see :class:`PretextMethod`.
        projector: widths of the projection head, with batch norm on its output, for student and teacher.
        predictor: widths of the prediction head; the last must equal the last of the projector.
        temperature: temperature of the softmax over cosine similarities.
        decay: decay of the teacher's exponential moving average per optimizer step.
        augmentation: BYOL's asymmetric views at 96 pixels by default, as in the paper.
    """

    def __init__(
        self,
        backbone: Backbone,
        tail: Tail,
        projector: Sequence[int] = (4096, 4096, 256),
        predictor: Sequence[int] = (4096, 256),
        temperature: float = 0.2,
        decay: float = 0.99,
        augmentation: Callable[[Any], tuple[Tensor, ...]] | None = None,
    ) -> None:
        super().__init__(backbone, tail, augmentation or two_views(aspect_ratio=(3 / 4, 4 / 3)))
        self.projector = mlp([tail.num_features, *projector], output_norm=True)
        self.predictor = mlp([projector[-1], *predictor], output_norm=True)
        self.temperature = temperature
        self.decay = decay
        self.teacher = Teacher(backbone=backbone, tail=tail, projector=self.projector)

    def losses(self, backbone: Backbone, views: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """Return `{"info_nce": scalar}` for two views `(N, 3, S, S)`: the sum of both directions."""
        return self.outer(self.outputs(backbone, views))

    def outputs(self, backbone: Backbone, views: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return the logits `(N, W * N)` of each direction."""
        queries = [self.predictor(self.projector(self.embed(backbone, view))) for view in views]
        keys = [self.teacher(view) for view in views]
        pairs = zip(queries, reversed(keys), strict=True)
        return tuple(batch_logits(query, key, self.temperature) for query, key in pairs)

    def outer(self, outputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """Return `{"info_nce": scalar}`, convex in the logits."""
        forth, back = (scaled_cross_entropy(logits, self.temperature) for logits in outputs)
        return {"info_nce": forth + back}

    def after_step(self, backbone: Backbone) -> None:
        """Update the teacher's parameters."""
        self.teacher.follow(self.decay, backbone=backbone, tail=self.tail, projector=self.projector)
