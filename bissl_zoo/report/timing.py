"""Where the time of a run went, as far as its records tell."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bissl_zoo.engine.stages.finetune import BASELINE
from bissl_zoo.report.history import Entry, History

#: seconds that no run takes
_MOST = 1e12
#: where the seconds of what was measured on the way are, and how the names of its figures begin
_MEASURED = {"time/evaluation": ("val/", "test/"), "time/probe": ("probe/",)}


@dataclass(frozen=True)
class StageTime:
    """Seconds from the end of the stage before to that of this one: its last record, or the evaluation after it.

    Attributes:
        evaluating, waiting, saving: of them, in evaluations and probes, for data, and while checkpoints were written.
        speed: images per second as last told, or NaN.
    """

    name: str
    seconds: float
    evaluating: float = 0.0
    waiting: float = 0.0
    saving: float = 0.0
    speed: float = math.nan

    @property
    def computing(self) -> float:
        """What is left."""
        return self.seconds - self.evaluating - self.waiting - self.saving


@dataclass
class Timing:
    """Seconds by stage, in their order, and what is left of the run's wall time; `notes`: what is not known."""

    stages: list[StageTime] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def time_of(history: History, facts: Mapping[str, Any], log: str, tested: Mapping[str, float]) -> Timing:
    """The times of a run from its records, the wall time in its facts, and what its log says of checkpoints.

    Args:
        tested: seconds of the evaluations on the test set, by what was fine-tuned; 0 where they were not recorded.
    """
    timing, saving = Timing(), _checkpoints(log)
    entries = [entry for entry in history.entries if entry.upper is None and not math.isnan(entry.time)]
    names = list(dict.fromkeys(entry.stage for entry in entries))
    testing = {_fine_tuning(start, names): seconds for start, seconds in tested.items()}
    outside = ["the start", "publishing"]
    before: float | None = None
    for name in names:
        own = [entry for entry in entries if entry.stage == name]
        begin = _first_step(own) if before is None else before
        if begin is None:
            begin = own[0].time - _evaluating(own[:1])
            timing.notes.append(f"Of {name}, the time before its first record (step {own[0].step}) is not counted.")
            outside.append("what came before the first record")
        stage = _stage(name, own, begin, saving.get(name, 0.0), testing.get(name, 0.0))
        timing.stages.append(stage)
        before = begin + stage.seconds
    if names and names[-1] in (BASELINE, "finetune") and not testing.get(names[-1]):
        outside.append("the last evaluation")
    _compare(timing, facts.get("wall_time_s"), outside)
    if not saving:
        timing.notes.append("How long checkpoints took is not known (log.txt does not say); it is in the bars.")
    if not all(tested.values()) or _is_silent(entries):
        timing.notes.append("How long evaluations took was not recorded, or not of all; it is in the bars.")
    elif not tested and {BASELINE, "finetune"} & set(names):
        timing.notes.append("How long the test set took is told when the run has ended; until then it is in the bars.")
    return timing


def _fine_tuning(start: str, stages: Sequence[str]) -> str:
    return BASELINE if start == "pretrained" and BASELINE in stages else "finetune"


def _first_step(own: Sequence[Entry]) -> float | None:
    """When the first step of a run began, if a record tells how long the steps until then took."""
    for entry in own:
        steps = entry.step * (entry.number("speed/seconds_per_step") or math.nan)
        if 0 < steps < _MOST:
            return min(own[0].time, entry.time - _evaluating([entry]) - steps)
    return None


def _stage(name: str, own: Sequence[Entry], begin: float, saving: float, testing: float) -> StageTime:
    """What of the time from `begin` on went where; the parts are never more than the whole."""
    waiting, before = 0.0, begin
    for entry in own:
        share = entry.number("speed/waiting")
        if share is not None:  # since the last that told one
            waiting += min(max(share, 0.0), 1.0) * max(entry.time - before, 0.0)
            before = entry.time
    seconds = max(own[-1].time - begin, 0.0) + testing
    speeds = [speed for entry in own if (speed := entry.number("speed/images_per_second")) is not None]
    evaluating = min(_evaluating(own) + testing, seconds)
    waiting = min(waiting, seconds - evaluating)
    saving = min(saving, seconds - evaluating - waiting)
    return StageTime(name, seconds, evaluating, waiting, saving, speeds[-1] if speeds else math.nan)


def _evaluating(entries: Sequence[Entry]) -> float:
    told = (entry.number(key) for entry in entries for key in _MEASURED)
    return math.fsum(seconds for seconds in told if seconds and 0 < seconds < _MOST)


def _is_silent(entries: Sequence[Entry]) -> bool:
    """Whether a record has figures of an evaluation or a probe, and not how long it took."""
    return any(
        entry.number(key) is None and any(name.startswith(beginnings) for name in entry.figures)
        for entry in entries
        for key, beginnings in _MEASURED.items()
    )


def _compare(timing: Timing, wall: Any, outside: Sequence[str]) -> None:
    """Set what the records tell beside the wall time; `outside`: what the rest of it is."""
    told = math.fsum(stage.seconds for stage in timing.stages)
    if type(wall) not in (int, float) or not 0 < wall < _MOST:
        timing.notes.append("The whole wall time of the run is not known: it has not ended in order yet.")
    elif told > wall * 1.02 + 1:
        timing.notes.append(
            f"The records span {told:.0f} s and the run counts {wall:.0f} s: it was paused, or killed and resumed, and "
            "pauses are in the bars."
        )
    else:
        timing.stages.append(StageTime("outside of the records", max(wall - told, 0.0)))
        timing.notes.append(f"Outside of the records: {', '.join(outside)}.")


def _checkpoints(log: str) -> dict[str, float]:
    """Seconds by stage, of all parts of a run, as the last line of each stage tells."""
    seconds: dict[str, float] = {}
    for stage, told in re.findall(r"\[(\w{1,64})\] checkpoints: \d{1,9}, (\d{1,9}\.\d) s,", log, re.ASCII):
        seconds[stage] = seconds.get(stage, 0.0) + float(told)
    return seconds
