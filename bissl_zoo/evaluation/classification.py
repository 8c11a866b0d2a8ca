"""Top-k accuracy over a whole data set and all ranks."""

from collections.abc import Sequence

import torch
from torch import Tensor

from bissl_zoo.distributed import all_gather_objects
from bissl_zoo.errors import BisslZooError, DatasetError


class TopKEvaluator:
    """Accuracies in [0, 1]: `top1`, `top5` with 5 or more classes, `mean_per_class` (mean of the top-1 per class).

    Equal scores are ranked in the order of the classes, so constant logits do not count as correct. Classes without
    samples are left out of the mean. Each sample must be processed once, on one rank; duplicates are not detected.

    Args:
        classes: names of the K classes.
    """

    def __init__(self, classes: Sequence[str]):
        self.classes = list(classes)
        self.topk = (1, 5) if len(self.classes) >= 5 else (1,)
        self.reset()

    def reset(self) -> None:
        """Discard all processed samples."""
        # [c, p]: number of samples of class c whose class has place p in the scores; the last column is "later"
        self._places = torch.zeros(len(self.classes), self.topk[-1] + 1, dtype=torch.int64)
        # K * label + prediction per sample; the K x K confusion matrix is only built on request
        self._pairs = [torch.zeros(0, dtype=torch.int64)]

    def process(self, predictions: Tensor, targets: Tensor) -> None:
        """Add one batch.

        Args:
            predictions: logits or probabilities `(B, K)`.
            targets: class indices `(B,)`, int64.
        Raises:
            BisslZooError: shapes or class indices do not match, or a score is not finite.
        """
        scores, labels = predictions.detach().float().cpu(), targets.detach().cpu()
        classes = len(self.classes)
        if scores.shape != (len(labels), classes) or labels.ndim != 1:
            raise BisslZooError(
                f"Top-k evaluation of {classes} classes: predictions have shape {tuple(scores.shape)} and targets "
                f"{tuple(labels.shape)}; expected (B, {classes}) and (B,)."
            )
        if len(labels) == 0:
            return
        if not torch.isfinite(scores).all():
            raise BisslZooError("Top-k evaluation: a score is NaN or infinite; the model has diverged.")
        if labels.min() < 0 or labels.max() >= classes:
            raise BisslZooError(
                f"Top-k evaluation: targets range from {int(labels.min())} to {int(labels.max())}, "
                f"but there are {classes} classes."
            )
        true = scores.gather(1, labels[:, None])
        earlier = torch.arange(classes) < labels[:, None]
        place = ((scores > true) | ((scores == true) & earlier)).sum(dim=1)
        place = place.clamp(max=self._places.shape[1] - 1)
        self._places.index_put_((labels, place), torch.ones_like(labels), accumulate=True)
        self._pairs.append(classes * labels + scores.argmax(dim=1))  # the first of equal scores, as above

    def synchronize(self) -> None:
        """Gather the samples of all ranks; call it once, on every rank, before `evaluate`."""
        places, pairs = zip(*all_gather_objects((self._places, torch.cat(self._pairs))), strict=True)
        self._places, self._pairs = torch.stack(places).sum(dim=0), list(pairs)

    def evaluate(self) -> dict[str, float]:
        """Return the metrics of all samples since `reset`.

        Raises:
            DatasetError: there are no samples.
        """
        samples = self._places.sum(dim=1)
        total = int(samples.sum())
        if total == 0:
            raise DatasetError("Top-k evaluation: no sample was processed. Is the test set empty?")
        metrics = {f"top{k}": int(self._places[:, :k].sum()) / total for k in self.topk}
        present = samples > 0
        metrics["mean_per_class"] = (self._places[present, 0].double() / samples[present]).mean().item()
        return metrics

    def per_class(self) -> dict[str, dict[str, float]]:
        """Return the accuracies of each class with samples: `{"cat": {"top1": 0.5}}`."""
        samples = self._places.sum(dim=1).tolist()
        reached = self._places.cumsum(dim=1).tolist()
        return {
            name: {f"top{k}": right[k - 1] / total for k in self.topk}
            for name, right, total in zip(self.classes, reached, samples, strict=True)
            if total
        }

    def confusion(self) -> Tensor:
        """Return the confusion matrix: entry (i, j) counts samples of class i predicted as j, int64 `(K, K)`."""
        classes = len(self.classes)
        return torch.cat(self._pairs).bincount(minlength=classes**2).view(classes, classes)
