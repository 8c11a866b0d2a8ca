"""What a comparison found: means, paired differences and a sentence, as JSON, CSV, Markdown and a picture."""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tabulate import tabulate

from bissl_zoo.evaluation.statistics import compare_paired, summarize
from bissl_zoo.runs.checkpoint import write_atomically
from bissl_zoo.studies.compare_arms import ARMS, Settings
from bissl_zoo.studies.compare_figure import draw
from bissl_zoo.studies.compare_words import conclusion, notes, sentence, verdict

#: what the other arms are compared with, the most telling first
REFERENCES = ("pretrained", "longer_pretraining", "joint")
#: of them those that the table has columns for
TABLED = REFERENCES[:2]
#: below it a difference is called significant, by the paired test here and by Welch's in the papers
LEVEL = 0.05


@dataclass
class Figures:
    """What the runs of a comparison came to.

    Attributes:
        values: of each arm, by seed.
        failures: runs that are left out, and why.
        found: the overrides that each arm's search has found.
    """

    values: dict[str, dict[int, float]]
    failures: dict[str, str] = field(default_factory=dict)
    found: dict[str, list[str]] = field(default_factory=dict)


def make_report(figures: Figures, settings: Settings) -> dict[str, Any]:
    """Everything that is said of a comparison, as plain values."""
    arms = {name: _arm(figures, name) for name in settings.arms}
    report: dict[str, Any] = {
        "metric": settings.metric,
        "higher_is_better": settings.higher_is_better,
        "seeds": list(settings.seeds),
        "vary": settings.vary,
        "arms": arms,
        "differences": {
            reference: {name: _difference(figures, name, reference, settings) for name in arms if name != reference}
            for reference in REFERENCES
            if reference in arms
        },
        "failures": figures.failures,
    }
    report["sentences"] = [sentence(report, name) for name in _subjects(arms)]
    report["conclusion"] = conclusion(report)
    report["notes"] = notes(report)
    return report


def _subjects(arms: Sequence[str]) -> list[str]:
    """The arms that a sentence is about."""
    return [name for name in ARMS if name in arms and name != "pretrained"]


def _arm(figures: Figures, name: str) -> dict[str, Any]:
    values = figures.values[name]
    summary = asdict(summarize(list(values.values()))) if values else {"count": 0, "mean": None, "std": None}
    found = {"overrides": figures.found[name]} if name in figures.found else {}
    return {"words": ARMS[name].words, **summary, "values": {str(seed): v for seed, v in values.items()}, **found}


def _difference(figures: Figures, name: str, reference: str, settings: Settings) -> dict[str, Any]:
    """Over the seeds that both have."""
    one, other = figures.values[name], figures.values[reference]
    seeds = [seed for seed in settings.seeds if seed in one and seed in other]
    if not seeds:
        return {"count": 0, "verdict": "none"}
    found = compare_paired([one[seed] for seed in seeds], [other[seed] for seed in seeds])
    plain = {**asdict(found), "half_width": found.half_width, "seeds": seeds}
    return {**plain, "verdict": verdict(plain, settings.higher_is_better, LEVEL)}


