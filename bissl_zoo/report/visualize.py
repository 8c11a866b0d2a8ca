"""Figures of a config's data and views, of a run's predictions, and of the features of backbones; those of a report.

Each function draws random samples with its own seed, restores all random states, and returns a matplotlib Figure.
"""

from collections.abc import Sequence
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
from bissl_zoo.engine.init import load_init
from bissl_zoo.engine.launch import choose_device
from bissl_zoo.engine.resume import preserved_randomness
from bissl_zoo.engine.stages import alternates
from bissl_zoo.errors import CheckpointError, DatasetError
from bissl_zoo.registry import STAGES
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

#: images in a report: of the data, of the views, and of the best and of the worst predictions
SAMPLES, VIEWS, PREDICTIONS = 8, 3, 4
#: inches up to which a figure is readable on a phone
_PHONE = 5.0
#: images on a map of features in a report
MAPPED = 500
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
    """The test set, the fine-tuned task, and its predictions for some images of the set."""

    dataset: Dataset
    task: DownstreamTask
    predictions: list[Prediction]


def predict_test_set(cfg: DictConfig, source: str | None, images: int | None, seed: int = 0) -> Predictions:
    """Predict at most `images` images of `dataloader.test`, or all, with the fine-tuned model of the run `source`.

    Raises:
        CheckpointError: no fine-tuned model.
        DatasetError: the data set is missing or damaged.
    """
    weights = Weights() if source is None else load_init(source, cfg, evaluate=True)[0]
    if weights.task is None:
        raise CheckpointError(
            f"Predictions need a fine-tuned model, but train.init={source} holds no task head. Give the directory of a "
            "run with the stage finetune, as in train.init=runs/a."
        )
    context = Context(cfg, build_datasets(cfg, {"test"}), choose_device(cfg.train.device))
    dataset, loader = context.data["test"], cfg.dataloader.test
    with preserved_randomness(context.device):
        backbone, task = build_downstream(context, weights)
        indices = sample_indices(len(dataset), images or len(dataset), seed)
        settings = (context.device, loader.batch_size, loader.get("num_workers", 0))
        return Predictions(dataset, task, predict(backbone, task, dataset, indices, *settings))


def predictions_figure(
    cfg: DictConfig, images: int = 16, seed: int = 0, worst: bool = False, threshold: float = 0.5
) -> Figure:
    """Draw targets and predictions of the fine-tuned model of the run `train.init`, see :func:`predict_test_set`.

    Args:
        worst: choose the images of the whole set with the lowest scores instead of random ones.
        threshold: minimum score of the parts of a prediction that are drawn, such as boxes.
    """
    dataset, task, predictions = predict_test_set(cfg, cfg.train.init, None if worst else images, seed)
    if worst:
        predictions = sorted(predictions, key=lambda prediction: prediction.score)[:images]
    samples = samples_of(dataset, [prediction.index for prediction in predictions])
    choice = "the worst" if worst else "random"
    title = f"{cfg.train.init} on {_describe(cfg, 'test')}: {len(samples)} of {len(dataset)} images, {choice}"
    return draw_predictions(samples, predictions, task, title, threshold)


class EmbeddingsFigure(NamedTuple):
    """A figure and its data: the maps, and the names of the classes by label."""

    figure: Figure
    embeddings: list[Embedding]
    classes: list[str]


def embeddings_figure(
    cfg: DictConfig, sources: Sequence[str], images: int = 1000, seed: int = 0, architecture: str | None = None
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
        """Return the test images with the best and the worst predictions."""
        if not any(STAGES.get(name).evaluates for name in self.cfg.train.stages):
            return [Note("The run has no stage finetune, so there is no fine-tuned model.")]
        _require_one_process()
        dataset, task, predictions = predict_test_set(self.cfg, str(self.folder), self.images)
        predictions.sort(key=lambda prediction: -prediction.score)
        if len(predictions) < 2 * PREDICTIONS:
            groups = {"best first": predictions}
        else:
            groups = {"best": predictions[:PREDICTIONS], "worst": predictions[: -PREDICTIONS - 1 : -1]}
        among = f"{len(predictions)} of {len(dataset)} test images"
        blocks: list[Block] = []
        for which, group in groups.items():
            samples = samples_of(dataset, [prediction.index for prediction in group])
            caption = f"Predictions, {which}, among {among}; the model of the last fine-tuning."
            figure = draw_predictions(samples, group, task, which, pairs=1)
            blocks.append(Chart(embed(figure, caption, "png"), caption))
        return blocks

    def embeddings(self) -> list[Block]:
        """Return maps of the test features before and after the BiSSL stage."""
        _require_one_process()
        if not any(map(alternates, self.cfg.train.stages)):
            return [Note("The run has no bilevel stage, so there are no features before and after it.")]
        result = embeddings_figure(self.cfg, [str(self.folder)], min(self.images, MAPPED))
        notes = [f"kNN: top-1 accuracy, k = {NEIGHBOURS}"]
        blocks: list[Block] = []
        for item in result.embeddings:
            figure = draw_embeddings([item], result.classes, "t-SNE of test features", notes)
            caption = f"{item.name}: test features by t-SNE; a point is an image or the crop of an object."
            blocks.append(Chart(embed(figure, caption), caption))
        return blocks


def _require_one_process() -> None:
    """Networks are built by all processes together, but a report is made by one of them."""
    if get_world_size() > 1:
        raise CheckpointError(
            f"Left out, since the run ended with {get_world_size()} processes. bissl report RUN adds it."
        )
