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
    """Cross entropy of finding each query's key among it and the queue (arXiv 1911.05722, equation 1).

    Args:
        query, key: `(N, D)`, of unit length; rows of the same number belong together.
        queue: `(K, D)` keys of other images.
    Returns:
        Scalar, the mean over this rank's queries.
    """
    positive = (query * key).sum(dim=1, keepdim=True)
    logits = torch.cat([positive, query @ queue.T], dim=1) / temperature
    return functional.cross_entropy(logits, torch.zeros(len(query), dtype=torch.long, device=query.device))


@PRETEXT_METHODS.register("moco_v2")
class MoCoV2(PretextMethod):
    """Find the teacher's key of the other view among a queue of keys of past batches.

    The queue holds the keys of all ranks, in rank order, and is the same on each. Shuffling batch norm (section 3.3) is
    left out: within one process it does nothing, and drawing an order would move the random state of a loss that must
    repeat itself in a solve. A query and its key so have batch statistics of the same images, which the loss can
    exploit the more, the smaller the batch of a process; a backbone without batch norm has no such leak.

    Args:
        projector: widths of the projection head after the embedding, without batch norm; also the teacher's.
        queue_length: keys to compare with; any number, also one that the batch does not divide.
        temperature: of the softmax over cosine similarities.
        decay: of the teacher's exponential moving average over optimizer steps.
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
        # No buffer: it is written by a loss and belongs to the step under way. A step takes its loss directly before
        # `after_step`; what the losses of a solve leave here is overwritten by the next step's.
        self._newest_keys: Tensor | None = None

    def losses(self, backbone: Backbone, views: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """`{"info_nce": scalar}` of two views `(N, 3, S, S)`: queries of the first, keys of the second."""
        query = functional.normalize(self.projector(self.embed(backbone, views[0])), dim=1)
        key = functional.normalize(self.teacher(views[1]), dim=1)
        self._newest_keys = key
        return {"info_nce": info_nce(query, key, self.queue, self.temperature)}

    @torch.no_grad()
    def after_step(self, backbone: Backbone) -> None:
        """Move the teacher towards the student, and let the step's keys of all ranks replace the oldest."""
        self.teacher.follow(self.decay, backbone=backbone, tail=self.tail, projector=self.projector)
        if self._newest_keys is not None:
            self._enqueue(gather_with_gradient(self._newest_keys))
            self._newest_keys = None

    def _enqueue(self, keys: Tensor) -> None:
        length = len(self.queue)
        rows = (self.position + torch.arange(len(keys), device=keys.device)) % length
        self.queue[rows[-length:]] = keys[-length:].to(self.queue.dtype)
        self.position.copy_((self.position + len(keys)) % length)
