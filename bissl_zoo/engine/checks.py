"""What can be known to be wrong before a run starts: its config, and the parts that its stages would build later on."""

import dataclasses
import importlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from bissl_zoo.backbones import Backbone
from bissl_zoo.bilevel import Adaptation
from bissl_zoo.config import LazyConfig, instantiate, load_config, with_defaults
from bissl_zoo.distributed import get_world_size
from bissl_zoo.downstream import DownstreamTask
from bissl_zoo.engine.build import (
    AMP_DTYPES,
    STAGE_DATA,
    Context,
    Readable,
    Weights,
    build_downstream,
    build_part,
    build_pretext,
    pretext_batches,
)
from bissl_zoo.engine.evaluate import figures_of
from bissl_zoo.engine.features import own_randomness
from bissl_zoo.engine.init import ZOO_PREFIX
from bissl_zoo.engine.publishing import check_entry_name
from bissl_zoo.engine.stages.finetune import trained_parameters
from bissl_zoo.engine.stages.pretrain import check_accumulation
from bissl_zoo.errors import ConfigError, did_you_mean
from bissl_zoo.progress.writers import check_writers
from bissl_zoo.zoo import get_config

#: the keys of `optimizer`, `lr_multiplier` and `clip_grad` that a stage reads
STAGE_ROLES = {"pretrain": ("pretrain",), "bissl": ("head_warmup", "lower", "upper"), "finetune": ("finetune",)}
_OPEN_SECTIONS = ("optimizer", "lr_multiplier", "dataloader", "backbone", "pretext", "task", "solver")
_LEAST = {
    "train.seed": 0,
    "train.log_period": 1,
    "train.max_skipped": 0,
    "train.checkpoint.period": 1,
    "train.checkpoint.keep": 1,
    "train.probe.period": 0,
    "train.probe.images": 2,
    "train.probe.k": 0,
    "pretrain.steps": 1,
    "pretrain.ema": 0,
    "pretrain.accumulate": 1,
    "bilevel.lower_steps": 1,
    "bilevel.upper_steps": 1,
    "bilevel.alternations": 1,
    "bilevel.curvature_batch_size": 2,
    "bilevel.gamma": 0,
    "bilevel.pretext_warmup.steps": 0,
    "bilevel.head_warmup.steps": 0,
    "finetune.steps": 1,
    "finetune.eval_period": 1,
    "finetune.layer_decay": 0,
    "finetune.early_stopping.patience": 1,
}
_CHOICES = {
    "train.amp": tuple(AMP_DTYPES),
    "train.on_nonfinite": ("stop", "skip"),
    "bilevel.hvp_mode": ("retain_graph", "recompute"),
    "bilevel.on_bad_hypergradient": ("stop", "plain"),
    "bilevel.head_warmup.backbone_mode": ("eval", "train"),
}


