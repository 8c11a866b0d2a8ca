"""Charts of a run: curves, and the last evaluation by class."""

import math
from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter

from bissl_zoo.downstream.drawing import COLOURS, shorten
from bissl_zoo.engine.evaluate import MOST_CLASSES, Details, worst_confusions
from bissl_zoo.report.history import MAX_CURVES, Series
from bissl_zoo.report.page import TEXT, Block, Chart, Fold, Note, Table, chart_style, embed, shown

#: inches; the width of a phone
WIDTH, HEIGHT = 5.0, 2.9
_DASHES = ("-", "--", ":", "-.")
#: rows up to which the table of metrics by class is not folded
_OPEN = 24
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
        figure.legend(loc="outside lower center", ncols=2)
    return figure


def plain_label(name: str) -> str:
    """Return a name for a legend; matplotlib drops labels that begin with an underscore."""
    return f"\u200b{shown(name)}" if name.startswith("_") else shown(name)


def in_time(seconds: float) -> str:
    """Return a duration as text."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{seconds / 60:.1f} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def detail_blocks(details: Mapping[str, Details]) -> list[Block]:
    """Return the charts and tables of the metrics by class, for every fine-tuning."""
    names = dict.fromkeys(name for d in details.values() for metrics in d.per_class.values() for name in metrics)
    blocks: list[Block] = []
    for start, detail in details.items():
        aside = f", fine-tuned from {start}"
        if len(detail.per_class) > MOST_CLASSES:
            blocks.append(Note(f"The confusion matrix{aside} is not kept above {MOST_CLASSES} classes."))
        if detail.confusion and len(detail.classes) <= _DRAWN:
            caption = f"Confusion{aside}: images by true and predicted class; shares of a row."
            blocks.append(Chart(embed(draw_confusion(detail), "confusion matrix"), caption))
        confused = worst_confusions(detail)
        if confused:
            blocks.append(Table(["true", "predicted", "images"], confused, f"Most frequent errors{aside}", [2]))
    if details:
        rows = [
            [label, start, *map(m.get, names)]
            for start, detail in details.items()
            for label, m in detail.per_class.items()
        ]
        caption = "Metrics by class, fractions."
        table = Table(["class", "fine-tuned from", *names], rows, caption, range(2, 2 + len(names)))
        blocks.append(table if len(rows) <= _OPEN else Fold("Metrics by class", [table]))
    return blocks or [Note("The evaluation has no metrics by class.")]


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
