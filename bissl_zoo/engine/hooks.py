"""Hooks: progress, metrics, checkpoints, evaluation."""

import datetime
import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter

from bissl_zoo.distributed import all_gather_objects, is_main_process, on_main_process
from bissl_zoo.engine.checkpoint import Checkpointer, write_atomically
from bissl_zoo.engine.randomness import random_state
from bissl_zoo.engine.trainer import HookBase

#: how the names of figures begin that are measured now and then, after a step
MEASURED = ("test/", "probe/")
METRICS_FILE = "metrics.jsonl"


def say(line: str) -> None:
    """Print a line at once, from the main process only."""
    if is_main_process():
        print(line, flush=True)


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
        due = done == 1 or trainer.step % self.period == 0 or trainer.step == trainer.total_steps
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
    wrote of steps that are taken again are dropped, so that each step is there once.
    """

    def __init__(self, folder: Path, period: int) -> None:
        self.folder = Path(folder)
        self.period = period

    def before_train(self) -> None:
        """Drop lines of steps to come, and open the TensorBoard file."""
        if is_main_process():
            drop_lines_after(self.folder / METRICS_FILE, self.trainer.name, self.trainer.step)
        self.board = SummaryWriter(str(self.folder / "tensorboard")) if is_main_process() else None

    def after_step(self) -> None:
        """Write what is due."""
        trainer = self.trainer
        if self.board is None:
            return
        records = list(trainer.records)
        for record in records:
            figures = {name: value for name, value in record.items() if name != trainer.record_key}
            self._show(f"{trainer.name}/{trainer.record_key}", figures, record[trainer.record_key])
        measured = any(name.startswith(MEASURED) for name in trainer.metrics)
        if measured or trainer.step % self.period == 0 or trainer.step == trainer.total_steps:
            records.append(trainer.metrics)
            self._show(trainer.name, trainer.metrics, trainer.step)
        head = {"stage": trainer.name, "step": trainer.step, "time": time.time()}
        if records:
            with open(self.folder / METRICS_FILE, "a") as file:
                file.writelines(json.dumps({**head, **_jsonable(record)}) + "\n" for record in records)
                file.flush()
                os.fsync(file.fileno())  # before the checkpoint of this step, which counts on these lines

    def _show(self, prefix: str, figures: dict[str, Any], step: int) -> None:
        for name, value in figures.items():
            if isinstance(value, (int, float)):
                self.board.add_scalar(f"{prefix}/{name}", value, step)

    def after_train(self) -> None:
        """Close the TensorBoard file."""
        if self.board is not None:
            self.board.close()


def drop_lines_after(path: Path, stage: str, step: int) -> None:
    """Keep the lines of `metrics.jsonl` up to `step` of `stage`; what follows was not finished and is done again."""
    if not path.exists():
        return
    kept, reached = [], False
    for line in path.read_text(errors="replace").splitlines(keepends=True):
        try:
            record = json.loads(line)
            here, number = record["stage"], record["step"]
        except (ValueError, KeyError, TypeError):  # cut off in the middle
            break
        reached = reached or here == stage
        if reached and (here != stage or number > step):
            break
        kept.append(line)
    write_atomically(path, "".join(kept))


class PeriodicCheckpoint(HookBase):
    """Save the trainer's state and every process's random state: every `period` steps, at the last, and on stopping."""

    def __init__(self, checkpointer: Checkpointer, period: int, architecture: str, device: torch.device) -> None:
        self.checkpointer = checkpointer
        self.period = period
        self.architecture = architecture
        self.device = device

    def after_step(self) -> None:
        """Save when it is due."""
        trainer = self.trainer
        if trainer.step % self.period == 0 or trainer.step == trainer.total_steps or trainer.stopping:
            randomness = all_gather_objects(random_state(self.device))
            on_main_process(lambda: self._save(randomness))  # what fails there ends every process with the same message

    def _save(self, randomness: list[dict[str, Any]]) -> None:
        trainer = self.trainer
        measured = {
            name: value
            for name, value in trainer.metrics.items()
            if name.startswith(MEASURED) and isinstance(value, (int, float))
        }
        self.checkpointer.save(
            trainer.name,
            trainer.step,
            trainer.total_steps,
            self.architecture,
            {**trainer.state_dict(), "random": randomness},
            measured,
        )


class PeriodicEvaluation(HookBase):
    """Evaluate every `period` steps, but not after the last, as the run does so itself; figures join the metrics."""

    def __init__(self, evaluate: Callable[[], dict[str, float]], period: int) -> None:
        self.evaluate = evaluate
        self.period = period

    def after_step(self) -> None:
        """Evaluate when it is due; placed before the writer, so that the figures are written with this step."""
        trainer = self.trainer
        if trainer.step % self.period == 0 and trainer.step < trainer.total_steps:
            results = self.evaluate()
            trainer.metrics.update({f"test/{name}": value for name, value in results.items()})
            say(f"[{trainer.name} {trainer.step}/{trainer.total_steps}] test  {format_results(results)}")


def format_results(results: dict[str, Any]) -> str:
    """Figures on one line, those of single classes left out."""
    return "  ".join(f"{name} {value:.4f}" for name, value in results.items() if "/" not in name)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _jsonable(figures: dict[str, Any]) -> dict[str, Any]:
    def finite(value: Any) -> bool:
        return not isinstance(value, float) or math.isfinite(value)

    # JSON has no infinity and no NaN
    return {name: value if finite(value) else str(value) for name, value in figures.items()}
