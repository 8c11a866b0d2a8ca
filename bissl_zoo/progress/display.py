"""Console output: handlers of `logging` for the terminal and for `log.txt`, and the state that a live display shows."""

import contextlib
import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bissl_zoo.distributed import STOP_SIGNALS, is_main_process
from bissl_zoo.errors import BisslZooError, Interrupted
from bissl_zoo.progress.run_log import LOG_FILE, LogFile, line_of
from bissl_zoo.runs.disk import DISK_ERRORS

#: `logger.info(..., extra=FILE_ONLY)` writes a record to log.txt and not to the console
FILE_ONLY = {"file_only": True}
#: seconds that the other processes answer a signal after the main one, which removes its display first
BEHIND = 0.1


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
        """Update the state of the run, by the names of `RunView`."""

    def aside(self) -> contextlib.AbstractContextManager[None]:
        """Hide what is drawn while something else writes to the terminal."""
        return contextlib.nullcontext()

    def end(self) -> None:
        """Draw the last state of the run; lines may follow."""


#: the handler that prints at the moment
_console: ConsoleHandler | None = None


def choose_display(plain: bool = False, quiet: bool = False, verbose: bool = False) -> ConsoleHandler:
    """Return a live display if standard output is a terminal that supports one, else a handler that prints lines."""
    if plain or quiet or not sys.stdout.isatty() or os.environ.get("TERM", "dumb") == "dumb" or not is_main_process():
        return ConsoleHandler(quiet, verbose)
    from bissl_zoo.progress.live import LiveScreen  # takes a while to import

    return LiveScreen(verbose)


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
    """Update the live display, by the names of `RunView`."""
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


@contextlib.contextmanager
def signals_aside() -> Iterator[None]:
    """Hide the live display while the handlers of stop signals write their message."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}

    def handle(number: int, frame: Any) -> None:
        if not is_main_process():
            time.sleep(BEHIND)
        with _console.aside() if _console else contextlib.nullcontext():
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
