"""Count the objects in an image: regress the count of each of four crops, and add them up."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.transforms import v2

from bissl_zoo.data.views import IMAGENET_MEAN, IMAGENET_STD
from bissl_zoo.distributed import all_gather_objects
from bissl_zoo.downstream import DownstreamTask
from bissl_zoo.downstream.drawing import show_image
from bissl_zoo.registry import DOWNSTREAM_TASKS


@DOWNSTREAM_TASKS.register("counting")
class Counting(DownstreamTask):
    """The number of annotated objects, from the pooled feature maps of an image's quarters.

    Args:
        image_size: side in pixels that images are resized to; a crop has half of it.
    """

    def __init__(self, backbone, classes, image_size: int = 96) -> None:
        super().__init__(backbone, classes)
        self.image_size = image_size
        self.count = nn.Linear(self.feature.channels, 1)

    def transform(self, train: bool):
        """Return a function from `(image, {"boxes": ...})` to four crops `(4, 3, S/2, S/2)` and the number of boxes."""
        pixels = [v2.PILToTensor(), v2.Resize([self.image_size] * 2), v2.ToDtype(torch.float32, scale=True)]
        return Quarters(v2.Compose([*pixels, v2.Normalize(IMAGENET_MEAN, IMAGENET_STD)]))

    def collate(self, samples):
        """Return crops `(B, 4, 3, S/2, S/2)` and counts `(B,)` float32."""
        crops, counts = zip(*samples, strict=True)
        return torch.stack(crops), torch.tensor(counts, dtype=torch.float32)

    def losses(self, backbone, batch) -> dict[str, Tensor]:
        """Return `{"smooth_l1": scalar}`."""
        crops, counts = batch
        return {"smooth_l1": functional.smooth_l1_loss(self._counts(backbone, crops), counts)}

    @torch.no_grad()
    def predict(self, backbone, images: Tensor) -> Tensor:
        """Return counts `(B,)`."""
        return self._counts(backbone, images)

    def blank_target(self, size):
        """Return no boxes."""
        return {"boxes": torch.zeros(0, 4)}

    def describe(self, prediction, threshold=0.5):
        """Return the count."""
        return {"count": float(prediction)}

    def evaluator(self) -> "CountEvaluator":
        """Return an evaluator of the mean absolute and the root mean squared error."""
        return CountEvaluator()

    def example_batch(self, n: int, size: tuple[int, int]):
        """Return `n` images of noise with 0, 1, 2, ... boxes."""
        return self.random_batch(n, size, lambda index: {"boxes": torch.zeros(index, 4)})

    def draw(self, axes, image, value, predicted: bool = False, threshold: float = 0.5) -> None:
        """Show the image with its true or predicted count."""
        count = f"{value:.1f}" if predicted else len(value["boxes"])
        show_image(axes, image, f"{count} objects")

    def score(self, prediction: Tensor, target: Tensor) -> float:
        """Return the negative absolute error."""
        return -abs(float(prediction) - float(target))

    def _counts(self, backbone, crops: Tensor) -> Tensor:
        features = backbone(crops.flatten(0, 1))[self.stage].mean(dim=(2, 3))
        return functional.softplus(self.count(features)).view(crops.shape[:2]).sum(dim=1)


class Quarters:
    """Cut an image into quarters; a class, so that it can be pickled for spawned workers."""

    def __init__(self, pixels) -> None:
        self.pixels = pixels

    def __call__(self, image, target):
        whole = self.pixels(image)
        crops = [crop for half in whole.chunk(2, dim=1) for crop in half.chunk(2, dim=2)]
        return torch.stack(crops), len(target["boxes"])


class CountEvaluator:
    """Collect errors over a whole set, across ranks."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Start a new evaluation."""
        self.errors: list[float] = []

    def process(self, predictions: Tensor, targets: Tensor) -> None:
        """Add one batch of counts `(B,)`."""
        self.errors += (predictions - targets).tolist()

    def synchronize(self) -> None:
        """Gather the errors of all ranks."""
        self.errors = [error for errors in all_gather_objects(self.errors) for error in errors]

    def evaluate(self) -> dict[str, float]:
        """Return `MAE` and `RMSE`, in objects."""
        size = len(self.errors)
        squares = sum(error**2 for error in self.errors)
        return {"MAE": sum(map(abs, self.errors)) / size, "RMSE": math.sqrt(squares / size)}
