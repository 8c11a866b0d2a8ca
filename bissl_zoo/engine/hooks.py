"""Hooks: progress, metrics, checkpoints, evaluation."""

import logging
import statistics
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bissl_zoo.data.samples import MAX_NAMED
from bissl_zoo.distributed import all_gather_objects, any_rank, is_main_process, on_main_process
from bissl_zoo.engine.build import Context
from bissl_zoo.engine.randomness import random_state
from bissl_zoo.engine.trainer import HookBase
from bissl_zoo.progress.console import clock, short
from bissl_zoo.progress.display import doing, every_step, show
from bissl_zoo.progress.file_writers import JsonWriter, Record, TensorBoardWriter, Writer
from bissl_zoo.progress.run_view import StageView, place_within
from bissl_zoo.runs.checkpoint import Checkpointer
from bissl_zoo.runs.disk import DiskError, retried

logger = logging.getLogger(__name__)

#: how the names of figures begin that are measured now and then, after a step
MEASURED = ("val/", "test/", "probe/")
#: seconds between tries of a checkpoint that the disk refuses: of one on the way, and of one that the run ends without;
#: the other processes wait meanwhile, for less than their communication waits by default
PAUSES, LAST_PAUSES = (2.0,), (1.0, 2.0, 4.0, 8.0, 16.0, 30.0)


class Progress(HookBase):
    """A line with losses, speed and ETA: every `period` steps, the first, the last, and after `silence` seconds.

    Images per second over all processes, and the share of the time that this one waited for data, are those since the
    line before; with the seconds per step since the start they join the metrics as `speed/...`. A live display asks
    for the same at any time.
    """

    def __init__(self, period: int, silence: float = 20.0) -> None:
        self.period = period
        self.silence = silence

    def before_train(self) -> None:
        """Start the clock, and show the stage."""
        self.start_time, self.start_step = time.perf_counter(), self.trainer.step
        self.spoke, self.taken = self.start_time, self._taken()
        self.seconds: float | None = None
        self.stepped, self.speed = self.start_time, {}
        show(source=self.view)

    def after_step(self) -> None:
        """Print the line when it is due."""
        trainer = self.trainer
        done, now = trainer.step - self.start_step, time.perf_counter()
        if not done:  # what an earlier part of the run owed of a step that it told of
            return
        self.seconds, self.stepped = (now - self.start_time) / done, now
        due = done == 1 or trainer.step % self.period == 0 or trainer.done or every_step()
        if not due and now - self.spoke < self.silence:
            return
        self.speed = speed = self._speed(now)
        told = {"seconds_per_step": self.seconds, **speed}
        trainer.metrics.update({f"speed/{name}": value for name, value in told.items()})
        eta = clock(self.seconds * (trainer.total_steps - trainer.step))
        shown = "  ".join(f"{key} {short(trainer.metrics[key])}" for key in trainer.headline if key in trainer.metrics)
        width = len(str(trainer.total_steps))
        rate = "  {images_per_second:.0f} images/s  {waiting:.0%} waiting for data".format(**speed) if speed else ""
        head = f"[{trainer.name} {trainer.step:{width}d}/{trainer.total_steps}]"
        logger.info(f"{head} {shown}  {self.seconds:.2f} s/step{rate}  ETA {eta}", extra={"progress": True})

    def after_train(self) -> None:
        """Leave the display what it needs, without the networks."""
        last = self.view()
        show(source=lambda: last)

    def view(self) -> StageView:
        """The stage as it stands, also in the middle of a step; another thread may ask."""
        trainer = self.trainer
        phase, within = place_within(trainer)
        left = None
        if self.seconds is not None:
            under_way = time.perf_counter() - self.stepped
            left = max(0.0, self.seconds * (trainer.total_steps - trainer.step) - under_way)
        return StageView(
            trainer.name,
            trainer.step,
            trainer.total_steps,
            phase,
            fraction=(trainer.step + within) / max(trainer.total_steps, 1),
            levels=tuple(trainer.levels()),
            figures=dict(trainer.metrics),
            speed=self.speed,
            seconds=self.seconds,
            left=0.0 if trainer.done else left,
        )

    def _taken(self) -> tuple[int, float]:
        levels = self.trainer.levels().values()
        return sum(level.images for level in levels), sum(level.data_time for level in levels)

    def _speed(self, now: float) -> dict[str, float]:
        """Since the line before, which this begins anew; nothing where no images were counted."""
        (images, waited), (images_before, waited_before), seconds = self._taken(), self.taken, now - self.spoke
        self.spoke, self.taken = now, (images, waited)
        if images == images_before or not seconds:
            return {}
        return {"images_per_second": (images - images_before) / seconds, "waiting": (waited - waited_before) / seconds}


