"""Does BiSSL help? A comparison on one data set or several, from its config to its report."""

import logging
from pathlib import Path
from typing import Any, Literal

from omegaconf import DictConfig
from tabulate import tabulate

from bissl_zoo.config import LazyConfig
from bissl_zoo.errors import BisslZooError, ConfigError, did_you_mean
from bissl_zoo.studies.compare_arms import ARMS, read_settings
from bissl_zoo.studies.compare_report import make_report, save_datasets, save_report
from bissl_zoo.studies.compare_runs import Comparison

logger = logging.getLogger(__name__)


def compare(
    cfg: DictConfig,
    source: str,
    folder: Path,
    parallel: int | None = None,
    only_report: bool = False,
    engine: Literal["local", "ray"] = "local",
) -> dict[str, Any]:
    """Run a comparison, or the rest of it, and write its report to `folder`.

    Args:
        source: the config's name, for messages.
        parallel, engine: see `run_jobs`.
        only_report: of what has finished by now, and run nothing.
    Returns:
        The report, as `comparison.json` has it.
    Raises:
        BisslZooError: as `Comparison.check` and `Comparison.run` do, and where there is nothing to report of.
    """
    comparison = Comparison(cfg, source, folder, parallel, engine)
    if not only_report:
        comparison.check()
    return _reported(comparison, only_report)


def compare_datasets(
    cfg: DictConfig,
    source: str,
    folder: Path,
    names: list[str],
    parallel: int | None = None,
    only_report: bool = False,
    engine: Literal["local", "ray"] = "local",
) -> dict[str, dict[str, Any]]:
    """A comparison per data set, in `folder/NAME`, and the table of all, which grows with each of them.

    Raises:
        BisslZooError: as :func:`compare`; all data sets are checked before the first run.
    """
    comparisons = _comparisons(cfg, source, folder, names, parallel, engine)
    if not only_report:
        for comparison in comparisons.values():
            comparison.check()
    reports = {}
    for name, comparison in comparisons.items():
        logger.info(f"data set {name}")
        reports[name] = _reported(comparison, only_report)
        save_datasets(reports, folder)
    return reports


def describe(cfg: DictConfig, source: str, folder: Path, names: list[str] | None = None) -> str:
    """The runs that there would be, and what each arm changes; everything is checked, and nothing is run or written.

    Raises:
        BisslZooError: as `Comparison.check` does.
    """
    if names:
        comparisons = _comparisons(cfg, source, folder, names)
        return "\n\n".join(f"data set {name}\n\n{_description(one)}" for name, one in comparisons.items())
    return _description(Comparison(cfg, source, folder))


def _comparisons(
    cfg: DictConfig,
    source: str,
    folder: Path,
    names: list[str],
    parallel: int | None = None,
    engine: Literal["local", "ray"] = "local",
) -> dict[str, Comparison]:
    known, found = read_settings(cfg, source).datasets, {}
    for name in names:
        if name not in known:
            there = ", ".join(known) or "none"
            raise ConfigError(f"{source}: compare.datasets has no '{name}'.{did_you_mean(name, known)} There: {there}.")
        where = f"{source}, data set {name}"
        one = LazyConfig.apply_overrides(cfg, known[name], where)
        found[name] = Comparison(one, where, folder / name, parallel, engine)
    return found


def _reported(comparison: Comparison, only_report: bool) -> dict[str, Any]:
    figures = comparison.collect() if only_report else comparison.run()
    if not any(figures.values.values()):
        reasons = "\n".join(f"  {name}: {message}" for name, message in list(figures.failures.items())[:4])
        raise BisslZooError(f"No run of {comparison.folder} has come to a figure:\n{reasons}")
    report = make_report(figures, comparison.settings)
    save_report(report, comparison.folder)
    return report


def _description(comparison: Comparison) -> str:
    comparison.check()
    settings, base = comparison.settings, comparison.base
    jobs = [*comparison.shared_jobs(), *comparison.search_jobs(), *comparison.seed_jobs({}).values()]
    rows = [
        [job.name, ", ".join(job.cfg.train.stages), job.cfg.train.seed, job.cfg.train.init or "random"] for job in jobs
    ]
    runs = tabulate(rows, headers=["run", "stages", "seed", "starts from"], disable_numparse=True)
    arms = [[name, ARMS[name].words, "\n".join(ARMS[name].overrides(base)) or "-"] for name in settings.arms]
    changes = tabulate(arms, headers=["arm", "", "overrides of its stage"], disable_numparse=True)
    trials = f"   and a search of {settings.search_trials} trials per arm" if settings.search_trials else ""
    return f"folder {comparison.folder}   figure {settings.metric}   {len(jobs)} runs{trials}\n\n{runs}\n\n{changes}"
