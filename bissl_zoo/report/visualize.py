"""Figures of a config's data and views, of a run's predictions, and of the features of backbones; those of a report.

Each function draws random samples with its own seed, restores all random states, and returns a matplotlib Figure.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from omegaconf import DictConfig
from torch import Tensor
from torch.utils.data import Dataset

from bissl_zoo.distributed import get_world_size
from bissl_zoo.downstream import DownstreamTask
from bissl_zoo.engine.build import Context, Weights, build_datasets, build_downstream, build_pretext, data_roles
from bissl_zoo.engine.checks import check_config, open_config
from bissl_zoo.engine.features import (
    CentralCrops,
    FrozenBackbone,
    extract_features,
    pretext_pixels,
    sample_indices,
)
from bissl_zoo.engine.init import zoo_of
from bissl_zoo.engine.launch import choose_device
from bissl_zoo.engine.resume import preserved_randomness
from bissl_zoo.engine.stages import alternates
from bissl_zoo.errors import CheckpointError, DatasetError
from bissl_zoo.model import MODEL_FOLDER, load_model
from bissl_zoo.registry import STAGES
from bissl_zoo.report import IMAGES
from bissl_zoo.report.embeddings import (
    MIN_POINTS,
    NO_CLASS,
    Embedding,
    Objects,
    draw_embeddings,
    embedding,
    load_stages,
)
from bissl_zoo.report.page import Block, Chart, Note, embed
from bissl_zoo.report.sheets import Prediction, draw_predictions, draw_samples, draw_views, predict, samples_of
from bissl_zoo.runs.directory import CONFIG_FILE

#: images in a report: of the data, of the views, and of each group of predictions
SAMPLES, VIEWS, PREDICTIONS = 4, 3, 3
#: inches of an image with predictions in a report, three of which are readable on a phone
_PANEL = 1.45
#: minimum score of the boxes in a report, below the usual 0.5: short runs give low scores
_THRESHOLD = 0.3
#: inches up to which a figure is readable on a phone
_PHONE = 5.0
#: batch size of a frozen backbone
BATCH = 64
#: neighbours of kNN, as in bissl probe
NEIGHBOURS = 20
_CPU = torch.device("cpu")


def untrained_task(cfg: DictConfig, data: dict[str, Dataset]) -> DownstreamTask:
    """Return the config's task with random weights on the CPU; `data` holds its training or test set."""
    with preserved_randomness(_CPU):
        return build_downstream(Context(cfg, data, _CPU), Weights())[1]


def data_figure(cfg: DictConfig, role: str, images: int = 16, seed: int = 0, columns: int = 4) -> Figure:
    """Draw images of `dataloader.<role>`, chosen with `seed`, with their targets; pretext images have none.

    Raises:
        DatasetError: the data set is missing or damaged.
    """
    data = build_datasets(cfg, {role})
    indices = sample_indices(len(data[role]), images, seed)
    title = f"{_describe(cfg, role)}: {len(indices)} of {len(data[role])} images"
    task = None if role == "pretext" else untrained_task(cfg, data)
    return draw_samples(samples_of(data[role], indices), task, title, columns)


def views_figure(cfg: DictConfig, images: int = 6, seed: int = 0) -> Figure:
    """Draw images of `dataloader.pretext` and the views that the pretext method trains on.

    Raises:
        DatasetError: the data set is missing or damaged.
        ConfigError: the method does not fit the backbone, or its views are not images.
    """
    dataset = build_datasets(cfg, {"pretext"})["pretext"]
    with preserved_randomness(_CPU):
        _, method = build_pretext(cfg, Weights(), _CPU)
    samples = samples_of(dataset, sample_indices(len(dataset), images, seed))
    pixels = pretext_pixels(cfg)
    title = f"Views of {cfg.pretext.name}, {_describe(cfg, 'pretext')}"
    return draw_views(samples, method.views(), pixels["mean"], pixels["std"], title, seed)


class Predictions(NamedTuple):
    """The test set, the task, and the predictions for the same images by what each model was fine-tuned from."""

    dataset: Dataset
    task: DownstreamTask
    models: dict[str, list[Prediction]]


def predict_test_set(cfg: DictConfig, source: str, images: int | None, seed: int = 0) -> Predictions:
    """Predict at most `images` images of `dataloader.test`, or all, with the fine-tuned models of a run.

    Args:
        source: a run, whose baseline comes first, or one of the other sources of :func:`bissl_zoo.load_model`.
    Raises:
        ZooError: no fine-tuned model.
        DatasetError: the data set is missing or damaged.
    """
    folders = [*sorted(Path(source).glob(f"{MODEL_FOLDER}_*")), Path(source, MODEL_FOLDER)]
    device, loader = choose_device(cfg.train.device), cfg.dataloader.test
    models = [load_model(folder, device=device) for folder in folders if folder.is_dir()]
    models = models or [load_model(source, zoo=zoo_of(cfg), device=device)]
    dataset = build_datasets(cfg, {"test"})["test"]
    indices = sample_indices(len(dataset), images or len(dataset), seed)
    settings = (dataset, indices, device, loader.batch_size, loader.get("num_workers", 0))
    with preserved_randomness(device):
        predictions = {m.metadata["start"]: predict(m.backbone, m.task, *settings) for m in models}
    return Predictions(dataset, models[-1].task, predictions)


