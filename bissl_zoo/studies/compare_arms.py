"""The arms of a comparison: what each one runs, as overrides of one base config."""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf

from bissl_zoo.config import LazyConfig, load_config
from bissl_zoo.errors import ConfigError, did_you_mean

#: the sections that a comparison has besides those of a run
SECTIONS = ("compare", "search")
#: added to the seed of pretraining, so that longer pretraining does not begin with the views it has seen before
PRETRAIN_SEEDS = 10_000
VARIES = ("pretrain", "bissl", "finetune")
#: what fine-tuning alone reads; a search may draw nothing else, since the stages before it are shared by its trials
SEARCHED = ("optimizer.finetune.", "lr_multiplier.finetune.", "clip_grad.finetune", "finetune.")


def override(key: str, value: Any) -> str:
    """`key=value` as an override, whatever the value holds."""
    plain = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
    return f"{key}={json.dumps(plain, ensure_ascii=False)}"


def _nothing(cfg: DictConfig) -> list[str]:
    return []


def _longer(cfg: DictConfig) -> list[str]:
    """As many pretext steps as the BiSSL stage takes, taken as its lower level takes them."""
    plain = {"epochs": None, "ema": None, "accumulate": 1, "channels_last": False, "compile": False}
    settings = {f"pretrain.{key}": value for key, value in plain.items()}
    settings["pretrain.steps"] = cfg.bilevel.lower_steps * cfg.bilevel.alternations
    settings |= {f"{section}.pretrain": cfg[section].lower for section in ("optimizer", "lr_multiplier", "clip_grad")}
    return [override(key, value) for key, value in settings.items()]


def _joint(cfg: DictConfig) -> list[str]:
    return [override("solver", load_config("common/solvers/identity.py").solver)]


@dataclass(frozen=True)
class Arm:
    """One way from the pretrained backbone to a fine-tuned model.

    Attributes:
        words: what it is, for tables and sentences.
        stage: what comes between pretraining and fine-tuning; None for nothing.
        overrides: what it changes in the base config.
    """

    words: str
    stage: str | None = None
    overrides: Callable[[DictConfig], list[str]] = _nothing


#: every arm by its name
ARMS = {
    "pretrained": Arm("fine-tuning alone"),
    "bissl": Arm("BiSSL", "bissl"),
    "longer_pretraining": Arm("longer pretraining", "pretrain", _longer),
    "joint": Arm("joint training", "bissl", _joint),
}


@dataclass(frozen=True)
class Settings:
    """The section `compare`, checked; see `configs/common/compare.py`."""

    metric: str
    higher_is_better: bool
    seeds: tuple[int, ...]
    arms: tuple[str, ...]
    vary: str
    search_trials: int
    datasets: dict[str, list[str]]


def read_settings(cfg: DictConfig, source: str) -> Settings:
    """The settings of a comparison's config, keys that it leaves out at their defaults.

    Raises:
        ConfigError: no such section, unknown keys, and values that cannot be.
    """
    defaults = OmegaConf.to_container(load_config("common/compare.py").compare)
    if not OmegaConf.is_dict(cfg.get("compare")):
        raise ConfigError(f"{source}: the section 'compare' is missing; start from configs/compare/digit_scenes.py.")
    found = OmegaConf.to_container(cfg.compare, resolve=True)
    for key in found.keys() - defaults.keys():
        hint = did_you_mean(str(key), defaults)
        raise ConfigError(f"{source}: no key 'compare.{key}'.{hint} Known: {', '.join(defaults)}.")
    found = {**defaults, **found}
    if not isinstance(found["metric"], str):
        raise ConfigError(f"{source}: compare.metric is {found['metric']!r}; name a figure of the task, such as AP50.")
    if not isinstance(found["higher_is_better"], bool):
        raise ConfigError(f"{source}: compare.higher_is_better is {found['higher_is_better']!r}; true or false.")
    if not _is_count(found["search_trials"]):
        raise ConfigError(f"{source}: compare.search_trials is {found['search_trials']!r}; a number, 0 for no search.")
    _choice(found["vary"], VARIES, "compare.vary", source)
    found["seeds"] = seeds_of(found["seeds"], source)
    found["arms"] = _arms(found["arms"], source)
    datasets = found["datasets"]
    if not isinstance(datasets, dict) or not all(isinstance(value, list) for value in datasets.values()):
        raise ConfigError(f"{source}: compare.datasets is a mapping of names to lists of overrides.")
    if found["search_trials"]:
        _check_search(cfg, source)
    if "pretrain" not in cfg.train.stages and cfg.train.init is None:
        raise ConfigError(
            f"{source}: there is no pretrained backbone to compare with. Name one, as in train.init=zoo:NAME, or let "
            "the comparison make it: train.stages=[pretrain,bissl,finetune]."
        )
    if "pretrain" not in cfg.train.stages and found["vary"] == "pretrain":
        raise ConfigError(f"{source}: compare.vary is 'pretrain', and the stage pretrain is not in train.stages.")
    return Settings(**found)


