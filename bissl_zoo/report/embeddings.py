"""Maps of features by t-SNE: the parts of a data set that are embedded, the backbones, and kNN."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from omegaconf import DictConfig
from PIL import Image
from sklearn.manifold import TSNE
from torch import Tensor
from torch.nn import functional
from torch.utils.data import Dataset

from bissl_zoo.backbones import merge_split_states
from bissl_zoo.config import instantiate
from bissl_zoo.downstream import DownstreamTask
from bissl_zoo.downstream.drawing import CAPTION, COLOURS, as_pixels, colour_of, shorten
from bissl_zoo.engine.build import Weights, build_split_backbone
from bissl_zoo.engine.features import CROP, FrozenBackbone, load_frozen, pretext_pixels, whole_embedding
from bissl_zoo.engine.init import load_init, pinned_init, resplit, weights_of
from bissl_zoo.engine.resume import seed_everything
from bissl_zoo.engine.stages import alternates
from bissl_zoo.engine.trainer import load_state
from bissl_zoo.errors import CheckpointError, DatasetError
from bissl_zoo.evaluation import knn_accuracy
from bissl_zoo.registry import STAGES
from bissl_zoo.report.sheets import DPI
from bissl_zoo.runs.checkpoint import Checkpointer, load_checkpoint
from bissl_zoo.runs.directory import CONFIG_FILE, load_run_config

#: shapes of points; with 10 colours they distinguish 90 classes
MARKERS = "o^sDvP*X<"
#: the usual perplexity of t-SNE (van der Maaten and Hinton, JMLR 2008: 5 to 50)
PERPLEXITY = 30.0
MIN_POINTS = 3
#: name of the label after those of the classes
NO_CLASS = "no single class"
#: inches of a map; maps in a row
_MAP, _ROW = 3.3, 4


@dataclass(frozen=True)
class Embedding:
    """The test features of one backbone.

    Attributes:
        points: `(N, 2)`, see :func:`project`; labels: `(N,)`.
        knn: top-1 accuracy of kNN from the training features; NaN if undefined.
    """

    name: str
    points: np.ndarray
    labels: np.ndarray
    knn: float


class Objects(Dataset):
    """`(image, label)` of the parts of images that a task names (`DownstreamTask.objects`): images or square crops.

    Parts without a class have the label K, the number of classes. The longer side of a box is 0.875 of its crop, the
    share that :class:`bissl_zoo.engine.features.CentralCrops` keeps.

    Args:
        indices: images of the data set whose objects are listed.
    """

    def __init__(self, dataset: Dataset, task: DownstreamTask, indices: Sequence[int]) -> None:
        self.dataset = dataset
        read = getattr(dataset, "target", None) or (lambda index: dataset[index][1])  # without decoding, if possible
        self.items = [
            (index, box, len(task.classes) if label is None else label)
            for index in indices
            for box, label in task.objects(read(index))
        ]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, place: int) -> tuple[Image.Image, int]:
        index, box, label = self.items[place]
        image = self.dataset[index][0]
        if box is None:
            return image, label
        if not isinstance(image, Image.Image):
            image = Image.fromarray(as_pixels(image))
        return image.crop(square_around(box, image.size)), label


def square_around(box: tuple[float, ...], size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Return the square x0, y0, x1, y1 in whole pixels around a box, within an image of size (width, height)."""
    x0, y0, x1, y1 = box
    side = max(1, min(round(max(x1 - x0, y1 - y0) / CROP), *size))
    corner = [round((low + high - side) / 2) for low, high in ((x0, x1), (y0, y1))]
    left, top = (min(max(start, 0), whole - side) for start, whole in zip(corner, size, strict=True))
    return left, top, left + side, top + side


def load_stages(source: str, architecture: str | None = None) -> list[tuple[str, FrozenBackbone]]:
    """Return the backbones of a source with a name for each.

    A run with a BiSSL stage has two: the backbone that entered the stage and the lower one that left it. Any other
    source has one, see :func:`bissl_zoo.engine.features.load_frozen`. The first may draw random weights.

    Raises:
        CheckpointError: weights that do not fit, an unfinished stage, or a run without a whole backbone.
        ZooError: no such entry or file.
    """
    folder = Path(source)
    if (folder / CONFIG_FILE).is_file():
        cfg = load_run_config(folder)
        bilevel = next(filter(alternates, cfg.train.stages), None)
        if bilevel is not None:
            stages = [_entering(folder, cfg, bilevel), (STAGES.get(bilevel).label, _of_stage(folder, cfg, bilevel))]
            return [_named(folder, cfg, *stage) for stage in stages]
    backbone = load_frozen(source, architecture)
    return [(backbone.source, backbone)]


def _entering(folder: Path, cfg: DictConfig, bilevel: str) -> tuple[str, Weights]:
    earlier = cfg.train.stages[: cfg.train.stages.index(bilevel)]
    for name in reversed(earlier):
        if "backbone" in STAGES.get(name).provides:
            return STAGES.get(name).label, _of_stage(folder, cfg, name)
    if cfg.train.init is not None:
        return f"from {Path(cfg.train.init).name}", load_init(pinned_init(cfg.train.init, folder), cfg)[0]
    seed_everything(cfg.train.seed)  # the random weights that the stage starts from
    trunk, tail = build_split_backbone(cfg)
    return "random weights", Weights(trunk.state_dict(), tail=tail.state_dict())


