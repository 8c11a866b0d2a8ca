"""Reports: one self-contained HTML file on one run or on several runs side by side."""

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

from bissl_zoo.engine.stages import alternates
from bissl_zoo.errors import CheckpointError
from bissl_zoo.report import IMAGES
from bissl_zoo.report.charts import draw_curves
from bissl_zoo.report.history import MAX_CURVES, Series
from bissl_zoo.report.page import Block, Chart, Note, Sections, Table, embed, footer, render, save_page
from bissl_zoo.report.run import RunReport, differing
from bissl_zoo.runs.listing import is_run

#: metrics of several runs in one chart, for each stage that has them
_CURVES = {"total_loss": "loss", "lower/total_loss": "lower loss", "probe/knn_top1": "kNN top-1"}


def write_report(folders: Sequence[Path], output: Path, images: int = IMAGES, ended: bool = False) -> int:
    """Write the report of these runs atomically.

    Args:
        folders: run directories in any state.
        images: maximum number of images of a data set; 0 reads only the files of the runs and builds nothing that
            their configs name.
        ended: this process has finished the runs and still holds their locks.
    Returns:
        The number of parts that could not be made; the page and a warning show the reason of each.
    Raises:
        CheckpointError: a folder is not a run directory.
        ConfigError: `output` cannot be written.
    """
    for folder in folders:
        if not is_run(folder):
            raise CheckpointError(f"There is no run in {folder} (no config.yaml). Give the directory of a run.")
    runs = [RunReport(folder, images, ended) for folder in folders]
    views = [run.view() for run in runs]
    if len(runs) == 1:
        page = render("run.html", view=views[0], footer=footer())
    else:
        named = list(zip(_names(runs), views, strict=True))
        page = render("runs.html", views=named, sections=side_by_side(runs).sections, footer=footer())
    save_page(page, output)
    return sum(view.problems for view in views)


def side_by_side(runs: Sequence[RunReport]) -> Sections:
    """Return the sections that compare several runs."""
    names = _names(runs)
    report = Sections("several runs")
    report.add("Results", lambda: _results(runs, names))
    report.add("Differences", lambda: _differences(runs, names))
    report.add("Curves", lambda: _curves(runs, names))
    return report


def _names(runs: Sequence[RunReport]) -> list[str]:
    """Return unique names of the runs."""
    short = [run.name for run in runs]
    return short if len(set(short)) == len(short) else [str(run.folder) for run in runs]


def _results(runs: Sequence[RunReport], names: Sequence[str]) -> list[Block]:
    measured = [metric for run in runs for metrics in run.state.results.values() for metric in metrics]
    columns = [metric for metric in dict.fromkeys(measured) if "/" not in metric]
    rows: list[list[Any]] = []
    for run, name in zip(runs, names, strict=True):
        for start, metrics in run.state.results.items() or [(None, {})]:
            rows.append([name, run.state.state, start, *map(metrics.get, columns)])
    header = ["run", "state", "fine-tuned from", *columns]
    return [Table(header, rows, "Metrics on the test set, fractions.", range(3, len(header)), wide=True)]


def _differences(runs: Sequence[RunReport], names: Sequence[str]) -> list[Block]:
    rows = [[key, *values] for key, values in differing([run.cfg for run in runs])]
    if not rows:
        return [Note("The configs are equal except for the output directories.")]
    return [Table(["key", *names], rows, "Keys of the config in which the runs differ.", wide=True)]


def _curves(runs: Sequence[RunReport], names: Sequence[str]) -> list[Block]:
    blocks: list[Block] = []
    pairs = list(zip(runs, names, strict=True))[:MAX_CURVES]
    evaluated = list(dict.fromkeys(metric for run, _ in pairs for metric in run.history.names("val/", "test/")))
    stages = dict.fromkeys(stage for run, _ in pairs for stage in run.history.stages())
    for stage, (key, y_label) in product(stages, {**_CURVES, **{metric: metric for metric in evaluated[:3]}}.items()):
        curves: dict[str, Series] = {name: run.history.series(key, stage) for run, name in pairs}
        curves = {name: series for name, series in curves.items() if series.x}
        if curves:
            x_label, title = f"{'alternations' if alternates(stage) else 'steps'} of {stage}", f"{y_label}, {stage}"
            blocks.append(Chart(embed(draw_curves(curves, x_label, y_label), title), f"{title[0].upper()}{title[1:]}."))
    if len(runs) > MAX_CURVES:
        blocks.append(Note(f"The charts show the first {MAX_CURVES} runs."))
    return blocks or [Note("The runs have written no curves yet.")]
