"""The arms of a comparison as overrides of one base config, and the settings in the section `compare`."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf

from bissl_zoo.config import LazyConfig, config_root, load_config
from bissl_zoo.engine.stages import alternates
from bissl_zoo.errors import ConfigError, did_you_mean
from bissl_zoo.registry import STAGES
from bissl_zoo.studies.budget import BUDGETS
from bissl_zoo.studies.jobs import override

#: sections of a comparison's config that are not part of a run
SECTIONS = ("compare", "search")
#: added to the seed of the pretraining, so that longer pretraining does not repeat its views
PRETRAIN_SEED_OFFSET = 10_000
#: added to the seed of a run for each further fine-tuning of the same stage
FINETUNE_SEED_OFFSET = 1_000_000
MOST_REPEATS = 100
VARY = ("pretrain", "bissl", "finetune")
#: keys that only fine-tuning reads; a search may draw no others, because its trials share the stages before it
CURVATURES = ("gauss_newton", "hessian")
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

    @property
    def leaves_backbone(self) -> bool:
        """True if runs of fine-tuning can start from a saved run of the arm's stage."""
        return self.stage is not None and "backbone" in STAGES.get(self.stage).provides


def _longer_pretraining(cfg: DictConfig) -> list[str]:
    """Pretrain for the steps of the lower level in the BiSSL stage, with its optimizer, schedule and clipping."""
    plain = {"epochs": None, "accumulate": 1, "compile": False}
    settings = {f"pretrain.{key}": value for key, value in plain.items()}
    settings["pretrain.steps"] = cfg.bilevel.lower_steps * cfg.bilevel.alternations
    settings |= {f"{section}.pretrain": cfg[section].lower for section in ("optimizer", "lr_multiplier", "clip_grad")}
    settings["pretrain.head_warmup"] = True  # as the BiSSL stage does if train.init has no pretext head
    return [override(key, value) for key, value in settings.items()]


def _target_pretraining(cfg: DictConfig) -> list[str]:
    """Pretrain for as long as `_longer_pretraining`, on the images of the training set."""
    return [*_longer_pretraining(cfg), override("dataloader.pretext.dataset", cfg.dataloader.train.dataset)]


def _lora(cfg: DictConfig) -> list[str]:
    """Train low-rank additions to queries and values, as in BiSSLight, if the config does not choose others."""
    return [override("bilevel.lora", cfg.bilevel.lora or {"r": 64, "alpha": 64, "targets": ["q", "v"]})]


def _with_solver(name: str) -> Callable[[DictConfig], list[str]]:
    """Return the overrides of a solver in `configs/common/solvers/`, or of a curvature with the config's solver."""
    if name in CURVATURES:
        return lambda cfg: [override("bilevel.curvature", name)]
    return lambda cfg: [override("solver", load_config(f"common/solvers/{name}.py").solver)]


_BISSL_REFERENCES = ("pretrained", "longer_pretraining", "joint")
#: every arm by its name; a module of `train.imports` may add others. `bissl[SOLVER]` is BiSSL with another solver.
ARMS = {
    "pretrained": Arm("fine-tuning alone", compared_with=()),
    "bissl": Arm("BiSSL", "bissl", compared_with=_BISSL_REFERENCES),
    "joint": Arm("joint training", "bissl", _with_solver("identity"), ("pretrained", "longer_pretraining")),
    "lora": Arm("BiSSL with LoRA", "bissl", _lora, ("pretrained", "bissl")),
    "longer_pretraining": Arm("longer pretraining", "pretrain", _longer_pretraining),
    "target_pretraining": Arm("pretraining on the labelled images", "pretrain", _target_pretraining),
    "self_training": Arm("self-training", "teacher"),
    "lp_ft": Arm("linear probe, then fine-tuning", None, lambda cfg: ["finetune.head=warm"]),
    "l2_sp": Arm("L2-SP", None, lambda cfg: [override("finetune.l2_sp", cfg.finetune.get("l2_sp") or 0.01)]),
    "random": Arm("random initialization", None, lambda cfg: ["train.init=null"]),
}


def find_arm(name: str) -> Arm:
    """Return the arm `name`; `bissl[nystrom]` is BiSSL with the solver nystrom, `bissl[hessian]` with that curvature.

    Raises:
        ConfigError: there is no such arm or solver.
    """
    solver = re.fullmatch(r"bissl\[(\w+)\]", name)
    if solver is None:
        _check_names([name], ARMS, "compare.arms", "the comparison")
        return ARMS[name]
    solvers = [file.stem for file in (config_root() / "common/solvers").glob("*.py")]
    _check_names([solver.group(1)], sorted([*solvers, *CURVATURES]), f"the arm {name}", "the comparison")
    return Arm(f"BiSSL ({solver.group(1)})", "bissl", _with_solver(solver.group(1)), _BISSL_REFERENCES)


