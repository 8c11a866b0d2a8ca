"""What backbones make of images, seen from above: t-SNE of their features, with what they are worth in figures."""

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from sklearn.manifold import TSNE
from sklearn.metrics import silhouette_score
from torch import Tensor
from torch.nn import functional

from bissl_zoo.errors import DatasetError
from bissl_zoo.evaluation import knn_accuracy
from bissl_zoo.report.images.drawing import (
    COLOURS,
    DPI,
    TEXT,
    TITLE,
    add_legend,
    fitted,
    legend_height,
    line_height,
    written,
)

#: shapes of points; with the colours they tell 72 classes apart
MARKERS = "o^sDvP*X<"
#: the usual perplexity of t-SNE (van der Maaten and Hinton, JMLR 2008: 5 to 50)
PERPLEXITY = 30.0
LEAST_POINTS = 3
#: inches of a panel and of what is around all of them; lines above a panel; panels in a row
_PANEL, _MARGIN, _HEADS, _ROW = 3.3, 0.12, 2.2, 4


@dataclass(frozen=True)
class Embedding:
    """The test features of one backbone.

    Attributes:
        points: `(N, 2)`, see :func:`project`; labels: `(N,)`.
        knn: top-1 accuracy from the training features to these; NaN where there are none.
        silhouette: see :func:`silhouette`.
    """

    name: str
    points: np.ndarray
    labels: np.ndarray
    knn: float
    silhouette: float


def embedding(
    name: str,
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    k: int = 20,
    seed: int = 0,
    classes: int | None = None,
) -> Embedding:
    """Measure and project the features `(N, D)` of a backbone; labels are `(N,)`.

    Args:
        classes: images with a label from this number on are on the map, and not in the figures; None counts them all.
    Raises:
        BisslZooError: features that are not finite.
        DatasetError: fewer than 3 images.
    """
    if len(test_labels) < LEAST_POINTS:
        raise DatasetError(f"{name}: {len(test_labels)} images; a map of embeddings needs {LEAST_POINTS} or more.")
    points, drawn = project(test_features, seed), test_labels.numpy()
    if classes is not None:
        train, test = train_labels < classes, test_labels < classes
        train_features, train_labels = train_features[train], train_labels[train]
        test_features, test_labels = test_features[test], test_labels[test]
    if not len(train_labels) or not len(test_labels):
        return Embedding(name, points, drawn, math.nan, math.nan)
    knn = knn_accuracy(train_features, train_labels, test_features, test_labels, k=k)["top1"]
    return Embedding(name, points, drawn, knn, silhouette(test_features, test_labels))


def project(features: Tensor, seed: int = 0) -> np.ndarray:
    """t-SNE (van der Maaten and Hinton, JMLR 2008) of features `(N, D)`, scaled to norm 1: `(N, 2)` float32.

    It starts from the first principal components, and its perplexity is 30, or a third of N - 1 where that is less.
    Features of a collapsed network, which are all alike, come to lie on one point.
    """
    rows = functional.normalize(features.float(), dim=1).numpy()
    if np.ptp(rows, axis=0).max() < 1e-6:
        return np.zeros((len(rows), 2), dtype=np.float32)
    perplexity = min(PERPLEXITY, (len(rows) - 1) / 3)
    return TSNE(2, perplexity=perplexity, init="pca", random_state=seed).fit_transform(rows)


def silhouette(features: Tensor, labels: Tensor) -> float:
    """How near features `(N, D)` are to their own class rather than the next, from -1 to 1 (Rousseeuw, 1987).

    The mean silhouette by cosine distance, in the space of the features and not on the map. NaN where it is not
    defined: a single class, or each image a class of its own.
    """
    if not 1 < len(labels.unique()) < len(labels):
        return math.nan
    rows = functional.normalize(features.double(), dim=1).numpy()
    return float(silhouette_score(rows, labels.numpy(), metric="cosine"))


