"""The report of a comparison: means, paired differences and sentences, as a table, JSON, Markdown and a plot."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from matplotlib.figure import Figure
from tabulate import tabulate

from bissl_zoo.errors import ConfigError, did_you_mean
from bissl_zoo.evaluation.statistics import compare_paired, equivalence_p, holm, seeds_needed, summarize
from bissl_zoo.files import write_atomically
from bissl_zoo.runs.directory import read_json
from bissl_zoo.studies.arms import ARMS, Settings, find_arm, run_name

#: arms that the others are compared with, the most important first; the table has columns for two of them
REFERENCES = ("pretrained", "longer_pretraining", "joint")
TABLE_REFERENCES = REFERENCES[:2]
COMPARISON_FILE = "comparison.json"
#: significance level of the paired test here and of Welch's test in the papers
LEVEL = 0.05
#: below this number of seeds the report has a note
FEW_SEEDS = 5
#: the note about the stages that seeds share, by `compare.vary`
SHARED = {
    "pretrain": "Every seed has its own pretraining.",
    "bissl": "All seeds share one pretrained backbone; the intervals do not cover the variation of pretraining.",
    "finetune": "All seeds of an arm share one backbone; the intervals cover the variation of fine-tuning only.",
}


@dataclass
class Results:
    """The results of the runs of a comparison.

    Attributes:
        values: metric of each arm by seed.
        failures: error messages of the runs that are left out, by name.
        best_overrides: the result of each arm's search.
        costs: seconds and peak memory in MiB of each run of an arm, its stage included.
        repeats: values of each fine-tuning by arm and seed.
        leakage: near-duplicates between the data sets, as sentences.
        label_fraction: share of the training labels, if not all were used.
        folds: number of folds of the test images; None if all runs use the same.
        steps: steps of fine-tuning of each arm, if budgets are equal in seconds.
    """

    values: dict[str, dict[int, float]]
    failures: dict[str, str] = field(default_factory=dict)
    best_overrides: dict[str, list[str]] = field(default_factory=dict)
    costs: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    repeats: dict[tuple[str, int], list[float]] = field(default_factory=dict)
    leakage: list[str] = field(default_factory=list)
    label_fraction: float | None = None
    folds: int | None = None
    steps: dict[str, int] = field(default_factory=dict)


def make_report(results: Results, settings: Settings) -> dict[str, Any]:
    """Return the report as plain values."""
    arms = {}
    for name in settings.arms:
        values = results.values[name]
        summary = asdict(summarize(list(values.values()))) if values else {"count": 0, "mean": None, "std": None}
        best = {"overrides": results.best_overrides[name]} if name in results.best_overrides else {}
        seconds, memory = zip(*results.costs.get(name) or [(0.0, 0.0)], strict=True)
        cost = {"seconds": float(median(seconds)), "memory_mib": float(max(memory))}
        arms[name] = {
            "label": find_arm(name).label,
            **summary,
            **cost,
            "values": {str(s): v for s, v in values.items()},
            **best,
        }
    report: dict[str, Any] = {
        "metric": settings.metric,
        "higher_is_better": settings.higher_is_better,
        "seeds": list(settings.seeds),
        "vary": settings.vary,
        "finetune_seeds": settings.finetune_seeds,
        "label_fraction": results.label_fraction,
        "folds": results.folds,
        "finetune_steps": results.steps,
        "margin": settings.margin,
        "arms": arms,
        "differences": {
            reference: {name: _difference(results, name, reference, settings) for name in arms if name != reference}
            for reference in REFERENCES
            if reference in arms
        },
        "failures": results.failures,
        "leakage": results.leakage,
    }
    _judge(report)
    report["sentences"] = [_sentence(report, name) for name in arms if find_arm(name).compared_with]
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
    tests = {"equivalence_p": equivalence_p(result, settings.margin)} if settings.margin else {}
    return {**asdict(result), "half_width": result.half_width, **tests, "seeds": seeds, "verdict": "untested"}


def _judge(report: dict[str, Any]) -> None:
    """Set `holm_p` and `verdict` of the differences that the sentences mention: one family of tests."""
    family = [item for _, _, item in _mentioned(report) if item.get("paired_p") is not None]
    for item, p in zip(family, holm([item["paired_p"] for item in family]), strict=True):
        item["holm_p"] = p
        if p < LEVEL:
            item["verdict"] = "better" if (item["mean"] > 0) == report["higher_is_better"] else "worse"
        else:
            equivalent = item.get("equivalence_p") is not None and item["equivalence_p"] < LEVEL
            item["verdict"] = "equivalent" if equivalent else "not significant"


def _mentioned(report: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield (arm, reference, difference) for every clause of the sentences."""
    for name in report["arms"]:
        for reference in find_arm(name).compared_with:
            if reference in report["differences"] and name != reference:
                yield name, reference, report["differences"][reference][name]


