"""Sheets of images: samples of a data set, the views of a pretext method, and predictions beside the truth.

Figures are made without pyplot, so that drawing changes no global state.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from bissl_zoo.backbones import Backbone, evaluating
from bissl_zoo.data.samples import TransformedDataset, temporary_seed, to_device
from bissl_zoo.downstream import DownstreamTask
from bissl_zoo.downstream.drawing import CAPTION, as_pixels, shorten, show_image
from bissl_zoo.errors import ConfigError, DatasetError
from bissl_zoo.files import replacing

#: file formats by suffix, with the metadata to leave out so that equal figures give equal bytes
FORMATS = {".png": {"Software": None}, ".pdf": {"CreationDate": None}, ".svg": {"Date": None}}
DPI = 150
#: inches of an image among samples, of a view, and of the space for a title and for captions
_SAMPLE, _VIEW, _TITLE, _CAPTIONS = 1.9, 1.3, 0.3, 0.55
#: gray level of the hidden part of a view
_HIDDEN = 0.55


class Sample(NamedTuple):
    """An image of a data set with its target, its file name and its index in the set."""

    index: int
    image: Any
    target: Any
    name: str


class Prediction(NamedTuple):
    """An item of the output of `predict` for the image `index` of a data set, and its score (higher is better)."""

    index: int
    value: Any
    score: float


def samples_of(dataset: Dataset, indices: Sequence[int]) -> list[Sample]:
    """Return samples of a data set, named by their files if the set knows them.

    Raises:
        DatasetError: no samples, or an image cannot be decoded.
    """
    if not indices:
        raise DatasetError("The data set has no images to draw.")
    source = getattr(dataset, "source", None)
    names = [Path(source(index)).name if source else f"image {index}" for index in indices]
    return [Sample(index, *dataset[index], name) for index, name in zip(indices, names, strict=True)]


def draw_samples(samples: Sequence[Sample], task: DownstreamTask | None, title: str, columns: int = 4) -> Figure:
    """Draw a grid of images, with their targets if a task is given."""
    columns = min(columns, len(samples))
    rows = math.ceil(len(samples) / columns)
    figure, grid = _sheet(rows, [_SAMPLE] * columns, _tallest(samples) * _SAMPLE, title)
    for axes, sample in zip(grid.flat, samples, strict=False):
        if task is None:
            show_image(axes, sample.image)
        else:
            task.draw(axes, sample.image, sample.target)
        _name(axes, sample.name)
    return figure


def draw_views(
    samples: Sequence[Sample],
    views: Callable[[Any], tuple[Tensor, ...]],
    mean: Sequence[float],
    std: Sequence[float],
    title: str,
    seed: int = 0,
) -> Figure:
    """Draw each image and its views in one row, views at one scale and their hidden parts gray.

    Args:
        views: function from an image to views `(3, S, S)`, normalised by `mean` and `std`, and masks `(C, C)` of bool,
            each after the view that it hides a part of.
        seed: the views of an image depend on the seed and its index only; random states are restored.
    Raises:
        ConfigError: the views have other shapes.
    """
    rows = []
    for sample in samples:
        with temporary_seed(seed, sample.index):
            rows.append(_panels(views(sample.image), mean, std))
    sides = [max(panel.shape[0] for _, panel in column) for column in zip(*rows, strict=True)]
    widths = [_VIEW, *(max(0.5, _VIEW * side / max(sides)) for side in sides)]
    figure, grid = _sheet(len(samples), widths, _VIEW, title, captions=0.25)
    for number, (axes, sample, panels) in enumerate(zip(grid, samples, rows, strict=True)):
        show_image(axes[0], sample.image, "" if number else "original")
        _name(axes[0], sample.name)
        for place, (name, panel), side in zip(axes[1:], panels, sides, strict=True):
            show_image(place, panel, "" if number else f"{name}\n{side} px")
            place.images[0].set_interpolation("nearest")
    return figure


def predict(
    backbone: Backbone,
    task: DownstreamTask,
    dataset: Dataset,
    indices: Sequence[int],
    device: torch.device,
    batch_size: int,
    num_workers: int = 0,
) -> list[Prediction]:
    """Return the predictions of a task's model for images of a data set.

    Raises:
        DatasetError: an image cannot be decoded.
    """
    samples = TransformedDataset(Subset(dataset, indices), task.transform(train=False))
    options = {"collate_fn": task.collate, "num_workers": num_workers, "generator": torch.Generator()}
    predictions: list[Prediction] = []
    with torch.no_grad(), evaluating(backbone, task):
        for images, targets in DataLoader(samples, batch_size, **options):
            output = to_device(task.predict(backbone, to_device(images, device)), torch.device("cpu"))
            for value, target in zip(output, targets, strict=True):
                predictions.append(Prediction(indices[len(predictions)], value, task.score(value, target)))
    return predictions


def draw_predictions(
    samples: Sequence[Sample],
    predictions: Mapping[str, Sequence[Prediction]],
    task: DownstreamTask,
    title: str,
    threshold: float = 0.5,
    images: int = 2,
    side: float = _SAMPLE,
) -> Figure:
    """Draw each image with its target and, beside it, with the prediction of each model.

    Args:
        predictions: of the samples, in the same order, by name of the model.
        threshold: minimum score of the parts of a prediction that are drawn, such as boxes.
        images: images in a row; side: inches of an image.
    """
    images, panels = min(images, len(samples)), 1 + len(predictions)
    rows = math.ceil(len(samples) / images)
    figure, grid = _sheet(rows, [side] * panels * images, _tallest(samples) * side, title, 2 * _CAPTIONS)
    for number, (places, sample) in enumerate(zip(grid.reshape(-1, panels), samples, strict=False)):
        task.draw(places[0], sample.image, sample.target)
        _name(places[0], sample.name)
        for axes, items in zip(places[1:], predictions.values(), strict=True):
            task.draw(axes, sample.image, items[number].value, predicted=True, threshold=threshold)
        for axes, kind in zip(places, ("truth", *predictions), strict=True):
            axes.set_title(f"{kind}\n{axes.get_title()}", fontsize=CAPTION, parse_math=False)
    return figure


def check_format(path: Path) -> Path:
    """Return the path of an image file if its suffix names a format that can be written.

    Raises:
        ConfigError: it does not.
    """
    if path.suffix.lower() not in FORMATS:
        raise ConfigError(f"{path}: the name of an image file must end in {', '.join(FORMATS)}.")
    return path


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure at 150 dpi, atomically, in the format of the suffix.

    Raises:
        ConfigError: unknown suffix, or the file cannot be written.
    """
    suffix = check_format(path).suffix.lower()
    try:
        with replacing(path) as file:
            figure.savefig(file, dpi=DPI, format=suffix[1:], metadata=FORMATS[suffix])
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror or error}.") from error


