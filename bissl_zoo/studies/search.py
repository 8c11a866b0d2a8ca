"""Hyperparameter search with Optuna: every trial is a run in a separate process, and a killed search can be resumed."""

import csv
import io
import json
import logging
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig, OmegaConf
from tabulate import tabulate

from bissl_zoo.config import LazyConfig, load_config
from bissl_zoo.engine.build import Weights, build_downstream
from bissl_zoo.engine.checks import check_parts, open_context
from bissl_zoo.engine.evaluate import metric_names
from bissl_zoo.engine.init import load_init
from bissl_zoo.errors import BisslZooError, ConfigError, DatasetError, did_you_mean
from bissl_zoo.files import write_atomically
from bissl_zoo.registry import STAGES
from bissl_zoo.runs.directory import METRICS_FILE
from bissl_zoo.runs.listing import is_run
from bissl_zoo.studies.jobs import check_unchanged, override, progress_line, run_jobs
from bissl_zoo.studies.places import FINISHED, STOPPED, Engine, Job, JobOutcome

logger = logging.getLogger(__name__)

STUDY_FILE, TABLE_FILE, BEST_FILE = "study.log", "trials.csv", "best.yaml"
#: finished trials before any is pruned, as by default in Optuna's MedianPruner (Akiba et al., arXiv 1907.10902)
STARTUP_TRIALS = 5
SAMPLERS = {"random": "RandomSampler", "tpe": "TPESampler"}
#: default section `search` of `configs/common/search.py` for each task
_DEFAULTS = {
    "classification": "classification",
    "multilabel_classification": "multilabel",
    "faster_rcnn": "detection",
    "detectron2_faster_rcnn": "detection",
}
#: overrides of all trials: there are many, and none is published
_TRIAL_OVERRIDES = ["train.publish.name=null", "train.checkpoint.keep=1"]