def seeds_of(value: Any, source: str) -> tuple[int, ...]:
    """Seeds given as a number of them or a list.

    Raises:
        ConfigError: they are neither, or one comes twice.
    """
    seeds = list(range(value)) if _is_count(value) else value
    if not isinstance(seeds, list) or not seeds or not all(map(_is_count, seeds)) or len(set(seeds)) < len(seeds):
        raise ConfigError(f"{source}: seeds are {value!r}; give how many, such as 10, or a list of different numbers.")
    return tuple(seeds)


def _arms(value: Any, source: str) -> tuple[str, ...]:
    arms = value if isinstance(value, list) else []
    for name in arms:
        _choice(name, ARMS, "compare.arms", source)
    if len(set(arms)) < len(arms) or len(arms) < 2 or "pretrained" not in arms:
        raise ConfigError(
            f"{source}: compare.arms is {value!r}; name 'pretrained', which the others are compared with, and one or "
            f"more of {', '.join(name for name in ARMS if name != 'pretrained')}."
        )
    return tuple(arms)


def _check_search(cfg: DictConfig, source: str) -> None:
    if not OmegaConf.is_dict(cfg.get("search")) or not cfg.search.get("overrides"):
        raise ConfigError(
            f"{source}: compare.search_trials needs a section 'search' whose overrides take the test set's place by a "
            "validation split, as in configs/compare/cells.py."
        )
    if cfg.compare.get("higher_is_better") is False:
        raise ConfigError(f"{source}: a search takes the highest figure; set compare.search_trials=0 for errors.")
    for key in cfg.search.get("space") or ():
        if not str(key).startswith(SEARCHED):
            raise ConfigError(
                f"{source}: search.space has '{key}', which the stages before fine-tuning may read. In a comparison a "
                f"search draws of {', '.join(SEARCHED)} only."
            )


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _choice(value: Any, choices: Iterable[str], key: str, source: str) -> None:
    names = list(choices)
    if value not in names:
        hint = did_you_mean(str(value), names)
        raise ConfigError(f"{source}: {key} has '{value}'.{hint} Known: {', '.join(names)}.")


def base_config(cfg: DictConfig) -> DictConfig:
    """The config of a run that all arms derive from: without sections of a comparison, publishing and a baseline."""
    plain = OmegaConf.to_container(cfg, resolve=True)
    base = OmegaConf.create({key: value for key, value in plain.items() if key not in SECTIONS})
    return LazyConfig.apply_overrides(base, ["train.publish.name=null", "finetune.baseline=false"])


def pretrain_config(base: DictConfig, seed: int) -> DictConfig:
    """The pretraining that the arms start from."""
    settings = {"train.stages": ["pretrain"], "train.seed": PRETRAIN_SEEDS + seed}
    return LazyConfig.apply_overrides(base, [override(*item) for item in settings.items()])


def arm_config(
    base: DictConfig, arm: str, seed: int, init: str | None, stages: Iterable[str], overrides: Iterable[str] = ()
) -> DictConfig:
    """A run of an arm.

    Args:
        init: what its first stage starts from, as `train.init`.
        stages: those of the arm that this run takes: the one before fine-tuning, fine-tuning, or both.
        overrides: what goes beyond the arm's own, such as what a search has found.
    """
    settings = {"train.stages": list(stages), "train.seed": seed, "train.init": init}
    arms_own = ARMS[arm].overrides(base) if ARMS[arm].stage in settings["train.stages"] else []
    return LazyConfig.apply_overrides(base, [*(override(*item) for item in settings.items()), *arms_own, *overrides])
