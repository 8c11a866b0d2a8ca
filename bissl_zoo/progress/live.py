"""The live display of a run on a terminal: log lines scroll above a progress bar and the latest metrics."""

import contextlib
import math
import os
import sys
import time
from collections.abc import Iterable, Sequence
from logging import LogRecord
from typing import Any

import torch
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.control import Control
from rich.live_render import LiveRender
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from rich.table import Table
from rich.text import Text

from bissl_zoo.distributed import is_main_process
from bissl_zoo.errors import printable
from bissl_zoo.files import format_size
from bissl_zoo.progress.console import clock, short
from bissl_zoo.progress.display import ConsoleHandler, RunStatus

#: drawings per second; each takes one or two milliseconds
RATE = 2.0
LEVEL_METRICS = ("total_loss", "lr", "grad_norm")
SOLVER_METRICS = ("residual", "products", "status", "damping")


def choose_display(plain: bool = False, quiet: bool = False, verbose: bool = False) -> ConsoleHandler:
    """Return a live display if standard output is a terminal that supports one, else a handler that prints lines."""
    if plain or quiet or not sys.stdout.isatty() or os.environ.get("TERM", "dumb") == "dumb" or not is_main_process():
        return ConsoleHandler(quiet, verbose)
    return LiveDisplay(verbose)


class LiveDisplay(ConsoleHandler):
    """Print log records above a display of the run, from the first stage on until `end`.

    What others print to standard output and standard error is printed above the display too.
    """

    def __init__(self, every_step: bool = False, console: Console | None = None) -> None:
        super().__init__(every_step=every_step)
        self.status = RunStatus()
        self.bars = _Bars(self.status, console or _console())
        self._ended = False
        os.register_at_fork(after_in_child=self._leave)

    def write(self, line: str, record: LogRecord) -> None:
        """Print a line above the display; lines of single steps only if `every_step`."""
        if not getattr(record, "progress", False) or self.every_step:
            style = "bold yellow" if record.levelno >= 30 else ""
            self.bars.console.print(Text(printable(line), style), soft_wrap=True)

    def show(self, **fields: Any) -> None:
        """Update the status; the first stage opens the display."""
        for name, value in fields.items():
            setattr(self.status, name, value)
        if self.status.source and not self._ended and not self.bars.live.is_started:
            live = self.bars.live
            live.vertical_overflow, live._live_render = "ellipsis", _Frame(self.bars.console)
            with contextlib.suppress(OSError):  # the terminal is gone
                live.start()
                self.bars.console.show_cursor(True)  # a killed process could not show it again

    def end(self) -> None:
        """Draw for the last time; later lines follow below."""
        self.status.doing = ""
        with contextlib.suppress(OSError):  # the terminal is gone
            self.bars.stop()
        self.status.source, self._ended = None, True

    def _leave(self) -> None:
        """Print directly in a forked process, such as a loader's worker: its parent may hold the display's lock."""
        if self.bars.live.is_started:
            sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
        self.write = lambda line, record: print(line, file=sys.__stderr__, flush=True)


class _Bars(Progress):
    """The bar of the current stage between rows of text."""

    def __init__(self, status: RunStatus, console: Console) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[left]}"),
        )
        super().__init__(*columns, console=console, refresh_per_second=RATE)
        self.status, self.started = status, time.monotonic()
        self.task = self.add_task("", total=1.0, left="")

    def get_renderables(self) -> Iterable[RenderableType]:
        """Yield the display; an error in it is shown in its place, and never ends the run."""
        if not hasattr(self, "task"):
            return
        try:
            yield self._group()
        except Exception as error:
            yield Text(f"warning: the display failed ({type(error).__name__}: {error})", "yellow")

    def _group(self) -> Group:
        status, view = self.status, self.status.source() if self.status.source else None
        stage = (
            [f"{status.number} of {len(status.stages)}: {status.stages[status.number - 1]}"] if status.number else []
        )
        rows = {"run": [status.folder, clock(time.monotonic() - self.started)], "stage": stage}
        details: dict[str, list[str]] = {}
        if view:
            several = len(view.levels) > 1
            stage.append(f"{'alternation' if several else 'step'} {view.step}/{view.total_steps}")
            done = view.step / max(view.total_steps, 1)
            self.update(self.task, completed=done, left=f"{clock(view.left)} left")
            for level in view.levels:
                prefix = f"{level}/" if several else ""
                details[f"{level} level" if several else "training"] = _named(view.metrics, prefix, LEVEL_METRICS)
            details["hypergradient"] = _named(view.metrics, "solver/", SOLVER_METRICS)
            details["speed"] = [f"{view.seconds:.3g} s/step"] if view.seconds is not None else []
            if view.speed:
                text = "{images_per_second:.0f} images/s  {waiting:.0%} waiting for data"
                details["speed"].append(text.format(**view.speed))
        stage.append(status.doing)
        if status.device is not None and status.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(status.device)
            details["memory"] = [f"GPU {format_size(peak)} allocated, peak"]
        details |= {"evaluation": [status.evaluation], "checkpoint": [status.checkpoint]}
        return Group(_table(rows), self.make_tasks_table(self.tasks), _table(details))


def _table(rows: dict[str, list[str]]) -> Table:
    table = Table.grid(padding=(0, 2))
    for label, items in rows.items():
        if any(items):
            table.add_row(Text(label.ljust(13), "dim", no_wrap=True), Text(printable("  ".join(filter(None, items)))))
    return table


def _named(metrics: dict[str, Any], prefix: str, names: Sequence[str]) -> list[str]:
    return [f"{name} {short(metrics[prefix + name])}" for name in names if prefix + name in metrics]


class _Frame(LiveRender):
    """A rendered display that is also removed whole after the terminal became narrower and wrapped its lines."""

    def __init__(self, console: Console) -> None:
        super().__init__("")
        self.console, self.lengths = console, [0]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        self.lengths = [0]
        for segment in super().__rich_console__(console, options):
            if segment.text == "\n":
                self.lengths.append(0)
            else:
                self.lengths[-1] += cell_len(segment.text)
            yield segment

    def position_cursor(self) -> Control:
        self._count_rows()
        return super().position_cursor()

    def restore_cursor(self) -> Control:
        self._count_rows()
        return super().restore_cursor()

    def _count_rows(self) -> None:
        if self._shape:
            width = self.console.width
            self._shape = (width, sum(max(1, math.ceil(length / width)) for length in self.lengths))


def _console() -> Console:
    """Return a console on standard output that does not share the lock of `sys.stdout` with forked processes."""
    stream = sys.stdout
    file = open(stream.fileno(), "w", encoding=stream.encoding, errors="replace", closefd=False)
    return Console(file=file, force_terminal=True, highlight=False, markup=False, emoji=False)
