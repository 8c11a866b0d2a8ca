"""Semantic segmentation with a linear head on the last feature map, and a data set of generated shapes."""

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional as tv

from bissl_zoo.data.views import IMAGENET_MEAN, IMAGENET_STD
from bissl_zoo.distributed import all_gather_objects
from bissl_zoo.downstream import DownstreamTask
from bissl_zoo.downstream.drawing import COLOURS, show_image
from bissl_zoo.errors import DatasetError
from bissl_zoo.registry import DATASETS, DOWNSTREAM_TASKS

CLASSES = ["background", "disc", "square", "triangle"]


@DATASETS.register("shapes")
class Shapes(Dataset):
    """Generated images of a disc, a square and a triangle on noise; a target is a class index per pixel, int64 (S, S).

    Args:
        split: "train", "test" or "unlabeled" (targets are None); images of different splits differ.
        images: number of images.
        image_size: side S in pixels.
    """

    def __init__(self, split: str = "train", images: int = 500, image_size: int = 64) -> None:
        self.split, self.images, self.image_size = split, images, image_size
        self.classes = None if split == "unlabeled" else list(CLASSES)

    def __len__(self) -> int:
        return self.images

    def __getitem__(self, index: int) -> tuple[Image.Image, Tensor | None]:
        rng = np.random.default_rng([index, *self.split.encode()])
        size = self.image_size
        image = Image.fromarray(rng.integers(0, 160, (size, size, 3), dtype=np.uint8))
        mask = Image.new("L", (size, size))
        for label in rng.permutation([1, 2, 3]).tolist():
            radius = rng.uniform(0.12, 0.22) * size
            x, y = rng.uniform(radius, size - radius, 2)
            colour = tuple(rng.integers(128, 256, 3).tolist())
            sides = {1: 60, 2: 4, 3: 3}[label]
            for canvas, fill in ((image, colour), (mask, label)):
                ImageDraw.Draw(canvas).regular_polygon((x, y, radius), sides, fill=fill)
        return image, None if self.classes is None else torch.from_numpy(np.array(mask)).long()


@DOWNSTREAM_TASKS.register("segmentation")
class Segmentation(DownstreamTask):
    """One class per pixel: a 1x1 convolution on the last map, upsampled to the image, trained by cross entropy.

    Args:
        image_size: side in pixels that images and masks are resized to.
    """

    def __init__(self, backbone, classes, image_size: int = 64) -> None:
        super().__init__(backbone, classes)
        self.image_size = image_size
        self.head = nn.Conv2d(self.feature.channels, len(self.classes), 1)

    def transform(self, train: bool):
        """Return the resizing of an image and its mask."""
        return Resized(self.image_size)

    def collate(self, samples):
        """Return images `(B, 3, S, S)` float32 and masks `(B, S, S)` int64."""
        images, masks = zip(*samples, strict=True)
        return torch.stack(images), torch.stack(masks)

    def losses(self, backbone, batch) -> dict[str, Tensor]:
        """Return `{"cross_entropy": scalar}`."""
        images, masks = batch
        return {"cross_entropy": functional.cross_entropy(self._logits(backbone, images), masks)}

    @torch.no_grad()
    def predict(self, backbone, images: Tensor) -> Tensor:
        """Return the class of each pixel, int64 `(B, S, S)`."""
        return self._logits(backbone, images).argmax(dim=1)

    def blank_target(self, size: tuple[int, int]) -> Tensor:
        """Return a mask of background."""
        return torch.zeros(size[1], size[0], dtype=torch.int64)

    def describe(self, prediction: Tensor, threshold: float = 0.5):
        """Return the class index of each pixel as `mask`, and the share of each class in the image."""
        counts = prediction.flatten().bincount(minlength=len(self.classes)) / prediction.numel()
        return {"mask": prediction.tolist(), "shares": dict(zip(self.classes, counts.tolist(), strict=True))}

    def evaluator(self) -> "MeanIoU":
        """Return an evaluator of mean intersection over union and pixel accuracy."""
        return MeanIoU(self.classes)

    def example_batch(self, n: int, size: tuple[int, int]):
        """Return `n` images of noise with random masks."""
        return self.random_batch(n, size, lambda index: torch.randint(len(self.classes), size))

    def draw(self, axes, image, value: Tensor, predicted: bool = False, threshold: float = 0.5) -> None:
        """Lay a mask in the colours of its classes over the image; the background stays as it is."""
        labels = value.cpu().numpy()
        show_image(axes, image, ", ".join(self.classes[label] for label in np.unique(labels) if label))
        colours = np.array([[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in COLOURS], dtype=np.uint8)
        overlay = np.dstack([colours[(labels - 1) % len(colours)], np.where(labels > 0, 160, 0).astype(np.uint8)])
        axes.imshow(overlay, extent=axes.images[0].get_extent(), interpolation="nearest")

    def _logits(self, backbone, images: Tensor) -> Tensor:
        logits = self.head(backbone(images)[self.stage])
        return functional.interpolate(logits, images.shape[-2:], mode="bilinear", align_corners=False)


class Resized:
    """Resize an image and its mask; a class, so that it can be pickled for spawned workers."""

    def __init__(self, size: int) -> None:
        self.size = [size, size]

    def __call__(self, image, mask):
        if not isinstance(mask, Tensor) or mask.ndim != 2:
            raise DatasetError(f"Segmentation needs masks (H, W) as Tensor, not {type(mask).__name__}.")
        pixels = tv.to_dtype(tv.resize(tv.pil_to_tensor(image), self.size), torch.float32, scale=True)
        mask = tv.resize(mask[None], self.size, tv.InterpolationMode.NEAREST)[0]
        return tv.normalize(pixels, IMAGENET_MEAN, IMAGENET_STD), mask


class MeanIoU:
    """Count pixels by true and predicted class over a whole set, across ranks."""

    def __init__(self, classes) -> None:
        self.classes = list(classes)
        self.reset()

    def reset(self) -> None:
        """Start a new evaluation."""
        self.counts = torch.zeros(len(self.classes), len(self.classes), dtype=torch.int64)

    def process(self, predictions: Tensor, targets: Tensor) -> None:
        """Add one batch of class indices `(B, S, S)`."""
        pairs = targets.flatten() * len(self.classes) + predictions.flatten()
        self.counts += torch.bincount(pairs, minlength=self.counts.numel()).view_as(self.counts)

    def synchronize(self) -> None:
        """Add up the counts of all ranks."""
        self.counts = torch.stack(all_gather_objects(self.counts)).sum(dim=0)

    def per_class(self) -> dict[str, dict[str, float]]:
        """Return the intersection over union of each class that occurs."""
        right = self.counts.diagonal()
        union = self.counts.sum(dim=0) + self.counts.sum(dim=1) - right
        pairs = zip(self.classes, right.tolist(), union.tolist(), strict=True)
        return {name: {"IoU": hits / total} for name, hits, total in pairs if total}

    def evaluate(self) -> dict[str, float]:
        """Return `mIoU`, the mean over the classes that occur, and `accuracy`, the share of pixels, as fractions."""
        by_class = [metrics["IoU"] for metrics in self.per_class().values()]
        accuracy = self.counts.diagonal().sum().item() / self.counts.sum().item()
        return {"mIoU": sum(by_class) / len(by_class), "accuracy": accuracy}
