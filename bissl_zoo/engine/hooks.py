"""The hooks of a stage, in one list: progress, evaluation, early stopping, probe, checks, metrics, checkpoints."""

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bissl_zoo.config import instantiate
from bissl_zoo.data.samples import MAX_NAMED
from bissl_zoo.distributed import all_gather_objects, any_rank, is_main_process, on_main_process
from bissl_zoo.engine.build import Context
from bissl_zoo.engine.evaluate import evaluate, format_metrics
from bissl_zoo.engine.features import build_probe
from bissl_zoo.engine.health import Health
from bissl_zoo.engine.resume import random_state
from bissl_zoo.engine.trainer import Hook, Stage, Trainer
from bissl_zoo.errors import ConfigError, shorten
from bissl_zoo.files import DiskError, retried
from bissl_zoo.progress.console import clock, short
from bissl_zoo.progress.display import StageView, doing, every_step, show
from bissl_zoo.progress.writers import JsonWriter, Record, TensorBoardWriter, Writer
from bissl_zoo.runs.checkpoint import Checkpointer
from bissl_zoo.runs.directory import CONFIG_FILE

logger = logging.getLogger(__name__)

#: prefixes of metrics that are measured only after some steps
MEASURED = ("val/", "test/", "probe/")
#: the metric that counts images which could not be decoded so far
SKIPPED = "data/skipped"
#: seconds between attempts to write a checkpoint that the disk refuses, for one on the way and for the last one;
#: the other processes wait for less than their communication's timeout
PAUSES, LAST_PAUSES = (2.0,), (1.0, 2.0, 4.0, 8.0, 16.0, 30.0)


def default_hooks(stage: Stage, context: Context) -> list[Hook]:
    """Return the hooks of a stage in the order in which they run; those of `train.hooks` come before the writer."""
    cfg, finetune = context.cfg, context.cfg.finetune
    role = "val" if "val" in context.data else "test"
    hooks = [
        Progress(cfg.train.log_period),
        PeriodicEvaluation(partial(_evaluate, context, role), finetune.eval_period, role)
        if stage.evaluates and finetune.eval_period
        else None,
        EarlyStopping(**finetune.early_stopping) if stage.evaluates and finetune.early_stopping.metric else None,
        SolverWatch(context.folder / CONFIG_FILE) if stage.unit == "alternation" else None,
        build_probe(context, stage),
        Health(cfg),
        UndecodableImages(context),
        *custom_hooks(context),
        # an alternation is many optimizer steps, and there are few of them
        MetricsWriter(context.folder, 1 if stage.unit == "alternation" else cfg.train.log_period, context.writers),
        PeriodicCheckpoint(context.checkpointer, cfg.train.checkpoint.period, cfg.backbone.name, context.device),
    ]
    return [hook for hook in hooks if hook is not None]


def custom_hooks(context: Context) -> list[Hook]:
    """Return new hooks of `train.hooks`, a list of described calls such as `L(MyHook)(period=10)`.

    Raises:
        ConfigError: an entry is not a described call, or does not make a :class:`Hook`.
    """
    hooks = [instantiate(call) for call in context.cfg.train.hooks or []]
    for number, hook in enumerate(hooks):
        if not isinstance(hook, Hook):
            raise ConfigError(
                f"train.hooks[{number}] makes {type(hook).__name__}, not a Hook. Describe a call of a subclass of "
                "bissl_zoo.engine.trainer.Hook, as in train.hooks=[L(MyHook)(period=10)]."
            )
    return hooks


def _evaluate(context: Context, role: str, trainer: Trainer) -> dict[str, float] | None:
    level = trainer.levels()["level"]
    return evaluate(context, level.backbone, level.head, role, context.stop.asked)


@contextmanager
def timed(trainer: Trainer, activity: str) -> Iterator[None]:
    """Add the seconds that the context lasts to the trainer's `timings`."""
    start = time.perf_counter()
    try:
        yield
    finally:
        trainer.timings[activity] += time.perf_counter() - start