def predictions_figure(
    cfg: DictConfig, images: int = 16, seed: int = 0, worst: bool = False, threshold: float = 0.5
) -> Figure:
    """Draw targets and the predictions of the models of the run `train.init`, see :func:`predict_test_set`.

    Args:
        worst: choose the images of the whole set on which the last model has the lowest scores, not random ones.
        threshold: minimum score of the parts of a prediction that are drawn, such as boxes.
    """
    if cfg.train.init is None:
        raise CheckpointError("Predictions need a fine-tuned model. Give a run directory, as in train.init=runs/a.")
    dataset, task, models = predict_test_set(cfg, cfg.train.init, None if worst else images, seed)
    last = list(models.values())[-1]
    places = sorted(range(len(last)), key=lambda place: last[place].score if worst else 0)[:images]
    samples = samples_of(dataset, [last[place].index for place in places])
    choice = "the worst" if worst else "random"
    title = f"{cfg.train.init} on {_describe(cfg, 'test')}: {len(samples)} of {len(dataset)} images, {choice}"
    chosen = {name: [items[place] for place in places] for name, items in models.items()}
    return draw_predictions(samples, chosen, task, title, threshold)


class EmbeddingsFigure(NamedTuple):
    """A figure and its data: the maps, and the names of the classes by label."""

    figure: Figure
    embeddings: list[Embedding]
    classes: list[str]


def embeddings_figure(
    cfg: DictConfig, sources: Sequence[str], images: int = IMAGES, seed: int = 0, architecture: str | None = None
) -> EmbeddingsFigure:
    """Draw the test features of several backbones side by side, with kNN from the training set.

    The task names the embedded parts of an image: for detection crops around the boxes, otherwise whole images. Images
    without a single class are on the map but not in the metrics. Pixels are normalised as the backbone's own training
    images, or as the config's pretext images if unknown.

    Args:
        sources: see :func:`bissl_zoo.report.embeddings.load_stages`.
        images: maximum number of images and of objects of each set, chosen with `seed`.
        architecture: timm name for files without one.
    Raises:
        DatasetError: a data set is missing or damaged, or has fewer than 3 images.
        CheckpointError: a source without a whole backbone.
        ZooError: no such entry or file.
    """
    device = choose_device(cfg.train.device)
    data = build_datasets(cfg, {"train", "test"})
    task = untrained_task(cfg, data)
    chosen = {role: sample_indices(len(data[role]), images, seed) for role in ("train", "test")}
    sets = {role: Objects(data[role], task, chosen[role]) for role in chosen}
    indices = {role: sample_indices(len(objects), images, seed) for role, objects in sets.items()}
    if len(indices["test"]) < MIN_POINTS:
        raise DatasetError(
            f"dataloader.test has {len(indices['test'])} images or objects; a map of embeddings needs {MIN_POINTS} or "
            "more."
        )
    embeddings, counts = [], [0, 0]
    with preserved_randomness(device):
        for source in sources:
            for name, backbone in load_stages(source, architecture):
                parts: list[Tensor] = []
                for role, objects in sets.items():
                    parts += _features(backbone, objects, indices[role], cfg, device, cfg.dataloader[role])
                embeddings.append(embedding(name, *parts, k=NEIGHBOURS, seed=seed, classes=len(task.classes)))
                counts = [int((labels < len(task.classes)).sum()) for labels in parts[1::2]]
    title = f"t-SNE of {len(indices['test'])} images or objects, {_describe(cfg, 'test')}"
    notes = [f"kNN: top-1 accuracy, k = {NEIGHBOURS}, {counts[0]} neighbours from dataloader.train"]
    if counts[1] < len(indices["test"]):
        notes += [f"metrics: {counts[1]} of {len(indices['test'])} have a single class"]
    classes = [*task.classes, NO_CLASS]
    return EmbeddingsFigure(draw_embeddings(embeddings, classes, title, notes), embeddings, classes)