def summary_rows(report: dict[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """The headers and rows of the table, a row per arm, its numbers unrounded and None where there is none."""
    references = [reference for reference in TABLED if reference in report["differences"]]
    headers = ["arm", "seeds", f"{report['metric']} mean", "std"]
    keys = ("mean", "low", "high", "paired_p", "welch_p")
    for reference in references:
        headers += [f"less {ARMS[reference].words}", "95 % CI low", "95 % CI high", "paired p", "Welch p"]
    rows = []
    for name, arm in report["arms"].items():
        row = [arm["words"], arm["count"], arm["mean"], arm["std"]]
        for reference in references:
            found = report["differences"][reference].get(name, {})
            row += [found.get(key) for key in keys]
        rows.append(row)
    return headers, rows


def table(report: dict[str, Any], style: str = "simple") -> str:
    """The summary for people: differences with their intervals in one cell, rounded."""
    headers, rows = summary_rows(report)
    shown = [headers[0], headers[1], headers[2], headers[3]]
    for start in range(4, len(headers), 5):
        shown += [f"{headers[start]} (95 % CI)", "paired p", "Welch p"]
    lines = []
    for row in rows:
        line = [row[0], str(row[1]), _number(row[2]), _number(row[3])]
        for start in range(4, len(row), 5):
            mean, low, high, paired, welch = row[start : start + 5]
            interval = "" if low is None else f" ({low:+.4f} to {high:+.4f})"
            line += ["-" if mean is None else f"{mean:+.4f}{interval}", p_value(paired), p_value(welch)]
        lines.append(line)
    return tabulate(lines, headers=shown, tablefmt=style, disable_numparse=True)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def p_value(value: float | None) -> str:
    """A p value for a table."""
    return "-" if value is None else "<0.001" if value < 0.001 else f"{value:.3f}"


def page(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    parts = ["# Does BiSSL help?", *report["sentences"], report["conclusion"], table(report, "github")]
    parts.append(f"![{report['metric']} of every seed](comparison.png)")
    searched = [(arm["words"], arm["overrides"]) for arm in report["arms"].values() if "overrides" in arm]
    if searched:
        parts.append("\n".join(f"- {words}, searched: `{' '.join(found)}`" for words, found in searched))
    if report["failures"]:
        lines = [f"- {name}: {_line(message)}" for name, message in report["failures"].items()]
        parts.append("Left out:\n\n" + "\n".join(lines))
    parts.append("\n".join(f"- {note}" for note in report["notes"]))
    return "\n\n".join(filter(None, parts)) + "\n"


def _line(message: str) -> str:
    return " ".join(message.split())


def save_report(report: dict[str, Any], folder: Path) -> None:
    """Write `comparison.json`, `.csv`, `.md` and `.png`."""
    _save(folder / "comparison", report, summary_rows(report), page(report))
    draw(report).savefig(folder / "comparison.png", dpi=150)


def _save(stem: Path, content: Any, rows: tuple[list[str], list[list[Any]]], text: str) -> None:
    lines = io.StringIO()
    csv.writer(lines, lineterminator="\n").writerows([rows[0], *rows[1]])
    write_atomically(stem.with_suffix(".json"), json.dumps(content, indent=2, allow_nan=False) + "\n")
    write_atomically(stem.with_suffix(".csv"), lines.getvalue())
    write_atomically(stem.with_suffix(".md"), text)


def datasets_table(reports: dict[str, dict[str, Any]], style: str = "simple") -> str:
    """A row per data set, a column per arm: mean and standard deviation, the best bold.

    An arrow marks what is significantly above or below fine-tuning alone, as the papers test it (Welch, p < 0.05).
    """
    arms = list(dict.fromkeys(name for report in reports.values() for name in report["arms"]))
    lines = []
    for dataset, report in reports.items():
        means = {name: arm["mean"] for name, arm in report["arms"].items() if arm["mean"] is not None}
        best = (max if report["higher_is_better"] else min)(means.values())
        cells = [_cell(report, name, best) for name in arms]
        lines.append([dataset, report["metric"], *cells])
    headers = ["data set", "metric", *(ARMS[name].words for name in arms)]
    return tabulate(lines, headers=headers, tablefmt=style, disable_numparse=True)


def _cell(report: dict[str, Any], name: str, best: float) -> str:
    arm = report["arms"].get(name)
    if arm is None or arm["mean"] is None:
        return "-"
    text = f"{arm['mean']:.4f}" + ("" if arm["std"] is None else f" ± {arm['std']:.4f}")
    found = report["differences"]["pretrained"].get(name, {})
    significant = (found.get("welch_p") or 1.0) < LEVEL
    arrow = ("" if not significant else " ↑" if found["mean"] > 0 else " ↓") if "mean" in found else ""
    missing = len(report["seeds"]) - arm["count"]
    left_out = f" ({missing} of {len(report['seeds'])} seeds missing)" if missing else ""
    return (f"**{text}**" if arm["mean"] == best else text) + arrow + left_out


def save_datasets(reports: dict[str, dict[str, Any]], folder: Path) -> None:
    """Write the table of several data sets as `datasets.json`, `.csv` and `.md`."""
    rows = [
        [dataset, report["metric"], name, arm["count"], arm["mean"], arm["std"], *_tests(report, name)]
        for dataset, report in reports.items()
        for name, arm in report["arms"].items()
    ]
    headers = ["data set", "metric", "arm", "seeds", "mean", "std", "less pretrained", "paired p", "Welch p"]
    legend = "↑ and ↓: above and below fine-tuning alone, Welch's t test, p < 0.05, not corrected for many tests."
    tally = _tally(reports)
    sentences = [f"- {dataset}: {report['sentences'][0]}" for dataset, report in reports.items()]
    text = "\n\n".join([datasets_table(reports, "github"), legend, tally, "\n".join(sentences)])
    folder.mkdir(parents=True, exist_ok=True)
    _save(folder / "datasets", reports, (headers, rows), text + "\n")


def _tests(report: dict[str, Any], name: str) -> list[float | None]:
    found = report["differences"]["pretrained"].get(name, {})
    return [found.get(key) for key in ("mean", "paired_p", "welch_p")]


def _tally(reports: dict[str, dict[str, Any]]) -> str:
    """How often BiSSL was significantly better and worse, in the papers' sense."""
    found = [report["differences"]["pretrained"].get("bissl", {}) for report in reports.values()]
    signs = [
        (1 if one["mean"] > 0 else -1) * (1 if report["higher_is_better"] else -1)
        for one, report in zip(found, reports.values(), strict=True)
        if (one.get("welch_p") or 1.0) < LEVEL
    ]
    better, worse = signs.count(1), signs.count(-1)
    return f"BiSSL is significantly better than fine-tuning alone on {better} of {len(reports)}, worse on {worse}."
