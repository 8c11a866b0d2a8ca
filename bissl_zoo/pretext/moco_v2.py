"""MoCo v2 (He et al., arXiv 1911.05722; Chen et al., arXiv 2003.04297)."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from bissl_zoo.backbones import Backbone, Tail
from bissl_zoo.data.views import two_views
from bissl_zoo.distributed import gather_with_gradient
from bissl_zoo.pretext.heads import mlp
from bissl_zoo.pretext.method import PretextMethod
from bissl_zoo.pretext.teacher import Teacher
from bissl_zoo.registry import PRETEXT_METHODS


def info_nce(query: Tensor, key: Tensor, queue: Tensor, temperature: float) -> Tensor:
    """Return the InfoNCE loss with one positive key per query and negatives from a queue (1911.05722, equation 1).

    Args:
        query, key: `(N, D)`, normalized; row i of both belongs to image i.
        queue: `(K, D)` normalized keys of other images.
        temperature: temperature of the softmax.
    Returns:
        Scalar, the mean over this rank's queries.
    """
    return first_cross_entropy(key_logits(query, key, queue, temperature))


def key_logits(query: Tensor, key: Tensor, queue: Tensor, temperature: float) -> Tensor:
    """Return similarities over the temperature `(N, 1 + K)`, that with a query's own key first."""
    positive = (query * key).sum(dim=1, keepdim=True)
    return torch.cat([positive, query @ queue.T], dim=1) / temperature


def first_cross_entropy(logits: Tensor) -> Tensor:
    """Return the cross entropy of the first column, convex in the logits."""
    return functional.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long, device=logits.device))


@PRETEXT_METHODS.register("moco_v2")
class MoCoV2(PretextMethod):
    """Identify the teacher's key of the other view among a queue of keys from past batches.

    The queue contains the keys of all ranks, in rank order, and is equal on all ranks. Shuffling batch norm (section
    3.3) is omitted: it has no effect in a single process, and its random order would change the loss within a solve.
    A query and its key therefore share batch statistics, which leaks information, more so with small batches per
    process; a backbone without batch norm has no such leak.

    Args:
        backbone, tail: see :class:`PretextMethod`.
        projector: widths of the projection head after the embedding, without batch norm, for student and teacher.
        queue_length: number of keys in the queue; need not be a multiple of the batch size.
        temperature: temperature of the softmax over cosine similarities.
        decay: decay of the teacher's exponential moving average per optimizer step.
        augmentation: the paper's views (arXiv 2003.04297) at 96 pixels by default.
    """

    def __init__(
        self,
        backbone: Backbone,
        tail: Tail,
        projector: Sequence[int] = (2048, 128),
        queue_length: int = 65536,
        temperature: float = 0.2,
        decay: float = 0.999,
        augmentation: Callable[[Any], tuple[Tensor, ...]] | None = None,
    ) -> None:
        views = augmentation or two_views(
            crop_scale=(0.2, 1.0),
            aspect_ratio=(3 / 4, 4 / 3),
            jitter=(0.4, 0.4, 0.4, 0.1),
            blur_probability=(0.5, 0.5),
            solarize_probability=(0.0, 0.0),
        )
        super().__init__(backbone, tail, views)
        self.projector = mlp([tail.num_features, *projector], norm=False, output_bias=True)
        self.temperature = temperature
        self.decay = decay
        self.teacher = Teacher(backbone=backbone, tail=tail, projector=self.projector)
        self.register_buffer("queue", functional.normalize(torch.randn(queue_length, projector[-1]), dim=1))
        self.register_buffer("position", torch.zeros((), dtype=torch.long))
        # not a buffer, since `losses` writes it; the losses of a solve are overwritten before the next `after_step`
        self._newest_keys: Tensor | None = None

    def losses(self, backbone: Backbone, views: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """Return `{"info_nce": scalar}` for two views `(N, 3, S, S)`: queries from the first, keys from the second."""
        return self.outer(self.outputs(backbone, views))

    def outputs(self, backbone: Backbone, views: tuple[Tensor, ...]) -> tuple[Tensor]:
        """Return the logits `(N, 1 + K)`."""
        query = functional.normalize(self.projector(self.embed(backbone, views[0])), dim=1)
        key = functional.normalize(self.teacher(views[1]), dim=1)
        self._newest_keys = key
        return (key_logits(query, key, self.queue, self.temperature),)

    def outer(self, outputs: tuple[Tensor]) -> dict[str, Tensor]:
        """Return `{"info_nce": scalar}`, convex in the logits."""
        return {"info_nce": first_cross_entropy(outputs[0])}

    @torch.no_grad()
    def after_step(self, backbone: Backbone) -> None:
        """Update the teacher, and replace the oldest keys by those of this step from all ranks."""
        self.teacher.follow(self.decay, backbone=backbone, tail=self.tail, projector=self.projector)
        if self._newest_keys is not None:
            self._enqueue(gather_with_gradient(self._newest_keys))
            self._newest_keys = None

    def _enqueue(self, keys: Tensor) -> None:
        length = len(self.queue)
        rows = (self.position + torch.arange(len(keys), device=keys.device)) % length
        self.queue[rows[-length:]] = keys[-length:].to(self.queue.dtype)
        self.position.copy_((self.position + len(keys)) % length)
