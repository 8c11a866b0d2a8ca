"""A comparison in sentences that claim no more than its figures bear."""

from typing import Any

from bissl_zoo.studies.compare_arms import ARMS

#: fewer seeds than these are called few
FEW = 5


def verdict(found: dict[str, Any], higher_is_better: bool, level: float) -> str:
    """Of a paired difference: better, worse, or open; "one" and "same" where there is nothing to test with."""
    if found["count"] == 1:
        return "one"
    if found["paired_p"] is None:
        return "same"
    if found["paired_p"] >= level:
        return "open"
    return "better" if (found["mean"] > 0) == higher_is_better else "worse"


def sentence(report: dict[str, Any], arm: str) -> str:
    """An arm against each of the references that come before it in importance."""
    clauses = [
        _clause(found[arm], ARMS[reference].words, report["metric"])
        for reference, found in report["differences"].items()
        if arm in found and list(ARMS).index(reference) != list(ARMS).index(arm) and _asks(arm, reference)
    ]
    return f"{_capital(ARMS[arm].words)} is {'; '.join(clauses)}."


def _asks(arm: str, reference: str) -> bool:
    """Whether a sentence on `arm` speaks of `reference`: BiSSL of all, joint training of all but BiSSL."""
    return {"bissl": True, "joint": reference != "joint"}.get(arm, reference == "pretrained")


def _clause(found: dict[str, Any], other: str, metric: str) -> str:
    kind = found["verdict"]
    if kind == "none":
        return f"not compared with {other}: no seed has both"
    size, seeds = f"{found['mean']:+.4f} {metric}", f"{found['count']} seeds"
    if kind == "one":
        return f"{size} from {other} in one seed, from which nothing can be concluded"
    if kind == "same":
        return f"{size} from {other} in each of {seeds}, and where nothing spreads nothing can be tested"
    facts = f"{size} (95 % CI {found['low']:+.4f} to {found['high']:+.4f}, paired p {_p(found['paired_p'])}, {seeds})"
    if kind == "open":
        return f"not told apart from {other}: {facts}"
    return f"{kind} than {other} by {facts}"


def conclusion(report: dict[str, Any]) -> str:
    """What it comes to for somebody who wonders whether to use BiSSL; empty where it was not among the arms."""
    found = {reference: arms.get("bissl") for reference, arms in report["differences"].items()}
    if found.get("pretrained") is None:
        return ""
    first = found["pretrained"]["verdict"]
    longer = (found.get("longer_pretraining") or {}).get("verdict")
    if first == "better" and longer == "better":
        return "So BiSSL helps here, and by more than its extra pretext steps do."
    if first == "better" and longer is None:
        return "So BiSSL helps here; whether by its extra pretext steps alone, the arm longer_pretraining would tell."
    if first == "better":
        return "So BiSSL helps here, but its extra pretext steps alone may be what helps."
    if first == "worse":
        return "So BiSSL does harm here, with these settings."
    if first == "open":
        return (
            "So these runs do not show that BiSSL helps here, nor that it does not: a difference below about "
            f"{found['pretrained']['half_width']:.4f} would not have shown."
        )
    return "So nothing can be concluded yet; run more seeds."


def notes(report: dict[str, Any]) -> list[str]:
    """What a reader should know before believing the figures."""
    found = []
    for reference, arms in report["differences"].items():
        for name, one in arms.items():
            if _asks(name, reference) and one.get("welch_p") is not None and one["paired_p"] is not None:
                if (one["welch_p"] < 0.05) != (one["paired_p"] < 0.05):
                    found.append(_disagreement(name, reference, one))
    counts = [arm["count"] for arm in report["arms"].values()]
    if min(counts) < FEW:
        found.append(
            f"Few seeds (the fewest of an arm are {min(counts)}): the intervals are wide, and tests lean on "
            "differences being normal. Ten are usual; --seeds 10 adds them."
        )
    fixed = {
        "pretrain": "Pretraining was repeated for every seed.",
        "bissl": "All seeds share one pretrained backbone, so the intervals speak of that one and not of pretraining.",
        "finetune": "All seeds of an arm share one backbone, so the intervals speak of fine-tuning it alone.",
    }
    found.append(fixed[report["vary"]])
    found.append("All runs were measured on the same test images; the intervals say nothing about other images.")
    if _tests(report) > 1:
        found.append(f"p values are two-sided and not corrected for {_tests(report)} comparisons.")
    return found


def _disagreement(name: str, reference: str, one: dict[str, Any]) -> str:
    return (
        f"{_capital(ARMS[name].words)} against {ARMS[reference].words}: the paired test has p {_p(one['paired_p'])}, "
        f"Welch's, which the papers use and which does not pair seeds, p {_p(one['welch_p'])}."
    )


def _tests(report: dict[str, Any]) -> int:
    return sum(
        _asks(name, reference) and one.get("paired_p") is not None
        for reference, arms in report["differences"].items()
        for name, one in arms.items()
    )


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"= {value:.3f}"


def _capital(words: str) -> str:
    return words[0].upper() + words[1:]
