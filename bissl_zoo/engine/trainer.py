"""The contracts of the engine: weights, context, stage, trainer and hook; and the training loop."""

import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torch.utils.data import Dataset

from bissl_zoo.backbones.lora import merge_lora, without_factors
from bissl_zoo.bilevel.level import Level
from bissl_zoo.data.samples import split_samples
from bissl_zoo.distributed import StopRequest, average_gradients
from bissl_zoo.errors import CheckpointError
from bissl_zoo.progress.writers import Writer
from bissl_zoo.runs.checkpoint import Checkpointer
from bissl_zoo.weights.files import state_difference


@dataclass
class Weights:
    """State dicts that one stage leaves and the next one starts from; None for a part that does not exist yet.

    Attributes:
        backbone: the trunk that both levels share, under timm's names. LoRA is merged, also in `pretext`.
        tail: the rest of the backbone, if it does not come with `pretext`.
        pretext: the pretext method, the tail of the split backbone included.
        task: the downstream task.
        previous: the weights that entered the stage which left these; `finetune.baseline` starts from them.
        teacher: a fine-tuned backbone and task that label the unlabelled images for the fine-tuning.
        pixels: `mean` and `std` of the images that they were trained on, RGB in [0, 1], if known.
    """

    backbone: dict[str, Tensor] | None = None
    tail: dict[str, Tensor] | None = None
    pretext: dict[str, Tensor] | None = None
    task: dict[str, Tensor] | None = None
    previous: "Weights | None" = None
    teacher: "Weights | None" = None
    pixels: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        for part in ("backbone", "pretext"):  # the latter may have a teacher
            state = getattr(self, part)
            if state and len(merged := merge_lora(state)) < len(state):
                setattr(self, part, merged)


@dataclass
class Context:
    """Objects that all stages and hooks of a run share.

    Attributes:
        data: the data sets that were opened, by role: `pretext`, `train`, `val`, `test`.
        folder: the run directory; None outside of a run, as in an analysis. The rest belongs to it.
        stop: the request to stop that a signal makes.
        writers: destinations of the metrics.
        begin: start of this process's part of the run, as `time.monotonic`.
    """

    cfg: DictConfig
    data: dict[str, Dataset]
    device: torch.device
    folder: Path | None = None
    stop: StopRequest = field(default_factory=StopRequest)
    writers: Sequence[Writer] = ()
    checkpointer: Checkpointer | None = None
    begin: float = field(default_factory=time.monotonic)

    @property
    def classes(self) -> list[str]:
        """Names of the downstream classes, from the first labelled data set."""
        return self.data.get("train", self.data.get("test")).classes


class Hook:
    """Code that runs around the steps of a stage. `trainer` is set before `before_train` is called."""

    trainer: "Trainer"

    def before_train(self) -> None:
        """Run once, before the first step of this process."""

    def before_step(self) -> None:
        """Run before each step, with `trainer.step` steps done."""

    def after_step(self) -> None:
        """Run after each step, with `trainer.step` steps done and their metrics in `trainer.metrics`."""

    def after_train(self) -> None:
        """Run once, after the last step of this process."""


