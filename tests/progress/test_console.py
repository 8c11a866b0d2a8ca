"""What the tools exit with, and that they end in silence when nobody reads on."""

import subprocess
import sys
from pathlib import Path

from bissl_zoo.errors import ZooError
from bissl_zoo.progress.console import READER_GONE, exit_status

RUNS = Path(__file__).resolve().parents[2] / "tools" / "runs.py"


def piped_into_nothing(*command):
    """Status and standard error of a process whose reader has gone before it writes."""
    with subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        said = process.stderr.read().decode()
    return process.returncode, said


def test_a_status_is_what_the_command_returns_and_nothing_is_success():
    assert exit_status(lambda: 3) == 3
    assert exit_status(lambda: None) == 0


def test_an_error_of_ours_is_one_message_that_a_terminal_can_show(capsys):
    def refuse():
        raise ZooError("there is no \x1b[31mred\u202e entry")

    assert exit_status(refuse) == 1
    assert capsys.readouterr().err == "error: there is no \\u001b[31mred\\u202e entry\n"


def test_a_tool_whose_reader_has_gone_ends_without_a_traceback(tmp_path):
    assert piped_into_nothing(str(RUNS), "list", str(tmp_path)) == (READER_GONE, "")


def test_so_does_a_run():
    code = "import sys; from bissl_zoo.engine.launch import launch; sys.exit(launch(lambda: print('x' * 100_000), 1))"
    assert piped_into_nothing("-c", code) == (READER_GONE, "")
