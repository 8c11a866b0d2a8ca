"""Open a config and check it, and build its parts once, before a run starts."""

import dataclasses
import importlib
import logging
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from bissl_zoo.bilevel import Adaptation
from bissl_zoo.config import LazyConfig, instantiate, load_config, with_defaults
from bissl_zoo.config.arguments import argument_problems
from bissl_zoo.config.lazy import resolved
from bissl_zoo.distributed import get_world_size
from bissl_zoo.downstream import DownstreamTask
from bissl_zoo.engine.build import (
    Decodable,
    build_datasets,
    build_downstream,
    build_part,
    build_pretext,
    data_roles,
    pretext_batches,
)
from bissl_zoo.engine.hooks import custom_hooks
from bissl_zoo.engine.launch import choose_device
from bissl_zoo.engine.publishing import check_publishing
from bissl_zoo.engine.resume import preserved_randomness
from bissl_zoo.engine.trainer import Context, Weights
from bissl_zoo.errors import ConfigError, did_you_mean
from bissl_zoo.progress.writers import check_writers
from bissl_zoo.registry import STAGES
from bissl_zoo.zoo.hub import restricted_config
from bissl_zoo.zoo.index import ZOO_PREFIX

logger = logging.getLogger(__name__)

_OPEN_SECTIONS = ("optimizer", "lr_multiplier", "dataloader", "backbone", "pretext", "task", "solver")


def open_config(name: str, overrides: Sequence[str] = ()) -> DictConfig:
    """Return the config that `--config-file` names, with overrides, and import the modules of `train.imports`.

    Args:
        name: a path, a shipped config, or `zoo:NAME` for that of a zoo entry, which is data: it sets listed arguments
            and no locations, and no code of it is run (`bissl_zoo.zoo.policy`). The log lists what was taken.
    Raises:
        ConfigError: from loading, overriding and importing.
        ZooError: the entry is unknown or damaged.
    """
    entry = name.removeprefix(ZOO_PREFIX)
    if entry == name:
        cfg = LazyConfig.apply_overrides(with_defaults(load_config(name)), overrides, source=name)
    else:
        imports = [override for override in overrides if override.startswith("train.imports=")]
        for module in LazyConfig.apply_overrides(load_config("common/train.py"), imports).train.imports or []:
            import_parts(str(module))  # the entry may need parts that the user registers
        cfg, left = restricted_config(entry)
        logger.info(f"{name}: took {', '.join(cfg)} from the entry")
        if left:
            logger.info(f"{name}: left to you, with defaults here: {', '.join(left)}")
        cfg = LazyConfig.apply_overrides(cfg, overrides, source=name)
    for module in cfg.train.imports or []:
        import_parts(str(module))
    return cfg


def open_context(cfg: DictConfig, source: str, roles: set[str] | None = None) -> Context:
    """Check the config and open the data sets that its stages (or `roles`) read."""
    check_config(cfg, source)
    device = choose_device(cfg.train.device)
    return Context(cfg, build_datasets(cfg, data_roles(cfg) if roles is None else roles), device)


def import_parts(name: str) -> None:
    """Import a module by name, or a `.py` file by its path."""
    file = Path(name).absolute()
    if name.endswith(".py"):
        if not file.is_file():
            raise ConfigError(f"train.imports: there is no file {file}.")
        if str(file.parent) not in sys.path:
            sys.path.insert(0, str(file.parent))  # also for loader workers that are spawned
    module = file.stem if name.endswith(".py") else name
    try:
        loaded = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if not f"{module}.".startswith(f"{error.name}."):
            raise  # an import inside the module
        raise ConfigError(
            f"train.imports: there is no module '{name}'. Install it, or give the path of its file."
        ) from error
    if name.endswith(".py") and Path(loaded.__file__ or "").resolve() != file.resolve():
        raise ConfigError(
            f"train.imports: {file} has the name of another module, {loaded.__file__ or module}. Rename the file."
        )


def check_config(cfg: DictConfig, source: str) -> None:
    """Compare sections, keys and values with `configs/common/train.py`, which lists them all.

    Raises:
        ConfigError: a missing or unknown section or key, with the nearest one; a value of the wrong type or out of
            range; unknown stages, or stages in the wrong order.
    """
    reference = load_config("common/train.py")
    for section in [*reference, *_OPEN_SECTIONS]:
        if section not in cfg:
            raise ConfigError(f"{source}: the section '{section}' is missing; start from configs/common/train.py.")
    for section in reference:
        _check_keys(dict(_leaves(cfg[section])), dict(_leaves(reference[section])), section, source)
    known = [field.name for field in dataclasses.fields(Adaptation)]
    if not isinstance(cfg.bilevel.adaptation, (DictConfig, type(None))):
        raise ConfigError(
            f"{source}: bilevel.adaptation is {cfg.bilevel.adaptation!r}; give null or {', '.join(known)}."
        )
    for key in cfg.bilevel.adaptation or ():
        if key not in known:
            hint = did_you_mean(key, known)
            raise ConfigError(f"{source}: no key 'bilevel.adaptation.{key}'.{hint} Known: {', '.join(known)}.")
    problems = argument_problems(resolved(cfg))
    if problems:
        raise ConfigError(f"{source}: {' '.join(problems[:5])}")
    _check_stages(list(cfg.train.stages), source)
    check_writers(list(cfg.train.writers), source)
    _check_early_stopping(cfg, source)
    check_publishing(cfg, source)


