"""The doctor, in a healthy environment and in broken ones."""

import ast
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import portalocker
import pytest
import torch

from bissl_zoo import doctor
from bissl_zoo.doctor import OK, PINS, PROBLEM, WARNING, Finding, examine, page, worst
from bissl_zoo.errors import ConfigError

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture
def run_doctor(tmp_path):
    """Call `python -m bissl_zoo doctor`: `run_doctor("zoo", BISSL_ZOO=...)` -> exit status, findings by subject."""

    def call(*arguments, **environment):
        path = os.pathsep.join([str(tmp_path / "stubs"), str(REPOSITORY)])
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment}
        command = [sys.executable, "-m", "bissl_zoo", "doctor", *arguments, "--json"]
        ran = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=300)
        assert ran.stdout, ran.stderr
        findings = [Finding(**finding) for finding in json.loads(ran.stdout)["findings"]]
        assert json.loads(ran.stdout)["status"] == worst(findings) and ran.returncode == (worst(findings) == PROBLEM)
        return {finding.subject: finding for finding in findings}

    return call


@pytest.fixture
def stub(tmp_path):
    """Install a module of this content, or metadata of a distribution: `stub("timm", version="0.4")`."""

    def install(name, content=None, version="1", requires=()):
        folder = tmp_path / "stubs" / (name if content is not None else f"{name}-{version}.dist-info")
        folder.mkdir(parents=True)
        if content is not None:
            (folder / "__init__.py").write_text(content)
        else:
            lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
            lines += [f"Requires-Dist: {requirement}" for requirement in requires]
            (folder / "METADATA").write_text("\n".join(lines) + "\n")

    return install


def only(findings):
    (finding,) = findings
    return finding


@pytest.mark.slow
def test_a_healthy_environment_has_no_problem(run_doctor, scenes):
    findings = run_doctor(BISSL_ZOO_DATASETS=str(scenes), BISSL_ZOO="", BISSL_ZOO_OFFLINE="")
    assert {"python", "cpu", "runs", "data sets", "torch", "torchvision", "zoo"} <= {*findings}
    assert worst(findings.values()) != PROBLEM and "operators run" in findings["torchvision"].message


@pytest.mark.slow
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('raise RuntimeError("operator torchvision::nms does not exist")', "torchvision::nms does not exist"),
        ("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)", "SIGSEGV"),
    ],
)
def test_a_broken_library_is_a_problem_and_the_other_checks_are_made(run_doctor, stub, content, message):
    stub("torchvision", content)
    findings = run_doctor("torchvision", "machine")
    assert findings["torchvision"].status == PROBLEM and message in findings["torchvision"].message
    assert findings["torchvision"].advice and findings["cpu"].status == OK


@pytest.mark.slow
def test_a_check_that_hangs_is_stopped(stub, tmp_path, monkeypatch):
    stub("torchvision", "import time\ntime.sleep(600)\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'stubs'}{os.pathsep}{REPOSITORY}")
    findings = examine(["torchvision", "machine"], timeout=8.0)
    assert [finding.status for finding in findings[:2]] == [PROBLEM, OK]
    assert findings[0].message == "no answer within 8 seconds"


@pytest.mark.slow
def test_versions_that_do_not_belong_together_are_found(run_doctor, stub):
    stub("omegaconf", version="2.4.0")
    stub("torchvision", version="0.30.0", requires=["torch (==99.1.0)"])
    stub(
        "torch", "class version: cuda, hip = None, None\n__version__ = '2'\ndef from_numpy(array): raise TypeError(1)\n"
    )
    findings = run_doctor("packages", "torch")
    assert findings["omegaconf"].status == WARNING and "Detectron2" in findings["omegaconf"].message
    assert findings["omegaconf"].advice == 'pip install "omegaconf>=2.3,<2.4"'
    assert findings["numpy"].status == PROBLEM and "pip" in findings["numpy"].advice


def test_data_sets_are_listed_or_missing(scenes, monkeypatch, tmp_path):
    monkeypatch.setenv("BISSL_ZOO_DATASETS", str(scenes))
    finding = only(doctor.check_datasets())
    assert finding.status == OK and next(scenes.iterdir()).name in finding.message
    monkeypatch.setenv("BISSL_ZOO_DATASETS", str(tmp_path / "nowhere"))
    finding = only(doctor.check_datasets())
    assert finding.status == WARNING and "nowhere" in finding.message and "BISSL_ZOO_DATASETS" in finding.advice


