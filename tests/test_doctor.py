"""The doctor from its command line, in environments that are well and in such as are not."""

import ast
import errno
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import portalocker
import pytest

from bissl_zoo.doctor import OK, PROBLEM, WARNING, Finding, examine, folders, libraries, machine, page, worst
from bissl_zoo.doctor.packages import EXTRAS, PINS, check_compiler
from bissl_zoo.errors import ConfigError

REPOSITORY = Path(__file__).resolve().parents[1]
BROKEN_TORCHVISION = 'raise RuntimeError("operator torchvision::nms does not exist")\n'


@pytest.fixture
def doctor(tmp_path):
    """Call `python -m bissl_zoo doctor`: `doctor("zoo", stubs=folder, BISSL_ZOO=...)` -> the finished process."""

    def call(*arguments, stubs="", **environment):
        path = os.pathsep.join(filter(None, [str(stubs), str(REPOSITORY), os.environ.get("PYTHONPATH")]))
        whole = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment}
        command = [sys.executable, "-m", "bissl_zoo", "doctor", *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=whole, timeout=300)

    return call


def stub_distribution(folder, name, version, requires=()):
    """Have a folder of PYTHONPATH say that a distribution is installed."""
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    (info / "METADATA").write_text("\n".join([*lines, *(f"Requires-Dist: {one}" for one in requires)]) + "\n")


def by_subject(ran):
    return {finding["subject"]: Finding(**finding) for finding in json.loads(ran.stdout)["findings"]}


def test_a_healthy_environment_has_no_problem(doctor, scenes):
    ran = doctor("--json", BISSL_ZOO_DATASETS=str(scenes), BISSL_ZOO="", BISSL_ZOO_OFFLINE="")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    content, found = json.loads(ran.stdout), by_subject(ran)
    assert content["status"] in (OK, WARNING)
    assert {"python", "torch", "torchvision", "timm", "omegaconf", "cpu", "runs", "data sets", "zoo", "cache"} <= {
        *found
    }
    assert found["torchvision"].status == OK and "operators run" in found["torchvision"].found
    assert not any(finding.status == PROBLEM for finding in found.values())


def test_a_torchvision_of_another_build_is_told_with_the_remedy_and_the_others_are_looked_at(doctor, tmp_path):
    stub = tmp_path / "stubs" / "torchvision"
    stub.mkdir(parents=True)
    (stub / "__init__.py").write_text(BROKEN_TORCHVISION)
    ran = doctor("python", "torchvision", "timm", "known_datasets", "cpu", stubs=stub.parent)
    assert ran.returncode == 1
    lines = ran.stdout.splitlines()
    assert "operator torchvision::nms does not exist" in ran.stdout
    assert "-> torch and torchvision must be builds of one kind" in ran.stdout
    assert any(line.startswith("ok") and " cpu " in line for line in lines)
    assert any(line.startswith("problem  known_datasets") and "torchvision::nms" in line for line in lines)


def test_a_library_that_takes_the_process_with_it_does_not_take_the_other_checks(doctor, tmp_path):
    stub = tmp_path / "stubs" / "torchvision"
    stub.mkdir(parents=True)
    (stub / "__init__.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n")
    ran = doctor("python", "torchvision", "cpu", "--json", stubs=stub.parent)
    found = by_subject(ran)
    assert ran.returncode == 1
    assert found["torchvision"].status == PROBLEM and "SIGSEGV" in found["torchvision"].found
    assert str(stub) in found["torchvision"].found  # where it died
    assert found["python"].status == found["cpu"].status == OK


def test_a_check_that_hangs_is_given_up(tmp_path, monkeypatch):
    (tmp_path / "timm.py").write_text("import time\ntime.sleep(600)\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{REPOSITORY}")
    findings = examine(["python", "timm", "cpu"], timeout=8.0)
    assert [finding.status for finding in findings[:3]] == [OK, PROBLEM, OK]
    assert findings[1].found == "no answer within 8 seconds"


def test_an_omegaconf_outside_the_pins_is_a_warning(doctor, tmp_path):
    stub_distribution(tmp_path / "stubs", "omegaconf", "2.4.0")
    ran = doctor("packages", "--json", stubs=tmp_path / "stubs")
    finding = by_subject(ran)["omegaconf"]
    assert ran.returncode == 0
    assert finding.status == WARNING and "2.4.0" in finding.found and "Detectron2" in finding.found
    assert finding.remedy == 'pip install "omegaconf>=2.3,<2.4"'


