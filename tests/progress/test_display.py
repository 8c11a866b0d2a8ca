"""What a person sees of a run: the display, the plain lines where there is none, and the log of both."""

import errno
import io
import logging
import os
import re
import sys
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from terminal import ESCAPES

from bissl_zoo.errors import ConfigError, Interrupted
from bissl_zoo.progress import display
from bissl_zoo.progress import live as live_screen
from bissl_zoo.progress.display import FILE_ONLY, ConsoleHandler, choose_display, console, doing, logged, show
from bissl_zoo.progress.live import LiveScreen
from bissl_zoo.progress.live_frame import frame
from bissl_zoo.progress.run_view import PlannedStage, RunView, StageView, place_within

logger = logging.getLogger("bissl_zoo.tests")
FIGURES = {
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
    phase="lower step 3/20",
    fraction=0.0741,
    levels=("lower", "upper"),
    figures=FIGURES,
    speed={"images_per_second": 512.4, "waiting": 0.031},
    seconds=4.0,
    left=1852.0,
)
PLAN = [PlannedStage("pretrain", "p", 10), PlannedStage("bissl", "b", 500)]


def run_view(**changed):
    values = dict(folder="/data/runs/a", device=torch.device("cpu"), stages=PLAN, number=2, source=lambda: STAGE)
    return RunView(**{**values, **changed}, began=0.0)


@pytest.mark.parametrize("width", [60, 120])
def test_the_display_holds_the_figures_and_keeps_to_its_width(width):
    run = run_view(evaluation="[bissl 30/500] probe  kNN top-1 0.512", checkpoint=("bissl step 30", 3000.0))
    lines = frame(run, now=3725.0, width=width)
    assert all(line.cell_len <= width for line in lines)
    told = " ".join(" ".join(line.plain for line in lines).split())
    for part in (
        *("/data/runs/a", "1:02:05", "2 of 2: bissl", "alternation 38/500 lower step 3/20", "7%"),
        *("lower level total_loss 2.125 lr 0.05 grad_norm 5.75", "upper level total_loss 0.875 lr 0.002"),
        *("hypergradient residual 0.0125 products 10 status converged", "4 s/step 512 images/s 3% waiting for data"),
        *("of this process", "stage 0:30:52 run 0:30:52", "evaluation [bissl 30/500] probe kNN top-1 0.512"),
        "checkpoint bissl step 30 0:12:05 ago",
    ):
        assert part in told, part


def test_the_memory_of_a_gpu_is_that_of_its_allocator(monkeypatch):
    stats = {"allocated_bytes.all.current": 3 << 30, "allocated_bytes.all.peak": 14 << 30}
    monkeypatch.setattr(torch.cuda, "memory_stats", {torch.device("cuda", 1): stats}.get)
    lines = frame(run_view(device=torch.device("cuda", 1)), 5.0, 80)
    assert "memory         GPU 3.0 GiB allocated, 14 GiB peak" in [line.plain for line in lines]


def test_a_folder_that_is_too_long_shows_its_end_and_a_terminal_without_utf_8_gets_ascii():
    head, *_ = lines = frame(run_view(folder="/far/away/" * 10 + "runs/a"), 5.0, 60, ascii_only=True)
    assert head.cell_len <= 60 and "runs/a -" in head.plain and "0:00:05" in head.plain
    assert all(line.plain.isascii() for line in lines)


def test_a_stage_that_has_not_begun_says_so_by_its_name_alone():
    told = "\n".join(line.plain for line in frame(run_view(source=None), 5.0, 80))
    assert "2 of 2: bissl" in told and "stage ?  run ?" in told and "total_loss" not in told


def test_the_rest_of_the_run_is_known_once_a_stage_like_each_to_come_was_seen():
    stages = [
        PlannedStage("finetune_pretrained", "f", 100),
        PlannedStage("bissl", "b", 5),
        PlannedStage("finetune", "f", 50),
    ]
    now = {"seconds": 2.0, "left": 60.0}
    run = run_view(stages=stages, number=1, source=lambda: StageView("s", 1, 9, "", 0, (), {}, {}, **now))
    assert run.left(run.stage()) is None
    run.number, now["seconds"], now["left"] = 2, 10.0, 30.0
    assert run.left(run.stage()) == 30.0 + 50 * 2.0


def test_the_place_within_an_alternation_follows_the_counters_of_the_levels():
    levels = {"lower": SimpleNamespace(step=0, total_steps=20), "upper": SimpleNamespace(step=0, total_steps=8)}
    trainer = SimpleNamespace(done=False, stopping=False, step=0, total_steps=4, levels=lambda: levels)
    assert place_within(trainer) == ("lower step 1/5", 0.0)
    levels["lower"].step = 5
    assert place_within(trainer) == ("upper step 1/2", pytest.approx(5 / 7))
    trainer.step, levels["lower"].step, levels["upper"].step = 1, 8, 2
    assert place_within(trainer) == ("lower step 4/5", pytest.approx(3 / 7))
    assert place_within(SimpleNamespace(done=False, stopping=False, levels=lambda: {"level": None})) == ("", 0.0)