def test_a_damaged_zoo_is_a_problem_and_the_next_one_is_read(tmp_path, monkeypatch):
    for name in ("damaged", "zoo"):
        (tmp_path / name).mkdir()
    (tmp_path / "damaged" / "index.json").write_text("{")
    monkeypatch.setenv("BISSL_ZOO", f"{tmp_path / 'damaged'},{tmp_path / 'zoo'}")
    damaged, local = doctor.check_zoo()
    assert damaged.status == PROBLEM and "index.json" in damaged.message and "BISSL_ZOO" in damaged.advice
    assert local.status == OK and "0 entries" in local.message


def test_a_run_folder_is_tried_where_it_would_be_created_and_nothing_remains(tmp_path, monkeypatch):
    monkeypatch.setenv(doctor.RUNS_VARIABLE, str(tmp_path / "deep" / "runs"))
    finding = only(doctor.check_run_folder())
    assert finding.status in (OK, WARNING) and f"created in {tmp_path}" in finding.message
    assert not list(tmp_path.iterdir())
    monkeypatch.setenv(doctor.RUNS_VARIABLE, "/proc/runs")
    finding = only(doctor.check_run_folder())
    assert finding.status == PROBLEM and "cannot be written" in finding.message and "output_dir" in finding.advice


def refuse(*_):
    raise portalocker.LockException("no locks available")


@pytest.mark.parametrize(
    ("replacement", "message"), [(refuse, "has no locks.*train.lock=False"), (lambda *_: None, "ignores locks")]
)
def test_a_file_system_that_does_not_suit_runs_is_a_warning(tmp_path, monkeypatch, replacement, message):
    monkeypatch.setenv(doctor.RUNS_VARIABLE, str(tmp_path))
    monkeypatch.setattr(portalocker, "lock", replacement)
    finding = only(doctor.check_run_folder())
    assert finding.status == WARNING and re.search(message, finding.message)


def test_limits_of_the_machine_are_warnings_with_advice(monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: namedtuple("Usage", "free")(1 << 20))
    monkeypatch.setattr(resource, "getrlimit", lambda _: (512, 4096))
    monkeypatch.setenv("OMP_NUM_THREADS", "4096")
    findings = {finding.subject: finding for finding in doctor.check_machine()}
    assert findings["cpu"].status == OK and "OMP_NUM_THREADS" in findings["openmp"].message
    assert findings["open files"].status == WARNING and findings["open files"].advice == "ulimit -n 4096"
    assert "--shm-size" in findings["shared memory"].advice or not os.path.isdir("/dev/shm")


def test_a_gpu_that_does_not_compute_is_a_problem(monkeypatch):
    class Properties:
        name, total_memory = "Some GPU", 8 << 30

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties)
    finding = doctor._check_gpu(64, "550.54")  # which no machine has
    assert finding.status == PROBLEM and "does not compute" in finding.message and finding.advice
    assert finding.message.startswith("Some GPU, 8 GiB, driver 550.54")


def test_pins_are_those_of_setup():
    calls = [n for n in ast.walk(ast.parse((REPOSITORY / "setup.py").read_text())) if isinstance(n, ast.keyword)]
    (required,) = [ast.literal_eval(keyword.value) for keyword in calls if keyword.arg == "install_requires"]
    assert {f"{name}{pin}" for name, pin in PINS.items()} <= {*required}


def test_the_page_has_the_advice_below_and_totals_at_the_end():
    findings = [Finding(OK, "a", "fine"), Finding(WARNING, "long name", "so so", "do this\nor that")]
    assert page(findings).splitlines() == [
        "ok       a          fine",
        "warning  long name  so so",
        "                    -> do this",
        "                    -> or that",
        "",
        "1 warning",
    ]
    assert worst([*findings, Finding(PROBLEM, "b", "bad")]) == PROBLEM and worst([]) == OK
    assert page(findings[:1]).endswith("all is well")


def test_an_unknown_check_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match="Did you mean 'torchvision'"):
        examine(["torchvison"])
