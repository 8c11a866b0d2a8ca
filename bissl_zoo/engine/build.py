"""From a config to the objects of a stage: data sets, networks, loaders, levels."""

import math
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from bissl_zoo.backbones import Backbone, Tail
from bissl_zoo.bilevel.level import Level
from bissl_zoo.config import instantiate
from bissl_zoo.data.device_views import two_parts
from bissl_zoo.distributed import broadcast_module, get_rank
from bissl_zoo.downstream import DownstreamTask
from bissl_zoo.engine import ROLES
from bissl_zoo.engine.batches import Batches
from bissl_zoo.engine.class_lists import unequal_classes
from bissl_zoo.engine.trainer import load_state
from bissl_zoo.errors import ConfigError, DatasetError
from bissl_zoo.pretext import PretextMethod

#: which data sets a stage reads; fine-tuning also `val`, where the config has it
STAGE_DATA = {"pretrain": ("pretext",), "bissl": ("pretext", "train"), "finetune": ("train", "test")}

#: what `train.amp` may be, and the type of autocast it stands for
AMP_DTYPES = {None: None, "bf16": torch.bfloat16}


@dataclass
class Weights:
    """What a stage leaves and the next one starts from: state dicts, None where there is none yet.

    Attributes:
        backbone: of the trunk, under timm's names.
        tail: of the rest of the backbone, where it does not come with `pretext`.
        pretext: of the pretext method, the tail of the split backbone included.
        task: of the downstream task.
    """

    backbone: dict[str, Tensor] | None = None
    tail: dict[str, Tensor] | None = None
    pretext: dict[str, Tensor] | None = None
    task: dict[str, Tensor] | None = None


@dataclass
class Context:
    """What all stages of a run share."""

    cfg: DictConfig
    data: dict[str, Dataset]
    device: torch.device

    @property
    def classes(self) -> list[str]:
        """Names of the downstream classes, from the first labelled set there is."""
        return self.data.get("train", self.data.get("test")).classes


def build_part(call: DictConfig, **extra: Any) -> Any:
    """Make the call that a section of the config describes, with `extra` arguments.

    Raises:
        ConfigError: as `instantiate` does; and where the part itself refuses a value, with the section's key.
    """
    try:
        return instantiate(call, **extra)
    except ValueError as error:
        raise ConfigError(f"{call._get_full_key(None)}: {error}") from error


def build_datasets(cfg: DictConfig, roles: set[str]) -> dict[str, Dataset]:
    """The data sets of the roles `pretext`, `train`, `val`, `test`, each checked as it is built.

    Raises:
        DatasetError: missing, empty, damaged, unlabelled where labels are needed, or of other classes than the training
            set.
        ConfigError: `val` and `test` are the same samples.
    """
    data = {role: instantiate(cfg.dataloader[role].dataset) for role in ROLES if role in roles}
    labelled = [role for role in data if role != "pretext"]
    for role in labelled:
        if data[role].classes is None:
            raise DatasetError(f"dataloader.{role} reads an unlabelled data set; the downstream task needs labels.")
    for role in labelled[1:]:
        if data[role].classes != data[labelled[0]].classes:
            raise DatasetError(unequal_classes(cfg, labelled[0], data[labelled[0]].classes, role, data[role].classes))
    if {"val", "test"} <= data.keys() and same_samples(data["val"], data["test"]):
        raise ConfigError(
            "dataloader.val and dataloader.test are the same samples: weights that are chosen by them would have test "
            "figures that are too good. Let dataloader.val read images that are kept back from the training set, such "
            "as another split, or part=val of an image_folder."
        )
    return data


def same_samples(one: Dataset, other: Dataset) -> bool:
    """Whether two data sets read the same files; of sets that do not know theirs, it is not known and False."""
    if len(one) != len(other) or not all(hasattr(dataset, "source") for dataset in (one, other)):
        return False
    # not their digests: those of folders that lie elsewhere count names from the folder itself
    first, second = ({os.path.abspath(each.source(index)) for index in range(len(each))} for each in (one, other))
    return first == second


def build_split_backbone(cfg: DictConfig) -> tuple[Backbone, Tail]:
    """The trunk that both levels share, up to `bilevel.shared_stage`, and the tail; random weights.

    The trunk also returns the earlier maps that `backbone.out_features` names, for tasks that take several.
    """
    whole = instantiate(cfg.backbone)
    return whole.split(cfg.bilevel.shared_stage or whole.stages[-1], cfg.backbone.get("out_features") or ())


