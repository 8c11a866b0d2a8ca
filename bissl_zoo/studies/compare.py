"""Does BiSSL help? Run the arms of a comparison over the same seeds and report the differences."""

import itertools
import json
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from tabulate import tabulate
from torch.utils.data import Dataset

from bissl_zoo.config import LazyConfig
from bissl_zoo.data.datasets.catalog import sample_digest
from bissl_zoo.engine.build import Context, Weights, build_datasets, build_downstream, data_roles
from bissl_zoo.engine.checks import check_config, check_parts
from bissl_zoo.engine.evaluate import metric_names
from bissl_zoo.engine.init import load_init
from bissl_zoo.engine.stages.bissl import MIN_COUPLING, coupling
from bissl_zoo.errors import BisslZooError, ConfigError, did_you_mean
from bissl_zoo.files import read_json, write_atomically
from bissl_zoo.runs.directory import flatten, read_metadata
from bissl_zoo.runs.listing import FINISHED as RUN_FINISHED
from bissl_zoo.runs.listing import is_run, look_at
from bissl_zoo.studies.arms import (
    arm_config,
    base_config,
    find_arm,
    folder_name,
    pretrain_config,
    read_settings,
    run_name,
)
from bissl_zoo.studies.budget import equal_steps, measured_cost, read_costs, settle_costs
from bissl_zoo.studies.compare_report import Results, make_report, save_report, save_reports
from bissl_zoo.studies.jobs import check_unchanged, progress_line, run_jobs
from bissl_zoo.studies.leakage import look_for_leakage, recorded_leakage
from bissl_zoo.studies.places import FINISHED, Engine, Job, JobOutcome
from bissl_zoo.studies.plan import Plan
from bissl_zoo.studies.search import check_metric, draw, read_search, search, trial_config
from bissl_zoo.zoo.index import ZOO_PREFIX

#: what the results of a comparison depend on
RECORD_FILE = "comparison.yaml"
#: best overrides of each arm's search
SEARCHED_FILE = "searched.json"

logger = logging.getLogger(__name__)


def open_comparisons(
    cfg: DictConfig,
    source: str,
    folder: Path,
    datasets: Sequence[str] | None = None,
    parallel: int | None = None,
    engine: Engine = "local",
) -> "dict[str, Comparison]":
    """Return a comparison in `folder/NAME` for each data set and label fraction, or one in `folder` under "".

    Args:
        datasets: names in `compare.datasets`.
        source: name of the config for messages.
        parallel, engine: see `run_jobs`.
    Raises:
        ConfigError: an unknown data set or invalid settings.
    """
    settings = read_settings(cfg, source)
    for name in datasets or ():
        if name not in settings.datasets:
            hint = did_you_mean(name, settings.datasets)
            known = ", ".join(settings.datasets) or "none"
            raise ConfigError(f"{source}: compare.datasets has no '{name}'.{hint} Known: {known}.")
    comparisons = {}
    for name, share in itertools.product(datasets or [""], settings.labels or [None]):
        label = "" if share is None else f"labels{100 * share:g}"
        cell = "-".join(filter(None, [name, label]))
        changes = [*settings.datasets.get(name, []), *([] if share is None else [f"train.label_fraction={share}"])]
        where = f"{source}, {cell}" if cell else source
        changed = LazyConfig.apply_overrides(cfg, changes, where)
        comparisons[cell] = Comparison(changed, where, folder / cell, parallel, engine)
    return comparisons


def compare(comparisons: "dict[str, Comparison]", folder: Path, only_report: bool = False) -> dict[str, dict[str, Any]]:
    """Run comparisons or the rest of them, and write their reports and, for data sets, the table of all to `folder`.

    Args:
        only_report: report the runs that have finished so far and start none.
    Returns:
        The reports, each with the content of `comparison.json`.
    Raises:
        BisslZooError: as `Comparison.check`, for all of them before the first run, and `Comparison.report`.
    """
    if not only_report:
        for comparison in comparisons.values():
            comparison.check()
    reports = {}
    for name, comparison in comparisons.items():
        if name:
            logger.info(f"comparison {name}")
        reports[name] = comparison.report(only_report)
        if name:
            save_reports(reports, folder)
    return reports