def check_config(cfg: DictConfig, source: str) -> None:
    """Compare the sections, their keys and values with `configs/common/train.py`, which lists them all.

    Raises:
        ConfigError: a section or key that is missing or unknown, with the nearest; a value of another type or out of
            range; stages that do not exist or not in this order.
    """
    reference = load_config("common/train.py")
    for section in [*reference, *_OPEN_SECTIONS]:
        if section not in cfg:
            raise ConfigError(f"{source}: the section '{section}' is missing; start from configs/common/train.py.")
    for section in reference:
        _check_keys(dict(_leaves(cfg[section])), dict(_leaves(reference[section])), section, source)
    for key, least in _LEAST.items():
        value = OmegaConf.select(cfg, key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise ConfigError(f"{source}: {key} is {value!r}; it must be a number, {least} or more, or null.")
        if value is not None and value < least:
            raise ConfigError(f"{source}: {key} is {value}; it must be {least} or more.")
    if (cfg.pretrain.ema or 0) >= 1:
        raise ConfigError(f"{source}: pretrain.ema is {cfg.pretrain.ema}; it must be below 1, such as 0.999, or null.")
    if not cfg.bilevel["lambda"] > 0:
        raise ConfigError(f"{source}: bilevel.lambda is {cfg.bilevel['lambda']}; it must be positive.")
    for key, choices in _CHOICES.items():
        value = OmegaConf.select(cfg, key)
        if value not in choices:
            names = ["null" if choice is None else choice for choice in choices]
            hint = did_you_mean(str(value), names)
            raise ConfigError(f"{source}: {key} is '{value}'; accepted are {' and '.join(names)}.{hint}")
    known = [field.name for field in dataclasses.fields(Adaptation)]
    for key in cfg.bilevel.adaptation or ():
        if key not in known:
            hint = did_you_mean(key, known)
            raise ConfigError(f"{source}: no key 'bilevel.adaptation.{key}'.{hint} Known: {', '.join(known)}.")
    _check_stages(list(cfg.train.stages), source)
    check_writers(list(cfg.train.writers), source)
    _check_early_stopping(cfg, source)
    check_entry_name(cfg, source)


def _check_early_stopping(cfg: DictConfig, source: str) -> None:
    metric, patience = cfg.finetune.early_stopping.metric, cfg.finetune.early_stopping.patience
    if metric is None and patience is not None:
        raise ConfigError(
            f"{source}: finetune.early_stopping.patience={patience} needs finetune.early_stopping.metric, such as AP50."
        )
    if metric is None:
        return
    if cfg.finetune.eval_period is None:
        raise ConfigError(
            f"{source}: finetune.early_stopping needs finetune.eval_period, the steps between evaluations."
        )
    if "val" not in cfg.dataloader:
        raise ConfigError(
            f"{source}: finetune.early_stopping needs dataloader.val: weights that were chosen by the test set would "
            "make its figures worthless. Add it, as in +dataloader.val={...}, like dataloader.test with another split."
        )


def _check_keys(found: dict[str, Any], reference: dict[str, Any], section: str, source: str) -> None:
    optional = tuple(f"{key}." for key, value in reference.items() if value is None)  # may be a section of its own
    for key in sorted(found.keys() - reference.keys()):
        if not key.startswith(optional):
            hint = did_you_mean(key, reference)
            known = ", ".join(sorted(reference))
            raise ConfigError(f"{source}: no key '{section}.{key}'.{hint} Known: {known}.")
    for key, default in reference.items():
        if key not in found:
            raise ConfigError(f"{source}: the key '{section}.{key}' is missing; see configs/common/train.py.")
        either = key.rpartition(".")[2] in ("steps", "epochs")  # null where the other is given
        value, nullable = found[key], default is None or either or section == "clip_grad"
        kinds = (int, float) if isinstance(default, float) or key.endswith("epochs") else (type(default),)
        wrong = default is not None and (not isinstance(value, kinds) or isinstance(value, bool) != (bool in kinds))
        if wrong and not (value is None and nullable):
            expected = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
            raise ConfigError(
                f"{source}: {section}.{key} is {value!r}; it must be "
                f"{expected.get(kinds[-1], 'a ' + kinds[-1].__name__)}, such as {default!r}."
            )


def _leaves(section: DictConfig, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every key of a section and of those in it, dotted, with its value; of lists and sections as plain containers."""
    for key, value in section.items():
        plain = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
        yield f"{prefix}{key}", plain
        if OmegaConf.is_dict(value) and "_target_" not in value:
            yield from _leaves(value, f"{prefix}{key}.")


def _check_stages(stages: list[str], source: str) -> None:
    for stage in stages:
        if stage not in STAGE_DATA:
            hint = did_you_mean(str(stage), STAGE_DATA)
            raise ConfigError(f"{source}: train.stages has '{stage}'.{hint} Stages: {', '.join(STAGE_DATA)}.")
    if not stages or stages != [stage for stage in STAGE_DATA if stage in stages]:
        raise ConfigError(
            f"{source}: train.stages is {stages}; name one or more of {', '.join(STAGE_DATA)}, in this order."
        )


def check_parts(context: Context, initial: Weights) -> None:
    """Build once what the stages build in their turn, and drop it, so that hours of pretraining do not end in a typo.

    Args:
        initial: the weights that the first stage starts from, which must fit.
    Raises:
        BisslZooError: as building the networks, optimizers, schedules, the solver and the loaders does.
    """
    cfg = context.cfg
    world = get_world_size()
    for role in context.data:
        batch_size = cfg.dataloader[role].batch_size
        if not isinstance(batch_size, int) or batch_size < 1 or (role not in ("val", "test") and batch_size % world):
            raise ConfigError(
                f"dataloader.{role}.batch_size={batch_size} must be a positive whole number and, being the batch over "
                f"all processes, a multiple of their number ({world})."
            )
        if role != "pretext" and "augment_on" in cfg.dataloader[role]:
            raise ConfigError(f"dataloader.{role}.augment_on: only dataloader.pretext has views. Remove it.")
        instantiate(cfg.dataloader[role], dataset=context.data[role], transform=None)
    if "pretext" in context.data:
        _, pretext = build_pretext(cfg, initial, context.device)
        pretext_batches(context, pretext, cfg.train.seed)  # reads nothing yet, and refuses views that cannot be
        if "pretrain" in cfg.train.stages:
            check_accumulation(cfg, pretext)
    if "train" in context.data:
        trunk, task = build_downstream(context, Weights(initial.backbone))
        _check_targets(context, task)
        if "finetune" in cfg.train.stages:
            _check_finetune(context, trunk, task)
    for role in (role for stage in cfg.train.stages for role in STAGE_ROLES[stage]):
        build_part(cfg.optimizer[role], params=[torch.zeros(1, requires_grad=True)])
        build_part(cfg.lr_multiplier[role])
    if "bissl" in cfg.train.stages:
        _check_damping(build_part(cfg.solver), cfg.bilevel["lambda"])


def _check_targets(context: Context, task: DownstreamTask) -> None:
    """Take one training sample through the task, which knows the type of its targets.

    Raises:
        ConfigError: the task does not take the targets of the data set.
    """
    cfg = context.cfg
    sample = Readable(context.data["train"], cfg, "train")[0]
    try:
        with own_randomness(context.device):
            task.collate([task.transform(train=True)(*sample)])
    except Exception as error:  # any error of any task means that it does not fit
        raise ConfigError(
            f"The task '{cfg.task.name}' does not fit the data set '{cfg.dataloader.train.dataset.name}' of "
            f"dataloader.train, whose targets are of type {type(sample[1]).__name__}: {error} Change one of them."
        ) from error


def _check_finetune(context: Context, trunk: Backbone, task: DownstreamTask) -> None:
    cfg = context.cfg
    build_part(cfg.optimizer.finetune, params=trained_parameters(cfg, trunk, task))
    metric = cfg.finetune.early_stopping.metric
    names = figures_of(context, trunk, task, "val") if metric else ()
    if metric and metric not in names:
        raise ConfigError(
            f"finetune.early_stopping.metric is '{metric}', which the task '{cfg.task.name}' does not give."
            f"{did_you_mean(metric, names)} It gives {', '.join(name for name in names if '/' not in name)}."
        )


def _check_damping(solver: Any, lam: float) -> None:
    damping = solver.damping
    if damping == "auto":
        if not getattr(solver, "iterations", 0) >= 1 or not getattr(solver, "tolerance", 0) > 0:
            raise ConfigError(
                "solver.damping=auto is the least damping with which solver.iterations reach solver.tolerance; both "
                "must be there and positive. Set them, or give a number for solver.damping."
            )
    elif isinstance(damping, bool) or not isinstance(damping, (int, float)) or not lam + damping > 0:
        raise ConfigError(
            f"solver.damping is {damping!r}; accepted are a number that makes bilevel.lambda + solver.damping "
            f"positive, and auto with a solver that iterates.{did_you_mean(str(damping), ['auto'])}"
        )


def open_config(name: str, overrides: Sequence[str] = ()) -> DictConfig:
    """The config that `--config-file` names, with overrides, after `train.imports` has registered the user's own parts.

    Args:
        name: a path, a shipped config, or `zoo:NAME` for that of a zoo entry. Code that the latter names is not run.
    Raises:
        ConfigError: from loading, overriding and importing.
        ZooError: an entry that is unknown or damaged.
    """
    entry = name.removeprefix(ZOO_PREFIX)
    if entry == name:
        cfg = LazyConfig.apply_overrides(with_defaults(load_config(name)), overrides, source=name)
    else:
        cfg = with_defaults(get_config(entry))
        foreign = list(cfg.train.imports or [])
        cfg.train.imports = None
        cfg = LazyConfig.apply_overrides(cfg, overrides, source=name)
        if foreign and not cfg.train.imports:
            raise ConfigError(
                f"The entry '{entry}' was made with code of its own ({', '.join(foreign)}), which a zoo does not bring "
                "and which is not run unasked. Get that code, look at it, and name it: train.imports=[FILE]."
            )
    for module in cfg.train.imports or []:
        _import(str(module))
    return cfg


def _import(name: str) -> None:
    """Import a module by its name, or a `.py` file by its path from the working directory."""
    file = Path(name).absolute()
    if name.endswith(".py"):
        if not file.is_file():
            raise ConfigError(f"train.imports: there is no file {file}.")
        if str(file.parent) not in sys.path:
            sys.path.insert(0, str(file.parent))  # so that loader workers that are spawned find it as well
    module = file.stem if name.endswith(".py") else name
    try:
        loaded = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if not f"{module}.".startswith(f"{error.name}."):
            raise  # of what the module itself imports
        raise ConfigError(
            f"train.imports: there is no module '{name}'. Install it, or give the path of its file."
        ) from error
    if name.endswith(".py") and Path(loaded.__file__ or "").resolve() != file.resolve():
        raise ConfigError(
            f"train.imports: {file} has the name of another module, {loaded.__file__ or module}. Rename the file."
        )
