"""Many runs on one machine: what is refused, what they leave, how they fail, stop and go on."""

import json
import os
import signal
import threading
import time

import pytest

from bissl_zoo.config import LazyConfig
from bissl_zoo.errors import CheckpointError, ConfigError, Interrupted
from bissl_zoo.runs.lock import run_lock
from bissl_zoo.studies import job_process
from bissl_zoo.studies.jobs import Job, progress_line, run_jobs


@pytest.fixture
def short(tiny_config, at_scenes):
    """A config that pretrains for a step and fine-tunes for two."""

    def build(**changed):
        settings = dict(train__stages="[pretrain, finetune]", train__publish__name="null", pretrain__steps=1)
        return tiny_config(**settings | changed)

    return build


def test_jobs_are_processes_that_fail_and_are_killed_alone_and_what_is_finished_is_only_read(short, tmp_path):
    diverging = short(train__seed=1, optimizer__finetune="{_target_: torch.optim.SGD, lr: 1.0e+30}")
    jobs = [Job("good", short()), Job("diverging", diverging)]
    seen = []
    good, bad = run_jobs(jobs, tmp_path, parallel=2, on_done=seen.append)

    assert (good.name, good.status, good.message) == ("good", "finished", "")
    assert good.folder == tmp_path / "runs" / "good" and good.ran
    assert good.results == json.loads((good.folder / "results.json").read_text())
    assert "AP50" in good.results["pretrained"]
    assert (bad.status, bad.results) == ("failed", {})
    assert "finetune" in bad.message and "Traceback" not in bad.message
    assert bad.message in (tmp_path / "logs" / "diverging.log").read_text()
    assert sorted((outcome.done, outcome.total) for outcome in seen) == [(1, 2), (2, 2)]
    assert not os.path.exists(tmp_path / "run.lock")  # which would make a run of the folder

    log = (tmp_path / "logs" / "good.log").read_text()
    stamp = (good.folder / "results.json").stat().st_mtime_ns
    [again] = run_jobs([jobs[0]], tmp_path)
    assert (again.status, again.results, again.ran) == ("finished", good.results, False)
    assert (tmp_path / "logs" / "good.log").read_text() == log
    assert (good.folder / "results.json").stat().st_mtime_ns == stamp

    longer = Job("good", short(finetune__steps=100000))  # which a resumed run may be made
    lines = good.folder / "metrics.jsonl"

    def kill(job):
        if '"step": 3' in lines.read_text():
            os.kill(json.loads((good.folder / "run.lock").read_text())["pid"], signal.SIGKILL)

    [killed] = run_jobs([longer], tmp_path, stop_if=kill)
    assert (killed.status, killed.ran, killed.results) == ("failed", True, {})
    assert "SIGKILL" in killed.message and "good.log" in killed.message
    steps = [json.loads(line)["step"] for line in lines.read_text().splitlines()]
    assert steps[:4] == [1, 1, 2, 3]  # of pretraining, before, and after

    with pytest.raises(ConfigError, match=r"(?s)^good: .*another configuration.*train.seed +0 +5"):
        run_jobs([Job("new", short()), Job("good", short(train__seed=5, finetune__steps=100000))], tmp_path)
    assert not (tmp_path / "runs" / "new").exists()


def test_a_request_to_stop_reaches_the_jobs_which_save_and_go_on_at_the_next_call(short, tmp_path):
    cfg = short(train__stages="[pretrain]", pretrain__steps=100000, train__checkpoint__period=100000)
    metrics = tmp_path / "runs" / "long" / "metrics.jsonl"

    def ask():
        while not metrics.exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    asker = threading.Thread(target=ask, daemon=True)
    asker.start()
    with pytest.raises(Interrupted, match="0 of 2 runs are finished") as stopped:
        run_jobs([Job("long", cfg), Job("later", cfg)], tmp_path)
    assert stopped.value.status == 143
    assert (tmp_path / "runs" / "long" / "checkpoints" / "latest").exists()
    assert not (tmp_path / "runs" / "long" / "run.lock").exists() and not (tmp_path / "runs" / "later").exists()

    def reason(job):
        return "seen enough" if "resuming: pretrain" in (tmp_path / "logs" / "long.log").read_text() else None

    [outcome] = run_jobs([Job("long", cfg)], tmp_path, stop_if=reason)
    assert (outcome.status, outcome.message) == ("stopped", "seen enough")