# ------------------------------------------------------------------------------------------------ sentences


def _sentence(report: dict[str, Any], arm: str) -> str:
    """Return one sentence that compares an arm with its references."""
    clauses = [
        _clause(item, ARMS[reference].label, report) for name, reference, item in _mentioned(report) if name == arm
    ]
    return f"{_capitalize(find_arm(arm).label)}: {'; '.join(clauses)}."


def _clause(difference: dict[str, Any], other: str, report: dict[str, Any]) -> str:
    verdict, count = difference["verdict"], difference["count"]
    if verdict == "no data":
        return f"no seed in common with {other}"
    size = f"{difference['mean']:+.4f} {report['metric']}"
    if verdict == "untested":
        return f"{size} compared with {other} in {count} {'seeds' if count > 1 else 'seed'}, which allows no test"
    details = (
        f"{size}, 95 % CI {difference['low']:+.4f} to {difference['high']:+.4f}, "
        f"p {_p(difference['holm_p'])}, {count} seeds"
    )
    if verdict == "equivalent":
        return f"equivalent to {other} within {report['margin']:g} ({details})"
    if verdict == "not significant":
        return f"no significant difference from {other} ({details})"
    return f"significantly {verdict} than {other} ({details})"


def _conclusion(report: dict[str, Any]) -> str:
    """Return which arm has the best mean, its cost, and whether to use BiSSL if that arm is compared."""
    parts = filter(None, [_best(report), _about_bissl(report)])
    return " ".join(parts)


def _best(report: dict[str, Any]) -> str:
    """Return a sentence about the arm with the best mean; empty without results of fine-tuning alone."""
    arms = {name: arm for name, arm in report["arms"].items() if arm["count"]}
    if "pretrained" not in arms:
        return ""
    best = (max if report["higher_is_better"] else min)(arms, key=lambda name: arms[name]["mean"])
    text = f"Best mean: {arms[best]['label']}, {arms[best]['mean']:.4f} {report['metric']}"
    if best == "pretrained":
        return f"{text}."
    verdict, base = report["differences"]["pretrained"][best]["verdict"], arms["pretrained"]["seconds"]
    times = f", at {arms[best]['seconds'] / base:.1f} times its time" if base else ""
    how = "significantly better than" if verdict == "better" else "not shown to be better than"
    return f"{text}, {how} fine-tuning alone{times}."


def _about_bissl(report: dict[str, Any]) -> str:
    difference = report["differences"]["pretrained"].get("bissl")
    if difference is None:
        return ""
    longer = report["differences"].get("longer_pretraining", {}).get("bissl", {}).get("verdict")
    if difference["verdict"] == "better":
        if longer == "better":
            return "BiSSL helps here, by more than its additional pretext steps."
        if longer is None:
            return "BiSSL helps here. Add the arm longer_pretraining to see whether its pretext steps suffice."
        return "BiSSL helps here, but its additional pretext steps alone may explain the gain."
    if difference["verdict"] == "worse":
        return "BiSSL reduces the performance here, with these settings."
    if difference["verdict"] == "equivalent":
        return f"BiSSL makes no difference of {report['margin']:g} or more here."
    if difference["verdict"] == "not significant":
        return (
            "These runs show no significant effect of BiSSL; with this number of seeds, differences below about "
            f"{difference['half_width']:.4f} cannot be detected."
        )
    return "No conclusion is possible yet; run more seeds."


