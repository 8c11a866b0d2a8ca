"""Multi-label image classification: any number of the classes may be in an image."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from bissl_zoo.backbones import Backbone
from bissl_zoo.data.views import IMAGENET_MEAN, IMAGENET_STD
from bissl_zoo.downstream.classification import PooledLinear
from bissl_zoo.downstream.task import Batch
from bissl_zoo.errors import ConfigError, DatasetError, did_you_mean
from bissl_zoo.evaluation.multilabel import MultilabelEvaluator, are_multilabel
from bissl_zoo.registry import DOWNSTREAM_TASKS


def binary_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Binary cross entropy, the mean over the labels that are not ignored; 0 where all are.

    Args:
        logits: `(B, K)`; targets: `(B, K)`, 1 positive, 0 negative, -1 ignored.
    """
    counts = targets >= 0
    losses = functional.binary_cross_entropy_with_logits(logits, targets.clamp(min=0), reduction="none")
    return torch.where(counts, losses, 0).sum() / counts.sum().clamp(min=1)


def softmax_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy of one softmax over the classes, summed over an image's positives, the mean over images.

    This is how the authors of BiSSL (arXiv 2410.02387) train VOC2007 classification. Shapes as of
    :func:`binary_cross_entropy`; an ignored label is no positive.
    """
    return functional.cross_entropy(logits, targets.clamp(min=0))


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"bce": binary_cross_entropy, "softmax": softmax_cross_entropy}


@DOWNSTREAM_TASKS.register("multilabel_classification")
class MultilabelClassification(PooledLinear):
    """Which of the classes are in an image; targets are float32 `(K,)`, 1 positive, 0 negative, -1 ignored.

    Args:
        loss: `bce`, or `softmax` as the authors of BiSSL have it; the others are those of :class:`PooledLinear`.
    Raises:
        ConfigError: `loss` is something else.
    """

    target_type = Tensor

    def __init__(
        self,
        backbone: Backbone,
        classes: Sequence[str],
        loss: str = "bce",
        image_size: int = 96,
        crop_scale: tuple[float, float] = (0.08, 1.0),
        resize: int | None = None,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
    ) -> None:
        if loss not in LOSSES:
            hint = did_you_mean(str(loss), LOSSES)
            raise ConfigError(f"task.loss is '{loss}'; accepted are {' and '.join(LOSSES)}.{hint}")
        super().__init__(backbone, classes, image_size, crop_scale, resize, mean, std)
        self.loss = loss

    def collate(self, samples: list[Batch]) -> Batch:
        """Images `(B, 3, S, S)` and targets `(B, K)`, both float32.

        Raises:
            DatasetError: a target that is not K numbers of 1, 0 and -1.
        """
        images, targets = zip(*samples, strict=True)
        for target in targets:
            if target.shape != (len(self.classes),) or not are_multilabel(target):
                raise DatasetError(
                    f"A multi-label target has the shape {tuple(target.shape)} and the values "
                    f"{target.unique().tolist()[:5]}; expected are {len(self.classes)} numbers, one per class: 1 for a "
                    "class that is there, 0 for one that is not, -1 for one to be ignored."
                )
        return torch.stack(images), torch.stack(targets).float()

    def losses(self, backbone: Backbone, batch: Batch) -> dict[str, Tensor]:
        """`{"bce": scalar}` or `{"softmax": scalar}`."""
        images, targets = batch
        return {self.loss: LOSSES[self.loss](self._logits(backbone, images), targets)}

    def evaluator(self) -> MultilabelEvaluator:
        """Mean average precision over the classes, in the form of VOC 2007 and as an area, as fractions."""
        return MultilabelEvaluator(self.classes)