class Comparison:
    """The runs of a comparison in their order: pretraining, searches, stages that seeds share, and the seeds.

    Args:
        source: name of the config for messages.
        folder: the runs are in `folder/runs/NAME`.
        parallel, engine: see `run_jobs`.
    """

    def __init__(
        self, cfg: DictConfig, source: str, folder: Path, parallel: int | None = None, engine: Engine = "local"
    ) -> None:
        self.source, self.folder, self.parallel, self.engine = source, folder, parallel, engine
        self.settings, self.base = read_settings(cfg, source), base_config(cfg)
        self.search = cfg.search if self.settings.search_trials else None
        #: base config with the data of the search: a BiSSL stage must not see the labels of the validation images
        self.search_base = self._search_base() if self.search is not None else None
        self.plan = Plan(self.base, self.settings, folder, self.search_base)
        self.failed: dict[str, str] = {}
        self.parents: list[dict[str, str]] = []
        self.samples: dict[str, dict[str, str]] = {}
        self.data: dict[str, Dataset] = {}

    def check(self) -> None:
        """Build the configs, data sets, initial weights and networks of all arms once, before hours of training.

        Raises:
            BisslZooError: as a single run before it starts.
        """
        base = LazyConfig.apply_overrides(self.base, ["train.device=cpu"])  # leaves the GPU to the runs
        init = base.train.init
        configs = {arm: arm_config(base, arm, 0, init, find_arm(arm).stages) for arm in self.settings.arms}
        if self.plan.pretrains:
            configs["pretrain"] = pretrain_config(base, 0)
        for cfg in configs.values():
            check_config(cfg, self.source)
        initial, lineage = load_init(init, base)
        self.parents = lineage[:1]
        if init and init.startswith(ZOO_PREFIX):  # seeds that are added later start from the same version
            self.base.train.init = f"{ZOO_PREFIX}{lineage[0]['name']}"
        evaluated = ({"val"} if "val" in base.dataloader else set()) | {"test"}
        data = build_datasets(base, {"pretext", "train", *evaluated})
        self.samples, self.data = _samples(base, data), data
        if self.search_base is not None:
            search_data = build_datasets(self.search_base, {"train", *evaluated})
            self.samples |= _samples(self.search_base, search_data, "search ")
        for cfg in configs.values():
            check_parts(Context(cfg, {role: data[role] for role in data_roles(cfg)}, torch.device("cpu")), initial)
        context = Context(base, data, torch.device("cpu"))
        backbone, task = build_downstream(context, Weights(initial.backbone))
        self._check_metric(metric_names(context, backbone, task, "test"))
        value = coupling(replace(context, cfg=configs["bissl"])) if "bissl" in configs else None
        if value is not None and value < MIN_COUPLING:
            logger.warning(
                f"lambda * lr_eff * lower steps = {value:.2g}, below {MIN_COUPLING}: the BiSSL stage will "
                "have almost no effect. Raise bilevel.lambda."
            )

    def run(self) -> Results:
        """Run what is missing and collect all results; call `check` before.

        Raises:
            BisslZooError: a shared pretraining failed; as `claim_folder`, the search and `run_jobs`.
        """
        claim_folder(self.folder, self.record())
        for sentence in look_for_leakage(self.folder, self.data):
            logger.warning(sentence)
        pretraining = self.plan.pretraining_jobs()
        self._note_failures(self._run(pretraining))
        if pretraining and len(self.failed) == len(pretraining):
            raise BisslZooError(f"Pretraining failed. {next(iter(self.failed.values()))}")
        self._note_failures(self._run(self.plan.stage_jobs()))
        budget = self._equal_budgets()
        best = self._run_searches(budget)
        results = self._empty_results(best)
        jobs = self.plan.seed_jobs({arm: [*budget.get(arm, ()), *best.get(arm, ())] for arm in self.settings.arms})
        ready = {cell: job for cell, job in jobs.items() if job.cfg.train.init not in self.failed}
        for job in (job for cell, job in jobs.items() if cell not in ready):
            results.failures[job.name] = f"the run it starts from failed, {self.failed[job.cfg.train.init]}"
        for cell, outcome in zip(ready, self._run(list(ready.values()), self._details), strict=True):
            if outcome.status == FINISHED:
                self._enter(results, *cell, outcome.results)
            else:
                results.failures[outcome.name] = outcome.message
        return self._averaged(results)

    def collect(self) -> Results:
        """Collect the results of the runs that have finished so far.

        Raises:
            ConfigError: the folder belongs to another comparison or to none.
        """
        file = self.folder / RECORD_FILE
        if not file.is_file():
            raise ConfigError(f"{self.folder} holds no comparison (no {RECORD_FILE}). Start one without --report.")
        # the version of a zoo entry and the samples are only known after `check`
        _check_same(self.folder, OmegaConf.to_container(LazyConfig.load(file)), self.record(), checked=False)
        searched = self.folder / SEARCHED_FILE
        best = read_json(searched) if searched.exists() else {}
        results = self._empty_results(best)
        for arm, seed, repeat in self.plan.runs():
            name = run_name(arm, seed, repeat)
            run = look_at(self.plan.run_dir(name)) if is_run(self.plan.run_dir(name)) else None
            if run is None or run.state != RUN_FINISHED:
                results.failures[name] = "not finished" if run else "not started"
            else:
                self._enter(results, arm, seed, repeat, run.results)
        return self._averaged(results)

    def report(self, only_report: bool) -> dict[str, Any]:
        """Run or collect the results, save their report and return it."""
        results = self.collect() if only_report else self.run()
        if not any(results.values.values()):
            reasons = "\n".join(f"  {name}: {message}" for name, message in list(results.failures.items())[:4])
            raise BisslZooError(f"No run of {self.folder} has finished:\n{reasons}")
        report = make_report(results, self.settings)
        save_report(report, self.folder)
        return report

    def describe(self) -> str:
        """Check everything and return the tables of the runs and of the arms; nothing is run or written."""
        self.check()
        jobs = self.plan.all_jobs()
        rows = [[job.name, ", ".join(job.cfg.train.stages), job.cfg.train.seed, job.cfg.train.init] for job in jobs]
        runs = tabulate(rows, ["run", "stages", "seed", "starts from"], disable_numparse=True, missingval="random")
        arms = [
            [arm, find_arm(arm).label, "\n".join(find_arm(arm).overrides(self.base)) or "-"]
            for arm in self.settings.arms
        ]
        changes = tabulate(arms, ["arm", "", "overrides of its stage"], disable_numparse=True)
        trials = (
            f"   and a search of {self.settings.search_trials} trials per arm" if self.settings.search_trials else ""
        )
        head = f"folder {self.folder}   metric {self.settings.metric}   {len(jobs)} runs{trials}"
        return f"{head}\n\n{runs}\n\n{changes}"

    def record(self) -> dict[str, Any]:
        """Return everything that the results depend on."""
        return {
            "config": OmegaConf.to_container(self.base),
            "arms": {name: find_arm(name).overrides(self.base) for name in self.settings.arms},
            "vary": self.settings.vary,
            **({"finetune_seeds": repeats} if (repeats := self.settings.finetune_seeds) > 1 else {}),
            **({"budget": budget} if (budget := self.settings.budget) != "steps" else {}),
            "search_trials": self.settings.search_trials,
            "search": OmegaConf.to_container(self.search, resolve=True) if self.search is not None else None,
            "init": self.parents,
            "samples": self.samples,
            "seeds": list(self.settings.seeds),
        }

    def _search_base(self) -> DictConfig:
        """Check the search space with a first draw and return the base config on the data of the search."""
        settings = read_search(self._with_search(self.base), self.source)
        trial_config(self.base, settings, draw(settings, 0), self.source)
        return LazyConfig.apply_overrides(self.base, settings.overrides, self.source)

    def _with_search(self, cfg: DictConfig) -> DictConfig:
        return OmegaConf.merge(cfg, {"search": self.search})

    def _equal_budgets(self) -> dict[str, list[str]]:
        """Measure the arms, once, and return the overrides with which all take the time of the dearest."""
        seed, costs = self.settings.seeds[0], read_costs(self.folder)
        pilots = {arm: job for arm, job in self.plan.pilot_jobs().items() if arm not in costs}
        if pilots:
            for outcome in self._run(list(pilots.values())):
                if outcome.status != FINISHED:
                    raise BisslZooError(f"A run that measures its arm failed. {outcome.name}: {outcome.message}")
            measured = {arm: measured_cost(self.plan.parts(arm, seed, job.name)) for arm, job in pilots.items()}
            costs = settle_costs(self.folder, measured)
        steps = equal_steps(costs)
        return {a: [f"finetune.steps={n}", "finetune.epochs=null"] for a, n in steps.items() if n != costs[a].steps}

    def _run_searches(self, budget: dict[str, list[str]]) -> dict[str, list[str]]:
        """Run the same search for each arm, with its budget, and return the best overrides."""
        if self.search is None:
            return {}
        init = self.plan.pretrained(self.settings.seeds[0])
        if init in self.failed:
            raise BisslZooError(f"The run that the searches start from failed. {self.failed[init]}")
        for outcome in self._run(self.plan.search_jobs()):
            if outcome.status != FINISHED:
                raise BisslZooError(f"The run that a search starts from failed. {outcome.name}: {outcome.message}")
        best = {}
        for arm in self.settings.arms:
            cfg = self._with_search(self.plan.trial_config(arm, budget.get(arm, ())))
            source, folder = f"{self.source}, arm {arm}", self.folder / "search" / folder_name(arm)
            result = search(cfg, source, folder, self.settings.search_trials, self.parallel, engine=self.engine)
            logger.info(f"{result.table}\nbest of {find_arm(arm).label}: {' '.join(result.best_overrides)}")
            best[arm] = result.best_overrides
        write_atomically(self.folder / SEARCHED_FILE, json.dumps(best, indent=2) + "\n")
        return best

    def _run(self, jobs: list[Job], details: Callable[[JobOutcome], str] = lambda outcome: "") -> list[JobOutcome]:
        def print_line(outcome: JobOutcome) -> None:
            text = details(outcome)
            if outcome.ran:
                logger.info(progress_line(outcome, text))

        return run_jobs(jobs, self.folder, self.parallel, print_line, engine=self.engine) if jobs else []

    def _note_failures(self, outcomes: list[JobOutcome]) -> None:
        for outcome in outcomes:
            if outcome.status != FINISHED:
                self.failed[str(self.plan.run_dir(outcome.name))] = f"{outcome.name}: {outcome.message}"

    def _details(self, outcome: JobOutcome) -> str:
        """Return the metric of a run for its line."""
        return f"{self.settings.metric} {self._value(outcome.results):.4f}" if outcome.status == FINISHED else ""

    def _empty_results(self, best: dict[str, list[str]]) -> Results:
        arms, train = self.settings.arms, self.base.train
        return Results(
            values={arm: {} for arm in arms},
            best_overrides=best,
            costs={arm: [] for arm in arms},
            leakage=recorded_leakage(self.folder),
            label_fraction=train.label_fraction,
            folds=train.folds,
            steps=equal_steps(read_costs(self.folder)),
        )

    def _enter(self, results: Results, arm: str, seed: int, repeat: int, metrics: dict[str, dict[str, float]]) -> None:
        value, name = self._value(metrics), run_name(arm, seed, repeat)
        if not math.isfinite(value):
            results.failures[name] = f"its {self.settings.metric} is {value}"
            return
        results.repeats.setdefault((arm, seed), []).append(value)
        parts = [read_metadata(run) for run in self.plan.parts(arm, seed, name)]
        seconds, memory = ([part.get(key, 0.0) for part in parts] for key in ("wall_time_s", "peak_memory_mib"))
        results.costs[arm].append((sum(seconds), max(memory)))

    def _averaged(self, results: Results) -> Results:
        """Set the value of each arm and seed to the mean of its fine-tunings, if all of them have a result."""
        for (arm, seed), values in results.repeats.items():
            if len(values) == self.settings.finetune_seeds:
                results.values[arm][seed] = sum(values) / len(values)
        return results

    def _value(self, metrics: dict[str, dict[str, float]]) -> float:
        """Return the compared metric of a run, which has fine-tuned once."""
        measured = next(iter(metrics.values()), {})
        self._check_metric(list(measured))
        return measured[self.settings.metric]

    def _check_metric(self, names: list[str]) -> None:
        """Check that the task computes the compared metric; without one it is the first."""
        if self.settings.metric is None:
            self.settings = replace(self.settings, metric=next(iter(names), None))
        check_metric(self.settings.metric, names, self.source, "compare.metric")