def _sheet(
    rows: int, widths: Sequence[float], height: float, title: str, captions: float = _CAPTIONS
) -> tuple[Figure, np.ndarray]:
    """Return a figure with a title and an array (rows, columns) of empty axes; sizes are in inches."""
    size = sum(widths) + 0.1 * len(widths), _TITLE + rows * (height + captions)
    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    room = int(size[0] * 72 / (0.62 * (CAPTION + 1)))
    figure.suptitle(shorten(title, room), x=0.02, ha="left", fontsize=CAPTION + 1, weight="bold", parse_math=False)
    grid = figure.subplots(rows, len(widths), squeeze=False, width_ratios=widths)
    for axes in grid.flat:
        axes.set_axis_off()
    return figure, grid


def _tallest(samples: Iterable[Sample]) -> float:
    """Return the largest ratio of height to width of the images, at most 1."""
    shapes = [as_pixels(sample.image).shape for sample in samples]
    return min(1.0, max(height / width for height, width, _ in shapes))


def _name(axes: Any, text: str) -> None:
    style = {"fontsize": CAPTION - 1, "color": "0.35", "ha": "center", "va": "top", "parse_math": False}
    axes.text(0.5, -0.02, shorten(text, 26), transform=axes.transAxes, **style)


def _panels(views: Sequence[Tensor], mean: Sequence[float], std: Sequence[float]) -> list[tuple[str, np.ndarray]]:
    """Return names and pixels `(H, W, 3)` in [0, 1] of the views and of the visible parts that masks leave."""
    panels: list[tuple[str, np.ndarray]] = []
    count = 0
    for part in views:
        if part.dtype == torch.bool and part.ndim == 2 and panels:
            visible = panels[-1][1].copy()
            visible[_enlarge(part, visible.shape[:2])] = _HIDDEN
            panels.append(("visible", visible))
        elif part.is_floating_point() and part.ndim == 3 and part.shape[0] == 3:
            count += 1
            pixels = part.detach().float().cpu() * torch.tensor(std).view(3, 1, 1) + torch.tensor(mean).view(3, 1, 1)
            panels.append((f"view {count}", pixels.clamp(0, 1).permute(1, 2, 0).numpy()))
        else:
            raise ConfigError(
                f"pretext.augmentation returns {part.dtype} of shape {tuple(part.shape)} as a view; expected float "
                "views (3, S, S), each optionally followed by a bool mask (C, C)."
            )
    return panels


def _enlarge(mask: Tensor, shape: tuple[int, ...]) -> np.ndarray:
    """Return a mask `(C, C)` enlarged to the size of its view, by nearest cell."""
    places = [torch.arange(side) * cells // side for side, cells in zip(shape, mask.shape, strict=True)]
    return mask[places[0]][:, places[1]].numpy()
