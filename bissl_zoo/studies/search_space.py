"""What a search draws: the section `search` of a config, and the config of each of its trials."""

import hashlib
import json
import math
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf

from bissl_zoo.config import LazyConfig, load_config
from bissl_zoo.errors import ConfigError, did_you_mean

#: sections of a config that are no part of a run
SECTIONS = ("search", "compare")
#: the search of `configs/common/search.py` that is a task's where its config has none
_USUAL = {
    "classification": "classification",
    "multilabel_classification": "multilabel",
    "faster_rcnn": "detection",
    "detectron2_faster_rcnn": "detection",
}
#: of a trial's: it publishes nothing, and there are many
_TRIAL = ["train.publish.name=null", "train.checkpoint.keep=1"]


@dataclass(frozen=True)
class LogUniform:
    """Numbers whose logarithm is uniform between those of two bounds."""

    low: float
    high: float

    def at(self, share: float) -> float:
        """The number below which there is this share of all, to four digits."""
        value = float(f"{self.low * (self.high / self.low) ** share:.4g}")
        return min(max(value, self.low), self.high)


@dataclass(frozen=True)
class Choice:
    """One of several values, each as often as the others."""

    values: tuple[Any, ...]

    def at(self, share: float) -> Any:
        """The value below which there is this share of all."""
        return self.values[min(int(share * len(self.values)), len(self.values) - 1)]


@dataclass(frozen=True)
class SearchSettings:
    """The section `search`, checked; see `configs/common/search.py`."""

    metric: str
    trials: int
    seed: int
    space: dict[str, LogUniform | Choice]
    overrides: list[str]

    def draw(self, number: int) -> dict[str, Any]:
        """The parameters of trial `number`: of seed, number and key alone, on every machine the same."""
        return {key: domain.at(_share(self.seed, number, key)) for key, domain in self.space.items()}


def _share(seed: int, number: int, key: str) -> float:
    """A number in [0, 1), uniform over trials and independent from key to key."""
    digest = hashlib.sha256(f"{seed}/{number}/{key}".encode()).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) / (1 << 53)


def read_search(cfg: DictConfig, source: str) -> SearchSettings:
    """The search that a config describes; what it leaves out is the usual of its task.

    Raises:
        ConfigError: no section where the task has no usual search, unknown keys, and values that cannot be.
    """
    usual = _USUAL.get(cfg.task.name)
    given = cfg.get("search")
    if given is None and usual is None:
        raise ConfigError(
            f"{source}: the section 'search' is missing, and there is no usual one for the task '{cfg.task.name}'; "
            "see configs/common/search.py."
        )
    defaults = OmegaConf.to_container(load_config("common/search.py"))[usual or "classification"]
    found = {} if given is None else OmegaConf.to_container(given, resolve=True) if OmegaConf.is_dict(given) else given
    if not isinstance(found, dict):
        raise ConfigError(f"{source}: search is {found!r}; it is a section, see configs/common/search.py.")
    for key in found.keys() - defaults.keys():
        hint = did_you_mean(str(key), defaults)
        raise ConfigError(f"{source}: no key 'search.{key}'.{hint} Known: {', '.join(defaults)}.")
    if usual is None and not {"metric", "space"} <= found.keys():
        raise ConfigError(f"{source}: the task '{cfg.task.name}' needs both search.metric and search.space.")
    found = {**defaults, **found}
    if not isinstance(found["metric"], str):
        raise ConfigError(f"{source}: search.metric is {found['metric']!r}; name a figure of the task, such as AP50.")
    for key, least in {"trials": 1, "seed": 0}.items():
        if type(found[key]) is not int or found[key] < least:
            raise ConfigError(f"{source}: search.{key} is {found[key]!r}; it must be a whole number, {least} or more.")
    if not isinstance(found["overrides"], list) or not all(isinstance(one, str) for one in found["overrides"]):
        raise ConfigError(f"{source}: search.overrides is a list of overrides, such as [finetune.epochs=10].")
    if not isinstance(found["space"], dict) or not found["space"]:
        raise ConfigError(
            f"{source}: search.space names the keys to draw, such as {{optimizer.finetune.lr: [1e-4, 1]}}."
        )
    found["space"] = {key: _domain(f"{source}: search.space: {key}", value) for key, value in found["space"].items()}
    return SearchSettings(**found)


def _domain(where: str, value: Any) -> LogUniform | Choice:
    if isinstance(value, dict) and value.keys() == {"choices"}:
        choices = value["choices"]
        if not isinstance(choices, list) or not choices or any(isinstance(one, (dict, list)) for one in choices):
            raise ConfigError(f"{where}: choices is {choices!r}; give a list of values.")
        return Choice(tuple(choices))
    if not isinstance(value, list) or len(value) != 2 or any(type(bound) not in (int, float) for bound in value):
        raise ConfigError(f"{where} is {value!r}; give [least, most], or {{choices: [...]}}.")
    low, high = map(float, value)
    if not 0 < low < high < math.inf:
        raise ConfigError(f"{where} is {value!r}; a log-uniform draw needs positive bounds, the lower one first.")
    return LogUniform(low, high)


def as_overrides(parameters: dict[str, Any]) -> list[str]:
    """Parameters as overrides of a command line."""
    return [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in parameters.items()]


def trial_name(number: int) -> str:
    """Such as `trial_007`."""
    return f"trial_{number:03d}"


def trial_config(cfg: DictConfig, settings: SearchSettings, number: int, source: str) -> DictConfig:
    """The config of a trial's run.

    Raises:
        ConfigError: the config has no such key, with the nearest one.
    """
    overrides = [*_TRIAL, *settings.overrides, *as_overrides(settings.draw(number))]
    return LazyConfig.apply_overrides(_without(cfg, SECTIONS), overrides, source=source)


def best_config(cfg: DictConfig, parameters: dict[str, Any], source: str) -> DictConfig:
    """The config with these parameters and without the search, for the run that is wanted in the end."""
    return LazyConfig.apply_overrides(_without(cfg, ("search",)), as_overrides(parameters), source=source)


def _without(cfg: DictConfig, sections: tuple[str, ...]) -> DictConfig:
    return LazyConfig.apply_overrides(cfg, [f"~{name}" for name in sections if name in cfg])
