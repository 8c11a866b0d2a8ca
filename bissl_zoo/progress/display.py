"""What a person is told while a run runs: lines, the run's log, and a display that stands still below the lines."""

import contextlib
import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Protocol

from bissl_zoo.distributed import STOP_SIGNALS, is_main_process
from bissl_zoo.errors import BisslZooError, Interrupted
from bissl_zoo.progress.run_log import LOG_FILE, RunLog
from bissl_zoo.runs.disk import DISK_ERRORS

#: progress: of one step among many; figures: of an evaluation; result: what the command was called for
Kind = Literal["line", "progress", "stage", "figures", "result"]
WARNING = "warning:"
#: seconds that the other processes answer a signal after the main one, which has its display to take away
BEHIND = 0.1


class Screen(Protocol):
    """Where lines go, and what stands there of the run; `every_step` asks for a line after each step."""

    every_step: bool

    def say(self, line: str, kind: Kind) -> None:
        """Print a line, or leave it out where its kind is not wanted."""

    def show(self, **facts: Any) -> None:
        """Keep what has changed of the run, by the names of `RunView`."""

    def aside(self) -> contextlib.AbstractContextManager[None]:
        """For what writes to the terminal by itself: nothing else is there meanwhile."""

    def end(self) -> None:
        """Leave the last state of the run as it stands; lines may follow."""


class PlainScreen:
    """Lines one after the other; `quiet` prints warnings and results alone."""

    def __init__(self, quiet: bool = False, every_step: bool = False) -> None:
        self.quiet, self.every_step = quiet, every_step

    def say(self, line: str, kind: Kind) -> None:
        """Print the line at once."""
        if not self.quiet or kind == "result" or line.startswith(WARNING):
            print(line, flush=True)

    def show(self, **facts: Any) -> None:
        """Nothing stands still here."""

    def aside(self) -> contextlib.AbstractContextManager[None]:
        """Whatever is written follows the lines."""
        return contextlib.nullcontext()

    def end(self) -> None:
        """The lines are all there is."""


#: where what is said goes at the moment
_screen: Screen = PlainScreen()
_log: RunLog | None = None


def choose_screen(plain: bool = False, quiet: bool = False, verbose: bool = False) -> Screen:
    """The live display on a terminal that can, unless it is not wanted; plain lines otherwise."""
    if plain or quiet or not sys.stdout.isatty() or os.environ.get("TERM", "dumb") == "dumb" or not is_main_process():
        return PlainScreen(quiet, verbose)
    from bissl_zoo.progress.live import LiveScreen  # which takes a while, and most commands need none

    return LiveScreen(verbose)


@contextlib.contextmanager
def on_screen(screen: Screen) -> Iterator[None]:
    """What is said meanwhile goes to `screen`."""
    global _screen
    before, _screen = _screen, screen
    try:
        yield
    finally:
        _screen = before
        screen.end()


@contextlib.contextmanager
def logged(folder: Path) -> Iterator[None]:
    """Every line that the main process says meanwhile is appended to `log.txt` in `folder`, and what ends the run."""
    global _log
    if not is_main_process():
        yield
        return
    before, _log = _log, RunLog(folder / LOG_FILE)
    logging.getLogger().addHandler(_log)
    try:
        yield
    except Interrupted as request:
        _log.write(str(request))
        raise
    except BisslZooError as error:
        _log.write(f"error: {error}")
        raise
    except BaseException:
        _log.write(traceback.format_exc())
        raise
    finally:
        logging.getLogger().removeHandler(_log)
        _log.close()
        _log = before


def say(line: str, kind: Kind = "line") -> None:
    """Print a line at once, from the main process only, and log it."""
    if not is_main_process():
        return
    _print(line, kind)
    log(line)


def log(line: str) -> None:
    """Append a line to the log of the run alone; the first that cannot be written is a warning on the screen."""
    if _log is None or not is_main_process():
        return
    mended = _log.problem is None
    _log.write(line)
    if _log.problem and mended:
        _print(
            f"{WARNING} {_log.path} could not be written: {_log.problem.strerror}. The run goes on; lines wait.", "line"
        )


def _print(line: str, kind: Kind) -> None:
    try:
        _screen.say(line, kind)
    except OSError as error:  # the output goes to a file on a full disk: a line less, and the run goes on
        if error.errno not in DISK_ERRORS:
            raise


def show(**facts: Any) -> None:
    """Tell the display what has changed of the run, by the names of `RunView`."""
    if is_main_process():
        _screen.show(**facts)


@contextlib.contextmanager
def doing(what: str) -> Iterator[None]:
    """Have the display say what holds up the steps."""
    show(doing=what)
    try:
        yield
    finally:
        show(doing="")


def every_step() -> bool:
    """Whether a line after each step is wanted."""
    return _screen.every_step


def end_display() -> None:
    """The run is over: its last state stays where it is, and what is said follows it."""
    _screen.end()


@contextlib.contextmanager
def signals_aside() -> Iterator[None]:
    """While this lasts, what the handlers of requests to stop write does not run into the display."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}

    def handle(number: int, frame: Any) -> None:
        if not is_main_process():
            time.sleep(BEHIND)
        with _screen.aside():
            before[number](number, frame)

    try:
        for number in before:
            signal.signal(number, handle)
    except ValueError:  # not the main thread, where requests are not noticed at all
        yield
        return
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