def test_versions_of_torch_and_torchvision_that_do_not_belong_together_are_a_problem(doctor, tmp_path):
    stub_distribution(tmp_path / "stubs", "torchvision", "0.30.0", ["torch (==99.1.0)"])
    ran = doctor("packages", stubs=tmp_path / "stubs")
    assert ran.returncode == 1
    assert "torchvision needs torch==99.1.0" in ran.stdout
    assert "pip install --upgrade torchvision" in ran.stdout


def test_a_package_that_is_too_old_is_a_problem(doctor, tmp_path):
    stub_distribution(tmp_path / "stubs", "timm", "0.4.12")
    ran = doctor("packages", "--json", stubs=tmp_path / "stubs")
    assert by_subject(ran)["timm"].status == PROBLEM and ran.returncode == 1


def test_a_numpy_that_torch_was_not_built_for_is_told(doctor, tmp_path):
    stub = tmp_path / "stubs" / "torch"
    stub.mkdir(parents=True)
    (stub / "__init__.py").write_text(
        "class version: cuda, hip = None, None\n"
        "__version__ = '2.15.0'\n"
        "def from_numpy(array): raise RuntimeError('Numpy is not available')\n"
    )
    ran = doctor("torch", "--json", stubs=stub.parent)
    finding = by_subject(ran)["numpy"]
    assert finding.status == PROBLEM and "Numpy is not available" in finding.found
    assert "pip install --upgrade torch numpy" in finding.remedy


def test_data_sets_that_are_missing_are_told(doctor, tmp_path):
    ran = doctor("datasets", "--json", BISSL_ZOO_DATASETS=str(tmp_path / "nowhere"))
    finding = by_subject(ran)["data sets"]
    assert ran.returncode == 0
    assert finding.status == WARNING and str(tmp_path / "nowhere") in finding.found
    assert "BISSL_ZOO_DATASETS" in finding.remedy


def test_data_sets_that_are_there_are_named(at_scenes):
    (finding,) = folders.check_datasets()
    assert finding.status == OK and next(at_scenes.iterdir()).name in finding.found


def test_sets_that_are_known_by_name_are_found(tmp_path, monkeypatch):
    monkeypatch.setenv("BISSL_ZOO_DATASETS", str(tmp_path))
    assert "none" in folders.check_known_datasets()[0].found
    (tmp_path / "VOCdevkit").mkdir()
    assert "voc_detection" in folders.check_known_datasets()[0].found


def test_a_zoo_that_cannot_be_reached_is_told_and_the_next_one_is_read(tmp_path, monkeypatch):
    (tmp_path / "zoo").mkdir()
    monkeypatch.setenv("BISSL_ZOO", f"http://127.0.0.1:9/zoo,{tmp_path / 'zoo'}")
    monkeypatch.delenv("BISSL_ZOO_OFFLINE", raising=False)
    unreachable, local = folders.check_zoo()
    assert unreachable.status == PROBLEM and "127.0.0.1:9" in unreachable.found and "BISSL_ZOO" in unreachable.remedy
    assert local.status == OK and "0 entries" in local.found


def test_a_damaged_index_is_told(tmp_path, monkeypatch):
    (tmp_path / "index.json").write_text("{")
    monkeypatch.setenv("BISSL_ZOO", str(tmp_path))
    (finding,) = folders.check_zoo()
    assert finding.status == PROBLEM and "index.json" in finding.found


def test_the_cache_tells_its_size(tmp_path, monkeypatch):
    monkeypatch.setenv("BISSL_ZOO_CACHE", str(tmp_path))
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "a").write_bytes(bytes(20 << 20))
    (finding,) = folders.check_cache()
    assert str(tmp_path) in finding.found and "0.02 GiB, " in finding.found


def test_a_run_folder_that_is_not_there_yet_is_tried_where_it_would_be_made(tmp_path, monkeypatch):
    monkeypatch.setenv(folders.RUNS_VARIABLE, str(tmp_path / "deep" / "runs"))
    (finding,) = folders.check_run_folder()
    assert finding.status in (OK, WARNING) and f"to be made in {tmp_path}" in finding.found
    assert not list(tmp_path.iterdir())  # nothing is left


def test_a_run_folder_that_cannot_be_written_is_a_problem(doctor):
    ran = doctor("runs", "--json", "--runs", "/proc/runs")
    finding = by_subject(ran)["runs"]
    assert ran.returncode == 1
    assert finding.status == PROBLEM and "cannot be written" in finding.found and "train.output_dir" in finding.remedy


