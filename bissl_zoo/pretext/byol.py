"""BYOL (Grill et al., arXiv 2006.07733)."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from bissl_zoo.backbones import Backbone, Tail
from bissl_zoo.pretext.heads import mlp
from bissl_zoo.pretext.method import PretextMethod
from bissl_zoo.registry import PRETEXT_METHODS


def regression_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """`2 - 2 cos(prediction, target)` per row (arXiv 2006.07733, equation 2): two `(N, D)` -> `(N,)`."""
    return 2.0 - 2.0 * functional.cosine_similarity(prediction, target, dim=1)


@PRETEXT_METHODS.register("byol")
class BYOL(PretextMethod):
    """Predict a slowly moving teacher's projection of one view from the student's projection of the other.

    Args:
        projector: widths of the projection head after the embedding; also the teacher's.
        predictor: widths of the prediction head after the projection; its last must be the projector's.
        decay: of the teacher's exponential moving average over optimizer steps.
    """

    def __init__(
        self,
        backbone: Backbone,
        tail: Tail,
        projector: Sequence[int] = (256, 256, 256),
        predictor: Sequence[int] = (256, 256, 256),
        decay: float = 0.9995,
        augmentation: Callable[[Any], tuple[Tensor, ...]] | None = None,
    ) -> None:
        super().__init__(backbone, tail, augmentation)
        self.projector = mlp([tail.num_features, *projector])
        self.predictor = mlp([projector[-1], *predictor])
        self.decay = decay
        self.teacher = nn.ModuleDict({"backbone": backbone, "tail": tail, "projector": self.projector})
        self.teacher = copy.deepcopy(self.teacher).requires_grad_(False)

    def losses(self, backbone: Backbone, views: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """`{"regression": scalar}` of two views `(N, 3, S, S)`: both directions added, mean over N."""
        predictions = [self.predictor(self.projector(self.embed(backbone, view))) for view in views]
        with torch.no_grad():
            teacher = self.teacher
            targets = [teacher["projector"](teacher["tail"](teacher["backbone"](v)[self.stage])) for v in views]
        first = regression_loss(predictions[0], targets[1])
        second = regression_loss(predictions[1], targets[0])
        return {"regression": (first + second).mean()}

    @torch.no_grad()
    def after_step(self, backbone: Backbone) -> None:
        """Move the teacher's parameters towards the student's; its batch-norm statistics are its own."""
        student = {"backbone": backbone, "tail": self.tail, "projector": self.projector}
        for name, module in student.items():
            for slow, fast in zip(self.teacher[name].parameters(), module.parameters(), strict=True):
                slow.lerp_(fast, 1.0 - self.decay)
