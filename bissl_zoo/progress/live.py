"""The live display on a terminal: lines scroll past above it, and it is drawn anew twice a second."""

import contextlib
import io
import logging
import math
import os
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from rich.console import Console, Group
from rich.control import Control
from rich.live import Live
from rich.segment import ControlType
from rich.text import Text

from bissl_zoo.progress.console import printable
from bissl_zoo.progress.display import ConsoleHandler
from bissl_zoo.progress.live_frame import frame
from bissl_zoo.progress.run_view import RunView
from bissl_zoo.runs.disk import DISK_ERRORS

#: seconds between two drawings, in each of which Python does nothing else for one or two milliseconds
PERIOD = 0.5
#: seconds without a display after a signal, in which the other processes of this terminal answer it as well
ASIDE = 0.3
#: columns left free at the end of a line, where a terminal echoes what is typed, as ^C
ECHO = 2


class LiveScreen(ConsoleHandler):
    """Lines, and below them the run as it stands, from the first stage on until `end`.

    What others print to standard output and standard error meanwhile is put above the display. Where it cannot be drawn
    any more, the lines go on without it: no display is worth a run.
    """

    def __init__(self, every_step: bool = False, console: Console | None = None) -> None:
        super().__init__(every_step=every_step)
        self.run = RunView()
        self.console = console or _console()
        self._drawing = threading.RLock()  # drawing, lines, and signals, which find the main thread anywhere
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._live: Live | None = None
        self._lengths: list[int] = []  # of the lines that are drawn, and the width that they were drawn at
        self._width = 0
        self._draw_after = 0.0
        self._streams = contextlib.ExitStack()

    def write(self, line: str, record: logging.LogRecord) -> None:
        """Print a line above the display; lines of single steps only if `every_step`."""
        if not getattr(record, "progress", False) or self.every_step:
            self.above(Text(printable(line), "bold yellow" if record.levelno >= logging.WARNING else ""))

    def above(self, text: Text) -> None:
        """Print a text that scrolls away as the terminal's lines do."""
        with self._drawing, self.console:
            if self._live:
                self._unwrap()
            self.console.print(text, soft_wrap=True)

    def show(self, **fields: Any) -> None:
        """Keep what has changed; the first stage opens the display."""
        with self._drawing:
            self.run.stage()
            for name, value in fields.items():
                setattr(self.run, name, value)
        if self._thread is None and self.run.source:
            self._begin()

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Take the display away, and draw it again a moment later."""
        with self._drawing:
            if self._live:
                self._live.transient = True
                self._close()
                self._draw_after = time.monotonic() + ASIDE
            yield

    def end(self) -> None:
        """Draw for the last time, and give the terminal back."""
        if self._thread is None or self._ended.is_set():
            return
        with self._streams, self._drawing:
            self.run.doing, self._draw_after = "", 0.0
            self._draw()
            self._ended.set()
            self._close()
            self.run.source = None  # which holds on to the stage
        self._thread.join(timeout=1)

    def _begin(self) -> None:
        for name in ("stdout", "stderr"):
            stream = getattr(sys, name)
            if stream.isatty():
                self._streams.enter_context(_redirected(name, stream, _Above(self, stream)))
        self._thread = threading.Thread(target=self._keep_drawing, name="display", daemon=True)
        self._thread.start()

    def _keep_drawing(self) -> None:
        while not self._ended.is_set():
            self._draw()
            self._ended.wait(PERIOD)

    def _draw(self) -> None:
        with self._drawing:
            if self._ended.is_set() or time.monotonic() < self._draw_after:
                return
            try:
                if self._live is None:
                    self._open()
                with self.console:
                    self._unwrap()
                    self._refresh()
            except OSError as error:  # a terminal that is gone refuses as a disk does
                if error.errno not in DISK_ERRORS:
                    raise
                self._ended.set()

    def _open(self) -> None:
        redirects = dict(redirect_stdout=False, redirect_stderr=False)
        self._live = Live(console=self.console, auto_refresh=False, vertical_overflow="crop", **redirects)
        self._lengths = []
        self.console.control(Control(ControlType.CARRIAGE_RETURN, (ControlType.ERASE_IN_LINE, 2)))  # an echoed ^C
        self._live.start()
        self.console.show_cursor(True)  # a process that is killed could not do so any more

    def _close(self) -> None:
        live, self._live = self._live, None
        if live:
            live.stop()

    def _unwrap(self) -> None:
        """Go up to where the display begins in a terminal that became narrower, and has wrapped its lines."""
        width = self.console.size.width
        if width < self._width:
            wrapped = sum(max(0, math.ceil(length / width) - 1) for length in self._lengths)
            self.console.control(*[Control((ControlType.ERASE_IN_LINE, 2), (ControlType.CURSOR_UP, 1))] * wrapped)
            self._lengths, self._width = [min(length, width) for length in self._lengths], width

    def _refresh(self) -> None:
        width, height = self.console.size
        try:
            lines = frame(self.run, time.monotonic(), width - ECHO, not self.console.encoding.startswith("utf"))
        except Exception as error:
            self._ended.set()
            self._close()
            self.every_step = True  # the lines are all there is from now on
            self.console.print(f"warning: the display has failed ({type(error).__name__}: {error})", style="yellow")
            return
        lines = lines[: max(1, height - 1)]
        self._lengths, self._width = [line.cell_len for line in lines], width
        self._live.update(Group(*lines), refresh=True)


class _Above(io.TextIOBase):
    """A stream whose lines go above the display; in a forked process, as a loader's worker, the stream itself."""

    def __init__(self, screen: LiveScreen, stream: Any) -> None:
        self.screen, self.stream, self.pid, self.line = screen, stream, os.getpid(), ""

    def write(self, text: str) -> int:
        if os.getpid() != self.pid:
            return self.stream.write(text)
        *lines, self.line = (self.line + text).split("\n")
        for line in lines:
            self.screen.above(Text.from_ansi(line.rpartition("\r")[2]))
        return len(text)

    def flush(self) -> None:
        self.stream.flush()

    def isatty(self) -> bool:
        return True

    def fileno(self) -> int:
        return self.stream.fileno()

    @property
    def encoding(self) -> str:
        return self.stream.encoding


@contextlib.contextmanager
def _redirected(name: str, stream: Any, above: _Above) -> Iterator[None]:
    """`sys.<name>`, and the handlers of `logging` that write to it, write to `above`."""
    handlers = [handler for handler in logging.getLogger().handlers if getattr(handler, "stream", None) is stream]
    setattr(sys, name, above)
    for handler in handlers:
        handler.setStream(above)
    try:
        yield
    finally:
        for handler in handlers:
            handler.setStream(stream)
        setattr(sys, name, stream)
        if above.line:
            above.write("\n")


def _console() -> Console:
    """On standard output, but not through `sys.stdout`, whose lock a forked process would find taken."""
    stream = sys.stdout
    file = open(stream.fileno(), "w", encoding=stream.encoding, errors="replace", closefd=False)
    return Console(file=file, force_terminal=True, highlight=False, markup=False, emoji=False)