def build_pretext(cfg: DictConfig, weights: Weights, device: torch.device) -> tuple[Backbone, PretextMethod]:
    """Trunk and pretext method with what `weights` holds for them, in train mode."""
    trunk, tail = build_split_backbone(cfg)
    if weights.backbone is not None:
        load_state(trunk, weights.backbone, "backbone")
    if weights.tail is not None:
        load_state(tail, weights.tail, "backbone's tail")
    pretext = instantiate(cfg.pretext, backbone=trunk, tail=tail)
    if weights.pretext is not None:
        load_state(pretext, weights.pretext, "pretext head")
    return _ready(trunk, device), _ready(pretext, device)


def build_downstream(context: Context, weights: Weights) -> tuple[Backbone, DownstreamTask]:
    """Trunk and downstream task with what `weights` holds for them, in train mode."""
    trunk, _ = build_split_backbone(context.cfg)
    if weights.backbone is not None:
        load_state(trunk, weights.backbone, "backbone")
    task = instantiate(context.cfg.task, backbone=trunk, classes=context.classes)
    if weights.task is not None:
        load_state(task, weights.task, "task head")
    return _ready(trunk, context.device), _ready(task, context.device)


def _ready(module: nn.Module, device: torch.device) -> nn.Module:
    module.to(device).train()
    broadcast_module(module)
    return module


def build_level(
    cfg: DictConfig,
    name: str,
    role: str,
    backbone: nn.Module,
    head: nn.Module,
    batches: Iterator[Any],
    total_steps: int,
    train_backbone: bool = True,
    groups: list[Any] | None = None,
) -> Level:
    """A level whose optimizer, schedule and clipping are those of `role` in the config's sections of that name.

    Args:
        groups: what the optimizer is given; None for all parameters that require gradients.
    """
    if not train_backbone:
        backbone.requires_grad_(False)
    parameters = groups or [p for module in (backbone, head) for p in module.parameters() if p.requires_grad]
    return Level(
        name=name,
        backbone=backbone,
        head=head,
        optimizer=build_part(cfg.optimizer[role], params=parameters),
        data_iterator=batches,
        lr_scheduler=build_part(cfg.lr_multiplier[role]),
        total_steps=total_steps,
        clip_norm=cfg.clip_grad[role],
        amp_dtype=AMP_DTYPES[cfg.train.amp],
        batch_size=cfg.dataloader["pretext" if role in ("pretrain", "lower") else "train"].batch_size,
    )


class ViewsOnly:
    """`(image, target)` -> the views of the image; a class, so that loader workers can be spawned."""

    def __init__(self, views: Callable[[Any], tuple[Tensor, ...]]) -> None:
        self.views = views

    def __call__(self, image: Any, target: Any) -> tuple[Tensor, ...]:
        return self.views(image)


def pretext_batches(context: Context, pretext: PretextMethod, seed: int, start_step: int = 0) -> Batches:
    """Endless batches of views on the run's device; made there if `dataloader.pretext.augment_on` is "device".

    Raises:
        ConfigError: they are to be made there, and the method's augmentation does not come in two parts.
    """
    views = pretext.views()
    if context.cfg.dataloader.pretext.get("augment_on") != "device":
        return _endless(context, "pretext", seed, start_step, transform=ViewsOnly(views))
    crops, on_device = two_parts(views)
    return _endless(context, "pretext", seed, start_step, on_device, transform=ViewsOnly(crops))


def train_batches(context: Context, task: DownstreamTask, seed: int, start_step: int = 0) -> Batches:
    """Endless downstream training batches on the run's device."""
    return _endless(context, "train", seed, start_step, transform=task.transform(train=True), collate=task.collate)


def test_loader(context: Context, task: DownstreamTask, role: str = "test") -> DataLoader:
    """One pass over this rank's part of the set `test` or `val`."""
    return instantiate(
        context.cfg.dataloader[role],
        dataset=context.data[role],
        transform=task.transform(train=False),
        collate=task.collate,
    )


def _endless(
    context: Context,
    role: str,
    seed: int,
    start_step: int,
    on_device: Callable[[Any], Any] | None = None,
    **extra: Any,
) -> Batches:
    loader = instantiate(
        context.cfg.dataloader[role], dataset=context.data[role], seed=seed, start_step=start_step, **extra
    )
    return Batches(loader, start_step, context.device, on_device)


def count_steps(section: DictConfig, key: str, dataset: Dataset, batch_size: int) -> int:
    """Optimizer steps of a section that gives either `steps` or `epochs`.

    Raises:
        ConfigError: neither or both are given.
    """
    steps, epochs = section.get("steps"), section.get("epochs")
    if (steps is None) == (epochs is None):
        raise ConfigError(
            f"{key}: give either steps or epochs and leave the other null (steps={steps}, epochs={epochs})."
        )
    return int(steps) if steps is not None else math.ceil(epochs * len(dataset) / batch_size)


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch; networks built after it are the same on every rank."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def seed_rank(seed: int) -> None:
    """Seed what is drawn during training, differently on each rank."""
    seed_everything(seed + 7919 * (get_rank() + 1))
