"""Hooks: progress, metrics, checkpoints, evaluation."""

import datetime
import json
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bissl_zoo.distributed import all_gather_objects, is_main_process, on_main_process
from bissl_zoo.engine.checkpoint import Checkpointer
from bissl_zoo.engine.disk import DISK_ERRORS, DiskError, reason_of, retried
from bissl_zoo.engine.log_files import AppendedFile, EventFile, drop_lines_after
from bissl_zoo.engine.randomness import random_state
from bissl_zoo.engine.trainer import HookBase

#: how the names of figures begin that are measured now and then, after a step
MEASURED = ("val/", "test/", "probe/")
METRICS_FILE = "metrics.jsonl"
#: seconds between tries of a checkpoint that the disk refuses: of one on the way, and of one that the run ends without;
#: the other processes wait meanwhile, for less than their communication waits by default
PAUSES, LAST_PAUSES = (2.0,), (1.0, 2.0, 4.0, 8.0, 16.0, 30.0)


def say(line: str) -> None:
    """Print a line at once, from the main process only."""
    if not is_main_process():
        return
    try:
        print(line, flush=True)
    except OSError as error:  # the output goes to a file on a full disk: a line less, and the run goes on
        if error.errno not in DISK_ERRORS:
            raise


class Progress(HookBase):
    """A line with losses, speed and ETA: every `period` steps, the first, the last, and after `silence` seconds.

    Images per second over all processes, and the share of the time that this one waited for data, are those since the
    line before; they join the metrics as `speed/...`.
    """

    def __init__(self, period: int, silence: float = 20.0) -> None:
        self.period = period
        self.silence = silence

    def before_train(self) -> None:
        """Start the clock."""
        self.start_time, self.start_step = time.perf_counter(), self.trainer.step
        self.spoke, self.taken = self.start_time, self._taken()

    def after_step(self) -> None:
        """Print the line when it is due."""
        trainer = self.trainer
        done, now = trainer.step - self.start_step, time.perf_counter()
        if not done:  # what an earlier part of the run owed of a step that it told of
            return
        due = done == 1 or trainer.step % self.period == 0 or trainer.done
        if not due and now - self.spoke < self.silence:
            return
        speed = self._speed(now)
        trainer.metrics.update({f"speed/{name}": value for name, value in speed.items()})
        seconds = (now - self.start_time) / done
        eta = datetime.timedelta(seconds=round(seconds * (trainer.total_steps - trainer.step)))
        shown = "  ".join(f"{key} {_short(trainer.metrics[key])}" for key in trainer.headline if key in trainer.metrics)
        width = len(str(trainer.total_steps))
        rate = "  {images_per_second:.0f} images/s  {waiting:.0%} waiting for data".format(**speed) if speed else ""
        head = f"[{trainer.name} {trainer.step:{width}d}/{trainer.total_steps}]"
        say(f"{head} {shown}  {seconds:.2f} s/step{rate}  ETA {eta}")

    def _taken(self) -> tuple[int, float]:
        levels = self.trainer.levels().values()
        return sum(level.images for level in levels), sum(level.waited for level in levels)

    def _speed(self, now: float) -> dict[str, float]:
        """Since the line before, which this begins anew; nothing where no images were counted."""
        (images, waited), (images_before, waited_before), seconds = self._taken(), self.taken, now - self.spoke
        self.spoke, self.taken = now, (images, waited)
        if images == images_before or not seconds:
            return {}
        return {"images_per_second": (images - images_before) / seconds, "waiting": (waited - waited_before) / seconds}