def test_the_jobs_of_a_process_that_is_killed_save_and_end(process, short, tmp_path):
    LazyConfig.save(short(train__stages="[pretrain]", pretrain__steps=100000), tmp_path / "long.yaml")
    program = tmp_path / "program.py"
    program.write_text(
        "from pathlib import Path\n"
        "from bissl_zoo.config import LazyConfig\n"
        "from bissl_zoo.studies.jobs import Job, run_jobs\n"
        "if __name__ == '__main__':\n"
        f"    folder = Path({str(tmp_path)!r})\n"
        "    run_jobs([Job('long', LazyConfig.load(folder / 'long.yaml'))], folder)\n"
    )
    run = tmp_path / "runs" / "long"
    with process(program) as parent:
        deadline = time.monotonic() + 120
        while not (run / "metrics.jsonl").exists():
            assert parent.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        parent.kill()
    while (run / "run.lock").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert "stopped as asked" in (tmp_path / "logs" / "long.log").read_text()


def test_a_process_that_does_not_get_as_far_as_its_log_is_a_failure(short, tmp_path, monkeypatch, capfd):
    (tmp_path / "portalocker.py").write_text("raise ImportError('no such library')\n")
    monkeypatch.syspath_prepend(tmp_path)  # which a process that is started has as well
    [outcome] = run_jobs([Job("a", short())], tmp_path / "jobs")
    assert outcome.status == "failed" and outcome.message == "ended with status 1 before it began; see standard error"
    assert "no such library" in capfd.readouterr().err


def test_names_that_are_not_unique_or_no_folders_are_refused(short, tmp_path):
    with pytest.raises(ConfigError, match="2 jobs are called 'a'"):
        run_jobs([Job("a", short()), Job("a", short())], tmp_path)
    for name in ("../a", "a/b", "", ".hidden"):
        with pytest.raises(ConfigError, match="cannot be the name of a job"):
            run_jobs([Job(name, short())], tmp_path)
    with pytest.raises(ConfigError, match="0 jobs at a time"):
        run_jobs([Job("a", short())], tmp_path, parallel=0)
    assert list(tmp_path.iterdir()) == []


def test_a_config_that_cannot_be_is_refused_before_any_job_starts(short, tmp_path):
    with pytest.raises(ConfigError, match="b: .*train.log_period"):
        run_jobs([Job("a", short()), Job("b", short(train__log_period=0))], tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_under_torchrun_jobs_are_refused(short, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="torchrun"):
        run_jobs([Job("a", short())], tmp_path)


def test_a_folder_in_which_jobs_of_another_process_run_is_refused(short, tmp_path):
    with run_lock(tmp_path / ".jobs"), pytest.raises(CheckpointError, match=rf"in use.*process {os.getpid()}"):
        run_jobs([Job("a", short())], tmp_path)
    assert not (tmp_path / "runs").exists()


def test_each_of_the_jobs_at_a_time_has_a_gpu_of_its_own_and_a_share_of_the_threads(monkeypatch, tmp_path):
    monkeypatch.setattr(job_process.torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(job_process.torch, "get_num_threads", lambda: 8)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def slots(parallel=None):
        return job_process.LocalPool(tmp_path, parallel).slots

    def gpus(parallel):
        return [slot["CUDA_VISIBLE_DEVICES"] for slot in slots(parallel)]

    assert gpus(None) == ["0", "1"] and gpus(3) == ["0", "1", "0"]
    assert [slot["OMP_NUM_THREADS"] for slot in slots(3)] == ["2"] * 3
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5, GPU-8932f937")
    assert gpus(None) == ["5", "GPU-8932f937"]
    monkeypatch.setattr(job_process.torch.cuda, "device_count", lambda: 0)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert [slot.get("CUDA_VISIBLE_DEVICES") for slot in slots()] == [None]


def test_a_line_of_progress_has_count_figures_time_and_the_time_that_is_left(tmp_path):
    outcome = job_process.JobOutcome("trial_006", tmp_path, "finished", seconds=42, done=7, total=100, eta=2470.0)
    assert progress_line(outcome, "top1 0.612") == "[  7/100] trial_006 finished  top1 0.612  0:00:42  ETA 0:41:10"
    failed = job_process.JobOutcome("b", tmp_path, "failed", message="first\nsecond", seconds=1, done=2, total=2, eta=0)
    assert progress_line(failed) == "[2/2] b failed  first  0:00:01"
