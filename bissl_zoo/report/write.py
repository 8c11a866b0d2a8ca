"""Reports: one HTML file on a run, on several side by side, or on a zoo, that needs no network and no server."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from bissl_zoo.errors import CheckpointError
from bissl_zoo.report import IMAGES
from bissl_zoo.report.charts import draw_curves
from bissl_zoo.report.config import differing
from bissl_zoo.report.history import Series
from bissl_zoo.report.page import Block, Chapters, Note, Picture, Table, footer, render, save_page
from bissl_zoo.report.run import RunReport
from bissl_zoo.report.svg import to_svg
from bissl_zoo.runs.listing import is_run

#: curves laid over each other: a figure by its key in the stages, and the title of its chart
_LAID_OVER = {
    "Pretext loss": ("total_loss", "pretrain"),
    "Lower loss, bissl": ("lower/total_loss", "bissl"),
    "Fine-tuning loss": ("total_loss", "finetune"),
    "kNN top-1, bissl": ("probe/knn_top1", "bissl"),
    "kNN top-1, pretrain": ("probe/knn_top1", "pretrain"),
}
#: runs whose curves one chart can tell apart
_MOST_OVER = 6


def write_report(folders: Sequence[Path], output: Path, images: int = IMAGES, ended: bool = False) -> int:
    """Write the report of these runs to `output`, complete or not at all.

    Args:
        folders: run directories, whatever their state.
        images: most of a data set that are looked at; 0 reads the files of the runs alone, and builds nothing that
            their configs name.
        ended: this process has run them to their end, and still holds their locks.
    Returns:
        How many parts could not be made; each says why in its place, and in a warning.
    Raises:
        CheckpointError: a folder that is no run.
        ConfigError: `output` cannot be written.
    """
    for folder in folders:
        if not is_run(folder):
            raise CheckpointError(f"There is no run in {folder} (no config.yaml). Give the directory of a run.")
    runs = [RunReport(folder, images, number, ended) for number, folder in enumerate(folders)]
    views = [run.view() for run in runs]
    problems = sum(view.problems for view in views)
    if len(runs) == 1:
        page = render("run.html", view=views[0], footer=footer())
    else:
        chapters = side_by_side(runs)
        page = render(
            "runs.html", views=list(zip(_names(runs), views, strict=True)), sections=chapters.sections, footer=footer()
        )
    save_page(page, output)
    return problems


def side_by_side(runs: Sequence[RunReport]) -> Chapters:
    """What several runs have in common and in what they differ."""
    names = _names(runs)
    chapters = Chapters("several runs")
    chapters.add("Results", lambda: _results(runs, names))
    chapters.add("Differences", lambda: _differences(runs, names))
    chapters.add("Curves", lambda: _curves(runs, names))
    return chapters


def _names(runs: Sequence[RunReport]) -> list[str]:
    """A name for each, unlike those of the others."""
    short = [run.name for run in runs]
    return short if len(set(short)) == len(short) else [str(run.folder) for run in runs]


def _results(runs: Sequence[RunReport], names: Sequence[str]) -> list[Block]:
    figures = [figure for run in runs for one in run.state.results.values() for figure in one if "/" not in figure]
    metrics = list(dict.fromkeys(figures))
    rows: list[list[Any]] = []
    for run, name in zip(runs, names, strict=True):
        for start, one in run.state.results.items() or [(None, {})]:
            rows.append([name, run.state.state, start, *(one.get(metric) for metric in metrics)])
    header = ["run", "state", "fine-tuned from", *metrics]
    return [Table(header, rows, "Figures on the test set, fractions.", range(3, len(header)), wide=True)]


def _differences(runs: Sequence[RunReport], names: Sequence[str]) -> list[Block]:
    configs: list[DictConfig] = [run.cfg for run in runs]
    rows = [[key, *values] for key, values in differing(configs)]
    if not rows:
        return [Note("The configs are equal, but for where the runs lie.")]
    return [Table(["key", *names], rows, "Keys of the config in which the runs differ.", wide=True)]


def _curves(runs: Sequence[RunReport], names: Sequence[str]) -> list[Block]:
    blocks: list[Block] = []
    shown = list(zip(runs, names, strict=True))[:_MOST_OVER]
    evaluated = dict.fromkeys(name for run, _ in shown for name in run.history.names("val/", "test/"))
    charts = {**_LAID_OVER, **{f"{name}, finetune": (name, "finetune") for name in list(evaluated)[:3]}}
    for number, (title, (key, stage)) in enumerate(charts.items()):
        curves: dict[str, Series] = {name: run.history.series(key, stage) for run, name in shown}
        curves = {name: series for name, series in curves.items() if series.x}
        if curves:
            x_label = "alternations of bissl" if stage == "bissl" else f"steps of {stage}"
            chart = to_svg(draw_curves(curves, x_label, title.partition(",")[0]), f"all-{number}", title)
            blocks.append(Picture(chart, f"{title}."))
    if len(runs) > _MOST_OVER:
        blocks.append(Note(f"Curves of the first {_MOST_OVER} runs; more could not be told apart."))
    return blocks or [Note("The runs have written no curves yet.")]
