"""What a search leaves: a line per trial, a table of the best, and a picture."""

import csv
import io
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tabulate import tabulate

from bissl_zoo.runs.checkpoint import write_atomically
from bissl_zoo.studies.search_space import LogUniform, SearchSettings, trial_name

FINISHED, FAILED, PRUNED = "finished", "failed", "pruned"
#: of Okabe and Ito, told apart with any colour vision; each state also has a marker of its own
_LOOKS = {FINISHED: ("#0072B2", "o"), PRUNED: ("#999999", "v"), FAILED: ("#D55E00", "x")}
_BEST = "#E69F00"


@dataclass(frozen=True)
class Trial:
    """A draw and what came of it.

    Attributes:
        state: finished, failed or pruned.
        figures: of the last fine-tuning; of a pruned trial its best value on the way alone.
        message: why it failed or was given up.
    """

    number: int
    parameters: dict[str, Any]
    state: str
    figures: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    message: str = ""

    @property
    def name(self) -> str:
        """That of its run directory."""
        return trial_name(self.number)


def ranked(trials: list[Trial], metric: str) -> list[Trial]:
    """The finished trials whose figure is a number, the best first; of equal ones that which was drawn first."""
    able = [t for t in trials if t.state == FINISHED and math.isfinite(t.figures[metric])]
    return sorted(able, key=lambda trial: (-trial.figures[metric], trial.number))


def write_csv(path: Path, trials: list[Trial]) -> None:
    """One line per trial, in the order of their numbers, replaced as a whole."""
    trials = sorted(trials, key=lambda trial: trial.number)
    parameters = list(dict.fromkeys(key for trial in trials for key in trial.parameters))
    figures = list(dict.fromkeys(name for trial in trials for name in trial.figures if "/" not in name))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["trial", "state", *parameters, *figures, "seconds", "message"])
    for trial in trials:
        drawn = [trial.parameters[key] for key in parameters]
        measured = [trial.figures.get(name, "") for name in figures]
        message = " ".join(trial.message.split())
        writer.writerow([trial.name, trial.state, *drawn, *measured, f"{trial.seconds:.1f}", message])
    write_atomically(path, text.getvalue())


def best_table(trials: list[Trial], metric: str, count: int = 5) -> str:
    """The best trials with their parameters."""
    rows = [
        [trial.name, f"{trial.figures[metric]:.4f}", *trial.parameters.values(), f"{trial.seconds:.0f}"]
        for trial in ranked(trials, metric)[:count]
    ]
    headers = ["trial", metric, *(trials[0].parameters if trials else ()), "seconds"]
    return tabulate(rows, headers=headers, disable_numparse=True, stralign="right")


def draw(trials: list[Trial], settings: SearchSettings) -> Figure:
    """The figure of every trial over each of its parameters."""
    metric, keys = settings.metric, list(settings.space)
    figure = Figure(figsize=(1.0 + 4.6 * len(keys), 4.4), layout="constrained")
    all_axes = figure.subplots(1, len(keys), sharey=True, squeeze=False)[0]
    best = ranked(trials, metric)[:1]
    for axes, key in zip(all_axes, keys, strict=True):
        _draw_parameter(axes, trials, key, metric)
        for trial in best:
            look = dict(marker="*", s=200, color=_BEST, edgecolor="black", linewidth=0.8, zorder=4)
            axes.scatter([_place(trial, key)], [trial.figures[metric]], label=f"best, {trial.name}", **look)
        domain = settings.space[key]
        if isinstance(domain, LogUniform):
            axes.set(xscale="log", xlim=(domain.low / 1.15, domain.high * 1.15))
        best_value = f": {best[0].parameters[key]}" if best else ""
        axes.set_xlabel(key)
        axes.set_title(f"best{best_value}" if best else "no trial has finished", fontsize=10)
        axes.grid(axis="y", color="0.9", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
    all_axes[0].set_ylabel(metric)
    handles, labels = all_axes[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=9)
    return figure


def _draw_parameter(axes: Axes, trials: list[Trial], key: str, metric: str) -> None:
    for state, (colour, marker) in _LOOKS.items():
        those = [trial for trial in trials if trial.state == state]
        measured = [trial for trial in those if math.isfinite(trial.figures.get(metric, math.nan))]
        label = f"{state} ({len(those)})"
        if state == FAILED and those:  # below the figures, since they have none
            places = [_place(trial, key) for trial in those]
            bottom = axes.get_xaxis_transform()
            axes.scatter(places, [0.02] * len(those), transform=bottom, color=colour, marker=marker, s=36, label=label)
        elif measured:
            values = [trial.figures[metric] for trial in measured]
            axes.scatter(
                [_place(t, key) for t in measured], values, color=colour, marker=marker, s=30, alpha=0.8, label=label
            )


def _place(trial: Trial, key: str) -> Any:
    value = trial.parameters[key]
    return value if type(value) in (int, float) else str(value)