def _check_stages(stages: list[str], source: str) -> None:
    known = STAGES.list()
    for stage in stages:
        if stage not in known:
            hint = did_you_mean(str(stage), known)
            raise ConfigError(f"{source}: train.stages has '{stage}'.{hint} Stages: {', '.join(known)}.")
    misplaced = [s for n, s in enumerate(stages) if set(STAGES.get(s).follows) & set(stages[n + 1 :])]
    if not stages or misplaced or len(set(stages)) < len(stages):
        order = "".join(f" '{s}' must come after {' and '.join(STAGES.get(s).follows)}." for s in misplaced)
        raise ConfigError(f"{source}: train.stages is {stages}; name one or more stages, each once, in order.{order}")


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
            f"{source}: finetune.early_stopping needs dataloader.val, since weights selected on the test set have test "
            "metrics that are too high. Add it, as in +dataloader.val={...}, like dataloader.test with another split."
        )


def _check_keys(values: dict[str, Any], reference: dict[str, Any], section: str, source: str) -> None:
    optional = tuple(f"{key}." for key, value in reference.items() if value is None)  # may be a section
    for key in sorted(values.keys() - reference.keys()):
        if not key.startswith(optional):
            hint = did_you_mean(key, reference)
            known = ", ".join(sorted(reference))
            raise ConfigError(f"{source}: no key '{section}.{key}'.{hint} Known: {known}.")
    for key, default in reference.items():
        if key not in values:
            raise ConfigError(f"{source}: the key '{section}.{key}' is missing; see configs/common/train.py.")
        either = key.rpartition(".")[2] in ("steps", "epochs")  # null if the other one is given
        value, nullable = values[key], default is None or either or section == "clip_grad"
        kinds = (int, float) if isinstance(default, float) or key.endswith("epochs") else (type(default),)
        wrong = default is not None and (not isinstance(value, kinds) or isinstance(value, bool) != (bool in kinds))
        if wrong and not (value is None and nullable):
            expected = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
            raise ConfigError(
                f"{source}: {section}.{key} is {value!r}; it must be "
                f"{expected.get(kinds[-1], 'a ' + kinds[-1].__name__)}, such as {default!r}."
            )


def _leaves(section: DictConfig, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every key of a section and of its subsections, dotted, with its value as a plain container."""
    for key, value in section.items():
        plain = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
        yield f"{prefix}{key}", plain
        if OmegaConf.is_dict(value) and "_target_" not in value:
            yield from _leaves(value, f"{prefix}{key}.")


def check_parts(context: Context, initial: Weights) -> None:
    """Build once what the stages will build, and drop it, so that a typo does not end a run after hours.

    Args:
        initial: the weights that the first stage starts from, which must fit.
    Raises:
        BisslZooError: as building the networks, optimizers, schedules, hooks, the solver and the loaders does.
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
        pretext_batches(context, pretext, cfg.train.seed)  # reads nothing yet, but refuses impossible views
    if "train" in context.data:
        _, task = build_downstream(context, Weights(initial.backbone))
        _check_targets(context, task)
    custom_hooks(context)
    for stage in map(STAGES.build, _with_warmups(cfg.train.stages)):
        for role in stage.optimizers:
            build_part(cfg.optimizer[role], params=[torch.zeros(1, requires_grad=True)])
            build_part(cfg.lr_multiplier[role])
        stage.check(context, initial)


def _check_targets(context: Context, task: DownstreamTask) -> None:
    """Pass one training sample through the task, which knows the type of its targets.

    Raises:
        ConfigError: the task does not accept the targets of the data set.
    """
    cfg = context.cfg
    sample = Decodable(context.data["train"], cfg, "train")[0]
    try:
        with preserved_randomness(context.device):
            task.collate([task.transform(train=True)(*sample)])
    except Exception as error:  # any error of any task means that it does not fit
        raise ConfigError(
            f"The task '{cfg.task.name}' does not fit the data set '{cfg.dataloader.train.dataset.name}' of "
            f"dataloader.train, whose targets are of type {type(sample[1]).__name__}: {error} Change one of them."
        ) from error


def _with_warmups(stages: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(each for name in stages for each in (*STAGES.get(name).requires.values(), name)))
