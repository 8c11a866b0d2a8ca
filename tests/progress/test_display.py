"""Console output: log handlers, the log file, and the live display."""

import errno
import io
import logging
import os
import re
import sys

import pytest
import torch
from rich.console import Console
from terminal import ESCAPES

from bissl_zoo.errors import ConfigError, Interrupted
from bissl_zoo.progress.display import (
    FILE_ONLY,
    ConsoleHandler,
    StageView,
    console,
    doing,
    logged,
    show,
)
from bissl_zoo.progress.live import LiveDisplay, choose_display

logger = logging.getLogger("bissl_zoo.tests")
METRICS = {
    "lower/total_loss": 2.125,
    "lower/lr": 0.05,
    "lower/grad_norm": 5.75,
    "upper/total_loss": 0.875,
    "upper/lr": 0.002,
    "solver/residual": 0.0125,
    "solver/products": 10,
    "solver/status": "converged",
}
STAGE = StageView(
    name="bissl",
    step=37,
    total_steps=500,
    levels=("lower", "upper"),
    metrics=METRICS,
    speed={"images_per_second": 512.4, "waiting": 0.031},
    seconds=4.0,
    left=1852.0,
)


@pytest.fixture
def opened():
    """A live display of a run, and the file that it draws to: `opened(width=60)`."""

    def build(width=120, **options):
        file = io.StringIO()
        terminal = Console(file=file, force_terminal=True, width=width, height=40, color_system="standard")
        handler = LiveDisplay(console=terminal, **options)
        handler.show(folder="/data/runs/a", device=torch.device("cpu"), stages=["pretrain", "bissl"], number=2)
        return handler, file

    return build


def plain(text):
    return ESCAPES.sub("", text).replace("\r", "")


@pytest.mark.parametrize("width", [60, 120])
def test_the_display_shows_the_latest_metrics_within_its_width(opened, width):
    handler, file = opened(width)
    with console(handler):
        show(evaluation="[bissl 30/500] probe  kNN top-1 0.512", checkpoint="bissl step 30, 12:05:00")
        show(source=lambda: STAGE)
    lines = plain(file.getvalue()).splitlines()
    assert max(map(len, lines)) <= width
    text = " ".join(" ".join(lines).split())
    for part in (
        *("run /data/runs/a 0:00:0", "2 of 2: bissl alternation 37/500", "7% 0:30:52 left"),
        *("lower level total_loss 2.125 lr 0.05 grad_norm 5.75", "upper level total_loss 0.875 lr 0.002"),
        *("hypergradient residual 0.0125 products 10 status converged", "4 s/step 512 images/s 3% waiting for data"),
        *("evaluation [bissl 30/500] probe kNN top-1 0.512", "checkpoint bissl step 30, 12:05:00"),
    ):
        assert part in text, part


def test_lines_that_a_narrower_terminal_has_wrapped_are_removed_too(opened):
    handler, file = opened(100)
    with console(handler):
        show(source=lambda: STAGE)
        handler.bars.live.refresh()
        height = handler.bars.live._live_render.last_render_height
        file.truncate(0)
        handler.bars.console.width = 20
        handler.bars.live.refresh()
        wrapped = file.getvalue().count("\x1b[1A")
    assert wrapped > height


def test_log_lines_scroll_above_the_display_and_lines_of_single_steps_are_left_out(opened):
    handler, file = opened()
    with console(handler):
        show(source=lambda: STAGE, evaluation="[bissl 37/500] test  AP50 0.5")
        logger.warning("look at \x1b[2J this")
        logger.info("[bissl 37/500] total_loss 1", extra={"progress": True})
        print("a library prints")
        logger.info("the end")
    text = plain(file.getvalue())
    above, _, last = text.rpartition("/data/runs/a")
    assert "warning: look at \\u001b[2J this\n" in above and "a library prints\n" in above and "the end\n" in above
    assert "evaluation     [bissl 37/500] test  AP50 0.5" in last and "total_loss 1" not in text
    assert re.search(r"\x1b\[1;33mwarning: look", file.getvalue())  # bold and yellow
    assert file.getvalue().rindex("\x1b[?25h") > file.getvalue().rindex("\x1b[?25l")  # the cursor is shown again


def test_an_error_of_the_display_is_shown_in_its_place_and_the_lines_go_on(opened):
    handler, file = opened()
    with console(handler):
        show(source=lambda: 1 / 0)
        logger.info("a line")
    text = plain(file.getvalue())
    assert "a line\n" in text and "warning: the display failed (ZeroDivisionError: division by zero)" in text


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_terminal_that_is_gone_does_not_end_the_run(opened):
    class Gone(io.StringIO):
        def write(self, text):
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    handler, _ = opened()
    handler.bars.console.file = Gone()
    with console(handler):
        show(source=lambda: STAGE)
        logger.info("a line")


def test_without_a_terminal_or_if_asked_the_output_is_plain_lines(monkeypatch):
    assert type(choose_display()) is ConsoleHandler
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    assert type(choose_display(plain=True)) is ConsoleHandler and type(choose_display(quiet=True)) is ConsoleHandler
    monkeypatch.setenv("TERM", "dumb")
    assert type(choose_display()) is ConsoleHandler


def test_a_quiet_console_prints_warnings_and_errors_only(capsys):
    with console(ConsoleHandler(quiet=True)), doing("nothing"):
        logger.info("a line")
        logger.info("[stage 1/2] loss", extra={"progress": True})
        logger.warning("mind")
        logging.getLogger("another.library").info("a detail")
        logging.getLogger("another.library").error("fails")
    assert capsys.readouterr().out == "warning: mind\nerror: fails\n"


def test_the_log_file_has_every_record_with_its_time_and_is_appended_to(tmp_path, capsys):
    for number in (1, 2):
        with console(ConsoleHandler(quiet=True)), logged(tmp_path):
            logger.info(f"two\nlines {number}")
            logger.info("in the file only", extra=FILE_ONLY)
            logging.getLogger("another.library").warning("mind %d", number)
    logger.info("after the run")
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", line) for line in lines)
    assert [line[20:] for line in lines] == [
        *("two", "lines 1", "in the file only", "warning: mind 1"),
        *("two", "lines 2", "in the file only", "warning: mind 2"),
    ]
    assert "in the file only" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ConfigError("no such key"), "error: no such key"),
        (Interrupted("Interrupted", 130), "Interrupted"),
        (ZeroDivisionError("by zero"), "ZeroDivisionError: by zero"),
    ],
)
def test_what_ends_the_run_is_in_its_log(tmp_path, error, line):
    with pytest.raises(type(error)), logged(tmp_path):
        raise error
    assert (tmp_path / "log.txt").read_text().splitlines()[-1][20:] == line


def test_a_log_file_that_cannot_be_written_is_one_warning_and_the_run_goes_on(tmp_path, capsys):
    path = tmp_path / "log.txt"
    path.symlink_to("/dev/full")
    with logged(tmp_path):
        logger.info("first")
        path.unlink()
        logger.info("second")
    out = capsys.readouterr().out
    assert out.count("warning") == 1 and "log.txt could not be written: No space left on device" in out
    assert path.read_text().splitlines()[-1][20:] == "second"
