"""What a display knows of a run: where it stands, and how long the rest will take."""

import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from bissl_zoo.engine.trainer import Trainer


class PlannedStage(NamedTuple):
    """A stage of the run; those of one `kind` take as long per step as each other."""

    name: str
    kind: Hashable
    steps: int


@dataclass(frozen=True)
class StageView:
    """A stage as it stands.

    Attributes:
        step, total_steps: done, and of how many; of `bissl`, alternations.
        phase: where it is within a step that is made of steps, such as `lower step 3/20`; else empty.
        fraction: of the stage that is done.
        levels: names of the levels.
        figures: what the last step measured.
        speed: images per second and share of time waiting for data, where they are known.
        seconds: a step takes; None before there was one.
        left: seconds until the stage ends; None likewise.
    """

    name: str
    step: int
    total_steps: int
    phase: str
    fraction: float
    levels: tuple[str, ...]
    figures: dict[str, Any]
    speed: dict[str, float]
    seconds: float | None
    left: float | None


def place_within(trainer: Trainer) -> tuple[str, float]:
    """The optimizer step that `trainer` is at within its present step, in words, and the share of it that is done.

    Told by the levels' counters alone, so that another thread may ask at any time.
    """
    levels = trainer.levels()
    if trainer.done or trainer.stopping or len(levels) < 2:
        return "", 0.0
    each = {name: level.total_steps // trainer.total_steps for name, level in levels.items()}
    done = {name: min(max(level.step - trainer.step * each[name], 0), each[name]) for name, level in levels.items()}
    at = next((name for name in each if done[name] < each[name]), None)
    words = f"{at} step {done[at] + 1}/{each[at]}" if at else ""
    return words, sum(done.values()) / sum(each.values())


@dataclass
class RunView:
    """The run as it stands.

    Attributes:
        folder: the run directory; device: what it runs on.
        stages: all of them; number: of the present one, from 1.
        source: asked for the present stage whenever the display is drawn.
        doing: what holds up the steps at the moment, such as an evaluation.
        evaluation: the last one's line; checkpoint: the last one, and when it was written (`time.monotonic`).
        rates: seconds per step by kind of stage, of the stages seen so far.
    """

    folder: str = ""
    device: torch.device | None = None
    stages: Sequence[PlannedStage] = ()
    number: int = 0
    source: Callable[[], StageView] | None = None
    doing: str = ""
    evaluation: str = ""
    checkpoint: tuple[str, float] | None = None
    began: float = field(default_factory=time.monotonic)
    rates: dict[Hashable, float] = field(default_factory=dict)

    def stage(self) -> StageView | None:
        """The present stage; remembers how long its steps take."""
        view = self.source() if self.source else None
        if view and view.seconds is not None and self.number:
            self.rates[self.stages[self.number - 1].kind] = view.seconds
        return view

    def left(self, view: StageView | None) -> float | None:
        """Seconds until the run ends; None as long as no stage like one of those to come was seen."""
        to_come = [(self.rates.get(stage.kind), stage.steps) for stage in self.stages[self.number :]]
        if view is None or view.left is None or any(rate is None for rate, _ in to_come):
            return None
        return view.left + sum(rate * steps for rate, steps in to_come)