class Stage(ABC):
    """One stage of the pipeline: what it reads, how long it takes, and how its trainer is built.

    A custom stage is one file: subclass this, register the class with `@STAGES.register("name")`, and name the
    file in `train.imports` and the stage in `train.stages`.

    Attributes:
        name: also the name of its checkpoint folder.
        data_roles: sections of `dataloader` that it reads; `val` only if the config has it.
        optimizers: keys of `optimizer`, `lr_multiplier` and `clip_grad` that it reads.
        section, epoch_role: the config section with its `steps` or `epochs`, and the data set that makes an epoch.
        requires: parts of :class:`Weights` that must be trained before, each with the stage that trains a new one.
        provides: parts of :class:`Weights` that it leaves to later stages.
        follows: stages that must not come after it.
        unit: what one step of its trainer is.
        purpose: what the stage does, for the log, as in "train ...".
        label: the name in the results of a model that was fine-tuned from its weights; None keeps the one before.
        baseline_label: the name of a model that was fine-tuned from the weights which entered it, see
            `finetune.baseline`; None if there is no such comparison.
        evaluates: True if it trains a model that is evaluated on the test set and handed to no later stage.
        probed: the level whose pretext embedding `train.probe` measures; None for no probe.
        start: for a stage that evaluates: the label of the weights it starts from.
    """

    name: str
    data_roles: tuple[str, ...] = ()
    optimizers: tuple[str, ...] = ()
    section: str = ""
    epoch_role: str = "train"
    requires: Mapping[str, str] = {}
    provides: tuple[str, ...] = ()
    follows: tuple[str, ...] = ()
    unit: str = "step"
    purpose: str = ""
    label: str | None = None
    baseline_label: str | None = None
    evaluates: bool = False
    probed: str | None = None
    start: str | None = None

    def needs(self, context: Context) -> Mapping[str, str]:
        """Return `requires` for this config."""
        return self.requires

    def steps(self, context: Context) -> int:
        """Return the number of trainer steps; by default from `steps` or `epochs` of the stage's config section."""
        from bissl_zoo.engine.build import count_steps  # which imports this module

        loader, data = context.cfg.dataloader[self.epoch_role], context.data[self.epoch_role]
        return count_steps(OmegaConf.select(context.cfg, self.section), self.section, data, loader.batch_size)

    @abstractmethod
    def build(self, context: Context, weights: Weights, start_step: int = 0) -> "Trainer":
        """Return the trainer that starts from `weights`, with its data at step `start_step`."""

    def expand(self, context: Context, earlier: Sequence["Stage"]) -> list["Stage"]:
        """Return the stages that one entry of `train.stages` stands for, given the stages before it."""
        return [self]

    def check(self, context: Context, weights: Weights) -> None:  # noqa: B027
        """Check before the run starts what would otherwise fail when the stage is built; raise a `BisslZooError`."""

    def announce(self, context: Context, weights: Weights, stages: Sequence["Stage"]) -> None:  # noqa: B027
        """Log at the start of a run what a user should know about this stage."""

    def describe(self, context: Context) -> tuple[str, str]:
        """Return the length and the batch size as text, for the dry run."""
        return str(self.steps(context)), str(context.cfg.dataloader[self.epoch_role].batch_size)

    def weights_of(self, state: dict[str, Any]) -> Weights:
        """Return the weights in a checkpoint of the finished stage; `KeyError` if they are missing.

        The best weights (`best`) and the average that early versions had (`average`) come before the last ones.
        """
        source = state["levels"]["level"]
        if "best" in state:
            source = state["best"]["weights"]
        if "average" in state:
            source = {part: take(dict(state["average"]), f"{part}.") for part in ("backbone", "head")}
        return Weights(source["backbone"], **{"pretext" if "pretext" in self.provides else "task": source["head"]})