class MetricsWriter(HookBase):
    """Hands the metrics to the writers every `period` steps; records of finer grain are handed over at every step.

    Such a record, as of an upper step, stands by itself under its own number. Steps after which something was measured
    are written whatever the period.

    Args:
        writers: of the run; by default `metrics.jsonl` and TensorBoard in `folder`.
    """

    def __init__(self, folder: Path, period: int, writers: Sequence[Writer] | None = None) -> None:
        self.period = period
        self.writers = [JsonWriter(folder, period), TensorBoardWriter(folder)] if writers is None else writers

    def before_train(self) -> None:
        """Have the writers forget what an earlier part of the run wrote of steps to come."""
        on_main_process(self._begin)

    def _begin(self) -> None:
        for writer in self.writers:
            writer.begin(self.trainer.name, self.trainer.step)

    def after_step(self) -> None:
        """Write what is due; placed before the checkpoint of this step, which counts on these lines."""
        trainer = self.trainer
        if trainer.owed or not is_main_process():
            return
        records = [Record(trainer.name, trainer.step, figures, trainer.record_key) for figures in trainer.records]
        measured = any(name.startswith(MEASURED) for name in trainer.metrics)
        if measured or trainer.step % self.period == 0 or trainer.done:
            records.append(Record(trainer.name, trainer.step, trainer.metrics))
        for writer in self.writers:
            writer.write(records, trainer.step)

    def after_train(self) -> None:
        """Write what waits."""
        for writer in self.writers if is_main_process() else ():
            writer.end()


class PeriodicCheckpoint(HookBase):
    """Save the trainer's state and every process's random state: every `period` steps, at the last, and on stopping.

    Where the disk refuses one on the way, the run goes on with a warning, and the next is due a period later; the last
    of a stage and the one on stopping are tried for about a minute, and end the run if that is in vain. A last line
    tells what time the stage has lost to them.
    """

    def __init__(self, checkpointer: Checkpointer, period: int, architecture: str, device: torch.device) -> None:
        self.checkpointer = checkpointer
        self.period = period
        self.architecture = architecture
        self.device = device

    def before_train(self) -> None:
        """Start the clock."""
        self.began, self.count, self.seconds = time.perf_counter(), 0, 0.0

    def after_step(self) -> None:
        """Save when it is due."""
        trainer = self.trainer
        if trainer.step % self.period == 0 or trainer.done or trainer.stopping:
            start = time.perf_counter()
            randomness = all_gather_objects(random_state(self.device))
            with doing("writing a checkpoint"):  # what fails there ends every process with the same message
                on_main_process(lambda: self._save(randomness))
            self.count, self.seconds = self.count + 1, self.seconds + time.perf_counter() - start

    def after_train(self) -> None:
        """Tell what the checkpoints cost."""
        share = self.seconds / max(time.perf_counter() - self.began, 1e-9)
        logger.info(
            f"[{self.trainer.name}] checkpoints: {self.count}, {self.seconds:.1f} s, {share:.1%} of the stage's time"
        )

    def _save(self, randomness: list[dict[str, Any]]) -> None:
        trainer = self.trainer
        measured = {
            name: value
            for name, value in trainer.metrics.items()
            if name.startswith(MEASURED) and isinstance(value, (int, float))
        }
        state = {**trainer.state_dict(), "random": randomness}
        place = (trainer.name, trainer.step, trainer.total_steps, self.architecture)
        save = partial(self.checkpointer.save, *place, state, measured, trainer.ended)
        if trainer.done or trainer.stopping:
            retried(save, LAST_PAUSES, lambda error, pause: self._warn(error, f"Trying again in {pause:g} s."))
        else:
            try:
                retried(save, PAUSES)
            except DiskError as error:
                last = self.checkpointer.newest_step(trainer.name)
                there = f"there is none of {trainer.name} yet" if last is None else f"the last one is step {last}"
                return self._warn(error, f"The run goes on; {there}.")
        show(checkpoint=(f"{trainer.name} step {trainer.step}", time.monotonic()))

    def _warn(self, error: DiskError, then: str) -> None:
        name = self.trainer.name
        logger.warning(
            f"checkpoint of {name} at step {self.trainer.step} could not be written to "
            f"{self.checkpointer.folder / name}: {error.reason}. {then}"
        )


class PeriodicEvaluation(HookBase):
    """Evaluate every `period` steps; the figures join the metrics as `<role>/...`, its seconds as `time/evaluation`.

    Args:
        evaluate: gives None where the run was asked to stop meanwhile.
        role: of the data set: `val`, which is looked at after the last step too, or `test`, as the run does itself.
    """

    def __init__(self, evaluate: Callable[[], dict[str, float] | None], period: int, role: str = "test") -> None:
        self.evaluate, self.period, self.role = evaluate, period, role

    def after_step(self) -> None:
        """Evaluate when it is due; placed before the writer, so that the figures are written with this step."""
        trainer = self.trainer
        last = trainer.step == trainer.total_steps
        if not (self.role == "val" if last else trainer.step % self.period == 0):
            return
        start = time.perf_counter()
        with doing(f"evaluating on {self.role}"):
            results = self.evaluate()
        if results is None:
            return trainer.postpone()
        trainer.metrics.update({f"{self.role}/{name}": value for name, value in results.items()})
        trainer.metrics["time/evaluation"] = time.perf_counter() - start
        line = f"[{trainer.name} {trainer.step}/{trainer.total_steps}] {self.role}  {format_results(results)}"
        logger.info(line)
        show(evaluation=line)


