"""Charts of a run: curves, and the last evaluation by class."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter

from bissl_zoo.downstream.drawing import COLOURS, shorten
from bissl_zoo.engine.evaluate import Details, worst_confusions
from bissl_zoo.report.history import MAX_CURVES, Series
from bissl_zoo.report.page import TEXT, Block, Chart, Fold, Table, chart_style, embed, shown

#: inches; the width of a phone
WIDTH, HEIGHT = 5.0, 2.9
_DASHES = ("-", "--", ":", "-.")
#: metrics in the table of classes
_METRICS = 3
#: classes of a confusion matrix with numbers in its cells, and of the largest one that is drawn
_NUMBERED, _DRAWN = 12, 60
#: characters of a class name
_NAME = 18


def _line(panel: Axes, series: Series, colour: str, dashes: str = "-", label: str | None = None) -> None:
    marker = "o" if len(series.x) <= 40 else ""
    panel.plot(series.x, series.y, color=colour, linestyle=dashes, marker=marker, markersize=2.6, label=label)


def draw_curves(
    curves: Mapping[str, Series], x_label: str, y_label: str, log: bool = False, level: float | None = None
) -> Figure:
    """Draw at most 6 curves in one panel; `level`: the solver's tolerance, as a grey line."""
    with chart_style():
        figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
        panel = figure.subplots()
        for number, (name, series) in enumerate(list(curves.items())[:MAX_CURVES]):
            _line(panel, series.thinned(), COLOURS[number], _DASHES[number % 4], plain_label(name))
        values = [value for series in curves.values() for value in series.y]
        if log and min(values) > 0:
            panel.set_yscale("log")
            panel.yaxis.set_major_formatter("{x:g}")
            decades = math.log10(max(values) / min(values))
            panel.yaxis.set_minor_formatter(NullFormatter() if decades > 1 else "{x:g}")
        if level is not None:
            panel.axhline(level, color="0.55", linewidth=1, dashes=(4, 2), label=f"tolerance {level:g}")
        panel.set(xlabel=x_label, ylabel=y_label)
        steps = {x for series in curves.values() for x in series.x}
        if len(steps) == 1:  # no fractions of a step on the axis
            panel.set_xlim(min(steps) - 1, max(steps) + 1)
        panel.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        if all(value == int(value) for value in values):
            panel.yaxis.set_major_locator(MaxNLocator(6, integer=True))
        if len(curves) > 1 or level is not None:
            figure.legend(loc="outside lower center", ncols=2)
    return figure


def plain_label(name: str) -> str:
    """Return a name for a legend; matplotlib drops labels that begin with an underscore."""
    return f"\u200b{shown(name)}" if name.startswith("_") else shown(name)


def decimals(value: Any) -> str | None:
    """Return a metric as the console prints it; None if it is missing."""
    return f"{value:.4f}" if isinstance(value, float) else value


def in_time(seconds: float) -> str:
    """Return a duration as text."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{seconds / 60:.1f} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def detail_blocks(details: Mapping[str, Details]) -> list[Block]:
    """Return the confusion of each fine-tuning, and the table of the metrics by class with a column for each."""
    blocks: list[Block] = []
    for start, detail in details.items():
        aside = f", fine-tuned from {start}"
        if detail.confusion and len(detail.classes) <= _DRAWN:
            caption = f"Confusion{aside}: images by true and predicted class; shares of a row."
            blocks.append(Chart(embed(draw_confusion(detail), "confusion matrix"), caption))
        confused = worst_confusions(detail)
        if confused:
            blocks.append(Table(["true", "predicted", "images"], confused, f"Most frequent errors{aside}", [2]))
    per_class = {start: detail.per_class for start, detail in details.items()}
    labels = dict.fromkeys(label for metrics in per_class.values() for label in metrics)
    names = dict.fromkeys(name for metrics in per_class.values() for row in metrics.values() for name in row)
    columns = [(name, start) for name in list(names)[:_METRICS] for start in per_class]
    rows = [
        [label, *(decimals(per_class[start].get(label, {}).get(name)) for name, start in columns)] for label in labels
    ]
    if rows:
        header = ["class", *(f"{name}, {start}" for name, start in columns)]
        table = Table(header, rows, "Metrics by class, fractions.", range(1, len(header)), wide=True)
        blocks.append(Fold("Metrics by class", [table]))
    return blocks


def draw_confusion(details: Details) -> Figure:
    """Draw the matrix in colours of the share of each true class, with numbers if it is small."""
    counts = np.array(details.confusion)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    size = len(details.classes)
    names = [shown(shorten(label, _NAME)) for label in details.classes]
    with chart_style():
        figure = Figure(figsize=(WIDTH, WIDTH * 0.92), layout="constrained")
        panel = figure.subplots()
        drawn = panel.imshow(shares, cmap="cividis", vmin=0, vmax=1)
        if size <= _NUMBERED:
            for row, column in np.ndindex(counts.shape):
                colour = "black" if shares[row, column] > 0.55 else "white"
                style = {"ha": "center", "va": "center", "color": colour, "fontsize": TEXT - 2}
                panel.text(column, row, str(counts[row, column]), **style)
        step = max(1, size // 30)
        panel.set_xticks(range(0, size, step), names[::step], rotation=90)
        panel.set_yticks(range(0, size, step), names[::step])
        panel.set(xlabel="predicted class", ylabel="true class")
        figure.colorbar(drawn, ax=panel, label="share of the true class", shrink=0.7, pad=0.02)
    return figure
