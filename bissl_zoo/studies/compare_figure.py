"""A comparison as a picture: every seed in every arm, and the paired differences."""

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

#: of Okabe and Ito, told apart with any colour vision; each arm also has a marker of its own
LOOKS = {
    "pretrained": ("#000000", "o"),
    "bissl": ("#D55E00", "s"),
    "longer_pretraining": ("#0072B2", "^"),
    "joint": ("#009E73", "D"),
}


def draw(report: dict[str, Any]) -> Figure:
    """Left every run, those of a seed joined by a line; right each arm's differences to fine-tuning alone."""
    arms = [name for name, arm in report["arms"].items() if arm["count"]]
    figure = Figure(figsize=(max(10.5, 2.0 + 2.4 * len(arms)), 4.8), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.25, 1.0))
    _draw_runs(left, report, arms)
    _draw_differences(right, report, [name for name in arms if name != "pretrained"])
    return figure


def _draw_runs(axes: Axes, report: dict[str, Any], arms: list[str]) -> None:
    for seed in map(str, report["seeds"]):
        there = [(x, report["arms"][name]["values"][seed]) for x, name in enumerate(arms) if _has(report, name, seed)]
        axes.plot(*zip(*there, strict=True), color="0.75", linewidth=0.9, zorder=1) if there else None
    for x, name in enumerate(arms):
        arm, (colour, marker) = report["arms"][name], LOOKS[name]
        values = list(arm["values"].values())
        axes.scatter([x] * len(values), values, s=30, color=colour, marker=marker, alpha=0.75, linewidth=0, zorder=2)
        _draw_mean(axes, x + 0.17, arm, colour)
    axes.set_xticks(range(len(arms)), [_label(report, name) for name in arms])
    axes.set(xlim=(-0.5, len(arms) - 0.4), ylabel=report["metric"], title="Every seed; bar: mean and its 95 % interval")
    _clean(axes, "y")


def _draw_mean(axes: Axes, x: float, arm: dict[str, Any], colour: str) -> None:
    axes.plot([x - 0.08, x + 0.08], [arm["mean"]] * 2, color=colour, linewidth=2.5, zorder=3)
    if arm["low"] is not None:
        axes.vlines(x, arm["low"], arm["high"], color=colour, linewidth=1.6, zorder=3)


def _draw_differences(axes: Axes, report: dict[str, Any], arms: list[str]) -> None:
    reference = report["arms"]["pretrained"]["values"]
    shown = [name for name in arms if report["differences"]["pretrained"][name]["count"]]
    for y, name in enumerate(shown):
        found, (colour, marker) = report["differences"]["pretrained"][name], LOOKS[name]
        values = report["arms"][name]["values"]
        differences = [values[str(seed)] - reference[str(seed)] for seed in found["seeds"]]
        axes.scatter(differences, [y] * len(differences), s=30, color=colour, marker=marker, alpha=0.6, linewidth=0)
        _draw_interval(axes, y - 0.2, found, colour)
    axes.axvline(0.0, color="black", linewidth=1, zorder=1)
    axes.set_yticks(range(len(shown)), [report["arms"][name]["words"] for name in shown])
    axes.set(ylim=(len(shown) - 0.5, -0.6), xlabel=f"{report['metric']} less fine-tuning alone, same seed")
    axes.set_title("Differences; bar: mean and its 95 % interval")
    axes.margins(x=0.12)
    _clean(axes, "x")


def _draw_interval(axes: Axes, y: float, found: dict[str, Any], colour: str) -> None:
    axes.plot([found["mean"]] * 2, [y - 0.07, y + 0.07], color=colour, linewidth=2.5)
    if found["low"] is not None:
        axes.hlines(y, found["low"], found["high"], color=colour, linewidth=1.6)


def _has(report: dict[str, Any], name: str, seed: str) -> bool:
    return seed in report["arms"][name]["values"]


def _label(report: dict[str, Any], name: str) -> str:
    arm = report["arms"][name]
    missing = len(report["seeds"]) - arm["count"]
    return arm["words"].replace(" ", "\n", 1) + (f"\n({missing} missing)" if missing else "")


def _clean(axes: Axes, grid: str) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, color="0.92")
    axes.set_axisbelow(True)
