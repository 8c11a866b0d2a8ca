"""Single-label image classification, and what it shares with multi-label classification."""

from abc import ABC
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.transforms import v2

from bissl_zoo.backbones import Backbone
from bissl_zoo.data.views import IMAGENET_MEAN, IMAGENET_STD
from bissl_zoo.downstream.task import Batch, DownstreamTask
from bissl_zoo.evaluation.classification import TopKEvaluator
from bissl_zoo.registry import DOWNSTREAM_TASKS


class PooledLinear(DownstreamTask, ABC):
    """Global average pooling of the shared feature map and one linear layer: K logits for an image.

    Args:
        image_size: side in pixels of the training crop and of the central test crop.
        crop_scale: area of the training crop, as a fraction of the image.
        resize: shorter side in pixels before the central test crop; 8/7 of `image_size` by default.
        mean, std: normalisation of images in [0, 1], per RGB channel.
    """

    def __init__(
        self,
        backbone: Backbone,
        classes: Sequence[str],
        image_size: int = 96,
        crop_scale: tuple[float, float] = (0.08, 1.0),
        resize: int | None = None,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
    ) -> None:
        super().__init__(backbone, classes)
        self.image_size = image_size
        self.crop_scale = tuple(crop_scale)
        self.resize = resize or round(image_size * 8 / 7)
        self.mean, self.std = list(mean), list(std)
        self.linear = nn.Linear(self.feature.channels, len(self.classes))

    def transform(self, train: bool) -> Callable[[Any, Any], Batch]:
        """Random resized crop and flip to train, central crop to test; the target passes through."""
        size, bicubic = self.image_size, v2.InterpolationMode.BICUBIC
        if train:
            crop = [v2.RandomResizedCrop(size, self.crop_scale, interpolation=bicubic), v2.RandomHorizontalFlip()]
        else:
            crop = [v2.Resize(self.resize, bicubic), v2.CenterCrop(size)]
        to_float = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(self.mean, self.std)]
        return _ImageTransform(v2.Compose([v2.PILToTensor(), *crop, *to_float]))

    @torch.no_grad()
    def predict(self, backbone: Backbone, images: Tensor) -> Tensor:
        """Logits `(B, K)`."""
        return self._logits(backbone, images)

    def _logits(self, backbone: Backbone, images: Tensor) -> Tensor:
        return self.linear(backbone(images)[self.stage].mean(dim=(2, 3)))


@DOWNSTREAM_TASKS.register("classification")
class Classification(PooledLinear):
    """One class per image, by cross entropy; arguments as of :class:`PooledLinear`."""

    def collate(self, samples: list[Batch]) -> Batch:
        """Images `(B, 3, S, S)` float32 and labels `(B,)` int64."""
        images, labels = zip(*samples, strict=True)
        return torch.stack(images), torch.tensor(labels)

    def losses(self, backbone: Backbone, batch: Batch) -> dict[str, Tensor]:
        """`{"cross_entropy": scalar}`."""
        images, labels = batch
        return {"cross_entropy": functional.cross_entropy(self._logits(backbone, images), labels)}

    def evaluator(self) -> TopKEvaluator:
        """Top-1, top-5 and mean-per-class accuracy as fractions."""
        return TopKEvaluator(self.classes)


class _ImageTransform:
    """Transform the image, leave the target; a class, so that loader workers can be spawned."""

    def __init__(self, transform: Callable[[Any], Tensor]) -> None:
        self.transform = transform

    def __call__(self, image: Any, target: Any) -> Batch:
        return self.transform(image), target
