"""Runs the checks in a process of their own, so that none of them, however it ends, keeps the others from theirs."""

import importlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict

from bissl_zoo.doctor.finding import PROBLEM, Finding
from bissl_zoo.doctor.folders import RUNS_VARIABLE
from bissl_zoo.errors import ConfigError, did_you_mean

#: every check by name, in the order of the page, and the function of this package that makes it
CHECKS = {
    "python": "packages:check_python",
    "packages": "packages:check_packages",
    "extras": "packages:check_extras",
    "compiler": "packages:check_compiler",
    "cpu": "machine:check_cpu",
    "memory": "machine:check_shared_memory",
    "files": "machine:check_open_files",
    "runs": "folders:check_run_folder",
    "datasets": "folders:check_datasets",
    "torch": "libraries:check_torch",
    "threads": "libraries:check_threads",
    "gpu": "libraries:check_gpus",
    "torchvision": "libraries:check_torchvision",
    "timm": "libraries:check_timm",
    "detectron2": "libraries:check_detectron2",
    "known_datasets": "folders:check_known_datasets",
    "zoo": "folders:check_zoo",
    "cache": "folders:check_cache",
}
#: seconds that the checks may take together; one that waits for a device or a network may hang
TIMEOUT = 60.0

_CHILD = "from bissl_zoo.doctor.examination import report_each; import sys; report_each(sys.argv[1:])"


def examine(names: Sequence[str] = (), runs: str | None = None, timeout: float = TIMEOUT) -> list[Finding]:
    """The findings of the checks named, or of all of them.

    Args:
        runs: the folder that runs are to be written to; None for `runs` in the working directory.
    Raises:
        ConfigError: there is no check of that name.
    """
    for name in names:
        if name not in CHECKS:
            raise ConfigError(f"No check '{name}'.{did_you_mean(name, CHECKS)} Checks: {', '.join(CHECKS)}.")
    left, findings = list(names or CHECKS), []
    environment = {**os.environ, **({RUNS_VARIABLE: runs} if runs else {})}
    while left:
        done, ending = _examine_in_a_process(left, environment, timeout)
        for found in done.values():
            findings += found
        left = left[len(done) :]
        if left:  # the first of these has ended the process
            findings.append(Finding(PROBLEM, left.pop(0), ending, "Install what it ended in again."))
    return findings


def _examine_in_a_process(
    names: Sequence[str], environment: Mapping[str, str], timeout: float
) -> tuple[dict[str, list[Finding]], str]:
    """The findings by check, as far as the process came, and how it ended."""
    command = [sys.executable, "-X", "faulthandler", "-c", _CHILD, *names]
    try:
        ran = subprocess.run(command, capture_output=True, timeout=timeout, text=True, env=environment)
        written, ending = ran.stdout, _ending(ran.returncode, ran.stderr)
    except subprocess.TimeoutExpired as error:
        written, ending = (error.stdout or b"").decode(), f"no answer within {timeout:g} seconds"
    done = {}
    for line in written.rpartition("\n")[0].splitlines():  # the last one may be cut short
        said = json.loads(line)
        done[said["check"]] = [Finding(**finding) for finding in said["findings"]]
    return done, ending


def _ending(status: int, errors: str) -> str:
    lines = errors.strip().splitlines() or ["it said nothing"]
    if status < 0:
        place = next((line.strip() for line in lines if line.startswith("  File ")), lines[-1])
        return f"the process died of {signal.Signals(-status).name} ({place})"
    last = lines[-1]
    return f"the process ended with status {status} ({last})"


def report_each(names: Sequence[str]) -> None:
    """Make the checks in this process and write a line of JSON for each; what libraries print goes elsewhere."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as out:
        os.dup2(2, 1)
        for name in names:
            findings = [asdict(finding) for finding in _make(name)]
            print(json.dumps({"check": name, "findings": findings}), file=out, flush=True)


def _make(name: str) -> list[Finding]:
    module, function = CHECKS[name].split(":")
    try:
        return getattr(importlib.import_module(f"bissl_zoo.doctor.{module}"), function)()
    # foreign libraries raise whatever they like, and each check is to have its turn
    except Exception as error:
        message = " ".join(str(error).split()) or "without a word"
        return [Finding(PROBLEM, name, f"{type(error).__name__}: {message}")]