def _notes(report: dict[str, Any]) -> list[str]:
    """Return the limits of the results."""
    notes, tests = list(report["leakage"]), 0
    for name, reference, item in _mentioned(report):
        if item.get("paired_p") is None:
            continue
        tests += 1
        if item["welch_p"] is not None and (item["welch_p"] < LEVEL) != (item["paired_p"] < LEVEL):
            notes.append(
                f"{_capitalize(find_arm(name).label)} and {ARMS[reference].label}: uncorrected, the paired test gives "
                f"p {_p(item['paired_p'])}, Welch's test of the papers, which does not pair seeds, gives p "
                f"{_p(item['welch_p'])}."
            )
    spread = report["differences"]["pretrained"].get("bissl", {}).get("std")
    if report["margin"] and spread:
        count = seeds_needed(spread, report["margin"])
        needed = f"{count} seeds are needed" if count else "more than 10,000 seeds are needed"
        notes.append(
            f"To find a difference of {report['margin']:g} between BiSSL and fine-tuning alone with a probability of "
            f"0.8, {needed} (paired t test, one comparison)."
        )
    fewest = min(arm["count"] for arm in report["arms"].values())
    if fewest < FEW_SEEDS:
        notes.append(
            f"Few seeds (at least one arm has {fewest}): the intervals are wide and rely on normally distributed "
            "differences. Ten seeds are usual; --seeds 10 adds them."
        )
    notes.append(SHARED[report["vary"]])
    if report["finetune_steps"]:
        steps = ", ".join(f"{count} ({find_arm(arm).label})" for arm, count in report["finetune_steps"].items())
        notes.append(f"Arms have equal time: cheaper ones fine-tune for longer. Steps of fine-tuning: {steps}.")
    if report["folds"]:
        notes.append(f"Each of {report['folds']} seeds tests another fold of the images, which the intervals cover.")
    else:
        notes.append("All runs use the same test images; the intervals do not cover the choice of test images.")
    if tests > 1:
        notes.append(f"p values are of two-sided paired t tests, corrected for {tests} comparisons (Holm).")
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
        headers += [f"minus {ARMS[reference].label} (95 % CI)", "p"]
    rows = []
    for name, arm in report["arms"].items():
        row = [arm["label"], str(arm["count"]), _number(arm["mean"]), _number(arm["std"])]
        for reference in references:
            item = report["differences"][reference].get(name, {})
            low, high = item.get("low"), item.get("high")
            interval = "" if low is None else f" ({low:+.4f} to {high:+.4f})"
            row += [_number(item.get("mean"), "+") + interval]
            row += [_number(item.get("holm_p"))]
        rows.append([*row, f"{arm['seconds']:.0f}", f"{arm['memory_mib']:.0f}"])
    headers += ["s", "MiB"]
    return tabulate(rows, headers=headers, tablefmt=style, disable_numparse=True)


def _number(value: float | None, sign: str = "") -> str:
    return "-" if value is None else f"{value:{sign}.4f}"


def summary(report: dict[str, Any], style: str = "simple") -> str:
    """Return the report as text: the table, the sentences, best parameters, left-out runs and notes."""
    searched = [(arm["label"], arm["overrides"]) for arm in report["arms"].values() if "overrides" in arm]
    left_out = report["failures"].items()
    parts = [
        table(report, style),
        "\n".join([*report["sentences"], report["conclusion"]]),
        "\n".join(f"- Best overrides of {label}: `{' '.join(best)}`" for label, best in searched),
        "\n".join(f"- warning: {name} is left out: {' '.join(message.split())}" for name, message in left_out),
        "\n".join(f"- {note}" for note in report["notes"]),
    ]
    return "\n\n".join(filter(None, parts))