def draw_embeddings(
    embeddings: Sequence[Embedding], classes: Sequence[str], title: str, notes: Sequence[str] = ()
) -> Figure:
    """Maps side by side, a point per image, coloured by class; figures in their titles.

    Where there are more classes than colours, points differ in shape as well; where there are more than can be told
    apart at all, there is no legend, and a note says so.

    Args:
        notes: lines below the maps, such as what kNN is measured from.
    Raises:
        DatasetError: there are no embeddings.
    """
    if not embeddings:
        raise DatasetError("There are no embeddings to draw.")
    present = sorted({int(label) for one in embeddings for label in one.labels})
    told = len({_look(label) for label in present}) == len(present)
    entries = [(classes[label], _point(label)) for label in present] if told else []
    repeated = f"{len(present)} classes, more than colours and shapes can tell apart: these repeat."
    notes = [*notes, *([] if told else [repeated])]
    columns = min(len(embeddings), _ROW)
    width, head = columns * _PANEL + 2 * _MARGIN, _MARGIN + line_height(TITLE)
    side = _PANEL - _MARGIN
    extents = [np.ptp(one.points, axis=0) for one in embeddings]
    tall = side * min(1.0, max(0.6, *(y / x if x else 1.0 for x, y in extents)))
    step = tall + _MARGIN + _HEADS * line_height(TITLE)
    legend = legend_height(entries, width)
    height = head + math.ceil(len(embeddings) / columns) * step + 2 * _MARGIN + len(notes) * line_height(TEXT) + legend
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")

    def write(top: float, text: str, size: float, color: str, weight: str = "normal") -> None:
        line = fitted(text, width - 2 * _MARGIN, size, weight)
        style = {"fontsize": size, "color": color, "weight": weight, "va": "top", "parse_math": False}
        figure.text(_MARGIN / width, 1 - top / height, line, **style)

    write(_MARGIN, title, TITLE, "black", "bold")
    for place, one in enumerate(embeddings):
        row, column = divmod(place, columns)
        left, bottom = _MARGIN * 1.5 + column * _PANEL, height - head - (row + 1) * step
        _draw_map(figure.add_axes((left / width, bottom / height, side / width, tall / height)), one, side)
    for number, line in enumerate(reversed(notes), start=1):
        write(height - legend - number * line_height(TEXT) - _MARGIN, line, TEXT, "0.3")
    add_legend(figure, entries, width, _MARGIN / 2)
    return figure


def _draw_map(axes: Axes, one: Embedding, side: float) -> None:
    measured = "silhouette undefined" if math.isnan(one.silhouette) else f"silhouette {one.silhouette:.3f}"
    knn = "undefined" if math.isnan(one.knn) else f"{one.knn:.3f}"
    if not np.ptp(one.points):
        measured = "all features are alike"
    axes.set_title(f"{fitted(one.name, side, TITLE)}\nkNN {knn}   {measured}", fontsize=TITLE, pad=4, parse_math=False)
    look = [_look(label) for label in one.labels.tolist()]
    size = min(40.0, max(12.0, 9000 / len(look)))
    # in an order of their own, so that no class lies on top of the others
    order = np.random.default_rng(0).permutation(len(look))
    for marker in dict.fromkeys(marker for _, marker in look):
        chosen = [place for place in order if look[place][1] == marker]
        colours = [look[place][0] for place in chosen]
        axes.scatter(*one.points[chosen].T, s=size, c=colours, marker=marker, linewidths=0.3, edgecolors="white")
    axes.set(xticks=[], yticks=[], aspect="equal", adjustable="datalim")
    axes.margins(0.05)
    for spine in axes.spines.values():
        spine.set_color("0.7")


def _look(label: int) -> tuple[str, str]:
    """Colour and shape of a class."""
    return COLOURS[label % len(COLOURS)], MARKERS[label // len(COLOURS) % len(MARKERS)]


def _point(label: int) -> Line2D:
    colour, marker = _look(label)
    return Line2D([], [], linestyle="", color=colour, marker=marker, markersize=5)


def write_csv(embeddings: Sequence[Embedding], classes: Sequence[str], names: Sequence[str], path: Path) -> None:
    """Write a line per point: the backbone, the image, its class, x and y.

    Args:
        names: of the N images, the same for all embeddings.
    """
    lines = [
        [one.name, name, classes[label], f"{x:.6g}", f"{y:.6g}"]
        for one in embeddings
        for name, label, (x, y) in zip(names, one.labels.tolist(), one.points.tolist(), strict=True)
    ]
    with written(path) as draft, open(draft, "w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([["backbone", "image", "class", "x", "y"], *lines])
