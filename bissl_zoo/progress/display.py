"""Console output: log handlers for the terminal and for `log.txt`, and the status that a live display shows."""

import contextlib
import logging
import os
import signal
import stat
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bissl_zoo.distributed import is_main_process, stop_signals
from bissl_zoo.errors import BisslZooError, Interrupted
from bissl_zoo.files import DISK_ERRORS
from bissl_zoo.runs.directory import LOG_FILE

logger = logging.getLogger(__name__)

#: `logger.info(..., extra=FILE_ONLY)` writes a record to log.txt and not to the console
FILE_ONLY = {"file_only": True}
#: seconds that the other processes answer a signal after the main one, which removes its display first
BEHIND = 0.1


def line_of(record: logging.LogRecord) -> str:
    """Return the message of a record; of warnings and errors with their level, as in `warning: message`."""
    message = record.getMessage()
    if record.exc_info:
        message += "\n" + logging.Formatter().formatException(record.exc_info)
    return message if record.levelno < logging.WARNING else f"{record.levelname.lower()}: {message}"


class ConsoleHandler(logging.Handler):
    """Print log records as lines to the current `sys.stdout`, in the main process only.

    Args:
        quiet: print warnings and errors only.
        every_step: ask the training loop for a line after each step.
    """

    def __init__(self, quiet: bool = False, every_step: bool = False) -> None:
        super().__init__(logging.WARNING if quiet else logging.INFO)
        self.every_step = every_step

    def emit(self, record: logging.LogRecord) -> None:
        """Print a record; a line that a full disk refuses is dropped, any other error is raised."""
        if getattr(record, "file_only", False) or not is_main_process():
            return
        try:
            self.write(line_of(record), record)
        except OSError as error:
            if error.errno not in DISK_ERRORS:
                raise

    def write(self, line: str, record: logging.LogRecord) -> None:
        """Print a line at once."""
        print(line, flush=True)

    def show(self, **fields: Any) -> None:
        """Update the state of the run, by the names of `RunStatus`."""

    def end(self) -> None:
        """Draw the last state of the run; lines may follow."""


class LogFile(logging.Handler):
    """Append log records to a file, each line with its time. If the disk refuses lines, warn once; they are lost.

    A forked process, such as a loader's worker, may log as well: a write is one append, and the lock is `logging`'s.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(logging.INFO)
        self.path = Path(path)
        self.has_warned = False

    def emit(self, record: logging.LogRecord) -> None:
        """Append a record."""
        self.write(line_of(record))

    def write(self, text: str) -> None:
        """Append `text`, each line with the time."""
        stamp = time.strftime("%Y-%m-%d %H:%M:%S")
        lines = "".join(f"{stamp} {line}\n" for line in text.splitlines() or [""])
        try:
            with self.lock, open(self.path, "ab", buffering=0) as file:
                file.write(lines.encode(errors="backslashreplace"))
        except OSError as error:
            if not self.has_warned:
                self.has_warned = True
                logger.warning(f"{self.path} could not be written: {error.strerror}. The run continues.")


#: the handler that prints at the moment
_console: ConsoleHandler | None = None


@contextlib.contextmanager
def console(handler: ConsoleHandler | None = None) -> Iterator[None]:
    """Print log records through `handler` while the context lasts; an outer console pauses.

    Prints records of this package from INFO on, of other libraries from WARNING on. In a notebook:

        with console():
            bissl_zoo.train(...)
    """
    global _console
    before, _console = _console, handler or ConsoleHandler()
    try:
        if before:
            logging.getLogger().removeHandler(before)
        with _handling(_console):
            yield
    finally:
        ended, _console = _console, before
        if before:
            logging.getLogger().addHandler(before)
        ended.end()


def console_by_default() -> contextlib.AbstractContextManager[None]:
    """Return `console()`, or a context that does nothing if a console is installed."""
    return contextlib.nullcontext() if _console else console()


@contextlib.contextmanager
def _handling(handler: logging.Handler) -> Iterator[None]:
    """Install a handler of all loggers; the loggers of this package pass on INFO meanwhile."""
    root, package = logging.getLogger(), logging.getLogger("bissl_zoo")
    level = package.level
    root.addHandler(handler)
    if not package.isEnabledFor(logging.INFO):
        package.setLevel(logging.INFO)
    try:
        yield
    finally:
        package.setLevel(level)
        root.removeHandler(handler)


@contextlib.contextmanager
def logged(folder: Path) -> Iterator[None]:
    """Append log records to `log.txt` in `folder` while the context lasts, and the error that ends it; main process."""
    if not is_main_process():
        yield
        return
    log_file = LogFile(folder / LOG_FILE)
    with _handling(log_file):
        try:
            yield
        except Interrupted as request:
            log_file.write(str(request))
            raise
        except BisslZooError as error:
            log_file.write(f"error: {error}")
            raise
        except BaseException:
            log_file.write(traceback.format_exc())
            raise


def show(**fields: Any) -> None:
    """Update the live display, by the names of `RunStatus`."""
    if _console and is_main_process():
        _console.show(**fields)


@contextlib.contextmanager
def doing(activity: str) -> Iterator[None]:
    """Show on the live display what the run does between two steps."""
    show(doing=activity)
    try:
        yield
    finally:
        show(doing="")


def every_step() -> bool:
    """Return True if a line after each step is wanted."""
    return bool(_console and _console.every_step)


def end_display() -> None:
    """Draw the live display for the last time; later lines follow below it."""
    if _console:
        _console.end()


def leave_terminal() -> None:
    """Discard what is still written to a terminal that was closed; it would raise an error and end the run."""
    with open(os.devnull, "w") as null:
        for descriptor in (1, 2):
            with contextlib.suppress(OSError):
                if stat.S_ISCHR(os.fstat(descriptor).st_mode):
                    os.dup2(null.fileno(), descriptor)


@contextlib.contextmanager
def signals_aside() -> Iterator[None]:
    """End the live display before the handlers of stop signals write their message."""
    before = {number: signal.getsignal(number) for number in stop_signals()}

    def handle(number: int, frame: Any) -> None:
        if number == signal.SIGHUP:
            leave_terminal()
        if not is_main_process():
            time.sleep(BEHIND)
        end_display()
        before[number](number, frame)

    try:
        for number in before:
            signal.signal(number, handle)
    except ValueError:  # not the main thread, which receives no signals
        yield
        return
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass(frozen=True)
class StageView:
    """A snapshot of a stage.

    Attributes:
        step, total_steps: in optimizer steps; of a bilevel stage in alternations.
        levels: names of the levels.
        metrics: of the last step.
        speed: `images_per_second`, and `waiting`, the fraction of time waiting for data; or empty.
        seconds: per step; None before the first.
        left: seconds until the stage ends; None before the first step.
    """

    name: str
    step: int
    total_steps: int
    levels: tuple[str, ...]
    metrics: dict[str, Any]
    speed: dict[str, float]
    seconds: float | None
    left: float | None


@dataclass
class RunStatus:
    """The state of the run that the live display shows.

    Attributes:
        folder: the run directory.
        stages: names of all stages; number: the current one, from 1.
        source: returns a snapshot of the current stage, from any thread.
        doing: the activity between two steps, such as an evaluation.
        evaluation: the line of the last evaluation.
        checkpoint: the last checkpoint.
    """

    folder: str = ""
    device: torch.device | None = None
    stages: Sequence[str] = ()
    number: int = 0
    source: Callable[[], StageView] | None = None
    doing: str = ""
    evaluation: str = ""
    checkpoint: str = ""
