"""Rotation prediction (Gidaris, Singh and Komodakis, arXiv 1803.07728)."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from bissl_zoo.pretext import PretextMethod
from bissl_zoo.registry import PRETEXT_METHODS


@PRETEXT_METHODS.register("rotation")
class Rotation(PretextMethod):
    """Rotate each view by 0, 90, 180 and 270 degrees and classify the angle."""

    def __init__(self, backbone, tail, augmentation=None) -> None:
        super().__init__(backbone, tail, augmentation)
        self.classifier = nn.Linear(tail.num_features, 4)

    def losses(self, backbone, views: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """Return `{"rotation": scalar}` for views `(N, 3, S, S)`."""
        images = torch.cat(views)
        rotated = torch.cat([images.rot90(quarter, dims=(2, 3)) for quarter in range(4)])
        angles = torch.arange(4, device=images.device).repeat_interleave(len(images))
        return {"rotation": functional.cross_entropy(self.classifier(self.embed(backbone, rotated)), angles)}
