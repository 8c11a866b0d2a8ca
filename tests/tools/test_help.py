"""`--help`, usage errors and lists are answered without importing a heavy library."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bissl_zoo.cli import COMMANDS

pytestmark = pytest.mark.slow  # starts a process

REPOSITORY = Path(__file__).resolve().parents[2]
HEAVY = ["torch", "torchvision", "timm", "numpy", "scipy", "sklearn", "pandas", "matplotlib", "PIL", "safetensors"]
SCRIPTS = sorted(str(script.relative_to(REPOSITORY)) for script in (REPOSITORY / "tools").glob("*.py"))
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


def docstring(command):
    module = REPOSITORY / "bissl_zoo" / "cli" / f"{command}.py"
    return ast.get_docstring(ast.parse(module.read_text(encoding="utf-8")))


def test_help_prints_the_docstring_of_each_command_and_imports_nothing_heavy(answer):
    commands = [["bissl_zoo", name, "--help"] for name in COMMANDS] + [[script, "--help"] for script in SCRIPTS]
    outputs = []
    for command, (status, out, err, heavy) in zip(commands, answer(commands), strict=True):
        assert (status, err, heavy) == (0, "", []), command
        outputs.append(out)
    for name, out in zip(COMMANDS, outputs, strict=False):
        assert out.startswith(f"usage: bissl {name} ") and docstring(name) in out, name
    assert set(outputs[len(COMMANDS) :]) < set(outputs)  # a script is a command


def test_usage_errors_name_the_nearest_command_and_import_nothing_heavy(answer):
    commands = [["bissl_zoo", name, "--no-such-option"] for name in COMMANDS] + [["bissl_zoo"], ["bissl_zoo", "trian"]]
    answers = answer(commands)
    for command, (status, out, err, heavy) in zip(commands, answers, strict=True):
        assert (status, out, heavy) == (2, "", []) and err.startswith("usage:") and "error:" in err, command
    assert "Did you mean 'train'?" in answers[-1][2]
    [[status, out, _, heavy]] = answer([["bissl_zoo", "--help"]])
    assert (status, heavy) == (0, []) and all(f"  {name} " in out for name in COMMANDS)


@pytest.mark.parametrize("command", [["bissl_zoo", "zoo", "list"], ["bissl_zoo", "data", "--list"]], ids=str)
def test_lists_import_no_torch(answer, command):
    [[status, _, err, heavy]] = answer([command])
    assert status == 0, err
    assert "torch" not in heavy
