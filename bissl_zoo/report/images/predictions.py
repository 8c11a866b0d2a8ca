"""What a fine-tuned model makes of images, beside what is true of them."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from bissl_zoo.backbones import Backbone, evaluating
from bissl_zoo.data.batches import to_device
from bissl_zoo.data.samples import TransformedDataset
from bissl_zoo.downstream import DownstreamTask
from bissl_zoo.evaluation import voc_average_precision
from bissl_zoo.report.images.data import Sample, draw_truth, label_text, require_samples
from bissl_zoo.report.images.sheet import Sheet, cell_height, class_legend, dashed_line, draw_boxes

#: inches of an image
_SIDE = 1.9
#: of the words below an image, where the model is right or wrong; both dark, and the words say it too
RIGHT, WRONG = "#00674B", "#B34A00"
#: classes that are told of an image with several, the most probable first
_TOLD = 3


class Prediction(NamedTuple):
    """What a model says of a sample: `boxes`, `scores` and `labels`, or probabilities `(K,)` of the classes.

    `quality` is 1 where it is right and falls as it is worse: of boxes the average precision of this image alone at an
    IoU of 0.5, of one class its probability, of several classes by how much the least probable one that is there is
    above the most probable one that is not.
    """

    index: int
    found: Any
    quality: float


def predict(
    backbone: Backbone,
    task: DownstreamTask,
    dataset: Dataset,
    indices: Sequence[int],
    device: torch.device,
    batch_size: int,
    num_workers: int = 0,
) -> list[Prediction]:
    """What the task's model says of the samples with these numbers.

    Raises:
        DatasetError: naming an image that cannot be read.
    """
    samples = TransformedDataset(Subset(dataset, indices), task.transform(train=False))
    options = {"collate_fn": task.collate, "num_workers": num_workers, "generator": torch.Generator()}
    predictions = []
    with torch.no_grad(), evaluating(backbone, task):
        for images, targets in DataLoader(samples, batch_size, **options):
            output = to_device(task.predict(backbone, to_device(images, device)), torch.device("cpu"))
            for found, target in zip(output, targets, strict=True):
                found = found if isinstance(found, dict) else task.probabilities(found)
                quality = quality_of(found, target, len(task.classes))
                predictions.append(Prediction(indices[len(predictions)], found, quality))
    return predictions


def quality_of(found: Any, target: Any, num_classes: int) -> float:
    """How good a prediction is, see :class:`Prediction`.

    Of an image without objects that count it is 1 less the highest score.
    """
    if isinstance(found, dict):
        precision = voc_average_precision([found], [target], num_classes)
        if np.isnan(precision).all():
            return 1.0 - max(found["scores"].tolist(), default=0.0)
        return float(np.nanmean(precision))
    if isinstance(target, Tensor) and target.ndim:
        there, absent = found[target == 1], found[target == 0]
        least = there.min().item() if len(there) else 1.0
        return least - (absent.max().item() if len(absent) else 0.0)
    return found[int(target)].item()


def draw_predictions(
    samples: Sequence[Sample],
    predictions: Sequence[Prediction],
    classes: Sequence[str],
    title: str,
    threshold: float = 0.5,
) -> Figure:
    """Samples with what is true of them and what was predicted.

    Of boxes there are two images side by side, the true ones and those predicted with a score of `threshold` or more;
    of classes the words below the image.

    Args:
        predictions: of the samples, in their order.
    Raises:
        DatasetError: there are no samples.
    """
    require_samples(samples)
    if isinstance(samples[0].target, dict):
        return _draw_boxes(samples, predictions, classes, title, threshold)
    return _draw_classes(samples, predictions, classes, title)


def _draw_boxes(
    samples: Sequence[Sample], predictions: Sequence[Prediction], classes: Sequence[str], title: str, threshold: float
) -> Figure:
    kept = [_above(prediction.found, threshold) for prediction in predictions]
    legend = class_legend(
        [int(label) for found in [*kept, *(sample.target for sample in samples)] for label in found["labels"]], classes
    )
    told = bool(legend)
    if any(sample.target["difficult"].any() for sample in samples):
        legend.append(dashed_line("difficult"))
    pairs = min(2, len(samples))
    height = cell_height((sample.image for sample in samples), _SIDE)
    sheet = Sheet([_SIDE] * 2 * pairs, height, math.ceil(len(samples) / pairs), 2, title, heads=1, legend=legend)
    for pair in range(pairs):
        sheet.head(2 * pair, ["ground truth"])
        sheet.head(2 * pair + 1, [f"predicted, score {threshold:g} or more"])
    for place, (sample, prediction, found) in enumerate(zip(samples, predictions, kept, strict=True)):
        row, pair = divmod(place, pairs)
        left = sheet.image(row, 2 * pair, sample.image, [label_text(sample.target, classes), sample.name])
        draw_truth(left, sample.target, classes, told)
        caption = [label_text(found, classes), f"AP50 of this image {prediction.quality:.2f}"]
        right = sheet.image(row, 2 * pair + 1, sample.image, caption)
        labels, scores = found["labels"].tolist(), found["scores"].tolist()
        texts = [f"{classes[label]} {score:.2f}" for label, score in zip(labels, scores, strict=True)]
        draw_boxes(right, found["boxes"], labels, texts, legend=told)
    return sheet.figure


def _above(found: dict[str, Tensor], threshold: float) -> dict[str, Tensor]:
    """The boxes of this score or more, the best first."""
    order = found["scores"].argsort(descending=True)
    order = order[found["scores"][order] >= threshold]
    return {key: found[key][order] for key in ("boxes", "scores", "labels")}


def _draw_classes(
    samples: Sequence[Sample], predictions: Sequence[Prediction], classes: Sequence[str], title: str
) -> Figure:
    columns = min(4, len(samples))
    several = isinstance(samples[0].target, Tensor)
    lines = 2 + (_TOLD if several else 1)
    height = cell_height((sample.image for sample in samples), _SIDE)
    sheet = Sheet([_SIDE] * columns, height, math.ceil(len(samples) / columns), lines, title)
    for place, (sample, prediction) in enumerate(zip(samples, predictions, strict=True)):
        told = _several(prediction, sample.target, classes) if several else _one(prediction, sample.target, classes)
        caption = [f"true: {label_text(sample.target, classes)}", *(words for words, _ in told), sample.name]
        colours = ["black", *(RIGHT if right else WRONG for _, right in told), "0.4"]
        sheet.image(*divmod(place, columns), sample.image, caption, colours=colours)
    return sheet.figure


def _one(prediction: Prediction, target: int, classes: Sequence[str]) -> list[tuple[str, bool]]:
    best = int(prediction.found.argmax())
    right = best == target
    aside = "" if right else f" (true class {prediction.found[target]:.2f})"
    return [(f"{_mark(right)} {classes[best]} {prediction.found[best]:.2f}{aside}", right)]


def _several(prediction: Prediction, target: Tensor, classes: Sequence[str]) -> list[tuple[str, bool]]:
    best = prediction.found.argsort(descending=True)[:_TOLD].tolist()
    return [
        (f"{_mark(target[label] == 1)} {classes[label]} {prediction.found[label]:.2f}", bool(target[label] == 1))
        for label in best
    ]


def _mark(right: Any) -> str:
    return "\u2713" if right else "\u2717"
