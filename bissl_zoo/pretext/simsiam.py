"""SimSiam (Chen and He, arXiv 2011.10566)."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.nn import functional

from bissl_zoo.backbones import Backbone, Tail
from bissl_zoo.data.views import two_views
from bissl_zoo.pretext.byol import normalized_residual
from bissl_zoo.pretext.heads import mlp
from bissl_zoo.pretext.method import PretextMethod
from bissl_zoo.registry import PRETEXT_METHODS


def negative_cosine(prediction: Tensor, target: Tensor) -> Tensor:
    """Return the mean of `-cos(prediction, stop_gradient(target))` over rows of two `(N, D)` tensors (equation 1)."""
    return -functional.cosine_similarity(prediction, target.detach(), dim=1).mean()


@PRETEXT_METHODS.register("simsiam")
class SimSiam(PretextMethod):
    """Predict the projection of one view from that of the other, with a stopped gradient instead of a teacher.

    The stopped branch is constant in the Hessian, too, like the output of a teacher. For the paper's constant learning
    rate of the predictor (table 1), use the optimizer's parameter groups.

    Args:
        backbone, tail: see :class:`PretextMethod`.
        projector: widths of the projection head after the embedding, with batch norm on its output.
        predictor: widths of the prediction head; the last must equal the last of the projector.
        augmentation: MoCo v2's views at 96 pixels by default, as in the paper.
    """

    supports_grad_accumulation = True

    def __init__(
        self,
        backbone: Backbone,
        tail: Tail,
        projector: Sequence[int] = (2048, 2048, 2048),
        predictor: Sequence[int] = (512, 2048),
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
        self.projector = mlp([tail.num_features, *projector], output_norm=True)
        self.predictor = mlp([projector[-1], *predictor], output_bias=True)

    def losses(self, backbone: Backbone, views: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """Return `{"negative_cosine": scalar}` for two views `(N, 3, S, S)`: mean of both directions (equation 2)."""
        first, second = (self.projector(self.embed(backbone, view)) for view in views)
        forth = negative_cosine(self.predictor(first), second)
        back = negative_cosine(self.predictor(second), first)
        return {"negative_cosine": (forth + back) / 2}

    def outputs(self, backbone: Backbone, views: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return the normalised predictions less the normalised targets, `(N, D)` for each direction."""
        first, second = (self.projector(self.embed(backbone, view)) for view in views)
        pairs = ((self.predictor(first), second), (self.predictor(second), first))
        return tuple(normalized_residual(prediction, target) for prediction, target in pairs)

    def outer(self, outputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """Return `{"negative_cosine": scalar}`: `-cos` is half the squared length of the residual, less 1."""
        squares = sum(residual.square().sum(dim=1).mean() for residual in outputs)
        return {"negative_cosine": squares / 4 - 1.0}
