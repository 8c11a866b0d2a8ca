"""Exit statuses of the tools, and a reader of their output that is gone."""

import subprocess
import sys
from pathlib import Path

import pytest

from bissl_zoo.errors import ZooError
from bissl_zoo.progress.console import READER_GONE, exit_status

RUNS = Path(__file__).resolve().parents[2] / "tools" / "runs.py"
LAUNCH = "import sys; from bissl_zoo.engine.launch import launch; sys.exit(launch(lambda: print('x' * 100_000), 1))"


def test_the_status_is_what_the_command_returns_and_none_is_success():
    assert exit_status(lambda: 3) == 3
    assert exit_status(lambda: None) == 0


def test_an_error_is_one_message_without_control_characters(capsys):
    def refuse():
        raise ZooError("there is no \x1b[31mred\u202e entry")

    assert exit_status(refuse) == 1
    assert capsys.readouterr().err == "error: there is no \\u001b[31mred\\u202e entry\n"


@pytest.mark.slow
@pytest.mark.parametrize("command", [[str(RUNS), "list"], ["-c", LAUNCH]], ids=["tool", "run"])
def test_a_process_whose_reader_is_gone_ends_without_a_traceback(command, tmp_path):
    command = [sys.executable, *command, *([str(tmp_path)] if "list" in command else [])]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        errors = process.stderr.read().decode()
    assert (process.returncode, errors) == (READER_GONE, "")