class MetricsWriter(HookBase):
    """Every `period` steps, one line of `metrics.jsonl` and the same figures in TensorBoard; finer records all.

    Such a record, as of an upper step, has a line of its own with its number, and is in TensorBoard at that number.
    Steps after which something was measured are written whatever the period. Lines that an earlier part of the run
    wrote of steps that are taken again are dropped, so that each step is there once. What a full or failing disk
    refuses waits in memory for the next step, and a warning says so.
    """

    def __init__(self, folder: Path, period: int) -> None:
        self.folder = Path(folder)
        self.period = period

    def before_train(self) -> None:
        """Drop lines of steps to come, and name the files."""
        path = self.folder / METRICS_FILE
        on_main_process(lambda: drop_lines_after(path, self.trainer.name, self.trainer.step))
        self.lines, self.board = AppendedFile(path), EventFile(self.folder / "tensorboard")
        self.warned: dict[AppendedFile, int] = {}

    def after_step(self) -> None:
        """Write what is due, and what waits."""
        trainer = self.trainer
        if trainer.owed or not is_main_process():
            return
        records = list(trainer.records)
        shown = [
            (_scalars(f"{trainer.name}/{trainer.record_key}", record, trainer.record_key), record[trainer.record_key])
            for record in records
        ]
        measured = any(name.startswith(MEASURED) for name in trainer.metrics)
        if measured or trainer.step % self.period == 0 or trainer.done:
            records.append(trainer.metrics)
            shown.append((_scalars(trainer.name, trainer.metrics), trainer.step))
        head = {"stage": trainer.name, "step": trainer.step, "time": time.time()}
        lines = [(json.dumps({**head, **_jsonable(record)}) + "\n").encode() for record in records]
        if lines or self.lines.waiting:  # before the checkpoint of this step, which counts on these lines
            self._write(self.lines, partial(self.lines.append, lines))
        if shown or self.board.waiting:
            self._write(self.board, partial(self.board.append_scalars, shown))

    def _write(self, file: AppendedFile, write: Callable[[], None]) -> None:
        """Write, or warn where that fails: once a period of the metrics, and once of TensorBoard's file."""
        try:
            write()
        except OSError as error:
            step, before = self.trainer.step, self.warned.get(file)
            if before is None or (file is self.lines and step - before >= self.period):
                self.warned[file] = step
                say(
                    f"warning: {file.path} could not be written: {_reason(error, file)}. The run goes on; entries that "
                    f"wait in memory for the next write: {len(file.waiting)}."
                )

    def after_train(self) -> None:
        """Write what waits, and tell what is lost."""
        for file in (self.lines, self.board) if is_main_process() else ():
            reason = f"more than {file.waiting.maxlen} had to wait"
            try:
                if file.waiting:
                    file.append()
            except OSError as error:
                file.lost += len(file.waiting)
                reason = _reason(error, file)
            if file.lost:
                say(f"warning: entries of {file.path} that are lost: {file.lost}. {reason[0].upper()}{reason[1:]}.")


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
            on_main_process(lambda: self._save(randomness))  # what fails there ends every process with the same message
            self.count, self.seconds = self.count + 1, self.seconds + time.perf_counter() - start

    def after_train(self) -> None:
        """Tell what the checkpoints cost."""
        share = self.seconds / max(time.perf_counter() - self.began, 1e-9)
        say(f"[{self.trainer.name}] checkpoints: {self.count}, {self.seconds:.1f} s, {share:.1%} of the stage's time")

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
            return
        try:
            retried(save, PAUSES)
        except DiskError as error:
            last = self.checkpointer.newest_step(trainer.name)
            there = f"there is none of {trainer.name} yet" if last is None else f"the last one is step {last}"
            self._warn(error, f"The run goes on; {there}.")

    def _warn(self, error: DiskError, then: str) -> None:
        name = self.trainer.name
        say(
            f"warning: checkpoint of {name} at step {self.trainer.step} could not be written to "
            f"{self.checkpointer.folder / name}: {error.reason}. {then}"
        )


class PeriodicEvaluation(HookBase):
    """Evaluate every `period` steps; the figures join the metrics as `<role>/...`.

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
        results = self.evaluate()
        if results is None:
            return trainer.postpone()
        trainer.metrics.update({f"{self.role}/{name}": value for name, value in results.items()})
        say(f"[{trainer.name} {trainer.step}/{trainer.total_steps}] {self.role}  {format_results(results)}")


def format_results(results: dict[str, Any]) -> str:
    """Figures on one line, those of single classes left out."""
    return "  ".join(f"{name} {value:.4f}" for name, value in results.items() if "/" not in name)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _reason(error: OSError, file: AppendedFile) -> str:
    return reason_of(error, file.path, sum(map(len, file.waiting)))


def _scalars(prefix: str, figures: dict[str, Any], leave_out: str = "") -> dict[str, float]:
    return {
        f"{prefix}/{name}": value
        for name, value in figures.items()
        if isinstance(value, (int, float)) and name != leave_out
    }


def _jsonable(figures: dict[str, Any]) -> dict[str, Any]:
    def finite(value: Any) -> bool:
        return not isinstance(value, float) or math.isfinite(value)

    # JSON has no infinity and no NaN
    return {name: value if finite(value) else str(value) for name, value in figures.items()}