def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch):
    def refuse(*_):
        raise portalocker.LockException("no locks available")

    monkeypatch.setattr(portalocker, "lock", refuse)
    monkeypatch.setenv(folders.RUNS_VARIABLE, str(tmp_path))
    found = [finding.found for finding in folders.check_run_folder()]
    assert any("has no locks" in one for one in found)


def test_locks_that_keep_nobody_out_are_told(tmp_path, monkeypatch):
    monkeypatch.setattr(portalocker, "lock", lambda *_: None)
    monkeypatch.setenv(folders.RUNS_VARIABLE, str(tmp_path))
    assert any("does not keep locks" in finding.found for finding in folders.check_run_folder())


def test_a_file_system_that_does_not_replace_files_is_told(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "replace", refuse)
    monkeypatch.setenv(folders.RUNS_VARIABLE, str(tmp_path))
    assert any("does not replace files" in finding.found for finding in folders.check_run_folder())


def test_little_shared_memory_is_told_with_the_containers_option(tmp_path):
    (finding,) = machine.check_shared_memory(str(tmp_path), least=1 << 60)
    assert finding.status == WARNING and "--shm-size" in finding.remedy
    (finding,) = machine.check_shared_memory(str(tmp_path), least=1)
    assert finding.status == OK


def test_a_low_limit_of_open_files_is_told():
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(before[1], 512), before[1]))
    try:
        (finding,) = machine.check_open_files()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert finding.status == WARNING and "512 at most" in finding.found and "ulimit -n" in finding.remedy
    assert machine.check_open_files(least=1)[0].status == OK


def test_more_threads_than_processors_are_told(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "4096")
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    warnings = [finding for finding in machine.check_cpu() if finding.status == WARNING]
    assert ["OMP_NUM_THREADS" in warnings[0].found, "OMP_WAIT_POLICY" in warnings[1].found] == [True, True]


def test_a_compiler_that_does_not_exist_is_told(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    (finding,) = check_compiler()
    assert finding.status == WARNING and "CXX=no-such-compiler" in finding.found


def test_a_gpu_that_does_not_compute_is_a_problem(monkeypatch):
    import torch

    class Facts:
        name, total_memory = "Some GPU", 8 << 30

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Facts)
    finding = libraries._gpu(64, "550.54")  # which no machine has
    assert finding.status == PROBLEM and "does not compute" in finding.found and finding.remedy
    assert finding.found.startswith("Some GPU, 8 GiB, driver 550.54")


def test_a_driver_without_cuda_is_told(tmp_path, monkeypatch):
    import torch

    (tmp_path / "version").write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar 5\n")
    monkeypatch.setattr(libraries, "_DRIVER", str(tmp_path / "version"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (finding,) = libraries.check_gpus()
    assert finding.status == WARNING and "550.54.15" in finding.found and "take the CPU" in finding.found


def test_what_is_asked_for_is_what_setup_says():
    """The pins and the optional parts that the doctor knows are those of setup.py."""
    calls = [n for n in ast.walk(ast.parse((REPOSITORY / "setup.py").read_text())) if isinstance(n, ast.keyword)]
    values = {keyword.arg: keyword.value for keyword in calls}
    required = {ast.literal_eval(one) for one in values["install_requires"].elts}
    assert {f"{name}{pin}" for name, pin in PINS.items()} <= required
    assert {ast.literal_eval(key) for key in values["extras_require"].keys} <= {*EXTRAS}


def test_the_page_has_the_remedy_below_and_counts_at_the_end():
    findings = [
        Finding(OK, "a", "fine"),
        Finding(WARNING, "long name", "so so", "do this\nor that"),
        Finding(PROBLEM, "b", "bad"),
    ]
    assert page(findings) == (
        "ok       a          fine\n"
        "warning  long name  so so\n"
        "                    -> do this\n"
        "                    -> or that\n"
        "problem  b          bad\n"
        "\n"
        "1 problem, 1 warning"
    )  # fmt: skip
    assert worst(findings) == PROBLEM and worst(findings[:2]) == WARNING and worst([]) == OK
    assert page([Finding(OK, "a", "fine")]).endswith("all is well")


def test_an_unknown_check_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match="Did you mean 'torchvision'"):
        examine(["torchvison"])