class Trainer(ABC):
    """The training loop of one stage: a number of steps with hooks around them.

    Attributes:
        name: of the stage, as in logs and checkpoints.
        step: steps done, of `total_steps`.
        metrics: metrics of the last step.
        records: metrics of finer grain than a step, numbered under `record_key`; those of the last step.
        timings: seconds by activity, such as `checkpoint`, since `train` was called.
        skipped: steps, of any level, that were undone because of NaN or Inf.
        bad: names of the samples that could not be decoded, of all processes, by level.
        ended: True if a hook has ended the stage before its last step.
        stopping: True if the run has been asked to stop; this step is the last one of this process.
        pending: True if a stop interrupted a hook: the remaining hooks of the step run first after the resume.
    """

    #: the metrics on the progress line
    headline: tuple[str, ...] = ("total_loss", "lr")
    #: further metrics on the lines of `--verbose`
    details: tuple[str, ...] = ()
    #: one sentence about the whole stage, for its end
    summary: str = ""
    #: the key that numbers `records`
    record_key: str = "record"

    def __init__(self, name: str, total_steps: int) -> None:
        self.name = name
        self.total_steps = total_steps
        self.step = 0
        self.metrics: dict[str, Any] = {}
        self.records: list[dict[str, Any]] = []
        self.timings: Counter[str] = Counter()
        self.skipped = 0
        self.bad: dict[str, list[str]] = {}
        self.ended = self.stopping = self.pending = False
        self.hooks: list[Hook] = []

    @property
    def done(self) -> bool:
        """True if no step remains."""
        return self.ended or self.step >= self.total_steps

    def train(self, hooks: Sequence[Hook] = (), stop: Callable[[], bool] = lambda: False) -> None:
        """Run from the current step to the last one, or to the first one after which `stop` returns True.

        Args:
            stop: called after each step on every rank; must return the same value on each.
        """
        self.hooks, self.timings = list(hooks), Counter()
        for hook in self.hooks:
            hook.trainer = self
            hook.before_train()
        if self.pending:
            self._after_step(stop)
        while not self.done and not self.stopping:
            for hook in self.hooks:
                hook.before_step()
            self.metrics = self.run_step()
            self.step += 1
            self._after_step(stop)
        for hook in self.hooks:
            hook.after_train()

    def _after_step(self, stop: Callable[[], bool]) -> None:
        self.pending, self.stopping = False, stop()
        for hook in self.hooks:
            hook.after_step()

    def postpone(self) -> None:
        """Stop after this step; a hook that was interrupted, and those after it, run first after the resume."""
        self.pending = self.stopping = True

    @abstractmethod
    def run_step(self) -> dict[str, Any]:
        """Do one step and return its metrics."""

    @abstractmethod
    def levels(self) -> dict[str, Level]:
        """Return the trained levels by their key in a checkpoint."""

    def result(self) -> Weights:
        """Return the weights that the stage leaves; by default none."""
        return Weights()

    def take_best(self) -> None:  # noqa: B027
        """Load the best weights, if the trainer remembers any."""

    def close(self) -> None:
        """End the loaders' workers; garbage collection of this trainer would wait for them."""
        for level in self.levels().values():
            level.data_iterator.close()

    def state_dict(self) -> dict[str, Any]:
        """Return all that a resumed run needs, as tensors and plain types."""
        pending = {"metrics": self.metrics, "records": self.records} if self.pending else None
        return {
            "step": self.step,
            "skipped": self.skipped,
            "ended": self.ended,
            "bad": self.bad,
            "pending": pending,
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
        """Continue where `state_dict` was called.

        Raises:
            CheckpointError: the state belongs to another architecture.
        """
        self.step = state["step"]
        self.skipped = state.get("skipped", 0)  # absent in checkpoints of early versions, as are the next three
        self.ended = state.get("ended", False)
        self.bad = state.get("bad", {})
        pending = state.get("pending", state.get("owed"))  # its name in checkpoints of early versions
        self.pending = pending is not None
        if pending:
            self.metrics, self.records = pending["metrics"], pending["records"]
        for name, level in self.levels().items():
            saved = state["levels"][name]
            load_state(level.backbone, saved["backbone"], f"{name} backbone")
            load_state(level.head, saved["head"], f"{name} head")
            level.optimizer.load_state_dict(saved["optimizer"])
            level.step = saved["step"]


class SingleLevelTrainer(Trainer):
    """Train one level by plain gradients, as pretraining, head warm-up and fine-tuning do.

    Args:
        accumulate: parts of a batch that pass through the networks one by one; their gradients are averaged.
    """

    def __init__(self, level: Level, accumulate: int = 1) -> None:
        super().__init__(level.name, level.total_steps)
        self.level = level
        self.accumulate = accumulate

    def run_step(self) -> dict[str, Any]:
        """Take one optimizer step, or none if the level's guard undoes it."""
        return self.level.attempt(self.take_step)

    def take_step(self) -> dict[str, Any]:
        """Take one optimizer step on the level's own loss and return its metrics."""
        level = self.level
        losses: dict[str, Tensor] = {}
        for part in split_samples(level.next_batch(), self.accumulate):
            total, terms = level.loss(level.backbone, part)
            (total / self.accumulate).backward()
            losses = {name: losses.get(name, 0.0) + value / self.accumulate for name, value in terms.items()}
        average_gradients(level.parameters)
        self.adjust_gradients()
        return level.optimize(losses)

    def adjust_gradients(self) -> None:
        """Change the gradients before the optimizer step; nothing by default."""

    def levels(self) -> dict[str, Level]:
        """Return the level under the key `level`."""
        return {"level": self.level}

    def result(self) -> Weights:
        """Return the backbone and the head, as weights of the downstream task."""
        return Weights(self.level.backbone.state_dict(), task=self.level.head.state_dict())


def load_state(module: nn.Module, state: dict[str, Tensor], what: str) -> None:
    """Load every tensor of `state` into `module`, or none.

    Raises:
        CheckpointError: with counts and examples of missing, unexpected and differently shaped tensors.
    """
    expected = module.state_dict()
    if state.keys() == without_factors(state).keys():  # the state of a backbone without LoRA fits one with it
        expected = without_factors(expected)
    if difference := state_difference(expected, state):
        raise CheckpointError(
            f"The {what} in the checkpoint belongs to another architecture: {difference}. "
            "Use the configuration that the checkpoint was made with, or another checkpoint."
        )
    module.load_state_dict(state)


def take(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Remove the entries whose key begins with `prefix` from `state` and return them without it."""
    return {key[len(prefix) :]: state.pop(key) for key in list(state) if key.startswith(prefix)}
