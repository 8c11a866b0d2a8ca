"""Pictures of a config's data and views, of what a run's model predicts, and of what backbones make of the test set.

Each function draws with a seed of its own, leaves all random states as they were, and returns a matplotlib Figure.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from omegaconf import DictConfig
from torch import Tensor
from torch.utils.data import Dataset

from bissl_zoo.engine.build import Context, Weights, build_datasets, build_downstream, build_pretext
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
from bissl_zoo.errors import CheckpointError, DatasetError
from bissl_zoo.report.images.box_crops import BoxCrops
from bissl_zoo.report.images.data import draw_samples, draw_views, samples_of
from bissl_zoo.report.images.embeddings import LEAST_POINTS, Embedding, draw_embeddings, embedding
from bissl_zoo.report.images.one_class import MIXED, OneClass
from bissl_zoo.report.images.predictions import draw_predictions, predict
from bissl_zoo.report.images.run_backbones import load_stages

#: images at a time that a frozen backbone embeds
BATCH = 64
#: neighbours of kNN, as tools/probe.py has them
NEIGHBOURS = 20


def picture_data(cfg: DictConfig, role: str, images: int = 16, seed: int = 0) -> Figure:
    """Images of `dataloader.<role>`, drawn with `seed`, with their boxes or labels.

    Raises:
        DatasetError: the set is missing or damaged.
    """
    dataset = build_datasets(cfg, {role})[role]
    chosen = sample_indices(len(dataset), images, seed)
    title = f"{_described(cfg, role)}: {len(chosen)} of {len(dataset)} images"
    return draw_samples(samples_of(dataset, chosen), getattr(dataset, "classes", None), title)


def picture_views(cfg: DictConfig, images: int = 6, seed: int = 0) -> Figure:
    """Images of `dataloader.pretext` and the views of them that the pretext method is given, drawn with `seed`.

    Raises:
        DatasetError: the set is missing or damaged.
        ConfigError: a method that does not fit the backbone, or views that are no images.
    """
    dataset = build_datasets(cfg, {"pretext"})["pretext"]
    cpu = torch.device("cpu")
    with preserved_randomness(cpu):
        _, method = build_pretext(cfg, Weights(), cpu)
    samples = samples_of(dataset, sample_indices(len(dataset), images, seed))
    pixels = pretext_pixels(cfg)
    title = f"Views of {cfg.pretext.name}, {_described(cfg, 'pretext')}"
    return draw_views(samples, method.views(), pixels["mean"], pixels["std"], title, seed)


def picture_predictions(
    cfg: DictConfig, images: int = 16, seed: int = 0, worst: bool = False, threshold: float = 0.5
) -> Figure:
    """What the fine-tuned model of the run `train.init` predicts for images of `dataloader.test`, and what is true.

    Args:
        worst: those that the model is worst at, of the whole set, rather than images drawn with `seed`.
        threshold: least score of the boxes that are drawn.
    Raises:
        CheckpointError: there is no fine-tuned model.
        DatasetError: the set is missing or damaged.
    """
    if cfg.train.init is None:
        raise CheckpointError(
            "Predictions need a fine-tuned model. Give the directory of a run with the stage finetune, as in "
            "train.init=runs/a."
        )
    weights, _ = load_init(cfg.train.init, cfg, evaluate=True)
    if weights.task is None:
        raise CheckpointError(
            f"Predictions need a fine-tuned model: train.init='{cfg.train.init}' holds no task head. Give the "
            "directory of a run with the stage finetune, as in train.init=runs/a."
        )
    device = choose_device(cfg.train.device)
    context = Context(cfg, build_datasets(cfg, {"test"}), device)
    dataset, loader = context.data["test"], cfg.dataloader.test
    with preserved_randomness(device):
        backbone, task = build_downstream(context, weights)
        chosen = sample_indices(len(dataset), len(dataset) if worst else images, seed)
        settings = (device, loader.batch_size, loader.get("num_workers", 0))
        predictions = predict(backbone, task, dataset, chosen, *settings)
    if worst:
        predictions = sorted(predictions, key=lambda one: one.quality)[:images]
    samples = samples_of(dataset, [one.index for one in predictions])
    choice = "the worst" if worst else "drawn at random"
    title = f"{cfg.train.init} on {_described(cfg, 'test')}: {len(samples)} of {len(dataset)} images, {choice}"
    return draw_predictions(samples, predictions, dataset.classes, title, threshold)


class EmbeddingsPicture(NamedTuple):
    """The figure, and what it was drawn from: the maps, the names of the classes and of the images."""

    figure: Figure
    embeddings: list[Embedding]
    classes: list[str]
    names: list[str]


def picture_embeddings(
    cfg: DictConfig, sources: Sequence[str], images: int = 1000, seed: int = 0, architecture: str | None = None
) -> EmbeddingsPicture:
    """The test features of several backbones as maps side by side, with kNN from the training set and silhouettes.

    Of a detection set the objects are embedded, each a square crop around its box. Of a multi-label set images of one
    class have its colour and are in the figures, the others are on the map as having several classes or none. Images
    are normalised as a backbone's own were; where a file does not say how, as the config's pretext images are.

    Args:
        sources: see :func:`bissl_zoo.report.images.run_backbones.load_stages`.
        images: most of either set, drawn with `seed`.
        architecture: timm's name, of files that do not say it.
    Raises:
        DatasetError: a set is missing or damaged, has targets of another kind, or fewer than 3 images.
        CheckpointError: a source without a whole backbone.
        ZooError: there is no such entry or file.
    """
    device = choose_device(cfg.train.device)
    data = build_datasets(cfg, {"train", "test"})
    classes, target = data["test"].classes, data["test"][0][1]
    crops, several = isinstance(target, dict), isinstance(target, Tensor)
    sets = {role: _single_labels(data[role], role) for role in ("train", "test")}
    chosen = {role: sample_indices(len(dataset), images, seed) for role, dataset in sets.items()}
    if len(chosen["test"]) < LEAST_POINTS:
        what = "objects" if crops else "images"
        raise DatasetError(
            f"dataloader.test gives {len(chosen['test'])} {what}; a map of embeddings needs {LEAST_POINTS} or more."
        )
    embeddings, counts = [], [0, 0]
    with preserved_randomness(device):
        for source in sources:
            for name, backbone in load_stages(source, architecture):
                parts: list[Tensor] = []
                for role, dataset in sets.items():
                    workers = cfg.dataloader[role].get("num_workers", 0)
                    parts += _features(backbone, dataset, chosen[role], cfg, device, workers)
                embeddings.append(embedding(name, *parts, k=NEIGHBOURS, seed=seed, classes=len(classes)))
                counts = [int((labels < len(classes)).sum()) for labels in parts[1::2]]
    what = "crops of the true boxes" if crops else "images"
    title = f"t-SNE of {len(chosen['test'])} {what}, {_described(cfg, 'test')}"
    notes = [
        f"kNN: top-1 with k = {NEIGHBOURS}, from {counts[0]} {what} of dataloader.train",
        "silhouette: of the features, by cosine distance",
    ]
    if several:
        notes += [f"both of images of one class only, here {counts[1]} of {len(chosen['test'])}"]
        classes = [*classes, *MIXED]
    names = [_name(sets["test"], index) for index in chosen["test"]]
    return EmbeddingsPicture(draw_embeddings(embeddings, classes, title, notes), embeddings, classes, names)


def _single_labels(dataset: Dataset, role: str) -> Dataset:
    """The set itself where its targets are classes, else its objects, or its images by their only class."""
    target = dataset[0][1]
    if isinstance(target, dict):
        return BoxCrops(dataset)
    if isinstance(target, Tensor) and target.shape == (len(dataset.classes),):
        return OneClass(dataset)
    if not isinstance(target, int):
        raise DatasetError(
            f"dataloader.{role} has targets of type {type(target).__name__}; a map of embeddings colours images by "
            "their classes, or objects by that of their box. Give the config of a classification or a detection."
        )
    return dataset


def _features(
    backbone: FrozenBackbone,
    dataset: Dataset,
    chosen: Sequence[int],
    cfg: DictConfig,
    device: torch.device,
    num_workers: int,
) -> tuple[Tensor, ...]:
    pixels: dict[str, Any] = {**pretext_pixels(cfg), **backbone.pixels}
    size = pixels["input_size"][-1]
    backbone = replace(backbone, model=backbone.model.to(device))
    backbone.width(size)  # tells where the network takes no such images
    crops = CentralCrops(dataset, chosen, size, pixels["mean"], pixels["std"])
    return extract_features(backbone.model, crops, device, BATCH, num_workers)


def _name(dataset: Dataset, index: int) -> str:
    source = getattr(dataset, "source", None)
    return source(index) if source else str(index)


def _described(cfg: DictConfig, role: str) -> str:
    dataset = cfg.dataloader[role].dataset
    return f"{dataset.get('root') or dataset.name} ({role})"
