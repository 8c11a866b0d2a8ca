"""`--help`, usage errors and lists are answered without importing a heavy library."""

import ast
import json
import os
import subprocess
import sys

import pytest
from command_line import TOOLS

pytestmark = pytest.mark.slow  # starts a process

REPOSITORY = TOOLS.parent
HEAVY = ["torch", "torchvision", "timm", "numpy", "scipy", "sklearn", "pandas", "matplotlib", "PIL", "safetensors"]
SCRIPTS = sorted(f"tools/{script.name}" for script in TOOLS.glob("*.py"))
LISTS = [["tools/zoo.py", "list"], ["tools/prepare_data.py", "--list"]]
#: for each command of a JSON list, prints [exit status, stdout, stderr, heavy modules imported so far]
PROGRAM = f"""
import contextlib, io, json, runpy, sys
for command in json.load(sys.stdin):
    sys.argv, out, err, status = command, io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            if command[0] == "bissl_zoo":
                runpy.run_module("bissl_zoo", run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(command[0], run_name="__main__")
        except SystemExit as exit:
            status = exit.code
    print(json.dumps([status, out.getvalue(), err.getvalue(), sorted(sys.modules.keys() & set({HEAVY}))]))
"""


@pytest.fixture(scope="module")
def answer(tmp_path_factory):
    """Run commands in one process: `answer([command, ...])` -> one answer of `PROGRAM` for each."""
    (folder := tmp_path_factory.mktemp("zoo") / "model_zoo").mkdir()
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "BISSL_ZOO": str(folder)}

    def call(commands):
        ran = subprocess.run(
            [sys.executable, "-c", PROGRAM],
            input=json.dumps(commands),
            capture_output=True,
            text=True,
            cwd=REPOSITORY,
            env=environment,
        )
        assert ran.returncode == 0, ran.stderr
        return [json.loads(line) for line in ran.stdout.splitlines()]

    return call


def test_help_prints_the_docstring_and_imports_nothing_heavy(answer):
    for script, (status, out, err, heavy) in zip(SCRIPTS, answer([[s, "--help"] for s in SCRIPTS]), strict=True):
        docstring = ast.get_docstring(ast.parse((REPOSITORY / script).read_text(encoding="utf-8")))
        assert (status, err, heavy) == (0, "", []) and docstring in out, script


def test_an_unknown_option_is_a_usage_error_and_imports_nothing_heavy(answer):
    commands = [[script, "--no-such-option"] for script in SCRIPTS] + [["bissl_zoo", "doctor", "--no-such-option"]]
    for command, (status, out, err, heavy) in zip(commands, answer(commands), strict=True):
        assert (status, out, heavy) == (2, "", []) and err.startswith("usage:") and "error:" in err, command


@pytest.mark.parametrize("command", LISTS, ids=lambda command: command[0])
def test_lists_import_no_torch(answer, command):
    [[status, _, err, heavy]] = answer([command])
    assert status == 0, err
    assert "torch" not in heavy
