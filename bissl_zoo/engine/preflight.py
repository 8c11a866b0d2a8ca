"""Checks before a run creates its directory: its data, and one small batch through every stage; and the dry run."""

import contextlib
import copy
import gc
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from tabulate import tabulate

from bissl_zoo.backbones import tail_input
from bissl_zoo.bilevel import BiLevel
from bissl_zoo.config import LazyConfig, instantiate
from bissl_zoo.distributed import get_world_size, is_main_process
from bissl_zoo.engine.build import build_split_backbone, data_roles
from bissl_zoo.engine.checks import check_config, check_parts, open_context
from bissl_zoo.engine.evaluate import metric_names
from bissl_zoo.engine.init import adopt_pixels, load_init
from bissl_zoo.engine.resume import preserved_randomness
from bissl_zoo.engine.stages import coupling, plan_stages
from bissl_zoo.engine.trainer import Context, Stage, Trainer, Weights
from bissl_zoo.errors import BisslZooError, CheckpointError, ConfigError, DatasetError, shorten
from bissl_zoo.registry import STAGES

logger = logging.getLogger(__name__)

#: images of each data set that are looked at, and images of each process in the batch that passes through the stages
SAMPLED, TRIED = 8, 2
#: loader workers per CPU core above which they hinder each other
MANY_WORKERS = 2


def preflight(context: Context, initial: Weights, stages: Sequence[Stage]) -> None:
    """Check data and initial weights, and pass one small real batch forward and backward through every stage.

    It builds its networks and loaders and restores the random state, so the run is the same without it.

    Args:
        initial: the weights that the first stage starts from.
        stages: of the run, in order.
    Raises:
        BisslZooError: what would otherwise end the run later; the message names the stage, the part and the cause.
    """
    check_finite(initial, str(context.cfg.train.init))
    with preserved_randomness(context.device):
        check_data(context)
        try_stages(context, initial, stages)
    gc.collect()


def check_finite(weights: Weights, name: str) -> None:
    """Raise CheckpointError if a tensor of the weights that `name` brings contains NaN or Inf."""
    for part in ("backbone", "tail", "pretext", "task"):
        for key, value in (getattr(weights, part) or {}).items():
            if value.is_floating_point() and not value.isfinite().all():
                raise CheckpointError(
                    f"train.init={name}: '{key}' of the {part} contains NaN or Inf. Start from other weights."
                )


def check_data(context: Context) -> None:
    """Check images, objects, sizes and workers of the data sets; log a warning for what only looks wrong.

    Raises:
        DatasetError: all sampled images are equal or of one colour, or a labelled set has no objects.
    """
    counts = {role: count for role, data in context.data.items() if (count := class_counts(data)) is not None}
    for role, data in context.data.items():
        if not hasattr(data, "stream"):  # shards are read from front to back
            _check_images(f"dataloader.{role}", data)
        if role in counts and not counts[role].any():
            purpose = "to learn from" if role == "train" else "to evaluate on, so its metrics are not defined"
            raise DatasetError(
                f"dataloader.{role} has {len(data):,} images and no objects {purpose}. Check it with `bissl "
                "data --check`, or read another split."
            )
        _check_loader(role, len(data), context.cfg)
    for role in counts.keys() - {"train"}:
        _warn_of_classes(role, counts.get("train"), counts[role], context.classes)


def class_counts(data: Any) -> np.ndarray | None:
    """Return the number of images or objects of each class that a data set has, int64 (K,); None if it is unknown."""
    targets, classes = getattr(data, "targets", None), getattr(data, "classes", None)
    if targets is None or classes is None:
        return None
    if targets.ndim == 2:  # several labels per image
        return (targets == 1).sum(axis=0)
    return np.bincount(targets, minlength=len(classes))