def _samples(cfg: DictConfig, data: dict[str, Dataset], prefix: str = "") -> dict[str, dict[str, str]]:
    """Return name and digest of the data sets that can list their samples, by role."""
    digests = {role: sample_digest(dataset) for role, dataset in data.items()}
    return {
        f"{prefix}{role}": {"name": cfg.dataloader[role].dataset.name, "sample_list_sha256": digest}
        for role, digest in digests.items()
        if digest
    }


def claim_folder(folder: Path, record: dict[str, Any]) -> None:
    """Write the record of a comparison to its folder, or check it against an existing one.

    Seeds and arms may be added to an existing comparison.

    Raises:
        ConfigError: the folder holds another comparison or other files, or cannot be written.
    """
    file = folder / RECORD_FILE
    if file.is_file():
        before = OmegaConf.to_container(LazyConfig.load(file))
        missing = sorted(set(before["seeds"]) - set(record["seeds"]))
        if missing:
            raise ConfigError(
                f"{folder} compares the seeds {', '.join(map(str, before['seeds']))}. Leaving seeds out would be a "
                f"selection of results; missing are {', '.join(map(str, missing))}. Use --report to see the results."
            )
        _check_same(folder, before, record)
        record = {**record, "arms": {**before["arms"], **record["arms"]}}
    elif folder.is_dir() and any(folder.iterdir()):
        raise ConfigError(f"'{folder}' is not empty and holds no comparison. Choose another train.output_dir.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"Cannot create the folder '{folder}': {error.strerror}.") from error
    LazyConfig.save(OmegaConf.create(record), file)


def _check_same(folder: Path, before: dict[str, Any], now: dict[str, Any], checked: bool = True) -> None:
    """Raise if two records differ, apart from their seeds and from arms and samples that only one of them has.

    Args:
        checked: False to ignore what is only known after `Comparison.check`.
    Raises:
        ConfigError: with the keys that differ.
    """

    def compared(record: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
        ignored = ("seeds",) if checked else ("seeds", "init", "samples", "config.train.init")
        single = [f"{s}.{key}" for s in ("arms", "samples") for key in record.get(s, {}).keys() - other.get(s, {})]
        ignored = {*ignored, *single}
        return {k: v for k, v in flatten(record).items() if not any(f"{k}.".startswith(f"{i}.") for i in ignored)}

    check_unchanged(folder, compared(before, now), compared(now, before), "comparison")