class Progress(Hook):
    """Log losses, speed and ETA every `period` steps, at the first, at the last, and after `silence` seconds.

    Images per second over all processes and the share of the time that this one waited for data are averages since the
    previous line. With the seconds per step since the start they join the metrics as `speed/...`. A live display reads
    the same numbers at any time.
    """

    def __init__(self, period: int, silence: float = 20.0) -> None:
        self.period = period
        self.silence = silence

    def before_train(self) -> None:
        """Start the clock and show the stage."""
        self.start_time, self.start_step = time.perf_counter(), self.trainer.step
        self.line_time, self.counts = self.start_time, self._counts()
        self.seconds: float | None = None
        self.step_time, self.speed = self.start_time, {}
        show(source=self.view)

    def after_step(self) -> None:
        """Log the line if it is due."""
        trainer = self.trainer
        done, now = trainer.step - self.start_step, time.perf_counter()
        if not done:  # pending hooks of a step that an earlier process has logged
            return
        self.seconds, self.step_time = (now - self.start_time) / done, now
        due = done == 1 or trainer.step % self.period == 0 or trainer.done or every_step()
        if not due and now - self.line_time < self.silence:
            return
        self.speed = speed = self._speed(now)
        measured = {"seconds_per_step": self.seconds, **speed}
        trainer.metrics.update({f"speed/{name}": value for name, value in measured.items()})
        eta = clock(self.seconds * (trainer.total_steps - trainer.step))
        keys = [*trainer.headline, *(trainer.details if every_step() else ())]
        values = "  ".join(f"{key} {short(trainer.metrics[key])}" for key in keys if key in trainer.metrics)
        width = len(str(trainer.total_steps))
        rate = "  {images_per_second:.0f} images/s  {waiting:.0%} waiting for data".format(**speed) if speed else ""
        head = f"[{trainer.name} {trainer.step:{width}d}/{trainer.total_steps}]"
        logger.info(f"{head} {values}  {self.seconds:.2f} s/step{rate}  ETA {eta}", extra={"progress": True})

    def after_train(self) -> None:
        """Leave the display the last state, without references to the networks."""
        last = self.view()
        show(source=lambda: last)

    def view(self) -> StageView:
        """Return the current state of the stage; another thread may call this in the middle of a step."""
        trainer = self.trainer
        left = None
        if self.seconds is not None:
            elapsed = time.perf_counter() - self.step_time
            left = max(0.0, self.seconds * (trainer.total_steps - trainer.step) - elapsed)
        return StageView(
            trainer.name,
            trainer.step,
            trainer.total_steps,
            levels=tuple(trainer.levels()),
            metrics=dict(trainer.metrics),
            speed=self.speed,
            seconds=self.seconds,
            left=0.0 if trainer.done else left,
        )

    def _counts(self) -> tuple[int, float]:
        levels = self.trainer.levels().values()
        return sum(level.images for level in levels), sum(level.data_time for level in levels)

    def _speed(self, now: float) -> dict[str, float]:
        """Return the averages since the previous line; empty if no images were counted."""
        (images, data_time), (images_before, data_time_before) = self._counts(), self.counts
        seconds, self.line_time, self.counts = now - self.line_time, now, (images, data_time)
        if images == images_before or not seconds:
            return {}
        return {
            "images_per_second": (images - images_before) / seconds,
            "waiting": (data_time - data_time_before) / seconds,
        }


class PeriodicEvaluation(Hook):
    """Evaluate every `period` steps; metrics are added as `<role>/...`, the duration as `time/evaluation`.

    Args:
        evaluate: called with the trainer; None as a result means that the run was asked to stop meanwhile.
        role: the data set: `val`, which is evaluated after the last step too, or `test`, which the run evaluates then.
    """

    def __init__(self, evaluate: Callable[[Trainer], dict[str, float] | None], period: int, role: str = "test") -> None:
        self.evaluate, self.period, self.role = evaluate, period, role

    def after_step(self) -> None:
        """Evaluate if it is due; runs before the writer, so that the metrics belong to this step."""
        trainer = self.trainer
        last = trainer.step == trainer.total_steps
        if not (self.role == "val" if last else trainer.step % self.period == 0):
            return
        start = time.perf_counter()
        with doing(f"evaluating on {self.role}"), timed(trainer, "evaluation"):
            results = self.evaluate(trainer)
        if results is None:
            return trainer.postpone()
        trainer.metrics.update({f"{self.role}/{name}": value for name, value in results.items()})
        trainer.metrics["time/evaluation"] = time.perf_counter() - start
        line = f"[{trainer.name} {trainer.step}/{trainer.total_steps}] {self.role}  {format_metrics(results)}"
        logger.info(line)
        show(evaluation=line)


