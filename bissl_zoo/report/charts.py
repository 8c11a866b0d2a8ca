"""Charts of what a run wrote while it went on: losses, the hypergradient, evaluations, probes, and where time went."""

import math
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, NullFormatter

from bissl_zoo.engine.stages.bissl import HEAD_WARMUP, PRETEXT_WARMUP
from bissl_zoo.engine.stages.finetune import BASELINE
from bissl_zoo.report.history import MOST_FIGURES, Axis, History, Series
from bissl_zoo.report.images.drawing import COLOURS
from bissl_zoo.report.page import shown
from bissl_zoo.report.svg import TEXT, chart_style
from bissl_zoo.report.timing import Timing

#: inches; a chart is as wide as a phone at its natural size
WIDTH, HEIGHT = 5.0, 2.9
#: tints behind the stages, light and dark pages alike
_SHADES = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9")
_SHADE = 0.16
_DASHES = ("-", "--", ":", "-.")

Curves = Mapping[str, Series]


def draw_losses(history: History, axis: Axis) -> Figure | None:
    """The pretext loss above and the downstream loss below, over the steps of all stages, which are shaded."""
    levels = loss_parts(history, axis)
    if not levels:
        return None
    with chart_style():
        figure = Figure(figsize=(WIDTH, 1.0 + 1.6 * len(levels)), layout="constrained")
        panels = figure.subplots(len(levels), 1, sharex=True, squeeze=False)[:, 0]
        for number, (panel, (name, parts)) in enumerate(zip(panels, levels.items(), strict=True)):
            _shade(panel, axis)
            for part in parts:
                _line(panel, part.thinned(), COLOURS[0] if number == 0 else COLOURS[4])
            panel.set_ylabel(name)
        panels[-1].set_xlabel("optimizer steps since the run began")
        ends = max((span.start + span.length for span in axis.spans), default=1)
        panels[-1].set_xlim(0, max(ends, 1))
        patches = [
            Patch(color=_SHADES[number % len(_SHADES)], alpha=_SHADE * 2, label=f"{span.stage}, {span.length} steps")
            for number, span in enumerate(axis.spans)
        ]
        figure.legend(handles=patches, loc="outside lower center", ncols=2)
    return figure


def loss_parts(history: History, axis: Axis) -> dict[str, list[Series]]:
    """The losses of both levels, of which there are any, each as its parts on the common axis."""
    levels = {
        "pretext loss": _level(history, axis, "lower", ("pretrain", PRETEXT_WARMUP)),
        "downstream loss": _level(history, axis, "upper", (HEAD_WARMUP, BASELINE, "finetune")),
    }
    return {name: parts for name, parts in levels.items() if parts}


def _level(history: History, axis: Axis, level: str, stages: Sequence[str]) -> list[Series]:
    """The loss of a level in the order of the stages, a part for each: of `stages`, and of bissl."""
    parts = []
    for span in axis.spans:
        part = Series()
        if span.stage in stages:
            entries, name = history.of([span.stage]), "total_loss"
        elif span.stage == "bissl":
            finer = level == "upper" and any(True for _ in history.of(["bissl"], upper=True))
            entries, name = history.of(["bissl"], upper=finer), f"{level}/total_loss"
        else:
            continue
        for entry in entries:
            value, place = entry.number(name), axis.place(entry, level)
            if value is not None and place is not None:
                part.x.append(place)
                part.y.append(value)
        parts += [part] if part.x else []
    return parts


def _shade(panel: Axes, axis: Axis) -> None:
    for number, span in enumerate(axis.spans):
        colour = _SHADES[number % len(_SHADES)]
        panel.axvspan(span.start, span.start + span.length, color=colour, alpha=_SHADE, linewidth=0)


def _line(panel: Axes, series: Series, colour: str, dashes: str = "-", label: str | None = None) -> None:
    marker = "o" if len(series.x) <= 40 else ""
    panel.plot(series.x, series.y, color=colour, linestyle=dashes, marker=marker, markersize=2.6, label=label)


def draw_curves(curves: Curves, x_label: str, y_label: str, log: bool = False, level: float | None = None) -> Figure:
    """Curves in one panel, told apart by colour and dashes; `level`: a value to be compared with, as a grey line."""
    with chart_style():
        figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
        panel = figure.subplots()
        for number, (name, series) in enumerate(list(curves.items())[:MOST_FIGURES]):
            series = series.thinned()
            _line(panel, series, COLOURS[number % 6], _DASHES[number % 4], plain_label(name))
        if log and all(value > 0 for series in curves.values() for value in series.y):
            panel.set_yscale("log")
            panel.yaxis.set_major_formatter("{x:g}")
            panel.yaxis.set_minor_formatter(NullFormatter() if _decades(curves) > 1 else "{x:g}")
        if level is not None:
            panel.axhline(level, color="0.55", linewidth=1, dashes=(4, 2), label=f"tolerance {level:g}")
        panel.set(xlabel=x_label, ylabel=y_label)
        places = {x for series in curves.values() for x in series.x}
        if len(places) == 1:  # or the axis would have fractions of a step
            panel.set_xlim(min(places) - 1, max(places) + 1)
        panel.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        if all(value == int(value) for series in curves.values() for value in series.y):
            panel.yaxis.set_major_locator(MaxNLocator(6, integer=True))
        figure.legend(loc="outside lower center", ncols=2)
    return figure


def _decades(curves: Curves) -> float:
    values = [value for series in curves.values() for value in series.y]
    return math.log10(max(values) / min(values))


def plain_label(name: str) -> str:
    """A name as a legend can show it."""
    # matplotlib leaves lines out of a legend whose label begins with an underscore
    return f"\u200b{shown(name)}" if name.startswith("_") else shown(name)


def draw_timing(timing: Timing) -> Figure:
    """A bar per stage in colours of what took the time, and one of what lies outside of the records."""
    names = [stage.name for stage in timing.stages]
    with chart_style():
        figure = Figure(figsize=(WIDTH, 0.9 + 0.36 * len(names)), layout="constrained")
        panel = figure.subplots()
        rows = range(len(names))
        left = [0.0] * len(names)
        parts = {
            "computing": [stage.computing for stage in timing.stages],
            "evaluating": [stage.evaluating for stage in timing.stages],
            "waiting for data": [stage.waiting for stage in timing.stages],
            "writing checkpoints": [stage.saving for stage in timing.stages],
        }
        for (label, values), colour in zip(parts.items(), COLOURS, strict=False):
            if any(values):
                panel.barh(rows, values, left=left, color=colour, height=0.62, label=label)
            left = [before + value for before, value in zip(left, values, strict=True)]
        for row, stage in zip(rows, timing.stages, strict=True):
            place = {"xytext": (3, 0), "textcoords": "offset points", "va": "center", "fontsize": TEXT - 1}
            panel.annotate(in_time(stage.seconds), (stage.seconds, row), **place)
        panel.set_yticks(list(rows), names)
        panel.invert_yaxis()
        panel.set_xlim(0, max((stage.seconds for stage in timing.stages), default=1) * 1.18 or 1)
        panel.set_xlabel("seconds")
        figure.legend(loc="outside lower center", ncols=2)
    return figure


def in_time(seconds: float) -> str:
    """A duration for people."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{seconds / 60:.1f} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