def screen_of(width=80, **options):
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=width, height=40, highlight=False, color_system="standard")
    screen = LiveScreen(console=console, **options)
    screen.run = run_view()
    return screen, file


def test_log_lines_scroll_above_the_display_and_lines_of_single_steps_are_left_out():
    screen, file = screen_of()
    with console(screen):
        show(source=lambda: STAGE, evaluation="[bissl 37/500] test  AP50 0.5")
        logger.warning("look at \x1b[2J this")
        logger.info("[bissl 37/500] total_loss 1", extra={"progress": True})
        logger.info("the end")
    plain = ESCAPES.sub("", file.getvalue()).replace("\r", "")
    above, _, last = plain.rpartition("─ /data/runs/a")
    assert "warning: look at \\u001b[2J this\n" in above and "the end\n" in above
    assert "evaluation     [bissl 37/500] test  AP50 0.5" in last
    assert "total_loss 1" not in plain
    assert re.search(r"\x1b\[1;33mwarning: look", file.getvalue())  # bold and yellow
    assert file.getvalue().rindex("\x1b[?25h") > file.getvalue().rindex("\x1b[?25l")


def test_verbose_prints_a_line_of_every_step():
    screen, file = screen_of(every_step=True)
    with console(screen):
        logger.info("[bissl 37/500] total_loss 1", extra={"progress": True})
    assert file.getvalue() == "[bissl 37/500] total_loss 1\n"


def test_a_display_that_fails_is_a_warning_and_the_lines_go_on(monkeypatch):
    screen, file = screen_of()
    monkeypatch.setattr(live_screen, "frame", lambda *arguments: 1 / 0)
    with console(screen):
        show(source=lambda: STAGE)
        screen._thread.join(timeout=10)
        logger.info("[bissl 38/500] total_loss 1", extra={"progress": True})
    told = ESCAPES.sub("", file.getvalue())
    assert "warning: the display has failed (ZeroDivisionError: division by zero)" in told
    assert told.endswith("[bissl 38/500] total_loss 1\n")


def test_a_terminal_that_is_gone_does_not_end_the_run():
    class Gone(io.StringIO):
        def write(self, text):
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    screen, _ = screen_of()
    screen.console.file = Gone()
    with console(screen):
        show(source=lambda: STAGE)
        logger.info("a line")
    assert not screen._thread.is_alive()


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


def test_an_inner_console_replaces_the_outer_one_while_it_lasts(capsys):
    with console():
        with console(ConsoleHandler(quiet=True)):
            logger.info("not printed")
        logger.info("printed once")
    assert capsys.readouterr().out == "printed once\n"


def test_only_the_main_process_prints(capsys, monkeypatch):
    monkeypatch.setattr(display, "is_main_process", lambda: False)
    logger.warning("mind")
    assert capsys.readouterr() == ("", "")


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
    ("error", "told"),
    [
        (ConfigError("no such key"), "error: no such key"),
        (Interrupted("stopped as asked", 130), "stopped as asked"),
        (ZeroDivisionError("by zero"), "ZeroDivisionError: by zero"),
    ],
)
def test_what_ends_the_run_is_in_its_log(tmp_path, error, told):
    with pytest.raises(type(error)), logged(tmp_path):
        raise error
    assert (tmp_path / "log.txt").read_text().splitlines()[-1][20:] == told


def test_a_log_file_that_cannot_be_written_is_one_warning_and_its_lines_are_written_later(tmp_path, capsys):
    path = tmp_path / "log.txt"
    path.symlink_to("/dev/full")
    with logged(tmp_path):
        logger.info("first")
        logger.info("second")
        path.unlink()
        logger.info("third")
    out = capsys.readouterr().out
    assert out.count("warning") == 1 and "log.txt could not be written: No space left on device" in out
    first, warning, *rest = [line[20:] for line in path.read_text().splitlines()]
    assert [first, *rest] == ["first", "second", "third"] and warning.startswith("warning: ")


def test_the_plain_output_of_a_run_has_no_escape_codes_and_all_of_it_is_logged(finished):
    said, logged_lines = ((finished / name).read_text() for name in ("said.txt", "log.txt"))
    assert "\x1b" not in said and "\x1b" not in logged_lines
    bare = [line[20:] for line in logged_lines.splitlines()]
    before_the_table = said[: said.index("\nfine-tuned from")].splitlines()
    assert [line for line in before_the_table if line not in bare] == []
    assert any(line.startswith("fine-tuned from") for line in bare)
