"""Build the objects of a stage from the config: data sets, networks, loaders, levels."""

import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from bissl_zoo.backbones import Backbone, Tail, share
from bissl_zoo.backbones.lora import add_lora
from bissl_zoo.bilevel.level import Level
from bissl_zoo.config import instantiate
from bissl_zoo.data.datasets.catalog import datasets_root
from bissl_zoo.data.datasets.subsets import label_fraction, split_fold, without
from bissl_zoo.data.loaders import PlacedSampler
from bissl_zoo.data.samples import to_device
from bissl_zoo.data.views import two_parts
from bissl_zoo.distributed import broadcast_module
from bissl_zoo.downstream import DownstreamTask
from bissl_zoo.engine import ROLES
from bissl_zoo.engine.trainer import Context, Weights, load_state
from bissl_zoo.errors import ConfigError, DatasetError, shorten
from bissl_zoo.pretext import PretextMethod
from bissl_zoo.registry import STAGES

logger = logging.getLogger(__name__)

#: values of `train.amp` and the dtype of autocast
AMP_DTYPES = {None: None, "bf16": torch.bfloat16}
#: samples that are tried in place of one that cannot be decoded
TRIES = 5


def build_part(call: DictConfig, **extra: Any) -> Any:
    """Instantiate a section of the config, with `extra` arguments.

    Raises:
        ConfigError: as `instantiate` does, and if the part refuses a value; with the section's key.
    """
    try:
        return instantiate(call, **extra)
    except ValueError as error:
        raise ConfigError(f"{call._get_full_key(None)}: {error}") from error


def data_roles(cfg: DictConfig) -> set[str]:
    """Return the roles whose data sets the stages of a config read."""
    roles = {role for stage in cfg.train.stages for role in STAGES.get(stage).data_roles}
    return roles if "val" in cfg.dataloader else roles - {"val"}


def build_datasets(cfg: DictConfig, roles: set[str]) -> dict[str, Dataset]:
    """Build and check the data sets of the roles `pretext`, `train`, `val`, `test`.

    Raises:
        DatasetError: missing (the message lists all that are), empty, damaged, unlabelled although labels are needed,
            or with other classes than the training set.
        ConfigError: `val` and `test` are the same samples.
    """
    data, problems = {}, {}
    for role in [role for role in ROLES if role in roles]:
        try:
            data[role] = instantiate(cfg.dataloader[role].dataset)
        except DatasetError as error:
            problem = f"{error}{_check_command(cfg.dataloader[role].dataset)}"
            problems.setdefault(problem, []).append(f"dataloader.{role}")
    if problems:
        raise DatasetError("\n".join(f"{', '.join(where)}: {problem}" for problem, where in problems.items()))
    labelled = [role for role in data if role != "pretext"]
    for role in labelled:
        if data[role].classes is None:
            raise DatasetError(f"dataloader.{role} reads an unlabelled data set; the downstream task needs labels.")
    for role in labelled[1:]:
        _check_classes(labelled[0], data[labelled[0]].classes, role, data[role].classes)
    seed = cfg.train.seed if cfg.train.label_seed is None else cfg.train.label_seed
    if cfg.train.folds and {"pretext", "train", "test"} & data.keys():
        both = [data[role] if role in data else instantiate(cfg.dataloader[role].dataset) for role in ("train", "test")]
        parts = dict(zip(("train", "test"), split_fold(both, cfg.train.folds, seed % cfg.train.folds), strict=True))
        data |= {role: parts[role] for role in parts.keys() & data.keys()}
        if "pretext" in data:  # the unlabelled images may be those of the training set
            data["pretext"] = without(data["pretext"], parts["test"])
    if "train" in data and cfg.train.label_fraction is not None:
        data["train"] = label_fraction(data["train"], cfg.train.label_fraction, seed)
    if {"val", "test"} <= data.keys() and _same_samples(data["val"], data["test"]):
        raise ConfigError(
            "dataloader.val and dataloader.test are the same samples, so weights selected on val would have test "
            "metrics that are too high. Let dataloader.val read another split, such as part=val of an image_folder."
        )
    return data


def _check_command(described: DictConfig) -> str:
    """Return a hint at the command that recognises layouts, if the set has a folder and that exists."""
    path = datasets_root() / described["root"] if described.get("root") else None
    return f" See which layout it has: bissl data --check {path}" if path and path.exists() else ""


