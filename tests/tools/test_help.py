"""Help and refusals of the command lines, which come before anything is imported that takes seconds."""

import ast
import os
import subprocess
import sys

import pytest
from command_line import TOOLS

REPOSITORY = TOOLS.parent
SLOW = {"torch", "torchvision", "timm", "numpy", "scipy", "sklearn", "pandas", "matplotlib", "PIL", "safetensors"}
SCRIPTS = sorted(TOOLS.glob("*.py"))
EVERY_SCRIPT = pytest.mark.parametrize("script", SCRIPTS, ids=[script.stem for script in SCRIPTS])


def call(*arguments):
    """The exit status, what was printed, what was said on standard error, and the packages that were imported."""
    command = [sys.executable, "-X", "importtime", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    ran = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, env=environment)
    lines = ran.stderr.splitlines()
    timed = [line for line in lines if line.startswith("import time:")]
    packages = {line.rpartition("|")[2].strip().partition(".")[0] for line in timed}
    assert "argparse" in packages
    return ran.returncode, ran.stdout, "\n".join(line for line in lines if line not in timed), packages


@EVERY_SCRIPT
def test_help_prints_the_docstring_and_imports_nothing_slow(script):
    status, out, err, packages = call(script, "--help")
    assert (status, err) == (0, "") and ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))) in out
    assert not SLOW & packages


@EVERY_SCRIPT
def test_a_wrong_option_is_refused_and_nothing_slow_is_imported(script):
    status, out, err, packages = call(script, "--no-such-option")
    assert (status, out) == (2, "") and err.startswith("usage:") and "error:" in err
    assert not SLOW & packages


@pytest.mark.parametrize("arguments, expected", [(["--help"], 0), (["--no-such-option"], 2)])
def test_nor_does_the_doctor_import_it_to_say_how_it_is_called(arguments, expected):
    status, out, err, packages = call("-m", "bissl_zoo", "doctor", *arguments)
    assert status == expected and "usage: python -m bissl_zoo" in out + err
    assert not SLOW & packages
