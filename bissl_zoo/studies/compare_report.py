"""The report of a comparison: means, paired differences and sentences, as JSON, CSV, Markdown and a plot."""

import csv
import io
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tabulate import tabulate

from bissl_zoo.evaluation.statistics import compare_paired, summarize
from bissl_zoo.files import write_atomically
from bissl_zoo.studies.arms import ARMS, Settings

#: arms that the others are compared with, the most important first; the table has columns for two of them
REFERENCES = ("pretrained", "longer_pretraining", "joint")
TABLE_REFERENCES = REFERENCES[:2]
#: significance level of the paired test here and of Welch's test in the papers
LEVEL = 0.05
#: below this number of seeds the report has a note
FEW_SEEDS = 5
#: colours of Okabe and Ito, which differ with any colour vision, and a marker for each arm
STYLES = [("#000000", "o"), ("#D55E00", "s"), ("#0072B2", "^"), ("#009E73", "D"), ("#CC79A7", "v"), ("#E69F00", "P")]


@dataclass
class Results:
    """The results of the runs of a comparison.

    Attributes:
        values: metric of each arm by seed.
        failures: error messages of the runs that are left out, by name.
        best_overrides: the result of each arm's search.
    """

    values: dict[str, dict[int, float]]
    failures: dict[str, str] = field(default_factory=dict)
    best_overrides: dict[str, list[str]] = field(default_factory=dict)


def make_report(results: Results, settings: Settings) -> dict[str, Any]:
    """Return the report as plain values."""
    arms = {}
    for name in settings.arms:
        values = results.values[name]
        summary = asdict(summarize(list(values.values()))) if values else {"count": 0, "mean": None, "std": None}
        best = {"overrides": results.best_overrides[name]} if name in results.best_overrides else {}
        arms[name] = {"label": ARMS[name].label, **summary, "values": {str(s): v for s, v in values.items()}, **best}
    report: dict[str, Any] = {
        "metric": settings.metric,
        "higher_is_better": settings.higher_is_better,
        "seeds": list(settings.seeds),
        "vary": settings.vary,
        "arms": arms,
        "differences": {
            reference: {name: _difference(results, name, reference, settings) for name in arms if name != reference}
            for reference in REFERENCES
            if reference in arms
        },
        "failures": results.failures,
    }
    report["sentences"] = [_sentence(report, name) for name in ARMS if name in arms and ARMS[name].compared_with]
    report["conclusion"] = _conclusion(report)
    report["notes"] = _notes(report)
    return report


def _difference(results: Results, name: str, reference: str, settings: Settings) -> dict[str, Any]:
    """Compare two arms on the seeds that both have."""
    values, others = results.values[name], results.values[reference]
    seeds = [seed for seed in settings.seeds if seed in values and seed in others]
    if not seeds:
        return {"count": 0, "verdict": "no data"}
    result = compare_paired([values[seed] for seed in seeds], [others[seed] for seed in seeds])
    if result.count == 1 or result.paired_p is None:
        verdict = "untested"
    elif result.paired_p >= LEVEL:
        verdict = "not significant"
    else:
        verdict = "better" if (result.mean > 0) == settings.higher_is_better else "worse"
    return {**asdict(result), "half_width": result.half_width, "seeds": seeds, "verdict": verdict}


# ------------------------------------------------------------------------------------------------ sentences


def _sentence(report: dict[str, Any], arm: str) -> str:
    """Return one sentence that compares an arm with its references."""
    clauses = [
        _clause(report["differences"][reference][arm], ARMS[reference].label, report["metric"])
        for reference in ARMS[arm].compared_with
        if reference in report["differences"]
    ]
    return f"{_capitalize(ARMS[arm].label)}: {'; '.join(clauses)}."


