"""Average precision of multi-label classification over a whole set, across ranks."""

from collections.abc import Sequence
from statistics import fmean

import numpy as np
import torch
from torch import Tensor

from bissl_zoo.distributed import all_gather_objects
from bissl_zoo.errors import BisslZooError, DatasetError
from bissl_zoo.evaluation.detection import average_precision
from bissl_zoo.evaluation.ranking import order_of_set, ranking


class MultilabelEvaluator:
    """Mean over the classes of the average precision of ranking all images for a class, as fractions in [0, 1].

    `mAP11`: mean of the best precision at the 11 recalls 0, 0.1, ... 1 (VOC 2007, Everingham et al., IJCV 2010); images
    of equal score rank in the order of the test set, as in the devkit. `mAP`: the area under the steps of precision
    over recall, with equal scores as one threshold (scikit-learn's definition, and torchmetrics'). An ignored label
    takes its image out of the ranking of that class. A class without positives is left out of the mean.

    Args:
        classes: the K class names.
    """

    def __init__(self, classes: Sequence[str]) -> None:
        self.classes = list(classes)
        self.reset()

    def reset(self) -> None:
        """Forget what was processed."""
        nothing = torch.zeros(0, len(self.classes))
        self._scores, self._targets = [nothing.double()], [nothing.to(torch.int8)]

    def process(self, predictions: Tensor, targets: Tensor) -> None:
        """Take in one batch.

        Args:
            predictions: scores (B, K), such as logits; only their order matters.
            targets: (B, K), 1 positive, 0 negative, -1 ignored.

        Raises:
            BisslZooError: shapes or targets that do not fit, or a score that is not finite.
        """
        scores, targets = predictions.detach().cpu().double(), targets.detach().cpu()
        classes = len(self.classes)
        if scores.ndim != 2 or scores.shape[1] != classes or targets.shape != scores.shape:
            raise BisslZooError(
                f"Multi-label evaluation of {classes} classes: predictions have shape {tuple(scores.shape)} and "
                f"targets {tuple(targets.shape)}; expected are (B, {classes}) for both."
            )
        if not torch.isfinite(scores).all():
            raise BisslZooError("Multi-label evaluation: a score is NaN or infinite; the model has diverged.")
        if not are_multilabel(targets):
            raise BisslZooError(
                f"Multi-label evaluation: targets are {targets.unique().tolist()[:5]}; expected are 1 for a class that "
                "is there, 0 for one that is not, and -1 for one to be ignored."
            )
        self._scores.append(scores)
        self._targets.append(targets.to(torch.int8))

    def synchronize(self) -> None:
        """Bring together the samples of all ranks; call it once, on every rank, before `evaluate`.

        Rank r of W has read the samples r, r + W, ... of the test set; equal scores rank in the order of that set.
        """
        parts = all_gather_objects((torch.cat(self._scores), torch.cat(self._targets)))
        order = order_of_set([len(scores) for scores, _ in parts])
        self._scores, self._targets = ([torch.cat(column)[order]] for column in zip(*parts, strict=True))

    def per_class(self) -> dict[str, dict[str, float]]:
        """`AP11` and `AP` by class, of those with positives, of what was processed since `reset`."""
        from sklearn.metrics import average_precision_score  # most of a second to import

        figures = {}
        for name, (scores, right) in self._columns().items():
            eleven = average_precision(*ranking(scores, right), eleven_point=True)
            figures[name] = {"AP11": eleven, "AP": float(average_precision_score(right.numpy(), scores.numpy()))}
        return figures

    def rankings(self) -> dict[str, tuple[np.ndarray, int]]:
        """By class, of those with positives: its images as ranked, bool (M,), and the number of its positives.

        Whether each image that counts has the class, the best score first, as
        :func:`bissl_zoo.evaluation.detection.average_precision` takes it.
        """
        return {name: ranking(*column) for name, column in self._columns().items()}

    def _columns(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Scores and whether they are of positives, by class, of what counts, where there are positives."""
        columns = {}
        for name, scores, targets in zip(
            self.classes, torch.cat(self._scores).T, torch.cat(self._targets).T, strict=True
        ):
            counts = targets >= 0
            if (targets == 1).any():
                columns[name] = scores[counts], targets[counts] == 1
        return columns

    def evaluate(self) -> dict[str, float]:
        """The metrics of what was processed since `reset`.

        Raises:
            DatasetError: nothing was, or no class has a positive.
        """
        samples = sum(map(len, self._scores))
        if not samples:
            raise DatasetError("Multi-label evaluation: no sample was processed. Is the test set empty?")
        figures = self.per_class()
        if not figures:
            raise DatasetError(
                f"Multi-label evaluation: none of the {samples} samples has a class; average precision is not defined."
            )
        return {f"m{name}": fmean(one[name] for one in figures.values()) for name in ("AP11", "AP")}


def are_multilabel(targets: Tensor) -> bool:
    """Whether all targets are 1, 0 or -1."""
    return bool(((targets == 1) | (targets == 0) | (targets == -1)).all())
