"""The contract of a downstream task: a head, a loss and its evaluation; the backbone is an argument."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import Tensor, nn

from bissl_zoo.backbones import Backbone

Batch = tuple[Any, Any]


class Evaluator(Protocol):
    """Collects predictions over a set and turns them into figures."""

    def reset(self) -> None: ...
    def process(self, predictions: Any, targets: Any) -> None: ...
    def synchronize(self) -> None: ...
    def evaluate(self) -> dict[str, float]: ...


class DownstreamTask(nn.Module, ABC):
    """Base of all downstream tasks, the upper level of BiSSL (arXiv 2410.02387, section 3).

    The same head runs on whichever backbone it is given: the lower one for the hypergradient, the upper one for the
    plain loss. Only first derivatives are taken of a task, so it may use operators that have no second ones.

    Args:
        backbone: the trunk that the task will be called with; for its shapes, never kept as a member.
        classes: names of the classes, in the order of the labels.
    """

    #: type of a data set's targets that this task takes
    target_type: type = int

    def __init__(self, backbone: Backbone, classes: Sequence[str]) -> None:
        super().__init__()
        self.stage = backbone.out_features[-1]
        self.feature = backbone.feature_info[self.stage]
        self.classes = list(classes)

    @abstractmethod
    def transform(self, train: bool) -> Callable[[Any, Any], Batch]:
        """The transform from a data set's `(PIL image, target)` to a sample."""

    @abstractmethod
    def collate(self, samples: list[Batch]) -> Batch:
        """A batch `(images, targets)` from samples."""

    @abstractmethod
    def losses(self, backbone: Backbone, batch: Batch) -> dict[str, Tensor]:
        """Scalar losses by name, means over the batch, to be added up."""

    @abstractmethod
    def predict(self, backbone: Backbone, images: Any) -> Any:
        """Predictions as the evaluator takes them; both modules in eval mode."""

    @abstractmethod
    def evaluator(self) -> Evaluator:
        """A fresh evaluator for this task's classes."""