def _clause(difference: dict[str, Any], other: str, metric: str) -> str:
    verdict = difference["verdict"]
    if verdict == "no data":
        return f"no seed in common with {other}"
    size = f"{difference['mean']:+.4f} {metric}"
    if difference["count"] == 1:
        return f"{size} compared with {other} in a single seed, which allows no test"
    if verdict == "untested":
        return f"{size} compared with {other} in each of {difference['count']} seeds, without any spread to test"
    details = (
        f"{size}, 95 % CI {difference['low']:+.4f} to {difference['high']:+.4f}, paired t test "
        f"p {_p(difference['paired_p'])}, {difference['count']} seeds"
    )
    if verdict == "not significant":
        return f"no significant difference from {other} ({details})"
    return f"significantly {verdict} than {other} ({details})"


def _conclusion(report: dict[str, Any]) -> str:
    """Return the answer to the question whether to use BiSSL; empty without the arm bissl."""
    difference = report["differences"].get("pretrained", {}).get("bissl")
    if difference is None:
        return ""
    longer = report["differences"].get("longer_pretraining", {}).get("bissl", {}).get("verdict")
    if difference["verdict"] == "better" and longer == "better":
        return "BiSSL helps here, by more than its additional pretext steps."
    if difference["verdict"] == "better" and longer is None:
        return "BiSSL helps here. Add the arm longer_pretraining to see whether its additional pretext steps suffice."
    if difference["verdict"] == "better":
        return "BiSSL helps here, but its additional pretext steps alone may explain the gain."
    if difference["verdict"] == "worse":
        return "BiSSL reduces the performance here, with these settings."
    if difference["verdict"] == "not significant":
        return (
            "These runs show no significant effect of BiSSL; with this number of seeds, differences below about "
            f"{difference['half_width']:.4f} cannot be detected."
        )
    return "No conclusion is possible yet; run more seeds."


def _notes(report: dict[str, Any]) -> list[str]:
    """Return the limits of the results."""
    notes, tests = [], 0
    for reference, arms in report["differences"].items():
        for name, item in arms.items():
            if reference not in ARMS[name].compared_with or item.get("paired_p") is None:
                continue
            tests += 1
            if item["welch_p"] is not None and (item["welch_p"] < LEVEL) != (item["paired_p"] < LEVEL):
                notes.append(
                    f"{_capitalize(ARMS[name].label)} and {ARMS[reference].label}: the paired test gives p "
                    f"{_p(item['paired_p'])}, Welch's test of the papers, which does not pair seeds, gives p "
                    f"{_p(item['welch_p'])}."
                )
    fewest = min(arm["count"] for arm in report["arms"].values())
    if fewest < FEW_SEEDS:
        notes.append(
            f"Few seeds (at least one arm has {fewest}): the intervals are wide and rely on normally distributed "
            "differences. Ten seeds are usual; --seeds 10 adds them."
        )
    shared = {
        "pretrain": "Every seed has its own pretraining.",
        "bissl": "All seeds share one pretrained backbone; the intervals do not cover the variation of pretraining.",
        "finetune": "All seeds of an arm share one backbone; the intervals cover the variation of fine-tuning only.",
    }
    notes.append(shared[report["vary"]])
    notes.append("All runs use the same test images; the intervals do not cover the choice of test images.")
    if tests > 1:
        notes.append(f"p values are two-sided and not corrected for {tests} comparisons.")
    return notes


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"= {value:.3f}"


def _capitalize(text: str) -> str:
    return text[0].upper() + text[1:]


# ------------------------------------------------------------------------------------------------ tables and files


def table(report: dict[str, Any], style: str = "simple") -> str:
    """Return the summary table, a row per arm, with differences and their intervals."""
    references = [reference for reference in TABLE_REFERENCES if reference in report["differences"]]
    headers = ["arm", "seeds", f"{report['metric']} mean", "std"]
    for reference in references:
        headers += [f"minus {ARMS[reference].label} (95 % CI)", "paired p", "Welch p"]
    rows = []
    for name, arm in report["arms"].items():
        row = [arm["label"], str(arm["count"]), _number(arm["mean"]), _number(arm["std"])]
        for reference in references:
            item = report["differences"][reference].get(name, {})
            low, high = item.get("low"), item.get("high")
            interval = "" if low is None else f" ({low:+.4f} to {high:+.4f})"
            row += [_number(item.get("mean"), "+") + interval]
            row += [_number(item.get(key)) for key in ("paired_p", "welch_p")]
        rows.append(row)
    return tabulate(rows, headers=headers, tablefmt=style, disable_numparse=True)


