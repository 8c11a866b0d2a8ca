"""The command line in a real terminal: what stays on it when the run ends, fails, or is asked to stop."""

import logging
import os
import re
import time

import pytest
from terminal import Terminal, shown

pytestmark = pytest.mark.slow


@pytest.fixture
def arguments(tiny, at_scenes, tmp_path):
    def build(**changed):
        return [
            *("--config-file", "quickstart/digit_scenes_det.py"),
            *tiny(**changed),
            f"train.output_dir={tmp_path / 'run'}",
        ]

    return build


def test_a_run_in_a_terminal_ends_with_its_last_state_and_the_table_below_it(tool, arguments):
    def noisy():
        from bissl_zoo.engine.stages.bissl import BisslTrainer

        step = BisslTrainer.run_step

        def run_step(self):
            print("a library prints")
            logging.getLogger("somebody").warning("a library warns")
            time.sleep(0.8)  # longer than between two drawings
            return step(self)

        BisslTrainer.run_step = run_step

    status, output = Terminal(tool, arguments(), noisy).end()
    plain, last = shown(output)
    assert status == 0 and "Traceback" not in plain
    for line in ("stage 3 of 5: bissl, .*", "a library prints", "warning: a library warns"):
        assert re.search(rf"^{line}$", plain, re.MULTILINE), line
    assert "alternation 1/2" in plain and "[bissl 1/2]" not in plain
    state, _, table = last.partition("fine-tuned from")
    assert "5 of 5: finetune  step 2/2" in state and "100% 0:00:00 left" in state
    assert re.search(r"evaluation +\[finetune\] test  AP ", state) and "published" in table


def test_ctrl_c_is_answered_below_the_lines_and_the_message_names_resume(tool, arguments):
    terminal = Terminal(tool, arguments(pretrain__steps=4000, train__checkpoint__period=10000))
    terminal.wait_for(r"step [1-9]\d*/4000")
    os.write(terminal.handle, b"\x03")
    status, output = terminal.end()
    plain, last = shown(output)
    assert status == 130 and "Traceback" not in plain
    assert re.search(r"^SIGINT: saving after this step; press Ctrl-C again to stop now$", plain, re.MULTILINE)
    # the display was taken away first: nothing is drawn between that and the message but the echo of the key
    assert re.search(r"\x1b\[\?25h[^━]*\r?\n?SIGINT: saving", output)
    assert re.search(
        r"Interrupted at pretrain step \d+/4000; checkpoint saved. Continue with --resume.$", last.rstrip()
    )


def test_a_plain_run_in_a_terminal_has_no_escape_codes_and_all_its_output_is_in_the_log(tool, arguments, tmp_path):
    status, output = Terminal(tool, ["--plain", *arguments(train__stages="[finetune]")]).end()
    log = (tmp_path / "run" / "log.txt").read_text()
    assert status == 0 and "\x1b" not in output + log and "[finetune 2/2]" in output
    lines = output.replace("\r", "").partition("\nfine-tuned from")[0].splitlines()
    in_the_run = lines[next(number for number, line in enumerate(lines) if line.startswith("run: ")) :]
    assert set(in_the_run) <= {line[20:] for line in log.splitlines()}
    assert "fine-tuned from" in log