def save_report(report: dict[str, Any], folder: Path) -> None:
    """Write `comparison.json`, `comparison.md` and `comparison.png`."""
    write_atomically(folder / COMPARISON_FILE, json.dumps(report, indent=2, allow_nan=False) + "\n")
    plot = f"![{report['metric']} of every seed](comparison.png)"
    write_atomically(folder / "comparison.md", f"# Does BiSSL help?\n\n{summary(report, 'github')}\n\n{plot}\n")
    draw_plot(report).savefig(folder / "comparison.png", dpi=150)


def arm_to_publish(folder: Path, arm: str) -> tuple[Path, dict[str, Any]]:
    """Return the run of the first seed of an arm, and metadata of its entry in the zoo.

    The metadata have the metric of the arm and of fine-tuning alone for every seed that both have, and the report.

    Raises:
        CheckpointError: the report of the comparison cannot be read.
        ConfigError: the comparison has no such arm, or no seed of it has finished.
    """
    report = read_json(folder / COMPARISON_FILE)
    arms = report["arms"]
    if arm not in arms:
        raise ConfigError(f"{folder} has no arm '{arm}'.{did_you_mean(arm, arms)} Its arms: {', '.join(arms)}.")
    values, base = arms[arm]["values"], arms["pretrained"]["values"]
    seeds = [seed for seed in values if seed in base]
    if not seeds:
        raise ConfigError(f"No seed of '{arm}' has finished in {folder}, or none of fine-tuning alone.")
    of_arm = {f"{report['metric']} ({name})": [arms[name]["values"][s] for s in seeds] for name in ("pretrained", arm)}
    leaked = [f"{note.partition(': ')[0]}." for note in report["leakage"]]  # without the files of the user
    shown = report | {"failures": {}, "notes": leaked + report["notes"][len(leaked) :]}
    notes = (
        f"The weights are those of seed {seeds[0]}; the metrics are those of all seeds, `pretrained` being fine-tuning "
        f"alone from the same weights.\n\n{summary(shown, 'github')}"
    )
    return folder / "runs" / run_name(arm, int(seeds[0])), {
        "metrics": of_arm,
        "seeds": [int(seed) for seed in seeds],
        "notes": notes,
    }


def reports_table(reports: dict[str, dict[str, Any]], style: str = "simple") -> str:
    """Return a table with a row per comparison and a column per arm: mean and standard deviation, the best bold.

    An arrow marks arms that are significantly above or below fine-tuning alone by the papers' test (Welch, p < 0.05).
    """
    arms = list(dict.fromkeys(name for report in reports.values() for name in report["arms"]))
    lines = []
    for dataset, report in reports.items():
        means = [arm["mean"] for arm in report["arms"].values() if arm["mean"] is not None]
        best = (max if report["higher_is_better"] else min)(means)
        lines.append([dataset, report["metric"], *(_cell(report, name, best) for name in arms)])
    headers = ["comparison", "metric", *(find_arm(name).label for name in arms)]
    return tabulate(lines, headers=headers, tablefmt=style, disable_numparse=True)


def _cell(report: dict[str, Any], name: str, best: float) -> str:
    arm = report["arms"].get(name)
    if arm is None or arm["mean"] is None:
        return "-"
    text = f"{arm['mean']:.4f}" + ("" if arm["std"] is None else f" ± {arm['std']:.4f}")
    item = report["differences"]["pretrained"].get(name, {})
    p = item.get("welch_p")
    arrow = "" if p is None or p >= LEVEL else " ↑" if item["mean"] > 0 else " ↓"
    missing = len(report["seeds"]) - arm["count"]
    left_out = f" ({missing} of {len(report['seeds'])} seeds missing)" if missing else ""
    return (f"**{text}**" if arm["mean"] == best else text) + arrow + left_out