class EarlyStopping(Hook):
    """Remember the weights with the highest `val/<metric>`, the first ones of equal values, and end the stage early.

    The best weights are part of the trainer's state, so a resumed run decides like an uninterrupted one.

    Args:
        patience: evaluations without improvement after which the stage ends; None for never.
    """

    def __init__(self, metric: str, patience: int | None) -> None:
        self.metric, self.patience = f"val/{metric}", patience

    def after_step(self) -> None:
        """Compare after an evaluation; runs before the writer and the checkpoint."""
        trainer = self.trainer
        value = trainer.metrics.get(self.metric)
        if value is None:
            return
        best = trainer.best
        if best is None or value > best["value"]:
            trainer.remember(value)
            return
        best["since"] += 1
        if self.patience and best["since"] >= self.patience and not trainer.done:
            trainer.ended = True
            logger.info(
                f"[{trainer.name} {trainer.step}/{trainer.total_steps}] early stopping: {self.metric} was best at step "
                f"{best['step']} ({best['value']:.4f}), without improvement in {best['since']} evaluations since"
            )


class SolverWatch(Hook):
    """Warn once if more than half of the last `window` upper steps had an unsolved linear system.

    Args:
        config: of the run, for the suggested command.
        window: upper steps that are judged together.
    """

    #: statuses of a solve that is no reason to warn
    FINE = ("converged", "not_solved")

    def __init__(self, config: Path, window: int = 24) -> None:
        self.config, self.warned = config, False
        self.recent: deque[dict[str, Any]] = deque(maxlen=window)

    def after_step(self) -> None:
        """Check the upper steps of this alternation."""
        for record in self.trainer.records:
            self.recent.append(record)
            failed = Counter(step["solver/status"] for step in self.recent if step["solver/status"] not in self.FINE)
            if self.warned or len(self.recent) < self.recent.maxlen or 2 * failed.total() <= len(self.recent):
                continue
            self.warned = True
            statuses = ", ".join(f"{status} {count}" for status, count in failed.most_common())
            logger.warning(
                f"{failed.total()} of the last {len(self.recent)} solves for the hypergradient failed ({statuses}; "
                f"damping {record['solver/damping']:.4g}), so it is inaccurate. Raise solver.iterations or "
                "solver.damping, or set solver.damping=auto; to compare solvers run "
                f"bissl check --config-file {self.config}."
            )

    def after_train(self) -> None:
        """Log what the hypergradients of the stage were."""
        if self.trainer.done and self.trainer.summary:
            logger.info(self.trainer.summary)


class UndecodableImages(Hook):
    """Collect the names of training images that could not be decoded, of all processes; their number is a metric.

    They are part of the trainer's state, so a resumed stage knows all of them. The last line of a stage names some.
    """

    def __init__(self, context: Context) -> None:
        self.context = context

    def after_step(self) -> None:
        """Gather new names; runs before the writer."""
        trainer = self.trainer
        new = {name: self._new(name) for name in trainer.levels()}
        if any_rank(any(new.values()), self.context.device):
            for part in all_gather_objects(new):
                for name, images in part.items():
                    known = trainer.bad.setdefault(name, [])
                    known += [image for image in images if image not in known]
        count = sum(map(len, trainer.bad.values()))
        if count:
            trainer.metrics[SKIPPED] = count

    def after_train(self) -> None:
        """Log the number of images and the names of some."""
        for name, images in self.trainer.bad.items():
            role = self.trainer.levels()[name].data_iterator.role
            logger.warning(
                f"[{self.trainer.name}] {len(images)} of {len(self.context.data[role])} images of dataloader.{role} "
                f"could not be decoded and were replaced by others: {shorten(images, MAX_NAMED)}"
            )

    def _new(self, name: str) -> list[str]:
        bad, known = getattr(self.trainer.levels()[name].data_iterator, "bad", {}), self.trainer.bad.get(name, ())
        return [image for image in bad if image not in known]