def format_results(results: dict[str, Any]) -> str:
    """Figures on one line, those of single classes left out."""
    shown = {name: value if isinstance(value, int) else f"{value:.4f}" for name, value in results.items()}
    return "  ".join(f"{name} {value}" for name, value in shown.items() if "/" not in name)


class EarlyStopping(HookBase):
    """Keep the weights of the highest `val/<metric>`; those of equal height that came first.

    What is remembered is part of the trainer's state, so that a resumed run decides as one that was not interrupted.

    Args:
        patience: evaluations without a better one after which the stage ends; None to go on to its last step.
    """

    def __init__(self, metric: str, patience: int | None) -> None:
        self.metric, self.patience = f"val/{metric}", patience

    def after_step(self) -> None:
        """Compare where there was an evaluation; placed after it, and before the writer and the checkpoint."""
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
                f"[{trainer.name} {trainer.step}/{trainer.total_steps}] {self.metric} was best at step {best['step']} "
                f"({best['value']:.4f}) and no better at {best['since']} evaluations since: the stage ends"
            )


#: how a solve may end without a word: solved, or by a solver that solves nothing
FINE = ("converged", "not_solved")


class SolverWatch(HookBase):
    """One warning, as soon as more than half of the last `window` upper steps ended with an unsolved system.

    Args:
        config: of the run, for the command that tells more.
        window: upper steps looked at; fewer are not judged.
    """

    def __init__(self, config: Path, window: int = 24) -> None:
        self.config = config
        self.window = window
        self.recent: deque[dict[str, Any]] = deque(maxlen=window)
        self.warned = False

    def after_step(self) -> None:
        """Look at the upper steps of this alternation."""
        for record in self.trainer.records:
            self.recent.append(record)
            failed = [step for step in self.recent if step["solver/status"] not in FINE]
            if not self.warned and len(self.recent) == self.window and 2 * len(failed) > self.window:
                self.warned = True
                logger.warning(self._warning(failed))

    def _warning(self, failed: list[dict[str, Any]]) -> str:
        statuses = Counter(step["solver/status"] for step in failed).most_common()
        residuals = [step["solver/residual"] for step in self.recent if "solver/residual" in step]
        figures = [f"{status} {count}" for status, count in statuses]
        if residuals:
            figures.append(f"median residual {statistics.median(residuals):.2g}")
        figures.append(f"damping {self.recent[-1]['solver/damping']:.4g}")
        return (
            f"{len(failed)} of the last {self.window} solves for the hypergradient failed "
            f"({', '.join(figures)}), so its curvature term is not what it should be. Raise solver.iterations or "
            "solver.damping, or set solver.damping=auto; "
            f"python tools/check_hypergradient.py --config-file {self.config} tells which."
        )


#: the metric: how many a stage has met so far
SKIPPED = "data/skipped"
#: the levels that read the pretext set; all others read `train`
_PRETEXT_LEVELS = ("pretrain", "pretext_warmup", "lower")


class BadImages(HookBase):
    """Keeps the names of the images that training could not use, of all processes; their number joins the metrics.

    They are part of the trainer's state, so that a resumed stage tells of all of them. The last line of a stage names
    the first of them.
    """

    def __init__(self, context: Context) -> None:
        self.context = context

    def after_step(self) -> None:
        """Gather what is new; placed before the writer."""
        trainer = self.trainer
        new = {name: self._new(name) for name in trainer.levels()}
        if any_rank(any(new.values()), self.context.device):
            for part in all_gather_objects(new):
                for name, found in part.items():
                    known = trainer.bad.setdefault(name, [])
                    known += [one for one in found if one not in known]
        count = sum(map(len, trainer.bad.values()))
        if count:
            trainer.metrics[SKIPPED] = count

    def after_train(self) -> None:
        """Tell of the stage's."""
        for name, found in self.trainer.bad.items():
            role = "pretext" if self.trainer.levels()[name].name in _PRETEXT_LEVELS else "train"
            more = f" and {len(found) - MAX_NAMED} more" if len(found) > MAX_NAMED else ""
            logger.warning(
                f"[{self.trainer.name}] data: {len(found)} of {len(self.context.data[role])} images of {role} "
                f"could not be read and were replaced: {', '.join(found[:MAX_NAMED])}{more}"
            )

    def _new(self, name: str) -> list[str]:
        bad, known = getattr(self.trainer.levels()[name].data_iterator, "bad", {}), self.trainer.bad.get(name, ())
        return [one for one in bad if one not in known]
