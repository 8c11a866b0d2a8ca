"""The doctor's page for people."""

from collections import Counter
from collections.abc import Sequence

from bissl_zoo.doctor.finding import PROBLEM, STATUSES, WARNING, Finding


def page(findings: Sequence[Finding]) -> str:
    """A line for each finding, its remedy below it, and how many there are of what is not right."""
    width = max((len(finding.subject) for finding in findings), default=0)
    indent = max(map(len, STATUSES)) + 2
    lines = []
    for finding in findings:
        lines.append(f"{finding.status:<{indent}}{finding.subject:<{width}}  {finding.found}")
        lines += [f"{'':<{indent}}{'':<{width}}  -> {line}" for line in finding.remedy.splitlines()]
    counts = Counter(finding.status for finding in findings)
    said = [f"{counts[s]} {s}{'s' if counts[s] > 1 else ''}" for s in (PROBLEM, WARNING) if counts[s]]
    return "\n".join([*lines, "", ", ".join(said) or "all is well"])
