"""BYOL (Grill et al., arXiv 2006.07733)."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.nn import functional

from bissl_zoo.backbones import Backbone, Tail
from bissl_zoo.pretext.heads import mlp
from bissl_zoo.pretext.method import PretextMethod
from bissl_zoo.pretext.teacher import Teacher
from bissl_zoo.registry import PRETEXT_METHODS


def regression_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Return `2 - 2 cos(prediction, target)` per row of two `(N, D)` tensors, `(N,)` (arXiv 2006.07733, equation 2)."""
    return 2.0 - 2.0 * functional.cosine_similarity(prediction, target, dim=1)


def normalized_residual(prediction: Tensor, target: Tensor) -> Tensor:
    """Return the difference of the rows at unit length, two `(N, D)` -> `(N, D)`; the target is a constant."""
    return functional.normalize(prediction, dim=1) - functional.normalize(target.detach(), dim=1)


@PRETEXT_METHODS.register("byol")
class BYOL(PretextMethod):
    """Predict a momentum teacher's projection of one view from the student's projection of the other.

    Args:
        backbone, tail: see :class:`PretextMethod`.
        projector: widths of the projection head after the embedding, for student and teacher.
        predictor: widths of the prediction head; the last must equal the last of the projector.
        decay: decay of the teacher's exponential moving average per optimizer step.
        augmentation: see :class:`PretextMethod`.
    """

    supports_grad_accumulation = True

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
        self.teacher = Teacher(backbone=backbone, tail=tail, projector=self.projector)

    def losses(self, backbone: Backbone, views: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """Return `{"regression": scalar}` for two views `(N, 3, S, S)`: sum of both directions, mean over N."""
        predictions = [self.predictor(self.projector(self.embed(backbone, view))) for view in views]
        targets = [self.teacher(view) for view in views]
        first = regression_loss(predictions[0], targets[1])
        second = regression_loss(predictions[1], targets[0])
        return {"regression": (first + second).mean()}

    def outputs(self, backbone: Backbone, views: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return the normalised predictions less the normalised targets, `(N, D)` for each direction."""
        predictions = [self.predictor(self.projector(self.embed(backbone, view))) for view in views]
        targets = [self.teacher(view) for view in reversed(views)]
        return tuple(map(normalized_residual, predictions, targets))

    def outer(self, outputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """Return `{"regression": scalar}`: `2 - 2 cos` is the squared length of the residual."""
        return {"regression": sum(residual.square().sum(dim=1).mean() for residual in outputs)}

    def after_step(self, backbone: Backbone) -> None:
        """Update the teacher's parameters; its batch-norm statistics come from its own forward passes."""
        self.teacher.follow(self.decay, backbone=backbone, tail=self.tail, projector=self.projector)
