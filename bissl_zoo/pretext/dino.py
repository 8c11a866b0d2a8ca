"""DINO (Caron et al., arXiv 2104.14294)."""

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from bissl_zoo.backbones import Backbone, Tail
from bissl_zoo.data.views import multi_crop
from bissl_zoo.distributed import all_reduce_mean
from bissl_zoo.errors import ConfigError
from bissl_zoo.pretext.method import PretextMethod
from bissl_zoo.pretext.teacher import Teacher
from bissl_zoo.registry import PRETEXT_METHODS

GLOBAL_CROPS = 2


def self_distillation(
    student: Tensor, teacher: Tensor, center: Tensor, student_temperature: float, teacher_temperature: float
) -> Tensor:
    """Return the cross entropy between teacher and student on different crops (arXiv 2104.14294, equation 3).

    Args:
        student: `(V, N, K)` logits of V crops of N images.
        teacher: `(T, N, K)` logits of the first T of these crops, constants; centered and sharpened here.
        center: `(K,)`.
        student_temperature, teacher_temperature: temperatures of the two softmaxes.
    Returns:
        Scalar, the mean over images and over pairs of two different crops.
    """
    targets = functional.softmax((teacher - center) / teacher_temperature, dim=-1)
    predictions = functional.log_softmax(student / student_temperature, dim=-1)
    pairs = [(t, v) for t in range(len(targets)) for v in range(len(predictions)) if t != v]
    return torch.stack([-(targets[t] * predictions[v]).sum(dim=-1).mean() for t, v in pairs]).mean()


class Prototypes(nn.Linear):
    """Cosine similarity to K prototypes: an l2-normalized input and a weight-normalized layer with norm 1."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(N, D)` to `(N, K)` with values in [-1, 1]."""
        return functional.linear(functional.normalize(x, dim=1), functional.normalize(self.weight, dim=1))


def dino_head(widths: Sequence[int]) -> nn.Sequential:
    """Build an MLP with the given widths (input first), GELU and no batch norm; the last layer are prototypes."""
    layers: list[nn.Module] = []
    for wide, narrow in zip(widths[:-2], widths[1:-1], strict=True):
        layers += [nn.Linear(wide, narrow), nn.GELU()]
        nn.init.trunc_normal_(layers[-2].weight, std=0.02)
        nn.init.zeros_(layers[-2].bias)
    return nn.Sequential(*layers[:-1], Prototypes(widths[-2], widths[-1]))


@PRETEXT_METHODS.register("dino")
class DINO(PretextMethod):
    """Predict a momentum teacher's distribution for a global crop from the student's other crops.

    Differences from the paper: momentum and temperatures are constant (the paper raises the momentum to 1 along a
    cosine, and the teacher's temperature from 0.04 to 0.07), and the last layer is trained from the first step (the
    authors' code freezes it for an epoch). The norm of that layer stays 1, the default of the authors' code.

    Args:
        backbone, tail: see :class:`PretextMethod`.
        projector: widths of the head after the embedding; the last two are the bottleneck and the number of prototypes.
        student_temperature, teacher_temperature: temperatures of the two softmaxes.
        center_decay: decay of the moving average of the teacher's outputs, which is subtracted from them.
        decay: decay of the teacher's exponential moving average per optimizer step.
        augmentation: its first two views must be global crops of one size; the teacher sees only these.
    """

    def __init__(
        self,
        backbone: Backbone,
        tail: Tail,
        projector: Sequence[int] = (2048, 2048, 256, 65536),
        student_temperature: float = 0.1,
        teacher_temperature: float = 0.04,
        center_decay: float = 0.9,
        decay: float = 0.996,
        augmentation: Callable[[Any], tuple[Tensor, ...]] | None = None,
    ) -> None:
        super().__init__(backbone, tail, augmentation or multi_crop())
        self.projector = dino_head([tail.num_features, *projector])
        self.student_temperature, self.teacher_temperature = student_temperature, teacher_temperature
        self.center_decay, self.decay = center_decay, decay
        self.teacher = Teacher(backbone=backbone, tail=tail, projector=self.projector)
        self.register_buffer("center", torch.zeros(projector[-1]))
        self.teacher_mean: Tensor | None = None  # from the last losses; not a buffer, so that a solve does not keep it

    def losses(self, backbone: Backbone, views: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """Return `{"cross_entropy": scalar}` for V views `(N, 3, S, S)`, of which the first two are global.

        Consecutive views of one size are one batch for the networks and therefore for batch-norm statistics.

        Raises:
            ConfigError: the views have several sizes, and the backbone takes only one.
        """
        return self.outer(self.outputs(backbone, views))

    def outputs(self, backbone: Backbone, views: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Return the student's logits `(V, N, K)` and the teacher's `(2, N, K)`, which are constants."""
        _check_sizes(backbone, views)
        groups = [torch.cat(list(group)) for _, group in groupby(views, key=lambda view: view.shape)]
        embeddings = torch.cat([self.embed(backbone, images) for images in groups])
        student = self.projector(embeddings).unflatten(0, (len(views), -1))
        teacher = self.teacher(torch.cat(tuple(views[:GLOBAL_CROPS]))).unflatten(0, (GLOBAL_CROPS, -1))
        self.teacher_mean = teacher.mean(dim=(0, 1), dtype=self.center.dtype)
        return student, teacher

    def outer(self, outputs: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        """Return `{"cross_entropy": scalar}`, convex in the student's logits."""
        student, teacher = outputs
        loss = self_distillation(student, teacher, self.center, self.student_temperature, self.teacher_temperature)
        return {"cross_entropy": loss}

    @torch.no_grad()
    def after_step(self, backbone: Backbone) -> None:
        """Update the teacher, and move the center towards the teacher's outputs in this step."""
        self.teacher.follow(self.decay, backbone=backbone, tail=self.tail, projector=self.projector)
        if self.teacher_mean is not None:
            self.center.lerp_(all_reduce_mean(self.teacher_mean), 1.0 - self.center_decay)
            self.teacher_mean = None


def _check_sizes(backbone: nn.Module, views: Sequence[Tensor]) -> None:
    embedding = getattr(getattr(backbone, "model", None), "patch_embed", None)
    sizes = sorted({tuple(view.shape[-2:]) for view in views})
    if len(sizes) > 1 and getattr(embedding, "strict_img_size", False):
        raise ConfigError(
            f"DINO: the backbone '{backbone.name}' takes only images of {embedding.img_size} pixels, but the views "
            f"have {sizes}. Set backbone.dynamic_img_size=True, or augmentation.local_size to the global size."
        )
