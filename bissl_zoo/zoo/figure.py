"""The figure of an entry's card."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bissl_zoo.zoo.page import split_metric

FIGURE_FILE = "metrics.png"

#: blue, orange and green that people with colour blindness can tell apart (Okabe and Ito, 2008)
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")


def draw_metrics(metrics: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Draw an entry's metrics as bars: one group per metric, one colour per start, a dot per seed.

    Args:
        metrics: by name, `mean` and `values`; a name such as `"AP50 (bissl)"` says what the model started from.
    """
    from matplotlib.figure import Figure

    groups: dict[str, dict[str, Mapping[str, Any]]] = {}
    for name, metric in metrics.items():
        base, start = split_metric(name)
        groups.setdefault(base, {})[start] = metric
    starts = list(dict.fromkeys(start for group in groups.values() for start in group))
    figure = Figure(figsize=(1.5 + 0.5 * len(metrics), 3.2), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    width = 0.8 / len(starts)
    for i, start in enumerate(starts):
        for x, group in enumerate(groups.values()):
            if start in group:
                place, values = x + (i - (len(starts) - 1) / 2) * width, group[start]["values"]
                label = start if list(groups.values()).index(group) == _first(groups, start) else None
                axes.bar(place, group[start]["mean"], 0.9 * width, color=_COLOURS[i % len(_COLOURS)], label=label)
                axes.plot([place] * len(values), values, "k.", markersize=4)
    axes.set_xticks(range(len(groups)), groups, rotation=20 if len(groups) > 3 else 0)
    axes.set_ylabel("test set")
    axes.spines[["top", "right"]].set_visible(False)
    if any(starts):
        axes.legend(title="fine-tuned from", frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.savefig(path, metadata={"Software": None})  # the same figures, the same bytes


def _first(groups: Mapping[str, Mapping[str, Any]], start: str) -> int:
    return next(i for i, group in enumerate(groups.values()) if start in group)