def _number(value: float | None, sign: str = "") -> str:
    return "-" if value is None else f"{value:{sign}.4f}"


def save_report(report: dict[str, Any], folder: Path) -> None:
    """Write `comparison.json`, `.csv`, `.md` and `.png`."""
    parts = ["# Does BiSSL help?", *report["sentences"], report["conclusion"], table(report, "github")]
    parts.append(f"![{report['metric']} of every seed](comparison.png)")
    searched = [(arm["label"], arm["overrides"]) for arm in report["arms"].values() if "overrides" in arm]
    parts.append("\n".join(f"- Best overrides of {label}: `{' '.join(best)}`" for label, best in searched))
    if report["failures"]:
        lines = [f"- {name}: {' '.join(message.split())}" for name, message in report["failures"].items()]
        parts.append("Left out:\n\n" + "\n".join(lines))
    parts.append("\n".join(f"- {note}" for note in report["notes"]))
    _save(folder / "comparison", report, {"": report}, "\n\n".join(filter(None, parts)) + "\n")
    plot(report).savefig(folder / "comparison.png", dpi=150)


def _save(stem: Path, content: Any, reports: dict[str, dict[str, Any]], markdown: str) -> None:
    """Write `content` as JSON, a row per data set and arm as CSV, and Markdown."""
    text = io.StringIO()
    keys = ("mean", "low", "high", "paired_p", "welch_p")
    differences = [f"{key} minus {reference}" for reference in TABLE_REFERENCES for key in keys]
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["data set", "metric", "arm", "seeds", "mean", "std", *differences])
    for dataset, report in reports.items():
        for name, arm in report["arms"].items():
            items = [report["differences"].get(reference, {}).get(name, {}) for reference in TABLE_REFERENCES]
            row = [dataset, report["metric"], name, arm["count"], arm["mean"], arm["std"]]
            writer.writerow([*row, *(item.get(key) for item in items for key in keys)])
    write_atomically(stem.with_suffix(".json"), json.dumps(content, indent=2, allow_nan=False) + "\n")
    write_atomically(stem.with_suffix(".csv"), text.getvalue())
    write_atomically(stem.with_suffix(".md"), markdown)


def datasets_table(reports: dict[str, dict[str, Any]], style: str = "simple") -> str:
    """Return a table with a row per data set and a column per arm: mean and standard deviation, the best bold.

    An arrow marks arms that are significantly above or below fine-tuning alone by the papers' test (Welch, p < 0.05).
    """
    arms = list(dict.fromkeys(name for report in reports.values() for name in report["arms"]))
    lines = []
    for dataset, report in reports.items():
        means = [arm["mean"] for arm in report["arms"].values() if arm["mean"] is not None]
        best = (max if report["higher_is_better"] else min)(means)
        lines.append([dataset, report["metric"], *(_cell(report, name, best) for name in arms)])
    headers = ["data set", "metric", *(ARMS[name].label for name in arms)]
    return tabulate(lines, headers=headers, tablefmt=style, disable_numparse=True)


def _cell(report: dict[str, Any], name: str, best: float) -> str:
    arm = report["arms"].get(name)
    if arm is None or arm["mean"] is None:
        return "-"
    text = f"{arm['mean']:.4f}" + ("" if arm["std"] is None else f" ± {arm['std']:.4f}")
    arrow = {1: " ↑", -1: " ↓", 0: ""}[_welch_sign(report, name)]
    missing = len(report["seeds"]) - arm["count"]
    left_out = f" ({missing} of {len(report['seeds'])} seeds missing)" if missing else ""
    return (f"**{text}**" if arm["mean"] == best else text) + arrow + left_out


def _welch_sign(report: dict[str, Any], name: str) -> int:
    """Return the sign of a difference from fine-tuning alone that is significant by Welch's test, else 0."""
    item = report["differences"]["pretrained"].get(name, {})
    p = item.get("welch_p")
    return 0 if p is None or p >= LEVEL else 1 if item["mean"] > 0 else -1


