"""Samples of a data set with their labels, and the views that a pretext method makes of them."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.utils.data import Dataset

from bissl_zoo.data.samples import temporary_seed
from bissl_zoo.errors import ConfigError, DatasetError
from bissl_zoo.report.images.drawing import DPI, unnormalized
from bissl_zoo.report.images.sheet import Sheet, cell_height, class_legend, dashed_line, draw_boxes

#: inches of an image among samples, of the largest view, and of the narrowest column of views
_SAMPLE, _VIEW, _COLUMN = 1.9, 1.3, 0.62
#: what hides a masked part of a view
_HIDDEN = 0.55


class Sample(NamedTuple):
    """An image of a data set, its target and its name; `index` is its place in the set."""

    index: int
    image: Any
    target: Any
    name: str


def samples_of(dataset: Dataset, indices: Sequence[int]) -> list[Sample]:
    """The samples with these numbers, named by their files where the set knows them.

    Raises:
        DatasetError: naming an image that cannot be read.
    """
    source = getattr(dataset, "source", None)
    names = [Path(source(index)).name if source else f"image {index}" for index in indices]
    return [Sample(index, *dataset[index], name) for index, name in zip(indices, names, strict=True)]


def draw_samples(samples: Sequence[Sample], classes: Sequence[str] | None, title: str, columns: int = 4) -> Figure:
    """A grid of images with boxes and class names, or labels, or nothing where there are none.

    Difficult objects are dashed.

    Raises:
        DatasetError: there are no samples.
    """
    require_samples(samples)
    boxed = [sample.target for sample in samples if isinstance(sample.target, dict)]
    legend = class_legend([int(label) for target in boxed for label in target["labels"]], classes or ())
    told = bool(legend)
    if any(target["difficult"].any() for target in boxed):
        legend.append(dashed_line("difficult"))
    columns = min(columns, len(samples))
    height = cell_height((sample.image for sample in samples), _SAMPLE)
    sheet = Sheet([_SAMPLE] * columns, height, math.ceil(len(samples) / columns), 2, title, legend=legend)
    for place, sample in enumerate(samples):
        caption = [label_text(sample.target, classes), sample.name]
        axes = sheet.image(*divmod(place, columns), sample.image, caption if caption[0] else caption[1:])
        if isinstance(sample.target, dict):
            draw_truth(axes, sample.target, classes, told)
    return sheet.figure


def require_samples(samples: Sequence[Sample]) -> None:
    """Raise DatasetError where there is nothing to draw."""
    if not samples:
        raise DatasetError("There are no images to draw.")


def draw_truth(axes: Any, target: dict[str, Any], classes: Sequence[str], told: bool) -> None:
    """The boxes of a detection target on its image; `told`: a legend has the classes."""
    labels = target["labels"].tolist()
    texts = [classes[label] for label in labels]
    draw_boxes(axes, target["boxes"], labels, texts, target["difficult"].tolist(), told)


def label_text(target: Any, classes: Sequence[str] | None) -> str:
    """A target in words: the class, the classes that are there, or how many objects; empty where there is none."""
    if target is None or classes is None:
        return ""
    if isinstance(target, dict):
        count = len(target["labels"])
        return "1 object" if count == 1 else f"{count} objects"
    if isinstance(target, Tensor):
        return ", ".join(classes[label] for label in target.eq(1).nonzero().flatten().tolist()) or "none of the classes"
    return classes[target]


def draw_views(
    samples: Sequence[Sample],
    views: Callable[[Any], tuple[Tensor, ...]],
    mean: Sequence[float],
    std: Sequence[float],
    title: str,
    seed: int = 0,
) -> Figure:
    """A row per image: the image, then its views in their colours and at one scale; hidden parts of a view are grey.

    Args:
        views: image -> views `(3, S, S)` that were normalised by `mean` and `std`, and masks `(C, C)` of bool, each of
            the view before it.
        seed: what is drawn for an image depends on it and the image's number alone; random states are put back.
    Raises:
        ConfigError: the views are of other shapes.
        DatasetError: there are no samples.
    """
    require_samples(samples)
    rows = []
    for sample in samples:
        with temporary_seed(seed, sample.index):
            rows.append(_panels(views(sample.image), mean, std))
    sides = [max(panel.shape[0] for _, panel in column) for column in zip(*rows, strict=True)]
    largest = max(sides)
    dots = max(1, round(_VIEW * DPI / largest)) / DPI  # whole dots for each pixel of a view
    widths = [_VIEW, *(max(side * dots, _COLUMN) for side in sides)]
    sheet = Sheet(widths, largest * dots, len(samples), 1, title, heads=2)
    sheet.head(0, ["original"])
    for column, ((name, _), side) in enumerate(zip(rows[0], sides, strict=True), start=1):
        sheet.head(column, [name, f"{side} px"])
    for row, (sample, panels) in enumerate(zip(samples, rows, strict=True)):
        sheet.image(row, 0, sample.image, [sample.name])
        for column, (_, panel) in enumerate(panels, start=1):
            sheet.image(row, column, panel, height=panel.shape[0] * dots)
    return sheet.figure


def _panels(views: Sequence[Tensor], mean: Sequence[float], std: Sequence[float]) -> list[tuple[str, np.ndarray]]:
    """Names and colours `(H, W, 3)` of the views, each mask as what it leaves to be seen."""
    panels: list[tuple[str, np.ndarray]] = []
    count = 0
    for part in views:
        if part.dtype == torch.bool and part.ndim == 2 and panels:
            seen = panels[-1][1].copy()
            seen[_enlarged(part, seen.shape[:2])] = _HIDDEN
            panels.append(("what is seen", seen))
        elif part.is_floating_point() and part.ndim == 3 and part.shape[0] == 3:
            count += 1
            panels.append((f"view {count}", unnormalized(part, mean, std)))
        else:
            raise ConfigError(
                f"pretext.augmentation gives {part.dtype} of shape {tuple(part.shape)} as a view; drawn are views "
                "(3, S, S) of float, and masks (C, C) of bool after the view that they belong to."
            )
    return panels


def _enlarged(mask: Tensor, shape: tuple[int, ...]) -> np.ndarray:
    """A mask `(C, C)` as large as its view; what does not divide evenly is cut where it ends."""
    places = [torch.arange(side) * cells // side for side, cells in zip(shape, mask.shape, strict=True)]
    return mask[places[0]][:, places[1]].numpy()
