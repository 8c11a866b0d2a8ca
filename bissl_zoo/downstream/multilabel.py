"""Multi-label image classification: an image shows any number of the classes."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from bissl_zoo.backbones import Backbone
from bissl_zoo.data.views import IMAGENET_MEAN, IMAGENET_STD
from bissl_zoo.downstream.classification import PooledLinear
from bissl_zoo.downstream.task import Batch, Box
from bissl_zoo.errors import ConfigError, DatasetError, did_you_mean
from bissl_zoo.evaluation.multilabel import MultilabelEvaluator, are_multilabel
from bissl_zoo.registry import DOWNSTREAM_TASKS


def binary_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the binary cross entropy, a mean over the labels that are not ignored; 0 if all are ignored.

    Args:
        logits: `(B, K)`; targets: `(B, K)`, 1 positive, 0 negative, -1 ignored.
    """
    counts = targets >= 0
    losses = functional.binary_cross_entropy_with_logits(logits, targets.clamp(min=0), reduction="none")
    return torch.where(counts, losses, 0).sum() / counts.sum().clamp(min=1)


def softmax_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the cross entropy of one softmax over the classes, summed over positives, a mean over images.

    The loss of BiSSL (arXiv 2410.02387) for VOC2007 classification. Shapes as in :func:`binary_cross_entropy`; ignored
    labels count as negative.
    """
    return functional.cross_entropy(logits, targets.clamp(min=0))


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"bce": binary_cross_entropy, "softmax": softmax_cross_entropy}


@DOWNSTREAM_TASKS.register("multilabel_classification")
class MultilabelClassification(PooledLinear):
    """Predict which classes an image shows; targets are float32 `(K,)`, 1 positive, 0 negative, -1 ignored.

    Args:
        loss: "bce", or "softmax" as in BiSSL; the other arguments are those of :class:`PooledLinear`.
    Raises:
        ConfigError: unknown `loss`.
    """

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
        aspect_ratio: tuple[float, float] = (3 / 4, 4 / 3),
        interpolation: str = "bicubic",
    ) -> None:
        if loss not in LOSSES:
            hint = did_you_mean(str(loss), LOSSES)
            raise ConfigError(f"task.loss is '{loss}'; accepted are {' and '.join(LOSSES)}.{hint}")
        super().__init__(backbone, classes, image_size, crop_scale, resize, mean, std, aspect_ratio, interpolation)
        self.loss = loss

    def collate(self, samples: list[Batch]) -> Batch:
        """Return images `(B, 3, S, S)` and targets `(B, K)`, both float32.

        Raises:
            DatasetError: a target is not a tensor of K values 1, 0 or -1.
        """
        images, targets = zip(*samples, strict=True)
        for target in targets:
            if not isinstance(target, Tensor):
                raise DatasetError(
                    f"Multi-label classification needs a Tensor (K,) per image, not {type(target).__name__}."
                )
            if target.shape != (len(self.classes),) or not are_multilabel(target):
                raise DatasetError(
                    f"A multi-label target has shape {tuple(target.shape)} and values {target.unique().tolist()[:5]}; "
                    f"expected {len(self.classes)} numbers, one per class: 1 present, 0 absent, -1 ignored."
                )
        return torch.stack(images), torch.stack(targets).float()

    def losses(self, backbone: Backbone, batch: Batch) -> dict[str, Tensor]:
        """Return `{"bce": scalar}` or `{"softmax": scalar}`."""
        images, targets = batch
        return {self.loss: LOSSES[self.loss](self._logits(backbone, images), targets)}

    def evaluator(self) -> MultilabelEvaluator:
        """Return an evaluator of mean average precision over classes (11-point and area form), as fractions."""
        return MultilabelEvaluator(self.classes)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return independent probabilities `(K,)` for "bce", one distribution over the classes for "softmax"."""
        return super().probabilities(logits) if self.loss == "softmax" else logits.float().sigmoid()

    def blank_target(self, size: tuple[int, int]) -> Tensor:
        """Return "ignored" for all classes."""
        return torch.full((len(self.classes),), -1.0)

    def describe(self, prediction: Tensor, threshold: float = 0.5) -> dict[str, Any]:
        """Return the classes with at least this probability as `labels` and `scores`, and all `probabilities`."""
        probabilities = super().describe(prediction)["probabilities"]
        order = sorted(probabilities, key=probabilities.get, reverse=True)
        labels = [name for name in order if probabilities[name] >= threshold]
        scores = [probabilities[name] for name in labels]
        return {"labels": labels, "scores": scores, "probabilities": probabilities}

    def pseudo_target(self, prediction: Tensor, threshold: float) -> Tensor | None:
        """Return 1 from the threshold on, 0 below one minus it, -1 (ignored) between; None without a class."""
        values = self.probabilities(prediction)
        target = torch.full_like(values, -1.0).masked_fill(values < 1 - threshold, 0.0)
        target = target.masked_fill(values >= threshold, 1.0)
        return target if (target == 1).any() else None

    def example_batch(self, n: int, size: tuple[int, int]) -> Batch:
        """Return `n` images of noise, each with one positive class."""
        positives = torch.eye(len(self.classes))
        return self.random_batch(n, size, lambda index: positives[index % len(self.classes)])

    def score(self, prediction: Tensor, target: Tensor) -> float:
        """Return the margin from the most probable absent class to the least probable present one, in [-1, 1]."""
        probabilities = self.probabilities(prediction)
        present, absent = probabilities[target == 1], probabilities[target == 0]
        lowest = present.min().item() if len(present) else 1.0
        return lowest - (absent.max().item() if len(absent) else 0.0)

    def objects(self, target: Tensor) -> list[tuple[Box | None, int | None]]:
        """Return the whole image, with its class if exactly one class is positive."""
        labels = self._positives(target)
        return [(None, labels[0] if len(labels) == 1 else None)]

    def _target_text(self, target: Tensor) -> str:
        return ", ".join(self.classes[label] for label in self._positives(target)) or "none of the classes"

    @staticmethod
    def _positives(target: Tensor) -> list[int]:
        return target.eq(1).nonzero().flatten().tolist()