def _check_classes(role: str, classes: Sequence[str], other: str, others: Sequence[str]) -> None:
    if list(classes) == list(others):
        return
    lacks = {other: [c for c in classes if c not in set(others)], role: [c for c in others if c not in set(classes)]}
    differences = [
        f"dataloader.{each} lacks {shorten([repr(c) for c in names])}" for each, names in lacks.items() if names
    ]
    raise DatasetError(
        f"dataloader.{role} has the classes {shorten([repr(c) for c in classes])} and dataloader.{other} "
        f"{shorten([repr(c) for c in others])}. {'; '.join(differences) or 'Only the order differs'}. Let both read "
        "splits of one data set, or give both the same list, in which a class may have no images: "
        f"dataloader.{other}.dataset.classes=[...]."
    )


def _same_samples(val: Dataset, test: Dataset) -> bool:
    if len(val) != len(test) or not all(hasattr(dataset, "source") for dataset in (val, test)):
        return False
    # paths, since the digests of folders depend on the names inside each folder only
    first, second = ({os.path.abspath(each.source(index)) for index in range(len(each))} for each in (val, test))
    return first == second


def build_split_backbone(cfg: DictConfig) -> tuple[Backbone, Tail]:
    """Return the trunk that both levels share, up to `bilevel.shared_stage`, and the tail; random weights.

    The trunk also returns the earlier maps in `backbone.out_features`, for tasks that read several.
    """
    return share(instantiate(cfg.backbone), cfg.bilevel.shared_stage, cfg.backbone.get("out_features") or ())


def build_pretext(
    cfg: DictConfig, weights: Weights, device: torch.device, lora: Mapping[str, Any] | None = None
) -> tuple[Backbone, PretextMethod]:
    """Return trunk and pretext method with their parts of `weights`, in train mode on `device`.

    Args:
        lora: arguments of `add_lora` to the trunk; None for no LoRA.
    """
    trunk, tail = build_split_backbone(cfg)
    if weights.backbone is not None:
        load_state(trunk, weights.backbone, "backbone")
    if weights.tail is not None:
        load_state(tail, weights.tail, "backbone's tail")
    if lora:
        add_lora(trunk, **lora)
    pretext = instantiate(cfg.pretext, backbone=trunk, tail=tail)
    if weights.pretext is not None:
        load_state(pretext, weights.pretext, "pretext head")
    return _prepare(cfg, trunk, device), _prepare(cfg, pretext, device)


def build_downstream(
    context: Context, weights: Weights, lora: Mapping[str, Any] | None = None
) -> tuple[Backbone, DownstreamTask]:
    """Return trunk and downstream task with their parts of `weights`, in train mode on the run's device."""
    trunk, _ = build_split_backbone(context.cfg)
    if weights.backbone is not None:
        load_state(trunk, weights.backbone, "backbone")
    if lora:
        add_lora(trunk, **lora)
    task = instantiate(context.cfg.task, backbone=trunk, classes=context.classes)
    if weights.task is not None:
        load_state(task, weights.task, "task head")
    return _prepare(context.cfg, trunk, context.device), _prepare(context.cfg, task, context.device)


def _prepare(cfg: DictConfig, module: nn.Module, device: torch.device) -> nn.Module:
    module.to(device, memory_format=torch.channels_last if cfg.train.channels_last else torch.preserve_format).train()
    broadcast_module(module)
    return module


class Batches:
    """Endless iterator of training batches on the run's device.

    A training stream is a function of its seed and the batch's number, so sample numbers need not be in the batch.

    Args:
        loader: of training batches, as :func:`bissl_zoo.data.loaders.build_train_loader` returns it.
        start_step: batches that an earlier process of the run has taken.
        on_device: the part of the augmentation that runs on the device.
        role: of the data set.

    Attributes:
        taken: batches taken since the beginning of the stage.
        bad: samples that this process could not decode so far: name and error message.
    """

    def __init__(
        self,
        loader: DataLoader,
        start_step: int,
        device: torch.device,
        on_device: Callable[[Any], Any] | None = None,
        role: str = "train",
    ) -> None:
        self.taken = start_step
        self.role = role
        self.bad: dict[str, str] = getattr(loader, "skipped", {})
        self.dataset = getattr(loader.dataset, "dataset", None)
        self._sampler = loader.sampler if isinstance(loader.sampler, PlacedSampler) else None
        self._stream = _moved(loader, device, on_device)  # the only reference to the loader and its workers

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
        """Return the sample numbers in this process's part of the newest batch; None for streamed data."""
        return None if self._sampler is None else self._sampler.batch(self.taken - 1)


