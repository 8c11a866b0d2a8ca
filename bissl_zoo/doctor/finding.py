"""What a check has found."""

from collections.abc import Sequence
from dataclasses import dataclass

OK, WARNING, PROBLEM = "ok", "warning", "problem"
STATUSES = (OK, WARNING, PROBLEM)


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's page.

    Attributes:
        status: `ok`, `warning` (runs work, but not all of them or not well), `problem` (mend it first).
        subject: what was looked at.
        found: what it is, in words.
        remedy: what to do; empty where nothing is to be done.
    """

    status: str
    subject: str
    found: str
    remedy: str = ""


def worst(findings: Sequence[Finding]) -> str:
    """The gravest status there is."""
    return max((finding.status for finding in findings), key=STATUSES.index, default=OK)
