"""Single-label image classification, and the base class it shares with multi-label classification."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.transforms import v2

from bissl_zoo.backbones import POOLED, Backbone, pooled_width
from bissl_zoo.data.views import IMAGENET_MEAN, IMAGENET_STD
from bissl_zoo.downstream.drawing import show_image
from bissl_zoo.downstream.graph import ClassifierGraph
from bissl_zoo.downstream.task import Batch, Box, DownstreamTask
from bissl_zoo.errors import DatasetError
from bissl_zoo.evaluation.classification import TopKEvaluator
from bissl_zoo.registry import DOWNSTREAM_TASKS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: classes in the caption of a prediction, the most probable first
_CAPTIONED = 3


class PooledLinear(DownstreamTask, ABC):
    """One linear layer on the mean of the last feature map: K logits per image.

    If the shared trunk returns a pooled embedding, as of class tokens, it takes the place of that mean.

    Args:
        image_size: side in pixels of the training crop and of the central test crop.
        crop_scale: area of the training crop as a fraction of the image.
        aspect_ratio: width over height of the training crop.
        interpolation: "bicubic" or "bilinear".
        resize: shorter side in pixels before the central test crop; by default 8/7 of `image_size`.
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
        aspect_ratio: tuple[float, float] = (3 / 4, 4 / 3),
        interpolation: str = "bicubic",
    ) -> None:
        super().__init__(backbone, classes)
        self.image_size = image_size
        self.crop_scale, self.aspect_ratio = tuple(crop_scale), tuple(aspect_ratio)
        self.interpolation = v2.InterpolationMode(interpolation)
        self.resize = resize or round(image_size * 8 / 7)
        self.mean, self.std = list(mean), list(std)
        self.linear = nn.Linear(pooled_width(backbone), len(self.classes))

    def transform(self, train: bool) -> Callable[[Any, Any], Batch]:
        """Return a random resized crop and flip for training, a central crop for testing; targets are unchanged."""
        size, mode = self.image_size, self.interpolation
        if train:
            crop = [v2.RandomResizedCrop(size, self.crop_scale, self.aspect_ratio, mode), v2.RandomHorizontalFlip()]
        else:
            crop = [v2.Resize(self.resize, mode), v2.CenterCrop(size)]
        to_float = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(self.mean, self.std)]
        return _ImageTransform(v2.Compose([v2.PILToTensor(), *crop, *to_float]))

    @torch.no_grad()
    def predict(self, backbone: Backbone, images: Tensor) -> Tensor:
        """Return logits `(B, K)` of images `(B, 3, S, S)`."""
        return self._logits(backbone, images)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return the probabilities `(..., K)` of the classes for logits `(..., K)`."""
        return logits.float().softmax(dim=-1)

    def blank_target(self, size: tuple[int, int]) -> Any:
        """Return the first class."""
        return 0

    def describe(self, prediction: Tensor, threshold: float = 0.5) -> dict[str, Any]:
        """Return the most probable class as `label`, its probability as `score`, and `probabilities` by class name."""
        values = self.probabilities(prediction)
        label = int(values.argmax())
        probabilities = dict(zip(self.classes, values.tolist(), strict=True))
        return {"label": self.classes[label], "score": values[label].item(), "probabilities": probabilities}

    def preprocessing(self) -> dict[str, Any]:
        """Return the shorter side after resizing, the side of the central crop, and the normalisation."""
        sizes = {"resize": self.resize, "crop": self.image_size, "interpolation": self.interpolation.value}
        return {**sizes, "mean": self.mean, "std": self.std}

    def graph(self, backbone: Backbone) -> ClassifierGraph:
        """Return the network from images in [0, 1] to probabilities."""
        return ClassifierGraph(backbone, self)

    def draw(self, axes: "Axes", image: Any, value: Any, predicted: bool = False, threshold: float = 0.5) -> None:
        """Show the image with its classes or, of a prediction, with the three most probable classes."""
        show_image(axes, image, self._predicted(value) if predicted else self._target_text(value))

    def _predicted(self, logits: Tensor) -> str:
        values, labels = self.probabilities(logits).topk(min(_CAPTIONED, len(self.classes)))
        pairs = zip(labels.tolist(), values.tolist(), strict=True)
        return "\n".join(f"{self.classes[label]} {value:.2f}" for label, value in pairs)

    @abstractmethod
    def _target_text(self, target: Any) -> str:
        """Return the names of the classes of a target."""

    def _logits(self, backbone: Backbone, images: Tensor) -> Tensor:
        features = backbone(images)
        return self.linear(features[POOLED] if POOLED in features else features[self.stage].mean(dim=(2, 3)))


@DOWNSTREAM_TASKS.register("classification")
class Classification(PooledLinear):
    """Assign one class to each image, trained by cross entropy; takes the arguments of :class:`PooledLinear`."""

    single_label = True

    def collate(self, samples: list[Batch]) -> Batch:
        """Return images `(B, 3, S, S)` float32 and labels `(B,)` int64.

        Raises:
            DatasetError: a target is not a class index.
        """
        images, labels = zip(*samples, strict=True)
        for label in labels:
            if not isinstance(label, Integral):
                raise DatasetError(f"Classification needs one class index (int) per image, not {type(label).__name__}.")
        return torch.stack(images), torch.tensor(labels)

    def losses(self, backbone: Backbone, batch: Batch) -> dict[str, Tensor]:
        """Return `{"cross_entropy": scalar}`."""
        images, labels = batch
        return {"cross_entropy": functional.cross_entropy(self._logits(backbone, images), labels)}

    def evaluator(self) -> TopKEvaluator:
        """Return an evaluator of top-1, top-5 and mean-per-class accuracy as fractions."""
        return TopKEvaluator(self.classes)

    def example_batch(self, n: int, size: tuple[int, int]) -> Batch:
        """Return `n` images of noise with the labels 0, 1, ... in turn."""
        return self.random_batch(n, size, lambda index: index % len(self.classes))

    def pseudo_target(self, prediction: Tensor, threshold: float) -> int | None:
        """Return the most probable class if its probability reaches the threshold."""
        probability, label = self.probabilities(prediction).max(dim=0)
        return int(label) if probability >= threshold else None

    def score(self, prediction: Tensor, target: Any) -> float:
        """Return the probability of the true class."""
        return self.probabilities(prediction)[int(target)].item()

    def objects(self, target: int) -> list[tuple[Box | None, int | None]]:
        """Return the whole image with its class."""
        return [(None, target)]

    def _target_text(self, target: int) -> str:
        return self.classes[target]


class _ImageTransform:
    """Transform the image and return the target as it is; a class, so that it can be pickled for spawned workers."""

    def __init__(self, transform: Callable[[Any], Tensor]) -> None:
        self.transform = transform

    def __call__(self, image: Any, target: Any) -> Batch:
        return self.transform(image), target
