"""The interface of pretext methods: a head and a loss; the backbone is an argument."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor, nn

from bissl_zoo.backbones import Backbone, Tail, tail_input
from bissl_zoo.data.views import two_views


class PretextMethod(nn.Module, ABC):
    """Base class of pretext methods, the lower level of BiSSL (arXiv 2410.02387, section 3).

    A method contains its head and the tail of the split backbone, which maps the shared feature map to an embedding.
    The shared trunk is an argument of each call. Subclass it, register it and name it in a config:

        @PRETEXT_METHODS.register("mine")
        class Mine(PretextMethod):
            def losses(self, backbone, views): ...

    Two more methods give it Gauss-Newton curvature, which is positive semidefinite; without them the Hessian is used:

        outputs(backbone, views) -> tuple of tensors     what the loss is a convex function of, such as logits
        outer(outputs) -> dict of scalars                this function: `losses` is `outer(outputs(backbone, views))`

    Args:
        backbone: the trunk that the method will be called with; used for shapes and copies, never stored.
        tail: maps the output of the trunk (`tail_input`) to embeddings `(B, tail.num_features)`.
        augmentation: maps a PIL image to a tuple of views; by default the two views of the BiSSL paper at 96 pixels.
    """

    #: True if the loss is a mean of independent terms per image and no state depends on the batch, so that gradients
    #: can be accumulated over parts of a batch; batch norm then uses the statistics of each part
    supports_grad_accumulation: ClassVar[bool] = False

    def __init__(
        self, backbone: Backbone, tail: Tail, augmentation: Callable[[Any], tuple[Tensor, ...]] | None = None
    ) -> None:
        super().__init__()
        self.stage = backbone.out_features[-1]
        self.tail = tail
        self.augmentation = augmentation or two_views()

    def views(self) -> Callable[[Any], tuple[Tensor, ...]]:
        """Return the transform from a PIL image to the views that `losses` takes, each `(3, S, S)`."""
        return self.augmentation

    def embed(self, backbone: Backbone, images: Tensor) -> Tensor:
        """Map images `(B, 3, S, S)` to embeddings `(B, tail.num_features)`, equal to those of the unsplit backbone."""
        return self.tail(tail_input(backbone(images), self.stage))

    @abstractmethod
    def losses(self, backbone: Backbone, views: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """Return named scalar losses whose sum is minimized, means over the batch.

        Hessian-vector products call it repeatedly: it may only change batch-norm statistics, and must not draw random
        numbers outside of the networks.
        """

    def after_step(self, backbone: Backbone) -> None:
        """Update state that is not trained, such as teachers and queues; called once per optimizer step."""