def _of_stage(folder: Path, cfg: DictConfig, stage: str) -> Weights:
    newest = Checkpointer(folder / "checkpoints").newest(stage)
    if newest is None:
        raise CheckpointError(f"{folder} has no checkpoint of the stage {stage}. Continue the run with --resume.")
    info, state = load_checkpoint(newest)
    if not info.done:
        raise CheckpointError(
            f"{newest} belongs to an unfinished stage (step {info.step} of {info.total_steps}). Continue the run with "
            "--resume."
        )
    return resplit(weights_of(stage, state), *build_split_backbone(cfg))


def _named(folder: Path, cfg: DictConfig, name: str, weights: Weights) -> tuple[str, FrozenBackbone]:
    name = f"{folder.absolute().name}: {name}"
    if weights.tail is None:
        raise CheckpointError(
            f"{name}: only the backbone up to {cfg.bilevel.shared_stage} is stored, an embedding needs all of it. Give "
            "the run or file that this run started from."
        )
    backbone = instantiate(cfg.backbone)
    load_state(backbone, merge_split_states(weights.backbone, weights.tail), f"backbone of '{name}'")
    return name, FrozenBackbone(whole_embedding(backbone), backbone.name, name, pretext_pixels(cfg))


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
        classes: items with labels from this number on are on the map but not in the metrics; None counts all.
    Raises:
        BisslZooError: features that are not finite.
        DatasetError: fewer than 3 items.
    """
    if len(test_labels) < MIN_POINTS:
        raise DatasetError(f"{name}: {len(test_labels)} images; a map of embeddings needs {MIN_POINTS} or more.")
    points, labels = project(test_features, seed), test_labels.numpy()
    if classes is not None:
        train, test = train_labels < classes, test_labels < classes
        train_features, train_labels = train_features[train], train_labels[train]
        test_features, test_labels = test_features[test], test_labels[test]
    if not len(train_labels) or not len(test_labels):
        return Embedding(name, points, labels, math.nan)
    knn = knn_accuracy(train_features, train_labels, test_features, test_labels, k=k)["top1"]
    return Embedding(name, points, labels, knn)


def project(features: Tensor, seed: int = 0) -> np.ndarray:
    """Return the t-SNE (van der Maaten and Hinton, JMLR 2008) of features `(N, D)` scaled to norm 1, `(N, 2)` float32.

    It starts from the first principal components; the perplexity is 30, at most a third of N - 1. Identical features of
    a collapsed network give identical points.
    """
    rows = functional.normalize(features.float(), dim=1).numpy()
    if np.ptp(rows, axis=0).max() < 1e-6:
        return np.zeros((len(rows), 2), dtype=np.float32)
    perplexity = min(PERPLEXITY, (len(rows) - 1) / 3)
    return TSNE(2, perplexity=perplexity, init="pca", random_state=seed).fit_transform(rows)


def draw_embeddings(
    embeddings: Sequence[Embedding], classes: Sequence[str], title: str, notes: Sequence[str] = ()
) -> Figure:
    """Draw maps side by side, one point per image in the colour of its class, with kNN in the titles.

    More than 10 classes also differ in the shape of their points; more than 90 have no legend.

    Args:
        classes: names by label; notes: lines below the maps.
    """
    present = sorted({int(label) for item in embeddings for label in item.labels})
    has_legend = len(present) <= len(COLOURS) * len(MARKERS)
    columns = min(len(embeddings), _ROW)
    rows = math.ceil(len(embeddings) / columns)
    legend_rows = math.ceil(len(present) / (2 * columns)) if has_legend else 0
    height = rows * (_MAP + 0.3) + 0.4 + 0.16 * (len(notes) + legend_rows)
    figure = Figure(figsize=(columns * _MAP, height), dpi=DPI, layout="constrained")
    room = int(columns * _MAP * 72 / (0.6 * CAPTION))
    figure.suptitle(shorten(title, int(0.8 * room)), fontsize=CAPTION + 2, weight="bold", parse_math=False)
    grid = figure.subplots(rows, columns, squeeze=False)
    lines = "\n".join(shorten(note, room) for note in notes)
    grid[-1, 0].set_xlabel(lines, loc="left", fontsize=CAPTION, color="0.3", parse_math=False)
    for axes in grid.flat[len(embeddings) :]:
        axes.set_axis_off()
    for axes, item in zip(grid.flat, embeddings, strict=False):
        knn = "undefined" if math.isnan(item.knn) else f"{item.knn:.3f}"
        collapsed = "" if np.ptp(item.points) else "   all features are equal"
        axes.set_title(f"{shorten(item.name, 44)}\nkNN {knn}{collapsed}", fontsize=CAPTION + 1, parse_math=False)
        size = min(40.0, max(12.0, 9000 / len(item.labels)))
        for label in present:
            style = {"color": colour_of(label), "marker": MARKERS[label // len(COLOURS) % len(MARKERS)]}
            name = f"\u200b{shorten(classes[label], 24)}"  # matplotlib drops labels that begin with an underscore
            points = item.points[item.labels == label].T
            axes.scatter(*points, s=size, linewidths=0.3, edgecolors="white", label=name, **style)
        axes.set(xticks=[], yticks=[], aspect="equal", adjustable="datalim")
        axes.margins(0.05)
    if has_legend:
        handles, _ = grid[0, 0].get_legend_handles_labels()
        style = {"frameon": False, "fontsize": CAPTION, "columnspacing": 1.0, "handletextpad": 0.2}
        legend = figure.legend(handles=handles, loc="outside lower center", ncols=2 * columns, **style)
        for text in legend.get_texts():
            text.set_parse_math(False)
    return figure
