"""Random search of settings: every trial a run of its own, at parameters that its number determines."""

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from omegaconf import DictConfig, OmegaConf

from bissl_zoo.config import LazyConfig
from bissl_zoo.engine.build import Weights, build_downstream
from bissl_zoo.engine.checks import check_parts
from bissl_zoo.engine.evaluate import figures_of
from bissl_zoo.engine.init import load_init
from bissl_zoo.engine.publishing import RESULTS_FILE
from bissl_zoo.engine.runner import open_context
from bissl_zoo.errors import BisslZooError, ConfigError, DatasetError, did_you_mean
from bissl_zoo.report.images.drawing import save_figure
from bissl_zoo.runs.checkpoint import write_atomically
from bissl_zoo.runs.listing import is_run
from bissl_zoo.studies.job_process import HIDDEN
from bissl_zoo.studies.jobs import FAILED, FINISHED, Job, JobOutcome, progress_line, run_jobs
from bissl_zoo.studies.search_pruning import MedianPruner
from bissl_zoo.studies.search_report import PRUNED, Trial, best_table, draw, ranked, write_csv
from bissl_zoo.studies.search_space import (
    SearchSettings,
    as_overrides,
    best_config,
    read_search,
    trial_config,
    trial_name,
)

logger = logging.getLogger(__name__)

TABLE_FILE, PICTURE_FILE, BEST_FILE = "trials.csv", "search.png", "best.yaml"


@dataclass(frozen=True)
class SearchResult:
    """What a search has found.

    Attributes:
        best_overrides: the best trial's parameters, as overrides.
        table: the five best trials, to be printed.
        trials: all of them, in the order of their numbers.
    """

    best_overrides: list[str]
    table: str
    trials: list[Trial]


def search(
    cfg: DictConfig,
    source: str,
    folder: Path,
    trials: int | None = None,
    parallel: int | None = None,
    prune: bool = False,
    engine: Literal["local", "ray"] = "local",
) -> SearchResult:
    """Run the trials that the section `search` of `cfg` describes, and keep the best.

    `folder` gets `trials.csv`, `best.yaml`, `search.png`, `runs/trial_NNN` and `logs/trial_NNN.log`. Trials that are
    finished or were given up are not run again, those that failed or were cut short are; more may be added later.

    Args:
        source: the config's name, for messages.
        trials: how many are drawn; None for `search.trials`.
        parallel, engine: see `run_jobs`.
        prune: give up trials that are worse on the way than the median, see `MedianPruner`.
    Raises:
        ConfigError: before the first trial, what cannot be; see `read_search`, `check_trials` and `run_jobs`.
        BisslZooError: no trial has finished.
        Interrupted: asked to stop, after the trials have saved.
    """
    settings = read_search(cfg, source)
    folder, number = Path(folder), settings.trials if trials is None else trials
    if number < 1:
        raise ConfigError(f"{number} trials: at least 1 is needed.")
    if is_run(folder):
        raise ConfigError(f"{folder} holds a run. Give a search another folder, as in --output runs/another.")
    configs = [trial_config(cfg, settings, n, source) for n in range(number)]
    _check_stages(configs[0], prune, source)
    if not (folder / "runs" / trial_name(0) / RESULTS_FILE).exists():
        check_trials(cfg, configs[0], settings, source)
    return _Search(cfg, source, settings, configs, folder, prune).go(parallel, engine)


def _check_stages(cfg: DictConfig, prune: bool, source: str) -> None:
    if "finetune" not in cfg.train.stages:
        raise ConfigError(f"{source}: a search compares fine-tunings; train.stages has no finetune.")
    if prune and not cfg.finetune.eval_period:
        raise ConfigError(
            f"{source}: --prune compares trials on the way; it needs finetune.eval_period, steps between evaluations."
        )


def check_trials(cfg: DictConfig, trial: DictConfig, settings: SearchSettings, source: str) -> None:
    """Build once what a trial builds, and look at one prediction for the names of the figures.

    Raises:
        ConfigError: the task does not give the metric.
        BisslZooError: as a run does before it starts.
    """
    trial = LazyConfig.apply_overrides(trial, ["train.device=cpu"])  # a GPU's memory is for the trials
    context = open_context(trial, source)
    initial, _ = load_init(trial.train.init, trial)
    check_parts(context, initial)
    backbone, task = build_downstream(context, Weights(initial.backbone))
    try:
        _check_metric(settings.metric, figures_of(context, backbone, task, "test"), cfg.task.name)
    except DatasetError as error:  # such as an image without objects
        logger.warning(f"whether the task gives search.metric={settings.metric} will be seen after a trial: {error}")
    if OmegaConf.to_container(cfg.dataloader.test) == OmegaConf.to_container(trial.dataloader.test):
        logger.warning(
            "the trials are measured on dataloader.test, and figures of settings that were chosen by a test "
            "set are too good. Let them read a validation split: search.overrides=[dataloader.test.dataset.split=val]."
        )


