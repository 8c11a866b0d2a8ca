"""What an analysis knows of a config's data sets, and batches of noise of the sizes that they would have."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from torch import nn
from torch.utils.data import Dataset, default_collate

from bissl_zoo.data.batches import to_device
from bissl_zoo.data.prepare.check import known_sets
from bissl_zoo.data.views import two_parts
from bissl_zoo.engine.build import Context, ViewsOnly, build_datasets, data_roles
from bissl_zoo.errors import DatasetError

#: width and height of the images that augmentations start from, those of a photograph of VOC or ImageNet
IMAGE_SIZE = (500, 375)
#: images of a batch that differ; the others repeat them
DISTINCT = 8
#: images that a data set is taken to have where its number is unknown; nothing that is reported depends on it
PLACEHOLDER = 1 << 16
#: classes of a task where nothing says how many they are
CLASSES = 20


@dataclass
class KnownData:
    """What is known of the data sets of a run; plain values, so that it can be handed to another process.

    Attributes:
        lengths: images by role, None where the data set is not there.
        classes: names of the downstream classes.
        notes: sentences on what is not known.
    """

    lengths: dict[str, int | None]
    classes: list[str]
    notes: list[str] = field(default_factory=list)


class Noise(Dataset):
    """Images of noise without targets."""

    def __init__(self, length: int, classes: list[str] | None = None) -> None:
        self.length = length
        self.classes = classes

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Image.Image, None]:
        width, height = IMAGE_SIZE
        pixels = np.random.default_rng(index).integers(0, 256, (height, width, 3), dtype=np.uint8)
        return Image.fromarray(pixels), None


def look_at_data(cfg: DictConfig) -> KnownData:
    """Open the data sets that the config's stages train on, as far as they are there."""
    roles = sorted(data_roles(cfg) - {"val", "test"})
    lengths: dict[str, int | None] = {}
    classes: list[str] | None = None
    notes = []
    for role in roles:
        try:
            dataset = build_datasets(cfg, {role})[role]
        except DatasetError as error:
            lengths[role] = None
            notes.append(f"The data set of dataloader.{role} is not there, so epochs of it are no steps: {error}")
        else:
            lengths[role] = len(dataset)
            classes = list(dataset.classes) if role == "train" else classes
    if "train" in roles and classes is None:
        classes = _stated_classes(cfg)
        if classes is None:
            classes = _names(CLASSES)
            notes.append(f"The classes of dataloader.train are unknown too; {CLASSES} were taken.")
    return KnownData(lengths, classes or _names(1), notes)


def _stated_classes(cfg: DictConfig) -> list[str] | None:
    """The classes that the config names, or as many as the original of a data set has; None where nothing tells."""
    described = cfg.dataloader.train.dataset
    given = described.get("classes")
    if OmegaConf.is_list(given):
        return [str(name) for name in given]
    known = known_sets().get(described.get("name"))
    return _names(known.classes) if known else None


def _names(number: int) -> list[str]:
    return [f"class {index}" for index in range(number)]


def noise_context(cfg: DictConfig, known: KnownData, device: torch.device) -> Context:
    """A run's context whose data sets are noise."""
    data = {}
    for role, length in known.lengths.items():
        data[role] = Noise(PLACEHOLDER if length is None else length, known.classes if role == "train" else None)
    return Context(cfg, data, device)


def noise_batch(context: Context, role: str, head: nn.Module, size: int | None = None) -> Any:
    """A batch of `role` as `head`, a pretext method or a task, would get it.

    Args:
        size: images in it; None for the config's batch.
    """
    settings: Mapping[str, Any] = context.cfg.dataloader[role]
    size = settings["batch_size"] if size is None else size
    if role != "pretext":
        return to_device(head.example_batch(size, IMAGE_SIZE[::-1]), context.device)
    views, finish = head.views(), None
    if settings.get("augment_on") == "device":
        views, finish = two_parts(views)
    transform = ViewsOnly(views)
    samples = [transform(*context.data[role][index]) for index in range(min(size, DISTINCT))]
    batch = to_device(default_collate([samples[index % len(samples)] for index in range(size)]), context.device)
    return finish(batch) if finish else batch
