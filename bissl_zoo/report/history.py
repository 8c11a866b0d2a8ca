"""The records of `metrics.jsonl` as series over steps, read whatever is in the file, and their common axis."""

import json
import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

#: bytes of the file that are read, and of one line; far above what a run leaves
MOST_BYTES, LONGEST_LINE = 256 << 20, 1 << 20
#: points of a curve; of more, each is a mean
MOST_POINTS = 300
#: figures that a drawing tells apart
MOST_FIGURES = 6


@dataclass(frozen=True)
class Entry:
    """A line: the figures after a step of a stage, or of an upper step, whose number is `upper`."""

    stage: str
    step: int
    time: float
    upper: int | None
    figures: dict[str, Any]

    def number(self, key: str) -> float | None:
        """A figure, if it is one; None also where it was infinite or NaN."""
        value = self.figures.get(key)
        if type(value) not in (int, float) or abs(value) > 1e300 or not math.isfinite(value):
            return None
        return float(value)


@dataclass
class Series:
    """One curve."""

    x: list[float] = field(default_factory=list)
    y: list[float] = field(default_factory=list)

    def thinned(self) -> "Series":
        """At most 300 points, each the mean of those it stands for."""
        size = math.ceil(len(self.x) / MOST_POINTS)
        if size <= 1:
            return self
        parts = [slice(start, start + size) for start in range(0, len(self.x), size)]
        return Series([_mean(self.x[part]) for part in parts], [_mean(self.y[part]) for part in parts])


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


@dataclass(frozen=True)
class Span:
    """A stage on the axis that all stages share, counted in optimizer steps."""

    stage: str
    start: int
    length: int


@dataclass
class History:
    """What a run wrote, in the order of the file.

    Attributes:
        problem: what of it could not be read, or empty.
    """

    entries: list[Entry] = field(default_factory=list)
    problem: str = ""

    def of(self, stages: Sequence[str], upper: bool = False) -> Iterator[Entry]:
        """The records of these stages; `upper`: those of single upper steps, rather than of steps."""
        return (entry for entry in self.entries if entry.stage in stages and (entry.upper is not None) == upper)

    def series(self, key: str, stage: str, upper: bool = False) -> Series:
        """A figure over the steps of a stage."""
        found = Series()
        for entry in self.of([stage], upper):
            value = entry.number(key)
            if value is not None:
                found.x.append(entry.upper if upper else entry.step)
                found.y.append(value)
        return found

    def stages(self) -> list[str]:
        """In the order in which they began."""
        return list(dict.fromkeys(entry.stage for entry in self.entries))

    def names(self, *beginnings: str) -> list[str]:
        """The figures that begin so, without those of single classes."""
        names = dict.fromkeys(name for entry in self.entries for name in entry.figures)
        return [name for name in names if name.startswith(beginnings) and name.count("/") == 1]


@dataclass(frozen=True)
class Axis:
    """Optimizer steps, one stage after the other; an alternation of `bissl` takes its lower and its upper steps."""

    spans: tuple[Span, ...]
    lower_steps: int
    upper_steps: int

    def place(self, entry: Entry, level: str = "") -> float | None:
        """Where a record lies; `level`: which one's loss it tells, in `bissl`."""
        span = next((span for span in self.spans if span.stage == entry.stage), None)
        if span is None:
            return None
        if entry.stage != "bissl":
            return span.start + entry.step
        before = span.start + (entry.step - 1) * (self.lower_steps + self.upper_steps) + self.lower_steps
        if entry.upper is not None:
            return before + entry.upper - (entry.step - 1) * self.upper_steps
        return before if level == "lower" else before + self.upper_steps


def make_axis(history: History, lower_steps: int, upper_steps: int) -> Axis:
    """The axis of all that a run has told so far."""
    spans: list[Span] = []
    start = 0
    for stage in history.stages():
        last = max(entry.step for entry in history.entries if entry.stage == stage)
        length = last * (lower_steps + upper_steps if stage == "bissl" else 1)
        spans.append(Span(stage, start, length))
        start += length
    return Axis(tuple(spans), lower_steps, upper_steps)


def read_history(path: Path) -> History:
    """All records of `metrics.jsonl`; what cannot be read is counted, and left out."""
    history, unread = History(), 0
    if not os.path.isfile(path):
        return history
    try:
        with open(path, "rb") as file:
            while file.tell() < MOST_BYTES and (line := file.readline(LONGEST_LINE)):
                entry = _entry(line)
                if entry:
                    history.entries.append(entry)
                elif line.endswith(b"\n"):  # else it is being written
                    unread += 1
            if file.read(1):
                history.problem = f"{path.name} is larger than {MOST_BYTES >> 20} MiB; what follows is not shown."
    except OSError as error:
        history.problem = f"{path.name} cannot be read: {error.strerror}"
    if unread:
        history.problem += f" {path.name}: {unread} lines cannot be read, and are left out."
    return history


def _entry(line: bytes) -> Entry | None:
    try:
        record = json.loads(line, parse_constant=str)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict):
        return None
    stage, step, upper = record.pop("stage", None), record.pop("step", None), record.pop("upper_step", None)
    if not (isinstance(stage, str) and re.fullmatch(r"\w{1,64}", stage, re.ASCII)) or not _is_count(step):
        return None
    time = record.pop("time", None)
    figures = {name[:200]: value for name, value in record.items() if isinstance(value, (int, float, str))}
    return Entry(
        stage,
        step,
        float(time) if type(time) in (int, float) and 0 < time < 1e11 else math.nan,
        upper if _is_count(upper) else None,
        figures,
    )


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 53
