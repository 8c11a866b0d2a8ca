"""The contract of a pretext method: a head and a loss; the backbone is an argument."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor, nn

from bissl_zoo.backbones import Backbone, Tail
from bissl_zoo.data.views import two_views


class PretextMethod(nn.Module, ABC):
    """Base of all pretext methods, the lower level of BiSSL (arXiv 2410.02387, section 3).

    A method owns the tail of the split backbone, which takes the shared feature map to an embedding, and its own head;
    the shared trunk is handed to each call. Subclass it, register it, name it in a config:

        @PRETEXT_METHODS.register("mine")
        class Mine(PretextMethod):
            def losses(self, backbone, views): ...

    Args:
        backbone: the trunk that the method will be called with; for shapes and copies, never kept as a member.
        tail: feature map of the trunk -> embedding `(B, tail.num_features)`.
        augmentation: PIL image -> tuple of views; the two views of the BiSSL paper at 96 pixels by default.
    """

    #: whether the loss is a mean over images each of which counts by itself, and a step leaves nothing of its batch, so
    #: that the parts of a batch can be taken one by one; batch norm then takes its statistics of each part
    supports_grad_accumulation: ClassVar[bool] = False

    def __init__(
        self, backbone: Backbone, tail: Tail, augmentation: Callable[[Any], tuple[Tensor, ...]] | None = None
    ) -> None:
        super().__init__()
        self.stage = backbone.out_features[-1]
        self.tail = tail
        self.augmentation = augmentation or two_views()

    def views(self) -> Callable[[Any], tuple[Tensor, ...]]:
        """The transform from a PIL image to the views `losses` takes, each `(3, S, S)`."""
        return self.augmentation

    def embed(self, backbone: Backbone, images: Tensor) -> Tensor:
        """Images `(B, 3, S, S)` -> embeddings `(B, tail.num_features)`, as the whole backbone computes them."""
        return self.tail(backbone(images)[self.stage])

    @abstractmethod
    def losses(self, backbone: Backbone, views: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """Scalar losses by name, means over the batch, to be added up; no side effects but batch-norm statistics."""

    def after_step(self, backbone: Backbone) -> None:
        """Update what is not trained (teachers, queues); called once per optimizer step, never within a solve."""