def _moved(loader: DataLoader, device: torch.device, on_device: Callable[[Any], Any] | None) -> Iterator[Any]:
    for batch in loader:
        batch = to_device(batch, device)
        yield on_device(batch) if on_device else batch


def build_level(
    cfg: DictConfig,
    name: str,
    role: str,
    backbone: nn.Module,
    head: nn.Module,
    batches: Batches,
    total_steps: int,
    train_backbone: bool = True,
    groups: list[Any] | None = None,
) -> Level:
    """Return a level with the optimizer, schedule and clipping under the key `role` of the config's sections.

    Args:
        groups: parameters or parameter groups of the optimizer; None for all that require gradients.
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
        batch_size=cfg.dataloader[batches.role].batch_size,
    )


class ViewsOnly:
    """Map `(image, target)` to the views of the image; a class, so that spawned loader workers can pickle it."""

    def __init__(self, views: Callable[[Any], tuple[Tensor, ...]]) -> None:
        self.views = views

    def __call__(self, image: Any, target: Any) -> tuple[Tensor, ...]:
        return self.views(image)


def pretext_batches(context: Context, pretext: PretextMethod, seed: int, start_step: int = 0) -> Batches:
    """Return endless batches of views; with `dataloader.pretext.augment_on="device"` they are augmented there.

    Raises:
        ConfigError: the method's augmentation cannot be split between workers and device.
    """
    views = pretext.views()
    if context.cfg.dataloader.pretext.get("augment_on") != "device":
        return _endless(context, "pretext", seed, start_step, transform=ViewsOnly(views))
    crops, on_device = two_parts(views)
    return _endless(context, "pretext", seed, start_step, on_device, transform=ViewsOnly(crops))


def train_batches(context: Context, task: DownstreamTask, seed: int, start_step: int = 0) -> Batches:
    """Return endless downstream training batches."""
    return _endless(context, "train", seed, start_step, transform=task.transform(train=True), collate=task.collate)


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
    return Batches(loader, start_step, context.device, on_device, role)


def test_loader(context: Context, task: DownstreamTask, role: str = "test") -> DataLoader:
    """Return a loader of one pass over this rank's part of the data set `test` or `val`."""
    return instantiate(
        context.cfg.dataloader[role],
        dataset=context.data[role],
        transform=task.transform(train=False),
        collate=task.collate,
    )


def skips_undecodable(cfg: DictConfig, role: str) -> bool:
    """Return True if the loader of `role` skips images that cannot be decoded; by default those of training do."""
    return cfg.dataloader[role].get("on_bad", "skip" if role in ("pretext", "train") else "error") == "skip"


class Decodable(Dataset):
    """A data set that returns one of the next `TRIES` samples, with a warning, for one that cannot be decoded.

    Raises:
        DatasetError: none of them can be decoded; or the first one cannot, if the role does not skip.
    """

    def __init__(self, dataset: Dataset, cfg: DictConfig, role: str) -> None:
        self.dataset, self.tries = dataset, TRIES if skips_undecodable(cfg, role) else 0

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        for candidate in range(index, index + self.tries):
            try:
                return self.dataset[candidate % len(self)]
            except DatasetError as error:
                logger.warning("%s Using the next sample instead.", error)
        return self.dataset[(index + self.tries) % len(self)]


def count_steps(section: DictConfig, key: str, dataset: Dataset, batch_size: int) -> int:
    """Return the optimizer steps of a section that gives either `steps` or `epochs`.

    Raises:
        ConfigError: neither or both are given.
    """
    steps, epochs = section.get("steps"), section.get("epochs")
    if (steps is None) == (epochs is None):
        raise ConfigError(
            f"{key}: give either steps or epochs and leave the other null (steps={steps}, epochs={epochs})."
        )
    return int(steps) if steps is not None else math.ceil(epochs * len(dataset) / batch_size)
