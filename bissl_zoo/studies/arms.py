"""The arms of a comparison as overrides of one base config, and the settings in the section `compare`."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf

from bissl_zoo.config import LazyConfig, load_config
from bissl_zoo.engine.stages import alternates
from bissl_zoo.errors import ConfigError, did_you_mean
from bissl_zoo.registry import STAGES
from bissl_zoo.studies.jobs import override

#: sections of a comparison's config that are not part of a run
SECTIONS = ("compare", "search")
#: added to the seed of the pretraining, so that longer pretraining does not repeat its views
PRETRAIN_SEED_OFFSET = 10_000
VARY = ("pretrain", "bissl", "finetune")
#: keys that only fine-tuning reads; a search may draw no others, because its trials share the stages before it
SEARCHABLE = ("optimizer.finetune.", "lr_multiplier.finetune.", "clip_grad.finetune", "finetune.")


@dataclass(frozen=True)
class Arm:
    """A way from the pretrained backbone to a fine-tuned model.

    Attributes:
        label: for tables and sentences.
        stage: the stage between pretraining and fine-tuning, or None.
        overrides: function from the base config to the overrides of this arm.
        compared_with: arms that the report's sentence about this arm mentions, the most important first.
    """

    label: str
    stage: str | None = None
    overrides: Callable[[DictConfig], list[str]] = lambda cfg: []
    compared_with: tuple[str, ...] = ("pretrained",)

    @property
    def stages(self) -> list[str]:
        """Stages of a run from the pretrained backbone to the results."""
        return [*filter(None, [self.stage]), "finetune"]


def _longer_pretraining(cfg: DictConfig) -> list[str]:
    """Pretrain for the steps of the lower level in the BiSSL stage, with its optimizer, schedule and clipping."""
    plain = {"epochs": None, "accumulate": 1, "channels_last": False, "compile": False}
    settings = {f"pretrain.{key}": value for key, value in plain.items()}
    settings["pretrain.steps"] = cfg.bilevel.lower_steps * cfg.bilevel.alternations
    settings |= {f"{section}.pretrain": cfg[section].lower for section in ("optimizer", "lr_multiplier", "clip_grad")}
    return [override(key, value) for key, value in settings.items()]


def _identity_solver(cfg: DictConfig) -> list[str]:
    return [override("solver", load_config("common/solvers/identity.py").solver)]


#: every arm by its name; a module of `train.imports` may add others
ARMS = {
    "pretrained": Arm("fine-tuning alone", compared_with=()),
    "bissl": Arm("BiSSL", "bissl", compared_with=("pretrained", "longer_pretraining", "joint")),
    "longer_pretraining": Arm("longer pretraining", "pretrain", _longer_pretraining),
    "joint": Arm("joint training", "bissl", _identity_solver, ("pretrained", "longer_pretraining")),
}


@dataclass(frozen=True)
class Settings:
    """The section `compare` after validation; see `configs/common/compare.py`."""

    metric: str
    higher_is_better: bool
    seeds: tuple[int, ...]
    arms: tuple[str, ...]
    vary: str
    search_trials: int
    datasets: dict[str, list[str]]


def read_settings(cfg: DictConfig, source: str) -> Settings:
    """Return the settings of a comparison; missing keys have their defaults.

    Raises:
        ConfigError: a missing section, unknown keys or invalid values.
    """
    defaults = OmegaConf.to_container(load_config("common/compare.py").compare)
    if not OmegaConf.is_dict(cfg.get("compare")):
        raise ConfigError(f"{source}: the section 'compare' is missing; start from configs/compare/digit_scenes.py.")
    given = OmegaConf.to_container(cfg.compare, resolve=True)
    _check_names(given, defaults, "compare", source)
    values = {**defaults, **given}
    metric, vary, trials, datasets = (values[key] for key in ("metric", "vary", "search_trials", "datasets"))
    seeds, arms = tuple(range(n) if _is_count(n := values["seeds"]) else n or ()), tuple(values["arms"] or ())
    _check_names([vary], VARY, "compare.vary", source)
    _check_names(arms, ARMS, "compare.arms", source)
    has_pretraining = pretrains(cfg)
    for key, valid, advice in (
        ("metric", isinstance(metric, str), "name a metric of the task, such as AP50"),
        ("seeds", seeds and all(map(_is_count, seeds)) and _differ(seeds), "give a number or a list of different ones"),
        ("arms", len(arms) > 1 and "pretrained" in arms and _differ(arms), "give 'pretrained' and at least one other"),
        ("vary", has_pretraining or vary != "pretrain", "but train.stages has no pretraining"),
        ("search_trials", _is_count(trials), "give a number, 0 for none"),
        ("datasets", isinstance(datasets, dict), "map names to lists of overrides"),
    ):
        if not valid:
            raise ConfigError(f"{source}: compare.{key} is {values[key]!r}; {advice}. See configs/common/compare.py.")
    if not has_pretraining and cfg.train.init is None:
        raise ConfigError(
            f"{source}: a comparison needs a pretrained backbone. Set train.init, as in train.init=zoo:NAME, or let it "
            "pretrain one: train.stages=[pretrain,bissl,finetune]."
        )
    settings = Settings(metric, values["higher_is_better"], seeds, arms, vary, trials, datasets)
    if trials:
        _check_search(cfg, settings, source)
    return settings


def pretrains(cfg: DictConfig) -> bool:
    """Return True if a stage of the config pretrains a backbone."""
    return any("backbone" in STAGES.get(name).provides and not alternates(name) for name in cfg.train.stages)


def _check_search(cfg: DictConfig, settings: Settings, source: str) -> None:
    if not OmegaConf.is_dict(cfg.get("search")) or not cfg.search.get("overrides"):
        raise ConfigError(
            f"{source}: compare.search_trials needs a section 'search' whose overrides replace the test set by a "
            "validation split, as in configs/compare/cells.py."
        )
    if not settings.higher_is_better:
        raise ConfigError(f"{source}: a search maximizes its metric; set compare.search_trials=0 for error rates.")
    for key in cfg.search.get("space") or ():
        if not str(key).startswith(SEARCHABLE):
            raise ConfigError(
                f"{source}: search.space has '{key}', which stages before fine-tuning may read. In a comparison only "
                f"{', '.join(SEARCHABLE)} can be searched."
            )


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _differ(values: tuple[Any, ...]) -> bool:
    return len(set(values)) == len(values)


def _check_names(given: Iterable[str], known: Iterable[str], key: str, source: str) -> None:
    names = list(known)
    for name in given:
        if name not in names:
            hint = did_you_mean(str(name), names)
            raise ConfigError(f"{source}: {key} has '{name}'.{hint} Known: {', '.join(names)}.")


def base_config(cfg: DictConfig) -> DictConfig:
    """Return the run config that all arms derive from; it publishes nothing and fine-tunes once."""
    plain = OmegaConf.to_container(cfg, resolve=True)
    base = OmegaConf.create({key: value for key, value in plain.items() if key not in SECTIONS})
    return LazyConfig.apply_overrides(base, ["train.publish.name=null", "finetune.baseline=false"])


def pretrain_config(base: DictConfig, seed: int) -> DictConfig:
    """Return the config of the pretraining that the arms start from."""
    return LazyConfig.apply_overrides(
        base, [override("train.stages", ["pretrain"]), override("train.seed", PRETRAIN_SEED_OFFSET + seed)]
    )


def arm_config(
    base: DictConfig, arm: str, seed: int, init: str | None, stages: Iterable[str], overrides: Iterable[str] = ()
) -> DictConfig:
    """Return the config of a run of an arm.

    Args:
        init: `train.init` of the run.
        stages: the arm's stages that this run executes.
        overrides: further overrides, such as the result of a search.
    """
    settings = {"train.stages": list(stages), "train.seed": seed, "train.init": init}
    changes = ARMS[arm].overrides(base) if ARMS[arm].stage in settings["train.stages"] else []
    return LazyConfig.apply_overrides(base, [*(override(*item) for item in settings.items()), *changes, *overrides])
