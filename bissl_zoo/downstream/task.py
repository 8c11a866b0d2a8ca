"""The contract of a downstream task: a head, a loss, its evaluation and its drawing; the backbone is an argument."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from bissl_zoo.backbones import Backbone
from bissl_zoo.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Batch = tuple[Any, Any]
Box = tuple[float, float, float, float]

#: distinct images of an example batch; larger batches repeat them
_DISTINCT = 8


class Evaluator(Protocol):
    """Collect predictions over a data set and compute metrics from them."""

    def reset(self) -> None: ...
    def process(self, predictions: Any, targets: Any) -> None: ...
    def synchronize(self) -> None: ...
    def evaluate(self) -> dict[str, float]: ...


class DownstreamTask(nn.Module, ABC):
    """Base of all downstream tasks, the upper level of BiSSL (arXiv 2410.02387, section 3).

    The same head runs on the lower backbone for the hypergradient and on the upper backbone for the plain loss. Only
    first derivatives of a task are taken, so operators without second derivatives are allowed.

    Only the task knows the type of its targets. Tools call `example_batch`, `draw`, `score` and `objects` instead of
    looking at targets.

    Args:
        backbone: the trunk that the task runs on; only its shapes are read, it never becomes a member.
        classes: class names in the order of the labels.
    """

    #: True if a target is one class index per image, as kNN and linear probes need
    single_label: ClassVar[bool] = False

    def __init__(self, backbone: Backbone, classes: Sequence[str]) -> None:
        super().__init__()
        self.stage = backbone.out_features[-1]
        self.feature = backbone.feature_info[self.stage]
        self.classes = list(classes)

    @abstractmethod
    def transform(self, train: bool) -> Callable[[Any, Any], Batch]:
        """Return a picklable function from a data set's `(PIL image, target)` to a sample `(image, target)`."""

    @abstractmethod
    def collate(self, samples: list[Batch]) -> Batch:
        """Return a batch `(images, targets)` of samples.

        Raises:
            DatasetError: the targets are not of this task's kind.
        """

    @abstractmethod
    def losses(self, backbone: Backbone, batch: Batch) -> dict[str, Tensor]:
        """Return scalar losses by name, each a mean over the batch; their sum is minimised."""

    @abstractmethod
    def predict(self, backbone: Backbone, images: Any) -> Any:
        """Return predictions as the evaluator takes them, one per image; both modules are in eval mode."""

    @abstractmethod
    def evaluator(self) -> Evaluator:
        """Return a new evaluator for the classes of this task."""

    @abstractmethod
    def example_batch(self, n: int, size: tuple[int, int]) -> Batch:
        """Return a batch of `n` random images with random targets, as `losses` takes it.

        Args:
            size: height and width of the images in pixels, before the training transform.
        """

    @abstractmethod
    def draw(self, axes: "Axes", image: Any, value: Any, predicted: bool = False, threshold: float = 0.5) -> None:
        """Draw an image of a data set with one target or one prediction on matplotlib axes.

        Args:
            image: PIL image, before any transform.
            value: the image's target in the data set or, if `predicted`, its item of the output of `predict`.
            threshold: minimum score of the parts of a prediction that are drawn, such as boxes.
        """

    def score(self, prediction: Any, target: Any) -> float:
        """Return how good a prediction for one image is, higher is better; used to find the worst predictions.

        By default the first metric of the evaluator on this image alone.

        Args:
            prediction, target: items of the output of `predict` and of the targets of a test batch.
        """
        evaluator = self.evaluator()
        evaluator.process(_batch_of_one(prediction), _batch_of_one(target))
        return float(next(iter(evaluator.evaluate().values())))

    def objects(self, target: Any) -> list[tuple[Box | None, int | None]]:
        """Return the parts of an image for embedding maps, as (box or None for the whole image, class index or None).

        By default the whole image without a class.

        Args:
            target: of the data set, before any transform.
        """
        return [(None, None)]

    def blank_target(self, size: tuple[int, int]) -> Any:
        """Return a target that `transform(train=False)` and `collate` accept for an image without one, to predict.

        Args:
            size: width and height of the image in pixels.
        """
        return None

    def describe(self, prediction: Any, threshold: float = 0.5) -> dict[str, Any]:
        """Return the prediction for one image in plain types, with class names; by default its values.

        Args:
            prediction: item of the output of `predict`, on the CPU.
            threshold: minimum score of the parts that are returned, such as boxes.
        """
        return {"prediction": prediction.tolist() if isinstance(prediction, Tensor) else prediction}

    def pseudo_target(self, prediction: Any, threshold: float) -> Any:
        """Return a training target made of the prediction for an unlabelled image; None to leave the image out.

        By default no image is used, so that self-training raises an error.

        Args:
            prediction: item of the output of `predict`, on the CPU.
            threshold: minimum score.
        """
        return None

    def preprocessing(self) -> dict[str, Any]:
        """Return sizes, mean and std of `transform(train=False)` in plain types, for users of an exported model."""
        return {}

    def graph(self, backbone: Backbone) -> nn.Module:
        """Return a module from images in [0, 1] to tensors, for export; with `outputs`, their names, and `size`.

        Raises:
            ConfigError: the task has no such form.
        """
        raise ConfigError(f"{type(self).__name__} has no method graph(backbone), which export to ONNX and .pt2 needs.")

    def random_batch(self, n: int, size: tuple[int, int], target: Callable[[int], Any]) -> Batch:
        """Return `n` images of noise with the targets `target(index)`, through the training transform and `collate`.

        Args:
            size: height and width of the images in pixels; beyond 8 images the samples repeat.
        """
        transform = self.transform(train=True)
        samples = []
        for index in range(min(n, _DISTINCT)):
            pixels = np.random.default_rng(index).integers(0, 256, (*size, 3), dtype=np.uint8)
            samples.append(transform(Image.fromarray(pixels), target(index)))
        return self.collate([samples[index % len(samples)] for index in range(n)])


def _batch_of_one(item: Any) -> Any:
    if isinstance(item, Tensor):
        return item.unsqueeze(0)
    return torch.tensor([item]) if isinstance(item, int | float) else [item]
