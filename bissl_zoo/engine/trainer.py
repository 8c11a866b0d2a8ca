"""The training loop and its hook points; what happens in a step is a stage's, what happens around it a hook's."""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from bissl_zoo.bilevel.level import Level
from bissl_zoo.data.batches import split_samples
from bissl_zoo.distributed import average_gradients
from bissl_zoo.errors import CheckpointError
from bissl_zoo.zoo.create import state_difference


class HookBase:
    """Something that happens around steps. `trainer` is set when the hook is handed to one."""

    trainer: "Trainer"

    def before_train(self) -> None:
        """Called once, before the first step of this process."""

    def after_step(self) -> None:
        """Called after each step, with `trainer.step` steps done."""

    def after_train(self) -> None:
        """Called once, after the last step that is taken."""


class Trainer(ABC):
    """A stage as a number of steps, with hooks around them.

    Attributes:
        name: of the stage, as it appears in logs and checkpoints.
        step: steps done, of `total_steps`.
        metrics: what the last step returned.
        records: of finer grain than a step, for the writer: those of the last step, numbered under `record_key`.
        skipped: steps, of any level, that were undone because of numbers that are not finite.
        bad: names of the samples that could not be used, of all processes, by level as `levels` names it.
        ended: whether a hook has ended the stage before its last step.
        stopping: whether the run was asked to stop, so that this step is its last for now.
        owed: whether a hook was cut short by that: what is left of the step, its hooks from the first on, is saved with
            its metrics and done first when the run goes on.
    """

    #: the metrics to show on the progress line
    headline: tuple[str, ...] = ("total_loss", "lr")
    #: what a record of finer grain is one of
    record_key: str = "record"

    def __init__(self, name: str, total_steps: int) -> None:
        self.name = name
        self.total_steps = total_steps
        self.step = 0
        self.metrics: dict[str, Any] = {}
        self.records: list[dict[str, Any]] = []
        self.skipped = 0
        self.bad: dict[str, list[str]] = {}
        self.ended = self.stopping = self.owed = False
        self.hooks: list[HookBase] = []

    @property
    def done(self) -> bool:
        """Whether no step is left to take."""
        return self.ended or self.step >= self.total_steps

    def train(self, hooks: Sequence[HookBase] = (), stop: Callable[[], bool] = lambda: False) -> None:
        """Run from the present step to the last, or to the one after which `stop` says so.

        Args:
            stop: asked after each step on every rank, with the same answer on each.
        """
        self.hooks = list(hooks)
        for hook in self.hooks:
            hook.trainer = self
            hook.before_train()
        if self.owed:
            self._end_step(stop)
        while not self.done and not self.stopping:
            self.metrics = self.run_step()
            self.step += 1
            self._end_step(stop)
        for hook in self.hooks:
            hook.after_train()

    def _end_step(self, stop: Callable[[], bool]) -> None:
        self.owed, self.stopping = False, stop()
        for hook in self.hooks:
            hook.after_step()

    def postpone(self) -> None:
        """Leave what a hook was cut short in, and those after it, to the run that goes on from here."""
        self.owed = self.stopping = True

    @abstractmethod
    def run_step(self) -> dict[str, Any]:
        """Do one step and return its metrics."""

    @abstractmethod
    def levels(self) -> dict[str, Level]:
        """The levels that are trained, by the name of their place in a checkpoint."""

    def averages(self) -> dict[str, nn.Module]:
        """Averages of what is trained that are no part of a level, by name; their numbers are watched as well."""
        return {}

    def close(self) -> None:
        """End the loaders' workers: collected as garbage, with this trainer, they would be waited for in vain."""
        for level in self.levels().values():
            level.data_iterator.close()

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs: tensors and plain types only."""
        owed = {"owed": {"metrics": self.metrics, "records": self.records}} if self.owed else {}
        return {
            "step": self.step,
            "skipped": self.skipped,
            "ended": self.ended,
            **({"bad": self.bad} if self.bad else {}),
            **owed,
            "levels": {
                name: {
                    "backbone": level.backbone.state_dict(),
                    "head": level.head.state_dict(),
                    "optimizer": level.optimizer.state_dict(),
                    "step": level.step,
                }
                for name, level in self.levels().items()
            },
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken.

        Raises:
            CheckpointError: the state is of another architecture.
        """
        self.step = state["step"]
        self.skipped = state.get("skipped", 0)  # of a checkpoint from before steps could be
        self.ended = state.get("ended", False)  # likewise
        self.bad = state.get("bad", {})
        self.owed = "owed" in state
        if self.owed:
            self.metrics, self.records = state["owed"]["metrics"], state["owed"]["records"]
        for name, level in self.levels().items():
            saved = state["levels"][name]
            load_state(level.backbone, saved["backbone"], f"{name} backbone")
            load_state(level.head, saved["head"], f"{name} head")
            level.optimizer.load_state_dict(saved["optimizer"])
            level.step = saved["step"]


class SingleLevelTrainer(Trainer):
    """A stage that trains one level by plain gradients: pretraining, head warm-up, fine-tuning.

    Args:
        accumulate: parts of a batch that pass through the networks one by one; their gradients are averaged.
    """

    def __init__(self, level: Level, accumulate: int = 1) -> None:
        super().__init__(level.name, level.total_steps)
        self.level = level
        self.accumulate = accumulate

    def run_step(self) -> dict[str, Any]:
        """One optimizer step, or none where the level's guard undoes it."""
        return self.level.attempt(self.take_step)

    def take_step(self) -> dict[str, Any]:
        """One optimizer step on the level's own loss."""
        level = self.level
        losses: Counter[str] = Counter()
        for part in split_samples(level.next_batch(), self.accumulate):
            total, terms = level.loss(level.backbone, part)
            (total / self.accumulate).backward()
            losses.update({name: value / self.accumulate for name, value in terms.items()})
        average_gradients(level.parameters)
        step = level.optimize()
        return {"total_loss": sum(losses.values()), **losses, **step}

    def levels(self) -> dict[str, Level]:
        """The one level."""
        return {"level": self.level}


def load_state(module: nn.Module, state: dict[str, Tensor], what: str) -> None:
    """Load every tensor of `state` into `module`, or none.

    Raises:
        CheckpointError: with counts and examples of missing, unexpected and differently shaped tensors.
    """
    difference = state_difference(module.state_dict(), state)
    if difference:
        raise CheckpointError(
            f"The {what} in the checkpoint belongs to another architecture: {difference}. "
            "Use the configuration that the checkpoint was made with, or another checkpoint."
        )
    module.load_state_dict(state)