class MetricsWriter(Hook):
    """Pass the metrics to the writers every `period` steps, and records of finer grain at every step.

    Such a record, as of an upper step, has its own number. Steps with an evaluation are written whatever the period.
    The last record of a stage in this process has no metrics but `event`, which is `stage_end` or `interrupted`, and
    `seconds` by activity, `total` included.

    Args:
        writers: of the run; by default `metrics.jsonl` and TensorBoard in `folder`.
    """

    def __init__(self, folder: Path, period: int, writers: Sequence[Writer] = ()) -> None:
        self.period = period
        self.writers = writers or [JsonWriter(folder, period), TensorBoardWriter(folder)]

    def before_train(self) -> None:
        """Let the writers drop records that an earlier process wrote for steps after this one."""
        self.start = time.perf_counter()
        on_main_process(self._begin)

    def _begin(self) -> None:
        for writer in self.writers:
            writer.begin(self.trainer.name, self.trainer.step)

    def after_step(self) -> None:
        """Write what is due; runs before the checkpoint of this step."""
        trainer = self.trainer
        if trainer.pending or not is_main_process():
            return
        records = [Record(trainer.name, trainer.step, record, trainer.record_key) for record in trainer.records]
        measured = any(name.startswith(MEASURED) for name in trainer.metrics)
        if measured or trainer.step % self.period == 0 or trainer.done:
            records.append(Record(trainer.name, trainer.step, trainer.metrics))
        for writer in self.writers:
            writer.write(records, trainer.step)

    def after_train(self) -> None:
        """Write the durations, flush buffered records and close the writers."""
        if not is_main_process():
            return
        trainer = self.trainer
        seconds = {"total": time.perf_counter() - self.start, **trainer.timings}
        seconds["data"] = sum(level.data_time for level in trainer.levels().values())
        summary = {
            "event": "stage_end" if trainer.done and not trainer.pending else "interrupted",
            "seconds": {name: round(value, 3) for name, value in seconds.items()},
            **({"summary": trainer.summary} if trainer.summary else {}),
        }
        for writer in self.writers:
            writer.write([Record(trainer.name, trainer.step, summary)], trainer.step)
            writer.end()


class PeriodicCheckpoint(Hook):
    """Save the trainer's state and all random states: every `period` steps, at the last one, and when stopping.

    If the disk refuses a checkpoint on the way, the run continues with a warning, and the next one is due a period
    later. The last one of a stage and the one when stopping are retried for about a minute, then the run ends.
    """

    def __init__(self, checkpointer: Checkpointer, period: int, architecture: str, device: torch.device) -> None:
        self.checkpointer = checkpointer
        self.period = period
        self.architecture = architecture
        self.device = device

    def before_train(self) -> None:
        """Start the clock."""
        self.start, self.count = time.perf_counter(), 0

    def after_step(self) -> None:
        """Save if it is due."""
        trainer = self.trainer
        if trainer.step % self.period == 0 or trainer.done or trainer.stopping:
            with timed(trainer, "checkpoint"), doing("writing a checkpoint"):
                random_states = all_gather_objects(random_state(self.device))
                on_main_process(lambda: self._save(random_states))  # its error ends every process
            self.count += 1

    def after_train(self) -> None:
        """Log the time that checkpoints took."""
        seconds = self.trainer.timings["checkpoint"]
        share = seconds / max(time.perf_counter() - self.start, 1e-9)
        logger.info(
            f"[{self.trainer.name}] checkpoints: {self.count}, {seconds:.1f} s, {share:.1%} of the stage's time"
        )

    def _save(self, random_states: list[dict[str, Any]]) -> None:
        trainer = self.trainer
        measured = {
            name: value
            for name, value in trainer.metrics.items()
            if name.startswith(MEASURED) and isinstance(value, (int, float))
        }
        state = {**trainer.state_dict(), "random": random_states}
        position = (trainer.name, trainer.step, trainer.total_steps, self.architecture)
        save = partial(self.checkpointer.save, *position, state, measured, trainer.ended)
        if trainer.done or trainer.stopping:
            retried(save, LAST_PAUSES, lambda error, pause: self._warn(error, f"Trying again in {pause:g} s."))
        else:
            try:
                retried(save, PAUSES)
            except DiskError as error:
                last = self.checkpointer.newest_step(trainer.name)
                existing = f"there is none of {trainer.name} yet" if last is None else f"the last one is step {last}"
                return self._warn(error, f"The run continues; {existing}.")
        show(checkpoint=f"{trainer.name} step {trainer.step}, {time.strftime('%H:%M:%S')}")

    def _warn(self, error: DiskError, then: str) -> None:
        name = self.trainer.name
        logger.warning(
            f"checkpoint of {name} at step {self.trainer.step} could not be written to "
            f"{self.checkpointer.folder / name}: {error.reason}. {then}"
        )
