"""The last evaluation in detail: figures by class, precision over recall, and the confusion matrix."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from bissl_zoo.engine.evaluate import Details, worst_confusions
from bissl_zoo.evaluation.ranking import MOST_RANKED
from bissl_zoo.report.charts import HEIGHT, WIDTH, plain_label
from bissl_zoo.report.images.drawing import COLOURS, fitted
from bissl_zoo.report.page import Block, Fold, Note, Picture, Table
from bissl_zoo.report.svg import TEXT, chart_style, to_svg

#: the figure of a class that is drawn, the first that is there
DRAWN = ("AP50", "AP", "top1", "AP11")
#: bars of one chart, and curves; of more classes the best and the worst are shown
MOST_BARS, MOST_CURVES = 24, 6
#: classes of a matrix whose cells hold their counts, and of one that is drawn
_COUNTED, _DRAWN = 12, 60
#: inches that names of classes get
_NAME = 1.1


def detail_blocks(details: Mapping[str, Details], prefix: str) -> list[Block]:
    """All there is by class, of every fine-tuning.

    Args:
        prefix: of the charts' names, unlike those of other runs on the page.
    """
    blocks: list[Block] = []
    drawn = next(
        (name for name in DRAWN if any(name in one for d in details.values() for one in d.per_class.values())), ""
    )
    if drawn:
        title = f"{drawn} by class"
        chart = to_svg(draw_classes(details, drawn), f"{prefix}-classes", title)
        blocks.append(Picture(chart, f"{title}, fractions{_which(details, drawn)}."))
    for number, (start, one) in enumerate(details.items()):
        aside = f", fine-tuned from {start}"
        if one.curves:
            chart = to_svg(draw_precision(one.curves), f"{prefix}-pr{number}", "precision over recall")
            few = f" The {MOST_CURVES} classes that differ most in area." if len(one.curves) > MOST_CURVES else ""
            blocks.append(Picture(chart, f"Precision over recall{aside}: the best at each recall or above.{few}"))
        elif len(one.per_class) > MOST_RANKED:
            blocks.append(Note(f"Precision over recall and confusion{aside} are not kept above {MOST_RANKED} classes."))
        elif one.per_class:
            blocks.append(Note(f"Precision over recall{aside} was not recorded."))
        if one.confusion and len(one.classes) <= _DRAWN:
            chart = to_svg(draw_confusion(one), f"{prefix}-confusion{number}", "confusion matrix")
            blocks.append(Picture(chart, f"Confusion{aside}: images by true and predicted class; shares of a row."))
        confused = worst_confusions(one)
        if confused:
            blocks.append(Table(["true", "taken for", "images"], confused, f"Commonest mistakes{aside}", [2]))
    if details:
        blocks.append(Fold("All figures by class", [_table(details)]))
    return blocks or [Note("The evaluation told nothing by class.")]


def _table(details: Mapping[str, Details]) -> Table:
    names = list(dict.fromkeys(name for d in details.values() for one in d.per_class.values() for name in one))
    rows = [[label, start, *map(one.get, names)] for start, d in details.items() for label, one in d.per_class.items()]
    return Table(["class", "fine-tuned from", *names], rows, "", range(2, 2 + len(names)))


def _ranked(details: Mapping[str, Details], name: str) -> tuple[list[str], bool]:
    """The classes from best to worst of the last fine-tuning, and whether some are left out."""
    last = list(details.values())[-1].per_class
    ranked = sorted(last, key=lambda label: -last[label].get(name, 0.0))
    half = MOST_BARS // 2
    return (ranked[:half] + ranked[-half:], True) if len(ranked) > MOST_BARS else (ranked, False)


def _which(details: Mapping[str, Details], name: str) -> str:
    _, cut = _ranked(details, name)
    return f"; the {MOST_BARS // 2} best and the {MOST_BARS // 2} worst" if cut else ""


def draw_classes(details: Mapping[str, Details], name: str) -> Figure:
    """A group of bars per class, one for each fine-tuning."""
    labels, _ = _ranked(details, name)
    thick = 0.8 / len(details)
    with chart_style():
        figure = Figure(figsize=(WIDTH, 0.9 + 0.26 * len(labels) * max(1.0, 0.6 * len(details))), layout="constrained")
        panel = figure.subplots()
        for number, (start, one) in enumerate(details.items()):
            rows = [place + (number - (len(details) - 1) / 2) * thick for place in range(len(labels))]
            values = [one.per_class.get(label, {}).get(name, 0.0) for label in labels]
            panel.barh(rows, values, height=thick, color=COLOURS[number % 6], label=plain_label(f"from {start}"))
            for row, value in zip(rows, values, strict=True):
                place = {"xytext": (3, 0), "textcoords": "offset points", "va": "center", "fontsize": TEXT - 2}
                panel.annotate(f"{value:.3f}", (value, row), **place)
        panel.set_yticks(range(len(labels)), [fitted(label, _NAME, TEXT - 1) for label in labels])
        panel.set(xlim=(0, 1.12), xlabel=f"{name} (fraction)", xticks=[0, 0.25, 0.5, 0.75, 1])
        panel.invert_yaxis()
        if len(details) > 1:
            figure.legend(loc="outside lower center", ncols=2)
    return figure


def draw_precision(curves: Mapping[str, Sequence[float]]) -> Figure:
    """Precision over recall, a curve per class, and their mean."""
    recall = np.linspace(0, 1, 101)
    chosen = sorted(curves, key=lambda label: -sum(curves[label]))
    if len(chosen) > MOST_CURVES:
        chosen = chosen[: MOST_CURVES // 2] + chosen[-MOST_CURVES // 2 :]
    with chart_style():
        figure = Figure(figsize=(WIDTH, HEIGHT + 0.3), layout="constrained")
        panel = figure.subplots()
        for number, label in enumerate(chosen):
            dashes = ("-", "--", ":")[number % 3]
            panel.plot(
                recall, curves[label], dashes, color=COLOURS[number % 6], label=plain_label(fitted(label, 1.8, TEXT))
            )
        if len(curves) > 1:
            mean = np.mean(list(curves.values()), axis=0)
            panel.plot(recall, mean, color="0.5", linewidth=2.4, label=f"mean of {len(curves)} classes")
        panel.set(xlim=(0, 1), ylim=(0, 1.03), xlabel="recall (fraction)", ylabel="precision (fraction)")
        figure.legend(loc="outside lower center", ncols=2)
    return figure


def draw_confusion(details: Details) -> Figure:
    """The matrix, coloured by the share of each true class; small ones have their counts in the cells."""
    counts = np.array(details.confusion)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    size = len(details.classes)
    names = [fitted(label, 0.9, TEXT - 1) for label in details.classes]
    with chart_style():
        figure = Figure(figsize=(WIDTH, WIDTH * 0.92), layout="constrained")
        panel = figure.subplots()
        drawn = panel.imshow(shares, cmap="cividis", vmin=0, vmax=1)
        if size <= _COUNTED:
            for row, column in np.ndindex(counts.shape):
                colour = "black" if shares[row, column] > 0.55 else "white"
                value = str(counts[row, column])
                panel.text(column, row, value, ha="center", va="center", color=colour, fontsize=TEXT - 2)
        step = max(1, size // 30)
        panel.set_xticks(range(0, size, step), names[::step], rotation=90)
        panel.set_yticks(range(0, size, step), names[::step])
        panel.set(xlabel="predicted class", ylabel="true class")
        figure.colorbar(drawn, ax=panel, label="share of the true class", shrink=0.7, pad=0.02)
    return figure
