"""From a config to the objects of a stage: data sets, networks, loaders, levels."""

import inspect
import json
import logging
import math
import os
import random
import shlex
from collections.abc import Callable, Iterator, Sequence
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
from bissl_zoo.data.batches import to_device
from bissl_zoo.data.datasets.boxes import shown_names
from bissl_zoo.data.device_views import two_parts
from bissl_zoo.data.loaders import PlacedSampler
from bissl_zoo.distributed import broadcast_module, get_rank
from bissl_zoo.downstream import DownstreamTask
from bissl_zoo.engine import ROLES
from bissl_zoo.engine.trainer import load_state
from bissl_zoo.errors import ConfigError, DatasetError
from bissl_zoo.pretext import PretextMethod
from bissl_zoo.registry import DATASETS

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


class Batches:
    """Endless batches on the run's device.

    The samples of a batch need not travel with it: a training stream is a function of its seed and the batch's number.

    Args:
        loader: of training batches, as :func:`bissl_zoo.data.loaders.build_train_loader` makes it.
        start_step: number of batches already taken by an earlier part of the run.
        on_device: makes what is left to be made of a batch once it is there.

    Attributes:
        taken: batches taken since the beginning of the stage.
        bad: the samples that this process could not use so far: what names each, and what is wrong with it.
    """

    def __init__(
        self,
        loader: DataLoader,
        start_step: int,
        device: torch.device,
        on_device: Callable[[Any], Any] | None = None,
    ) -> None:
        self.taken = start_step
        self.bad: dict[str, str] = getattr(loader, "skipped", {})
        self.dataset = getattr(loader.dataset, "dataset", None)
        self._sampler = loader.sampler if isinstance(loader.sampler, PlacedSampler) else None
        self._stream = _moved(loader, device, on_device)  # alone holds the loader, and with it the workers

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        batch = next(self._stream)
        self.taken += 1
        return batch

    def close(self) -> None:
        """End the loader's workers."""
        self._stream.close()

    def newest(self) -> list[int] | None:
        """Numbers of the samples in this process's part of the newest batch; None of data that is read in a stream."""
        return None if self._sampler is None else self._sampler.batch(self.taken - 1)


def _moved(loader: DataLoader, device: torch.device, on_device: Callable[[Any], Any] | None) -> Iterator[Any]:
    for batch in loader:
        batch = to_device(batch, device)
        yield on_device(batch) if on_device else batch


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


#: classes that an override can be expected to name
_MOST_TYPED = 40


def unequal_classes(cfg: DictConfig, role: str, classes: Sequence[str], other: str, others: Sequence[str]) -> str:
    """The message for two roles of `cfg.dataloader` with unlike classes: which differ, and the overrides that help."""
    told = f"dataloader.{role} has the classes {_shown(classes)} and dataloader.{other} {_shown(others)}. "
    lacks = {other: _without(classes, others), role: _without(others, classes)}
    differing = [f"dataloader.{one} lacks {_shown(names)}" for one, names in lacks.items() if names]
    told += f"{'; '.join(differing) or 'They are the same in another order'}. "
    wanted = list(classes) if not lacks[role] else list(others) if not lacks[other] else [*classes, *lacks[role]]
    changed = [one for one, names in ((role, classes), (other, others)) if list(names) != wanted]
    for one in changed:
        if not _takes_classes(cfg, one):
            name = cfg.dataloader[one].dataset.get("name")
            return f"{told}The classes of '{name}' are fixed, so let both read splits of one data set."
    typed = [_override(cfg, one, wanted) for one in changed]
    return f"{told}Give both the same list; a class may have no images in one of them:\n  " + " ".join(typed)


def _override(cfg: DictConfig, role: str, classes: Sequence[str]) -> str:
    add = "" if "classes" in cfg.dataloader[role].dataset else "+"
    key = f"{add}dataloader.{role}.dataset.classes"
    if len(classes) <= _MOST_TYPED:
        return shlex.quote(f"{key}={json.dumps(list(classes), ensure_ascii=False)}")
    first = json.dumps(list(classes[:3]), ensure_ascii=False)[:-1]
    return f"'{key}={first}, ...]' (all {len(classes)}, better in the config file)"


def _takes_classes(cfg: DictConfig, role: str) -> bool:
    """Whether a role's data set has the argument `classes`; one that is not registered is taken to have it."""
    name = cfg.dataloader[role].dataset.get("name")
    return name not in DATASETS or "classes" in inspect.signature(DATASETS.get(name)).parameters


def _without(names: Sequence[str], others: Sequence[str]) -> list[str]:
    held = set(others)
    return [name for name in names if name not in held]


def _shown(names: Sequence[str]) -> str:
    return shown_names([repr(name) for name in names])


logger = logging.getLogger(__name__)

#: neighbours that are looked at in place of one that cannot be used
TRIES = 5


def skips(cfg: DictConfig, role: str) -> bool:
    """Whether the loader of that role goes on without an image that cannot be used, as those of training do."""
    return cfg.dataloader[role].get("on_bad", "skip" if role in ("pretext", "train") else "error") == "skip"


class Readable(Dataset):
    """A data set in which one of the `TRIES` samples that follow stands in for one that cannot be used, with a warning.

    Raises:
        DatasetError: none of them can be used; or the one that is asked for, where the role does not skip.
    """

    def __init__(self, dataset: Dataset, cfg: DictConfig, role: str) -> None:
        self.dataset, self.tries = dataset, TRIES if skips(cfg, role) else 0

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        for following in range(index, index + self.tries):
            try:
                return self.dataset[following % len(self)]
            except DatasetError as error:
                logger.warning("%s The one that follows is looked at in its place.", error)
        return self.dataset[(index + self.tries) % len(self)]