def import_optuna() -> Any:
    """Import Optuna.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import optuna
    except ImportError as error:
        raise ConfigError('A search needs Optuna: pip install "bissl_zoo[search]".') from error
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


@dataclass(frozen=True)
class SearchSettings:
    """The section `search` of a config after validation; see `configs/common/search.py`."""

    metric: str
    trials: int
    seed: int
    sampler: str
    space: dict[str, Any]
    overrides: list[str]

    def distributions(self) -> dict[str, Any]:
        """Return the Optuna distribution of each key."""
        optuna = import_optuna().distributions
        return {
            key: optuna.CategoricalDistribution(tuple(domain["choices"]))
            if isinstance(domain, dict)
            else optuna.FloatDistribution(*map(float, domain), log=True)
            for key, domain in self.space.items()
        }

    def make_sampler(self, number: int) -> Any:
        """Return the sampler of trial `number`. Its seed depends on the number, so that a resume repeats no draw."""
        seed = np.random.SeedSequence([self.seed, number]).generate_state(1)[0]
        return getattr(import_optuna().samplers, SAMPLERS[self.sampler])(seed=int(seed))


def read_search(cfg: DictConfig, source: str) -> SearchSettings:
    """Return the search settings of a config; missing keys have the defaults of its task.

    Raises:
        ConfigError: a missing section for a task without defaults, unknown keys, or invalid values.
    """
    default, given = _DEFAULTS.get(cfg.task.name), OmegaConf.to_container(cfg, resolve=True).get("search", {})
    if not isinstance(given, dict):
        raise ConfigError(f"{source}: search is {given!r}; it must be a section, see configs/common/search.py.")
    if default is None and not {"metric", "space"} <= given.keys():
        raise ConfigError(
            f"{source}: the task '{cfg.task.name}' has no default search. Add a section 'search' with at least metric "
            "and space; see configs/common/search.py."
        )
    defaults = OmegaConf.to_container(load_config("common/search.py"))[default or "classification"]
    for key in given.keys() - defaults.keys():
        hint = did_you_mean(str(key), defaults)
        raise ConfigError(f"{source}: no key 'search.{key}'.{hint} Known: {', '.join(defaults)}.")
    settings = SearchSettings(**{**defaults, **given})
    for key, minimum in {"trials": 1, "seed": 0}.items():
        value = getattr(settings, key)
        if type(value) is not int or value < minimum:
            raise ConfigError(f"{source}: search.{key} is {value!r}; it must be an integer of at least {minimum}.")
    if settings.sampler not in SAMPLERS:
        hint = did_you_mean(str(settings.sampler), SAMPLERS)
        raise ConfigError(f"{source}: unknown search.sampler '{settings.sampler}'.{hint} Known: {', '.join(SAMPLERS)}.")
    if not isinstance(settings.space, dict) or not settings.space:
        raise ConfigError(
            f"{source}: search.space must map keys to ranges, as in {{optimizer.finetune.lr: [1e-4, 1]}}."
        )
    for key, domain in settings.space.items():
        if not _is_choice(domain) and not _is_range(domain):
            raise ConfigError(
                f"{source}: search.space: {key} is {domain!r}; give [low, high] with 0 < low < high, which is drawn "
                "log-uniformly, or {choices: [...]}."
            )
    return settings


def _is_choice(domain: Any) -> bool:
    return isinstance(domain, dict) and list(domain) == ["choices"] and bool(domain["choices"])


def _is_range(domain: Any) -> bool:
    numbers = isinstance(domain, list) and len(domain) == 2 and all(type(bound) in (int, float) for bound in domain)
    return numbers and 0 < domain[0] < domain[1] < math.inf


def parameters_of(trial: Any) -> dict[str, Any]:
    """Return the parameters of an Optuna trial, numbers rounded to four digits."""
    return {
        key: float(f"{value:.4g}") if hasattr(trial.distributions[key], "low") else value
        for key, value in trial.params.items()
    }


def draw(settings: SearchSettings, number: int) -> dict[str, Any]:
    """Return the parameters of trial `number` in a search without earlier results (with "random": in any search)."""
    study = import_optuna().create_study(sampler=settings.make_sampler(number))
    return parameters_of(study.ask(settings.distributions()))


def as_overrides(parameters: dict[str, Any]) -> list[str]:
    """Format parameters as command-line overrides."""
    return [override(key, value) for key, value in parameters.items()]


def base_config(cfg: DictConfig, settings: SearchSettings, source: str) -> DictConfig:
    """Return the config that all trials share."""
    removed = [f"~{section}" for section in ("search", "compare") if section in cfg]
    return LazyConfig.apply_overrides(cfg, [*removed, *_TRIAL_OVERRIDES, *settings.overrides], source=source)


def trial_config(cfg: DictConfig, settings: SearchSettings, parameters: dict[str, Any], source: str) -> DictConfig:
    """Return the config of a trial.

    Raises:
        ConfigError: the config has no such key.
    """
    return LazyConfig.apply_overrides(base_config(cfg, settings, source), as_overrides(parameters), source=source)


@dataclass(frozen=True)
class SearchResult:
    """The result of a search.

    Attributes:
        best_overrides: parameters of the best trial as command-line overrides.
        table: the five best trials, to be printed.
        study: the Optuna study, for its plots and analyses.
    """

    best_overrides: list[str]
    table: str
    study: Any


def search(
    cfg: DictConfig,
    source: str,
    folder: Path,
    trials: int | None = None,
    parallel: int | None = None,
    prune: bool = False,
    engine: Engine = "local",
) -> SearchResult:
    """Run the trials of the section `search` of `cfg` and save the best parameters.

    Writes `study.log` (the Optuna journal), `trials.csv`, `best.yaml`, `runs/trial_NNN` and `logs/trial_NNN.log` to
    `folder`. Finished and pruned trials are not run again; failed and interrupted ones are.

    Args:
        source: name of the config for messages.
        trials: total number of trials; by default `search.trials`. It can be raised later.
        parallel, engine: see `run_jobs`.
        prune: stop trials whose best value so far is below the median of the finished trials at the same step.
    Raises:
        ConfigError: an invalid config, before the first trial, or another configuration in `folder`.
        BisslZooError: no trial has finished.
        Interrupted: stopped by a signal, after the trials have saved.
    """
    settings, folder = read_search(cfg, source), Path(folder)
    number = settings.trials if trials is None else trials
    if number < 1:
        raise ConfigError(f"--trials is {number}; at least 1 trial is needed.")
    if is_run(folder):
        raise ConfigError(f"{folder} holds a run. Choose another folder, as in --output runs/another.")
    first = trial_config(cfg, settings, draw(settings, 0), source)
    if not any(STAGES.get(stage).evaluates for stage in first.train.stages):
        raise ConfigError(f"{source}: a search compares fine-tuned models, but train.stages has none that fine-tunes.")
    if prune and not first.finetune.eval_period:
        raise ConfigError(f"{source}: --prune needs finetune.eval_period, the number of steps between evaluations.")
    if not (folder / STUDY_FILE).exists():
        check_trials(cfg, first, settings, source)
    return _Search(cfg, source, settings, folder).run(number, parallel, prune, engine)


def check_trials(cfg: DictConfig, trial: DictConfig, settings: SearchSettings, source: str) -> None:
    """Build all parts of a trial once and evaluate one prediction to get the names of the metrics.

    Raises:
        ConfigError: the task does not compute the metric.
        BisslZooError: as a run before it starts.
    """
    trial = LazyConfig.apply_overrides(trial, ["train.device=cpu"])  # leaves the GPU memory to the trials
    context = open_context(trial, source)
    initial, _ = load_init(trial.train.init, trial)
    check_parts(context, initial)
    backbone, task = build_downstream(context, Weights(initial.backbone))
    try:
        check_metric(settings.metric, metric_names(context, backbone, task, "test"), source, "search.metric")
    except DatasetError as error:  # for example, no image has an object
        logger.warning(f"cannot check search.metric={settings.metric} before the first trial: {error}")
    if OmegaConf.to_container(cfg.dataloader.test) == OmegaConf.to_container(trial.dataloader.test):
        logger.warning(
            "the trials are evaluated on the test set (dataloader.test), so its results will be too good. Use "
            "a validation split: search.overrides=[dataloader.test.dataset.split=val]."
        )


def check_metric(metric: str, names: list[str], source: str, key: str) -> None:
    """Check that the metric under a config key is among the `names` that the task computes.

    Raises:
        ConfigError: it is not.
    """
    if metric not in names:
        known = ", ".join(name for name in names if "/" not in name) or "none"
        hint = did_you_mean(metric, names)
        raise ConfigError(f"{source}: {key} is '{metric}', which the task does not compute.{hint} Known: {known}.")


class _Search:
    """A search in a folder, with its Optuna study in `STUDY_FILE`.

    A trial that failed stays open in the study, with its error as the attribute `message`, so that the next call runs
    it again with the same parameters.
    """

    def __init__(self, cfg: DictConfig, source: str, settings: SearchSettings, folder: Path) -> None:
        self.cfg, self.source, self.settings, self.folder = cfg, source, settings, folder
        self.optuna = import_optuna()
        self.states = self.optuna.trial.TrialState
        base = base_config(cfg, settings, source)
        record = {"config": OmegaConf.to_container(base, resolve=True), "search": asdict(settings)}
        del record["search"]["trials"], record["search"]["overrides"]  # the first may grow, the second are in config
        if not (folder / STUDY_FILE).exists() and (folder / "runs").exists():
            raise ConfigError(f"{folder} holds runs, but no {STUDY_FILE}. Choose another folder for the search.")
        folder.mkdir(parents=True, exist_ok=True)
        journal = self.optuna.storages.journal
        self.study = self.optuna.create_study(
            storage=journal.JournalStorage(journal.JournalFileBackend(str(folder / STUDY_FILE))),
            study_name="search",
            direction="maximize",
            load_if_exists=True,
            pruner=self.optuna.pruners.MedianPruner(n_startup_trials=STARTUP_TRIALS),
        )
        if "record" in self.study.user_attrs:
            check_unchanged(folder, self.study.user_attrs["record"], record, "search")
        else:
            self.study.set_user_attr("record", record)
        self.curve_key = f"{'val' if 'val' in base.dataloader else 'test'}/{settings.metric}"
        self.open: dict[str, Any] = {}
        self.sizes: dict[str, int] = {}

    def run(self, number: int, parallel: int | None, prune: bool, engine: Engine) -> SearchResult:
        """Run the missing trials; see :func:`search`."""
        jobs = []
        for trial in self.study.trials[:number]:
            if not trial.state.is_finished():
                self.open[_name(trial.number)] = self.optuna.trial.Trial(self.study, trial._trial_id)
                jobs.append(Job(_name(trial.number), self._config(trial)))
        jobs += [Job(_name(n), self._draw_next) for n in range(len(self.study.trials), number)]
        logger.info(f"search: {number} trials in {self.folder}, {self.settings.metric} of the last fine-tuning")
        if jobs:
            run_jobs(jobs, self.folder, parallel, self._take, self._prune if prune else lambda job: None, engine)
        trials = self._ranked()
        if not trials:
            message = next(filter(None, map(_message, self.study.trials)), "")
            raise BisslZooError(f"No trial has finished. {_name(0)}: {message} Logs: {self.folder / 'logs'}.")
        return SearchResult(as_overrides(parameters_of(trials[0])), self._table(trials[:5]), self.study)

    def _config(self, trial: Any) -> DictConfig:
        return trial_config(self.cfg, self.settings, parameters_of(trial), self.source)

    def _draw_next(self) -> DictConfig:
        """Draw the parameters of the next trial when its job starts, so that the sampler knows the earlier results."""
        self.study.sampler = self.settings.make_sampler(len(self.study.trials))
        trial = self.study.ask(self.settings.distributions())
        self.open[_name(trial.number)] = trial
        return self._config(trial)

    def _prune(self, job: Job) -> str | None:
        """Return the reason for pruning a running trial, or None."""
        trial = self.open[job.name]
        if not self._report_curve(job.name) or not trial.should_prune():
            return None
        curve = self.study.trials[trial.number].intermediate_values
        best, step = max(curve.values()), max(curve)
        return f"{self.curve_key} {best:.4f} at step {step} is below the median of the finished trials"

    def _report_curve(self, name: str) -> bool:
        """Report the new evaluations of a trial to Optuna; return False if there are none."""
        path = self.folder / "runs" / name / METRICS_FILE
        size = path.stat().st_size if path.exists() else 0
        if size == self.sizes.get(name, 0):
            return False
        self.sizes[name] = size
        trial = self.open[name]
        known = self.study.trials[trial.number].intermediate_values
        new = {step: value for step, value in _read_curve(path, self.curve_key).items() if step not in known}
        for step, value in new.items():
            trial.report(value, step)
        return bool(new)

    def _take(self, outcome: JobOutcome) -> None:
        """Enter the outcome of a trial into the study, print it, and save the table and the best config."""
        trial, metric = self.open[outcome.name], self.settings.metric
        self._report_curve(outcome.name)
        metrics = list(outcome.results.values())[-1] if outcome.results else {}
        message = " ".join(outcome.message.split())
        if outcome.status == FINISHED:
            check_metric(metric, list(metrics), self.source, "search.metric")
            message = "" if math.isfinite(metrics[metric]) else f"{metric} is {metrics[metric]}"
        trial.set_user_attr("seconds", outcome.seconds)
        trial.set_user_attr("message", message)
        if outcome.status == STOPPED:
            self.study.tell(trial, state=self.states.PRUNED)
        elif outcome.status == FINISHED and not message:
            self.study.tell(trial, metrics[metric])
        best = self._ranked()[:1]
        details = [message[:200] or f"{metric} {metrics[metric]:.4f}"]
        details += [f"best {trial.value:.4f} ({_name(trial.number)})" for trial in best]
        status = _state(self.study.trials[trial.number])
        logger.info(progress_line(replace(outcome, status=status), "  ".join(details)))
        self._save(best)

    def _ranked(self) -> list[Any]:
        """Return the finished trials, best first."""
        trials = self.study.get_trials(states=(self.states.COMPLETE,))
        return sorted(trials, key=lambda trial: (-trial.value, trial.number))

    def _table(self, trials: list[Any]) -> str:
        rows = [[_name(t.number), f"{t.value:.4f}", *parameters_of(t).values(), _seconds(t)] for t in trials]
        headers = ["trial", self.settings.metric, *self.settings.space, "seconds"]
        return tabulate(rows, headers=headers, disable_numparse=True, stralign="right")

    def _save(self, best: list[Any]) -> None:
        """Write `trials.csv`, a row per trial that has an outcome, and `best.yaml`."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["trial", "state", *self.settings.space, self.settings.metric, "seconds", "message"])
        for trial in (trial for trial in self.study.trials if "seconds" in trial.user_attrs):
            best_so_far = max(trial.intermediate_values.values(), default="")
            value = {"finished": trial.value, "pruned": best_so_far}.get(_state(trial), "")
            row = [_name(trial.number), _state(trial), *parameters_of(trial).values(), value]
            writer.writerow([*row, _seconds(trial), _message(trial)])
        write_atomically(self.folder / TABLE_FILE, text.getvalue())
        for trial in best:
            cfg = LazyConfig.apply_overrides(self.cfg, ["~search"] if "search" in self.cfg else [])
            cfg = LazyConfig.apply_overrides(cfg, as_overrides(parameters_of(trial)), source=self.source)
            LazyConfig.save(cfg, self.folder / BEST_FILE)


def _read_curve(path: Path, key: str) -> dict[int, float]:
    """Return a metric of the fine-tuning stage by step, from a file that may still be written."""
    curve = {}
    for line in path.read_bytes().splitlines(keepends=True):
        if line.endswith(b"\n") and f'"{key}"'.encode() in line:
            record = json.loads(line)
            if record.get("stage") == "finetune" and math.isfinite(record[key]):
                curve[record["step"]] = record[key]
    return curve


def _name(number: int) -> str:
    """Return the name of a trial's run, such as `trial_007`."""
    return f"trial_{number:03d}"


def _state(trial: Any) -> str:
    return {"COMPLETE": "finished", "PRUNED": "pruned"}.get(trial.state.name, "failed")


def _message(trial: Any) -> str:
    return trial.user_attrs.get("message", "")


def _seconds(trial: Any) -> str:
    return f"{trial.user_attrs['seconds']:.0f}"