def save_reports(reports: dict[str, dict[str, Any]], folder: Path) -> None:
    """Write the table of several comparisons as `comparisons.json` and `comparisons.md`.

    If they differ in the label fraction, `labels.png` shows the metric against it.
    """
    shares = {report["label_fraction"] or 1.0 for report in reports.values()}
    if len(shares) > 1 and len(shares) == len(reports):
        draw_labels(list(reports.values())).savefig(folder / "labels.png", dpi=150)
    text = [
        reports_table(reports, "github"),
        "↑ and ↓: above and below fine-tuning alone, Welch's t test, p < 0.05, not corrected for multiple tests.",
        "\n".join(f"- {dataset}: {report['sentences'][0]}" for dataset, report in reports.items()),
    ]
    write_atomically(folder / "comparisons.json", json.dumps(reports, indent=2, allow_nan=False) + "\n")
    write_atomically(folder / "comparisons.md", "\n\n".join(text) + "\n")


def draw_labels(reports: list[dict[str, Any]]) -> Figure:
    """Plot the mean of every arm and its 95 % confidence interval against the share of the labels, on a log axis."""
    reports = sorted(reports, key=lambda report: report["label_fraction"] or 1.0)
    figure = Figure(figsize=(7.0, 4.8), layout="constrained")
    axes = figure.subplots()
    arms = list(dict.fromkeys(name for report in reports for name in report["arms"]))
    for number, name in enumerate(arms):
        found = [(r["label_fraction"] or 1.0, r["arms"][name]) for r in reports if r["arms"].get(name, {}).get("count")]
        x = [100 * share * 1.02 ** (number - len(arms) / 2) for share, _ in found]  # intervals side by side
        means = [arm["mean"] for _, arm in found]
        halves = [0.0 if arm.get("high") is None else arm["high"] - arm["mean"] for _, arm in found]
        axes.errorbar(x, means, yerr=halves, marker="o", markersize=4, capsize=3, label=find_arm(name).label)
    ticks = [100 * (report["label_fraction"] or 1.0) for report in reports]
    axes.set_xscale("log")
    axes.set_xticks(ticks, [f"{tick:g} %" for tick in ticks])
    axes.minorticks_off()
    axes.set(xlabel="labels used", ylabel=reports[0]["metric"], title="Mean over seeds; bar: 95 % CI")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="0.92")
    axes.legend(frameon=False, fontsize="small")
    return figure


def draw_plot(report: dict[str, Any]) -> Figure:
    """Plot the runs of every arm, joined by seed, with their mean and its 95 % confidence interval."""
    arms = [arm for arm in report["arms"].values() if arm["count"]]
    figure = Figure(figsize=(2.0 + 1.8 * len(arms), 4.8), layout="constrained")
    axes = figure.subplots()
    for seed in map(str, report["seeds"]):
        points = [(x, arm["values"][seed]) for x, arm in enumerate(arms) if seed in arm["values"]]
        if points:
            axes.plot(*zip(*points, strict=True), color="0.75", linewidth=0.9, zorder=1)
    for x, arm in enumerate(arms):
        values, mean = list(arm["values"].values()), arm["mean"]
        half = 0.0 if arm.get("high") is None else arm["high"] - mean
        (line, *_) = axes.errorbar(x + 0.17, mean, yerr=half, fmt="_", markersize=12, capsize=4, linewidth=1.6)
        axes.scatter([x] * len(values), values, s=30, color=line.get_color(), alpha=0.7, linewidth=0, zorder=2)
    axes.set_xticks(range(len(arms)), [arm["label"].replace(" ", "\n", 1) for arm in arms])
    axes.set(xlim=(-0.5, len(arms) - 0.4), ylabel=report["metric"], title="Every seed; bar: mean and 95 % CI")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="0.92")
    return figure
