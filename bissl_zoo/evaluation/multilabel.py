"""Average precision of multi-label classification over a whole data set and all ranks."""

from collections.abc import Sequence
from statistics import fmean

import torch
from torch import Tensor

from bissl_zoo.distributed import all_gather_objects
from bissl_zoo.errors import BisslZooError, DatasetError
from bissl_zoo.evaluation.detection import average_precision


class MultilabelEvaluator:
    """Mean average precision over classes as a fraction in [0, 1].

    `mAP11` is the mean of the best precision at the 11 recalls 0, 0.1, ... 1 (VOC 2007, Everingham et al., IJCV 2010);
    images with equal scores are ranked in the order of the test set, as in the devkit. `mAP` is the area under the
    step function of precision over recall, with equal scores as one threshold (as in scikit-learn and torchmetrics).
    An ignored label removes its image from the ranking of that class. Classes without positives are left out.

    Args:
        classes: names of the K classes.
    """

    def __init__(self, classes: Sequence[str]) -> None:
        self.classes = list(classes)
        self.reset()

    def reset(self) -> None:
        """Discard all processed samples."""
        empty = torch.zeros(0, len(self.classes))
        self._scores, self._targets = [empty.double()], [empty.to(torch.int8)]

    def process(self, predictions: Tensor, targets: Tensor) -> None:
        """Add one batch.

        Args:
            predictions: scores `(B, K)`, such as logits; only their order matters.
            targets: `(B, K)`, 1 positive, 0 negative, -1 ignored.
        Raises:
            BisslZooError: shapes or targets are invalid, or a score is not finite.
        """
        scores, targets = predictions.detach().cpu().double(), targets.detach().cpu()
        classes = len(self.classes)
        if scores.ndim != 2 or scores.shape[1] != classes or targets.shape != scores.shape:
            raise BisslZooError(
                f"Multi-label evaluation of {classes} classes: predictions have shape {tuple(scores.shape)} and "
                f"targets {tuple(targets.shape)}; expected (B, {classes}) for both."
            )
        if not torch.isfinite(scores).all():
            raise BisslZooError("Multi-label evaluation: a score is NaN or infinite; the model has diverged.")
        if not are_multilabel(targets):
            raise BisslZooError(
                f"Multi-label evaluation: targets are {targets.unique().tolist()[:5]}; expected 1 for a class that is "
                "present, 0 for one that is absent, and -1 for one to ignore."
            )
        self._scores.append(scores)
        self._targets.append(targets.to(torch.int8))

    def synchronize(self) -> None:
        """Gather the samples of all ranks; call it once, on every rank, before `evaluate`.

        Rank r of W must have processed samples r, r + W, ... of the test set; equal scores are ranked in its order.
        """
        parts = all_gather_objects((torch.cat(self._scores), torch.cat(self._targets)))
        places = [rank + len(parts) * torch.arange(len(scores)) for rank, (scores, _) in enumerate(parts)]
        order = torch.cat(places).argsort()
        self._scores, self._targets = ([torch.cat(column)[order]] for column in zip(*parts, strict=True))

    def per_class(self) -> dict[str, dict[str, float]]:
        """Return `AP11` and `AP` of each class with positives."""
        from sklearn.metrics import average_precision_score  # its import takes most of a second

        metrics = {}
        for name, (scores, positive) in self._columns().items():
            ranking = positive[scores.argsort(descending=True, stable=True)].numpy()
            eleven = average_precision(ranking, int(positive.sum()), eleven_point=True)
            metrics[name] = {"AP11": eleven, "AP": float(average_precision_score(positive.numpy(), scores.numpy()))}
        return metrics

    def _columns(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Return scores and positives of the labelled images, for each class with positives."""
        columns = {}
        for name, scores, targets in zip(
            self.classes, torch.cat(self._scores).T, torch.cat(self._targets).T, strict=True
        ):
            labelled = targets >= 0
            if (targets == 1).any():
                columns[name] = scores[labelled], targets[labelled] == 1
        return columns

    def evaluate(self) -> dict[str, float]:
        """Return the metrics of all samples since `reset`.

        Raises:
            DatasetError: there are no samples, or no class has a positive.
        """
        samples = sum(map(len, self._scores))
        if not samples:
            raise DatasetError("Multi-label evaluation: no sample was processed. Is the test set empty?")
        per_class = self.per_class()
        if not per_class:
            raise DatasetError(
                f"Multi-label evaluation: none of the {samples} samples has a class; average precision is not defined."
            )
        return {f"m{name}": fmean(metrics[name] for metrics in per_class.values()) for name in ("AP11", "AP")}


def are_multilabel(targets: Tensor) -> bool:
    """Return True if all targets are 1, 0 or -1."""
    return bool(((targets == 1) | (targets == 0) | (targets == -1)).all())