def _check_metric(metric: str, names: list[str], task: str) -> None:
    if metric not in names:
        known = ", ".join(name for name in names if "/" not in name)
        raise ConfigError(
            f"search.metric is '{metric}', which the task '{task}' does not give.{did_you_mean(metric, names)} It "
            f"gives {known}."
        )


class _Search:
    """The trials of a search and what is known of them."""

    def __init__(
        self,
        cfg: DictConfig,
        source: str,
        settings: SearchSettings,
        configs: list[DictConfig],
        folder: Path,
        prune: bool,
    ) -> None:
        self.cfg, self.source, self.settings, self.configs, self.folder = cfg, source, settings, configs, folder
        self.prune = prune
        role = "val" if "val" in configs[0].dataloader else "test"
        self.pruner = MedianPruner(folder / "runs", f"{role}/{settings.metric}")
        self.trials: dict[str, Trial] = {}

    def go(self, parallel: int | None, engine: Literal["local", "ray"]) -> SearchResult:
        """Run what is missing; see :func:`search`."""
        jobs = []
        for number, config in enumerate(self.configs):
            given_up = self._given_up(trial_name(number))
            if given_up.exists():
                self._add_pruned(number, given_up.read_text(), 0.0)
            else:
                jobs.append(Job(trial_name(number), config))
        logger.info(
            f"search: {len(self.configs)} trials in {self.folder}, {self.settings.metric} of the last fine-tuning"
        )
        stop_if = (lambda job: self.pruner.reason(job.name)) if self.prune else None
        try:
            run_jobs(jobs, self.folder, parallel, self._take, stop_if, engine)
        finally:
            if self.trials:
                self._save()
                save_figure(draw(list(self.trials.values()), self.settings), self.folder / PICTURE_FILE)
        return self._result()

    def _given_up(self, name: str) -> Path:
        return self.folder / HIDDEN / f"{name}.pruned"

    def _add_pruned(self, number: int, reason: str, seconds: float) -> None:
        values = self.pruner.curve(trial_name(number)).values()
        figures = {self.settings.metric: max(values)} if values else {}
        parameters = self.settings.draw(number)
        trial = Trial(number, parameters, PRUNED, figures, seconds, reason)
        self.trials[trial.name] = trial

    def _take(self, outcome: JobOutcome) -> None:
        """Note what a trial came to, and tell of it."""
        number = int(outcome.name.rpartition("_")[2])
        if outcome.status in (FINISHED, FAILED):
            figures = list(outcome.results.values())[-1] if outcome.results else {}
            if outcome.status == FINISHED:
                _check_metric(self.settings.metric, list(figures), self.cfg.task.name)
                self.pruner.finished.add(outcome.name)
            parameters = self.settings.draw(number)
            trial = Trial(number, parameters, outcome.status, figures, outcome.seconds, outcome.message)
            self.trials[trial.name] = trial
        else:
            write_atomically(self._given_up(outcome.name), outcome.message)
            self._add_pruned(number, outcome.message, outcome.seconds)
        if outcome.ran:
            self._save()
            state = self.trials[outcome.name].state
            logger.info(progress_line(replace(outcome, status=state), self._figures(outcome)))

    def _figures(self, outcome: JobOutcome) -> str:
        metric, best = self.settings.metric, ranked(list(self.trials.values()), self.settings.metric)
        told = f"best {best[0].figures[metric]:.4f} ({best[0].name})" if best else ""
        if outcome.status != FINISHED:
            return "  ".join(filter(None, [" ".join(outcome.message.split())[:200], told]))
        return f"{metric} {self.trials[outcome.name].figures[metric]:.4f}  {told}".rstrip()

    def _save(self) -> None:
        trials = list(self.trials.values())
        write_csv(self.folder / TABLE_FILE, trials)
        for best in ranked(trials, self.settings.metric)[:1]:
            LazyConfig.save(best_config(self.cfg, best.parameters, self.source), self.folder / BEST_FILE)

    def _result(self) -> SearchResult:
        trials = sorted(self.trials.values(), key=lambda trial: trial.number)
        best = ranked(trials, self.settings.metric)
        if not best:
            message = next((trial.message for trial in trials if trial.message), "none gave a finite figure")
            raise BisslZooError(
                f"None of the {len(trials)} trials has finished with a figure; {trials[0].name}: {message} Their logs "
                f"are in {self.folder / 'logs'}."
            )
        return SearchResult(as_overrides(best[0].parameters), best_table(trials, self.settings.metric), trials)