def _features(
    backbone: FrozenBackbone,
    objects: Objects,
    indices: Sequence[int],
    cfg: DictConfig,
    device: torch.device,
    loader: DictConfig,
) -> tuple[Tensor, ...]:
    pixels: dict[str, Any] = {**pretext_pixels(cfg), **backbone.pixels}
    size = pixels["input_size"][-1]
    backbone = replace(backbone, model=backbone.model.to(device))
    backbone.width(size)  # raises if the network does not take images of this size
    crops = CentralCrops(objects, indices, size, pixels["mean"], pixels["std"])
    return extract_features(backbone.model, crops, device, BATCH, loader.get("num_workers", 0))


def _describe(cfg: DictConfig, role: str) -> str:
    dataset = cfg.dataloader[role].dataset
    return f"{dataset.get('root') or dataset.name} ({role})"


# the images of a report


class RunImages:
    """Images of the run in `folder`; its config is imported and built, so the run must be trusted.

    Args:
        images: maximum number of images of a data set for predictions and feature maps.
    """

    def __init__(self, folder: Path, images: int) -> None:
        self.folder, self.images = folder, images

    @cached_property
    def cfg(self) -> DictConfig:
        """Return the checked config, with `train.imports` imported."""
        source = str(self.folder / CONFIG_FILE)
        cfg = open_config(source)
        check_config(cfg, source)
        return cfg

    def data(self) -> list[Block]:
        """Return sheets of random training images with their targets."""
        _require_one_process()
        role = "train" if "train" in data_roles(self.cfg) else "pretext"
        figure = data_figure(self.cfg, role, SAMPLES, columns=2)
        caption = f"Random images of dataloader.{role} with their targets."
        return [Chart(embed(figure, caption, "png"), caption)]

    def views(self) -> list[Block]:
        """Return the views that the pretext method trains on."""
        _require_one_process()
        if "pretext" not in data_roles(self.cfg):
            return []
        figure = views_figure(self.cfg, VIEWS)
        caption = f"Views of {self.cfg.pretext.name}: what the pretext method trains on."
        return [Chart(embed(figure, caption, "png"), caption, wide=figure.get_figwidth() > _PHONE)]

    def predictions(self) -> list[Block]:
        """Return test images with the targets and the predictions of the fine-tuned models."""
        if not any(STAGES.get(name).evaluates for name in self.cfg.train.stages):
            return [Note("The run has no stage finetune, so there is no fine-tuned model.")]
        _require_one_process()
        dataset, task, models = predict_test_set(self.cfg, str(self.folder), self.images)
        blocks: list[Block] = []
        for which, places in _chosen(models).items():
            for place in places:
                items = {name: [predictions[place]] for name, predictions in models.items()}
                samples = samples_of(dataset, [next(iter(items.values()))[0].index])
                figure = draw_predictions(samples, items, task, "", _THRESHOLD, side=_PANEL)
                caption = f"{which}."
                blocks.append(Chart(embed(figure, caption, "png"), caption))
        count = len(next(iter(models.values())))
        return [Note(f"Chosen among {count} of {len(dataset)} test images."), *blocks]

    def embeddings(self) -> list[Block]:
        """Return maps of the test features before and after the BiSSL stage."""
        _require_one_process()
        if not any(map(alternates, self.cfg.train.stages)):
            return [Note("The run has no bilevel stage, so there are no features before and after it.")]
        result = embeddings_figure(self.cfg, [str(self.folder)], self.images)
        notes = [f"kNN: top-1 accuracy, k = {NEIGHBOURS}"]
        blocks: list[Block] = []
        for item in result.embeddings:
            figure = draw_embeddings([item], result.classes, "t-SNE of test features", notes)
            caption = f"{item.name}: test features by t-SNE; a point is an image or the crop of an object."
            blocks.append(Chart(embed(figure, caption), caption))
        return blocks


def _chosen(models: Mapping[str, list[Prediction]]) -> dict[str, list[int]]:
    """Return the places of random images, and of those on which two models differ most or one is worst."""
    *others, (name, last) = models.items()
    chosen = {"Random": sample_indices(len(last), PREDICTIONS, 0)}
    base = others[-1][1] if others else None
    gains = [item.score - (base[place].score if base else 0.0) for place, item in enumerate(last)]
    order = sorted(range(len(last)), key=gains.__getitem__)
    if not others:
        return chosen | {"Worst": order[:PREDICTIONS]}
    better = [place for place in order[: -PREDICTIONS - 1 : -1] if gains[place] > 0]
    worse = [place for place in order[:PREDICTIONS] if gains[place] < 0]
    return chosen | {f"Better, fine-tuned from {name}": better, f"Worse, fine-tuned from {name}": worse}


def _require_one_process() -> None:
    """Networks are built by all processes together, but a report is made by one of them."""
    if get_world_size() > 1:
        raise CheckpointError(
            f"Left out, since the run ended with {get_world_size()} processes. bissl report RUN adds it."
        )