def save_datasets(reports: dict[str, dict[str, Any]], folder: Path) -> None:
    """Write the table of several data sets as `datasets.json`, `.csv` and `.md`."""
    signs = [_welch_sign(r, "bissl") * (1 if r["higher_is_better"] else -1) for r in reports.values()]
    better, worse = signs.count(1), signs.count(-1)
    text = [
        datasets_table(reports, "github"),
        "↑ and ↓: above and below fine-tuning alone, Welch's t test, p < 0.05, not corrected for multiple tests.",
        f"BiSSL is significantly better than fine-tuning alone on {better} of {len(reports)}, worse on {worse}.",
        "\n".join(f"- {dataset}: {report['sentences'][0]}" for dataset, report in reports.items()),
    ]
    _save(folder / "datasets", reports, reports, "\n\n".join(text) + "\n")


# ------------------------------------------------------------------------------------------------ plot


def plot(report: dict[str, Any]) -> Figure:
    """Plot the runs of every arm, joined by seed, and the paired differences from fine-tuning alone."""
    arms = {name: arm for name, arm in report["arms"].items() if arm["count"]}
    styles = {name: STYLES[number % len(STYLES)] for number, name in enumerate(ARMS)}
    figure = Figure(figsize=(max(10.5, 2.0 + 2.4 * len(arms)), 4.8), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.25, 1.0))
    for seed in map(str, report["seeds"]):
        points = [(x, arm["values"][seed]) for x, arm in enumerate(arms.values()) if seed in arm["values"]]
        if points:
            left.plot(*zip(*points, strict=True), color="0.75", linewidth=0.9, zorder=1)
    for x, (name, arm) in enumerate(arms.items()):
        _draw_values(left, x, list(arm["values"].values()), arm, styles[name], vertical=True)
    labels = []
    for arm in arms.values():
        missing = len(report["seeds"]) - arm["count"]
        labels.append(arm["label"].replace(" ", "\n", 1) + (f"\n({missing} missing)" if missing else ""))
    left.set_xticks(range(len(arms)), labels)
    left.set(xlim=(-0.5, len(arms) - 0.4), ylabel=report["metric"], title="Every seed; bar: mean and 95 % CI")

    differences = {name: item for name, item in report["differences"]["pretrained"].items() if item["count"]}
    reference = report["arms"]["pretrained"]["values"]
    for y, (name, item) in enumerate(differences.items()):
        values = [report["arms"][name]["values"][str(seed)] - reference[str(seed)] for seed in item["seeds"]]
        _draw_values(right, y, values, item, styles[name], vertical=False)
    right.axvline(0.0, color="black", linewidth=1, zorder=1)
    right.set_yticks(range(len(differences)), [report["arms"][name]["label"] for name in differences])
    right.set(ylim=(len(differences) - 0.5, -0.6), xlabel=f"{report['metric']} minus fine-tuning alone, same seed")
    right.set_title("Differences; bar: mean and 95 % CI")
    right.margins(x=0.12)
    for axes, grid in ((left, "y"), (right, "x")):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis=grid, color="0.92")
        axes.set_axisbelow(True)
    return figure


def _draw_values(
    axes: Axes, place: float, values: list[float], summary: dict[str, Any], style: tuple[str, str], vertical: bool
) -> None:
    """Draw values at a place of the axis of arms, and beside them their mean and its interval."""
    color, marker = style
    bar = place + 0.17 if vertical else place - 0.2
    low, mean, high = (summary["mean"] if summary[key] is None else summary[key] for key in ("low", "mean", "high"))
    points = ([place] * len(values), values)
    line, ends = ([bar, bar], [low, high]), ([bar - 0.08, bar + 0.08], [mean, mean])
    if not vertical:
        points, line, ends = points[::-1], line[::-1], ends[::-1]
    axes.scatter(*points, s=30, color=color, marker=marker, alpha=0.7, linewidth=0, zorder=2)
    axes.plot(*line, color=color, linewidth=1.6, zorder=3)
    axes.plot(*ends, color=color, linewidth=2.5, zorder=3)
