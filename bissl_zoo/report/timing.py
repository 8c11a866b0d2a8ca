"""Where the time of a run went, as far as its records tell."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from bissl_zoo.report.history import Entry, History


@dataclass(frozen=True)
class StageTime:
    """Seconds from the last record of the stage before to that of this one.

    Attributes:
        waiting, saving: of them, for data, and while checkpoints were written.
        speed: images per second as last told, or NaN.
    """

    name: str
    seconds: float
    waiting: float
    saving: float
    speed: float


@dataclass
class Timing:
    """Seconds by stage, in their order, and what is left of the run's wall time; `notes`: what is not known."""

    stages: list[StageTime] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def time_of(history: History, facts: Mapping[str, Any], log: str) -> Timing:
    """The times of a run from its records, the wall time in its facts, and what its log says of checkpoints."""
    timing, saving = Timing(), _checkpoints(log)
    entries = [entry for entry in history.entries if entry.upper is None and not math.isnan(entry.time)]
    before: float | None = None
    for stage in dict.fromkeys(entry.stage for entry in entries):
        own = [entry for entry in entries if entry.stage == stage]
        begin = own[0].time if before is None else before
        if before is None and len(own) > 1:
            timing.notes.append(f"Of {stage}, the time before its first record (step {own[0].step}) is not counted.")
        timing.stages.append(_stage(stage, own, begin, saving.get(stage, 0.0)))
        before = own[-1].time
    told, wall = sum(stage.seconds for stage in timing.stages), facts.get("wall_time_s")
    if type(wall) in (int, float) and 0 < wall < 1e12:
        _compare(timing, told, wall)
    else:
        timing.notes.append("The whole wall time of the run is not known: it has not ended in order yet.")
    if not saving:
        timing.notes.append("How long checkpoints took is not known (log.txt does not say); it is in the bars.")
    timing.notes.append("How long evaluations took is not kept; it is in the bars.")
    return timing


def _stage(name: str, own: list[Entry], begin: float, saving: float) -> StageTime:
    waiting, before = 0.0, begin
    for entry in own:
        share = entry.number("speed/waiting") or 0.0
        waiting += min(max(share, 0.0), 1.0) * max(entry.time - before, 0.0)
        before = entry.time
    seconds = max(own[-1].time - begin, 0.0)
    speeds = [speed for entry in own if (speed := entry.number("speed/images_per_second")) is not None]
    waiting = min(waiting, seconds)
    return StageTime(name, seconds, waiting, min(saving, seconds - waiting), speeds[-1] if speeds else math.nan)


def _compare(timing: Timing, told: float, wall: float) -> None:
    """Set what the records tell beside the wall time."""
    if told > wall * 1.02 + 1:
        timing.notes.append(
            f"The records span {told:.0f} s and the run counts {wall:.0f} s: it was paused, or killed and resumed, and "
            "pauses are in the bars."
        )
    else:
        timing.stages.append(StageTime("outside of the records", wall - told, 0.0, 0.0, math.nan))
        timing.notes.append(
            "Outside of the records: the start, what came before the first record, the last evaluation, publishing."
        )


def _checkpoints(log: str) -> dict[str, float]:
    """Seconds by stage, of all parts of a run, as the last line of each stage tells."""
    seconds: dict[str, float] = {}
    for stage, told in re.findall(r"\[(\w{1,64})\] checkpoints: \d{1,9}, (\d{1,9}\.\d) s,", log, re.ASCII):
        seconds[stage] = seconds.get(stage, 0.0) + float(told)
    return seconds