def run_name(arm: str, seed: int, repeat: int = 0) -> str:
    """Return the name of the run of an arm and a seed, which is also its folder; further fine-tunings are numbered."""
    return f"{folder_name(arm)}-seed{seed}{f'-{repeat}' if repeat else ''}"


def folder_name(arm: str) -> str:
    """Return the name of an arm without brackets."""
    return arm.replace("[", "-").replace("]", "")


@dataclass(frozen=True)
class Settings:
    """The section `compare` after validation; see `configs/common/compare.py`."""

    metric: str | None
    higher_is_better: bool
    seeds: tuple[int, ...]
    arms: tuple[str, ...]
    vary: str
    search_trials: int
    datasets: dict[str, list[str]]
    finetune_seeds: int = 1
    labels: tuple[float, ...] = ()
    margin: float | None = None
    budget: str = "steps"


def read_settings(cfg: DictConfig, source: str) -> Settings:
    """Return the settings of a comparison; missing keys, or a missing section, have their defaults.

    Raises:
        ConfigError: unknown keys or invalid values.
    """
    defaults = OmegaConf.to_container(load_config("common/compare.py").compare)
    given = OmegaConf.to_container(cfg.get("compare") or OmegaConf.create(), resolve=True)
    _check_names(given, defaults, "compare", source)
    values = {**defaults, **given}
    metric, vary, trials, datasets = (values[key] for key in ("metric", "vary", "search_trials", "datasets"))
    repeats, labels, margin = values["finetune_seeds"], tuple(values["labels"] or ()), values["margin"]
    seeds, arms = tuple(range(n) if _is_count(n := values["seeds"]) else n or ()), tuple(values["arms"] or ())
    _check_names([vary], VARY, "compare.vary", source)
    _check_names([budget := values["budget"]], BUDGETS, "compare.budget", source)
    for arm in arms:
        find_arm(arm)
    has_pretraining = pretrains(cfg)
    for key, valid, advice in (
        ("metric", metric is None or isinstance(metric, str), "name a metric of the task, such as AP50"),
        ("seeds", seeds and all(map(_is_count, seeds)) and _differ(seeds), "give a number or a list of different ones"),
        ("arms", len(arms) > 1 and "pretrained" in arms and _differ(arms), "give 'pretrained' and at least one other"),
        ("vary", has_pretraining or vary != "pretrain", "but train.stages has no pretraining"),
        ("search_trials", _is_count(trials), "give a number, 0 for none"),
        ("datasets", isinstance(datasets, dict), "map names to lists of overrides"),
        (
            "finetune_seeds",
            _is_count(repeats) and 0 < repeats <= MOST_REPEATS,
            f"give a number from 1 to {MOST_REPEATS}",
        ),
        ("finetune_seeds", repeats == 1 or vary != "finetune", "with vary='finetune' it must be 1"),
        (
            "labels",
            _differ(labels) and all(_is_share(n) for n in labels),
            "give shares above 0 and up to 1, such as 0.05",
        ),
        (
            "budget",
            budget == "steps" or cfg.finetune.early_stopping.patience is None,
            "but finetune.early_stopping.patience ends runs earlier",
        ),
        ("margin", margin is None or _is_number(margin) and margin > 0, "give a positive difference of the metric"),
    ):
        if not valid:
            raise ConfigError(f"{source}: compare.{key} is {values[key]!r}; {advice}. See configs/common/compare.py.")
    if not has_pretraining and cfg.train.init is None:
        raise ConfigError(
            f"{source}: a comparison needs a pretrained backbone. Set train.init, as in train.init=zoo:NAME, or let it "
            "pretrain one: train.stages=[pretrain,bissl,finetune]."
        )
    settings = Settings(
        metric, values["higher_is_better"], seeds, arms, vary, trials, datasets, repeats, labels, margin, budget
    )
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


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_share(value: Any) -> bool:
    return _is_number(value) and 0 < value <= 1


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
    changes = {"train.stages": ["pretrain"], "train.seed": PRETRAIN_SEED_OFFSET + seed}
    if base.train.folds:
        changes["train.label_seed"] = seed  # the fold of the runs that start from it
    return LazyConfig.apply_overrides(base, [override(*item) for item in changes.items()])


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
    changes = find_arm(arm).overrides(base)
    if init is not None and find_arm(arm).leaves_backbone and find_arm(arm).stage not in settings["train.stages"]:
        changes = []  # the stage has run in `init`
    return LazyConfig.apply_overrides(base, [*(override(*item) for item in settings.items()), *changes, *overrides])
