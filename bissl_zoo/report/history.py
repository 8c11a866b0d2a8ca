"""The records of `metrics.jsonl`: series over steps, and the time of each stage."""

import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bissl_zoo.files import parse_json

#: bytes that are read of the file, and of one line; far above what a run writes
MAX_BYTES, MAX_LINE = 256 << 20, 1 << 20
#: points of a curve; longer ones are averaged
MAX_POINTS = 300
#: curves in one chart
MAX_CURVES = 6
#: seconds that no run takes
_MAX_SECONDS = 1e12


@dataclass(frozen=True)
class Entry:
    """A line: the metrics after a step of a stage, or after the upper step number `upper`."""

    stage: str
    step: int
    time: float
    upper: int | None
    metrics: dict[str, Any]

    def number(self, key: str) -> float | None:
        """Return a metric if it is a finite number."""
        value = self.metrics.get(key)
        if type(value) not in (int, float) or abs(value) > 1e300 or not math.isfinite(value):
            return None
        return float(value)

    def seconds(self, *parts: str) -> float:
        """Return the sum of the durations of these parts of a stage; invalid ones count as 0."""
        values = (self.number(f"seconds/{part}") for part in parts)
        return math.fsum(value for value in values if value and 0 < value < _MAX_SECONDS)


@dataclass
class Series:
    """One curve."""

    x: list[float] = field(default_factory=list)
    y: list[float] = field(default_factory=list)

    def thinned(self) -> "Series":
        """Return at most 300 points, each the mean of its neighbours."""
        size = math.ceil(len(self.x) / MAX_POINTS)
        if size <= 1:
            return self
        parts = [slice(start, start + size) for start in range(0, len(self.x), size)]
        return Series([_mean(self.x[part]) for part in parts], [_mean(self.y[part]) for part in parts])


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


@dataclass
class History:
    """The records of a run in the order of the file; `problem`: what could not be read, or empty."""

    entries: list[Entry] = field(default_factory=list)
    problem: str = ""

    def of(self, stage: str, upper: bool = False) -> Iterator[Entry]:
        """Yield the records of steps of a stage or, with `upper`, of single upper steps."""
        return (entry for entry in self.entries if entry.stage == stage and (entry.upper is not None) == upper)

    def series(self, key: str, stage: str, upper: bool = False) -> Series:
        """Return a metric over the steps of a stage."""
        series = Series()
        for entry in self.of(stage, upper):
            value = entry.number(key)
            if value is not None:
                series.x.append(entry.upper if upper else entry.step)
                series.y.append(value)
        return series

    def stages(self) -> list[str]:
        """Return the stages in the order in which they began."""
        return list(dict.fromkeys(entry.stage for entry in self.entries))

    def names(self, *prefixes: str) -> list[str]:
        """Return the metrics with these prefixes, without those of single classes."""
        names = dict.fromkeys(name for entry in self.entries for name in entry.metrics)
        return [name for name in names if name.startswith(prefixes) and name.count("/") == 1]


def read_history(path: Path) -> History:
    """Read `metrics.jsonl`; lines that cannot be read are counted and left out."""
    history, unreadable = History(), 0
    if not os.path.isfile(path):
        return history
    try:
        with open(path, "rb") as file:
            while file.tell() < MAX_BYTES and (line := file.readline(MAX_LINE)):
                entry = _entry(line)
                if entry:
                    history.entries.append(entry)
                elif line.endswith(b"\n"):  # otherwise it is being written
                    unreadable += 1
            if file.read(1):
                history.problem = f"{path.name} is larger than {MAX_BYTES >> 20} MiB; the rest is not shown."
    except OSError as error:
        history.problem = f"{path.name} cannot be read: {error.strerror}."
    if unreadable:
        history.problem += f" {path.name}: {unreadable} lines cannot be read and are left out."
    return history


def _entry(line: bytes) -> Entry | None:
    try:
        record = parse_json(line, parse_constant=str)
    except ValueError:
        return None
    if not isinstance(record, dict):
        return None
    stage, step, upper = record.pop("stage", None), record.pop("step", None), record.pop("upper_step", None)
    if not (isinstance(stage, str) and re.fullmatch(r"\w{1,64}", stage, re.ASCII)) or not _is_count(step):
        return None
    time = record.pop("time", None)
    seconds = record.pop("seconds", None)
    record |= {f"seconds/{name}": value for name, value in seconds.items()} if isinstance(seconds, dict) else {}
    metrics = {name[:200]: value for name, value in record.items() if isinstance(value, (int, float, str))}
    time = float(time) if type(time) in (int, float) and 0 < time < 1e11 else math.nan
    return Entry(stage, step, time, upper if _is_count(upper) else None, metrics)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 53


@dataclass
class StageTime:
    """Seconds of a stage: all of it, and its parts; `speed`: last measured images per second, or NaN."""

    name: str
    seconds: float
    evaluating: float = 0.0
    waiting: float = 0.0
    saving: float = 0.0
    speed: float = math.nan


def time_of(history: History) -> list[StageTime]:
    """Return the time of each stage from the records at the end of its processes."""
    stages: dict[str, StageTime] = {}
    for entry in history.entries:
        if "seconds/total" in entry.metrics:
            stage = stages.setdefault(entry.stage, StageTime(entry.stage, 0.0))
            stage.seconds += entry.seconds("total")
            stage.evaluating += entry.seconds("evaluation", "probe")
            stage.waiting += entry.seconds("data")
            stage.saving += entry.seconds("checkpoint")
            stage.speed = (history.series("speed/images_per_second", entry.stage).y or [math.nan])[-1]
    return list(stages.values())