def _check_images(where: str, data: Any) -> None:
    numbers = sorted({number * len(data) // SAMPLED for number in range(SAMPLED)})
    images = {}
    for number in numbers:
        with contextlib.suppress(DatasetError):  # the loader decides about images that cannot be decoded
            images[number] = np.asarray(data[number][0])
    if not images:
        return
    name = getattr(data, "source", "sample {}".format)(next(iter(images)))
    plain = sum(bool((image == image.reshape(-1, *image.shape[2:])[0]).all()) for image in images.values())
    if plain == len(images):
        raise DatasetError(
            f"{where}: all of {plain} sampled images are of one colour, such as {name}. Check the files."
        )
    if len({image.tobytes() for image in images.values()}) == 1 < len(images):
        raise DatasetError(f"{where}: all of {len(images)} sampled images are equal, such as {name}. Check the files.")
    if plain:
        logger.warning(f"{where}: {plain} of {len(images)} sampled images are of one colour.")


def _check_loader(role: str, size: int, cfg: DictConfig) -> None:
    loader, where = cfg.dataloader[role], f"dataloader.{role}"
    if role in ("pretext", "train") and loader.batch_size > size:
        logger.warning(
            f"{where}.batch_size={loader.batch_size:,} is more than the {size:,} images of the set: every batch has "
            "images twice. Set a smaller one."
        )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = loader.get("num_workers", 0) * int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if workers > MANY_WORKERS * cores:
        logger.warning(
            f"{where}.num_workers: {workers} processes on {cores} CPU cores slow each other down; set fewer."
        )


def _warn_of_classes(role: str, train: np.ndarray | None, counts: np.ndarray, classes: Sequence[str]) -> None:
    absent = [name for name, count in zip(classes, counts, strict=True) if not count]
    if absent:
        logger.warning(
            f"dataloader.{role} has no objects of {len(absent)} of {len(classes)} classes: {shorten(absent)}."
        )
    if train is None:
        return
    unseen = [name for name, seen, count in zip(classes, train, counts, strict=True) if count and not seen]
    if unseen:
        logger.warning(
            f"dataloader.{role} has classes that dataloader.train lacks and nothing learns: {shorten(unseen)}."
        )


def try_stages(context: Context, initial: Weights, stages: Sequence[Stage]) -> None:
    """Pass a batch of `TRIED` images per process forward and backward through every stage.

    Raises:
        ConfigError: a part raises an exception.
    """
    trial, weights, tried = _trial(context), initial, set()
    for stage in stages:
        if type(stage) in tried:  # the baseline of a fine-tuning
            continue
        tried.add(type(stage))
        with _naming(stage, "its networks", context):
            trainer = stage.build(trial, weights)
        try:
            _try_stage(stage, trainer, trial)
            weights = weights if stage.evaluates else trainer.result()
        finally:
            trainer.close()


def _try_stage(stage: Stage, trainer: Trainer, trial: Context) -> None:
    for level in trainer.levels().values():
        with _naming(stage, type(level.head).__name__, trial, getattr(level.data_iterator, "role", None)):
            batch = level.next_batch()
            loss, _ = level.loss(level.backbone, batch)
            if level.parameters:  # the warm-up of a method without parameters has none
                loss.backward()
            level.optimizer.zero_grad(set_to_none=True)
        problem = getattr(trainer, "problem", None)
        if isinstance(problem, BiLevel) and level is problem.lower:
            with _naming(stage, f"the curvature of {type(level.head).__name__}", trial, "pretext"):
                problem.time_constant = 1.0  # measured in lower steps
                operator = problem.curvature(batch).prepare()
                operator.hessian_product(torch.ones(sum(operator.block_sizes), device=trial.device))
                operator.release()
    if stage.evaluates:
        with _naming(stage, f"the evaluation of {type(level.head).__name__}", trial, "test"):
            metric_names(trial, level.backbone, level.head, "test")


def _trial(context: Context) -> Context:
    """Return the context with small batches that this process loads itself."""
    cfg = OmegaConf.create(OmegaConf.to_container(context.cfg))
    data = dict(context.data)
    for role in data.keys() & {"pretext", "train"}:
        loader = cfg.dataloader[role]
        loader.update(batch_size=min(loader.batch_size, TRIED * get_world_size()), num_workers=0)
        if hasattr(data[role], "shuffle_buffer"):  # which would be filled first
            data[role] = copy.copy(data[role])
            data[role].shuffle_buffer = 1
    cfg.pretrain.update(accumulate=1, compile=False)
    cfg.bilevel.curvature_batch_size = None
    return replace(context, cfg=cfg, data=data)


@contextlib.contextmanager
def _naming(stage: Stage, part: str, context: Context, role: str | None = None) -> Iterator[None]:
    """Raise any exception of a part as a ConfigError with the stage, the part and the cause."""
    try:
        yield
    except BisslZooError:
        raise
    except Exception as error:  # parts raise what their libraries raise
        size = context.cfg.dataloader[role].batch_size if role in ("pretext", "train") else 1
        batch = f" on a batch of {size} from dataloader.{role}" if role else ""
        cause = (str(error).strip() or "no message").splitlines()[0]
        raise ConfigError(f"The stage {stage.name} fails in {part}{batch}: {type(error).__name__}: {cause}") from error


def describe(cfg: DictConfig, source: str) -> str:
    """Return stages, steps, data, shapes and parameters of a run of `cfg` as text, after all checks of a run.

    Raises:
        DatasetError: data sets are missing; it lists them all, and the rest of the description is printed.
    """
    check_config(cfg, source)
    networks = _networks(cfg, ["a class", "another class"])  # first, since it names a missing extra
    config = f"config {source}\n{LazyConfig.to_py(cfg)}"
    try:
        context = open_context(cfg, source)
    except DatasetError:
        rows = [[name, STAGES.get(name).section or "bilevel"] for name in cfg.train.stages]
        stages = f"stages\n{tabulate(rows, headers=['stage', 'length: see'])}"
        if is_main_process():
            print("\n\n".join([config, stages, *networks, "The head is that of two classes; the data decide.\n"]))
        raise
    initial, _ = load_init(cfg.train.init, cfg)
    adopt_pixels(cfg, initial.pixels)
    check_parts(context, initial)
    stages = plan_stages(context, initial)
    preflight(context, initial, stages)
    rows = [[f"{s.name} (baseline)" if getattr(s, "baseline", False) else s.name, *s.describe(context)] for s in stages]
    data = [
        [role, cfg.dataloader[role].dataset.name, len(dataset), len(dataset.classes or ()) or "unlabelled"]
        for role, dataset in context.data.items()
    ]
    parts = [
        config,
        f"stages\n{tabulate(rows, headers=['stage', 'steps', 'batch'])}",
        f"data\n{tabulate(data, headers=['role', 'data set', 'images', 'classes'])}",
        *_networks(cfg, context.classes if "train" in context.data else ()),
    ]
    if any(stage.unit == "alternation" for stage in stages):
        value, product = coupling(context), "lambda * lr_eff * lower steps"
        kind = cfg.optimizer.lower["_target_"].rpartition(".")[2]
        parts.append(
            f"{product} = {value:.3g} (useful: 1 to 10)" if value is not None else f"{product}: unknown for {kind}"
        )
    return "\n\n".join(parts)


def _networks(cfg: DictConfig, classes: Sequence[str]) -> list[str]:
    """Return tables of the numbers of trained parameters and of the shapes of a pretext view."""
    roles = data_roles(cfg)
    trunk, tail = build_split_backbone(cfg)
    modules = {"shared backbone": trunk, "tail": tail}
    if "pretext" in roles:
        modules["pretext head, tail included"] = instantiate(cfg.pretext, backbone=trunk, tail=tail)
    if "train" in roles:
        modules["task head"] = instantiate(cfg.task, backbone=trunk, classes=list(classes))
    counts = {name: sum(p.numel() for p in module.parameters() if p.requires_grad) for name, module in modules.items()}
    augmentation = cfg.pretext.get("augmentation")
    images = torch.zeros(1, 3, *[augmentation.size if augmentation else 96] * 2)
    with torch.no_grad():
        features = trunk.eval()(images)
        embedding = tail.eval()(tail_input(features, trunk.out_features[-1]))
    maps = {"pretext view": images, **{f"shared map {name}": value for name, value in features.items()}}
    shapes = [[name, tuple(value.shape[1:])] for name, value in {**maps, "embedding": embedding}.items()]
    return [
        f"parameters\n{tabulate([[name, f'{count:,}'] for name, count in counts.items()])}",
        f"shapes\n{tabulate(shapes)}",
    ]
