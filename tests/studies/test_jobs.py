"""The job pool: validation, slots, failures, signals and resume."""

import json
import os
import signal
import threading
import time

import pytest

from bissl_zoo.config import LazyConfig
from bissl_zoo.errors import CheckpointError, ConfigError, Interrupted
from bissl_zoo.runs.lock import LOCK_FILE, run_lock
from bissl_zoo.studies.jobs import progress_line, run_jobs
from bissl_zoo.studies.places import Job, JobOutcome


@pytest.fixture
def short(tiny_config, at_scenes):
    """A config that pretrains for a step and fine-tunes for two."""

    def build(**changed):
        settings = dict(train__stages="[pretrain, finetune]", train__publish__name="null", pretrain__steps=1)
        return tiny_config(**settings | changed)

    return build


def steps_in(metrics):
    records = map(json.loads, metrics.read_text().splitlines())
    return [record["step"] for record in records if "event" not in record]


def wait_for(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
def test_a_job_that_fails_or_is_killed_leaves_the_others_alone_and_a_finished_one_is_not_repeated(short, tmp_path):
    diverging = short(train__seed=1, optimizer__finetune="{_target_: torch.optim.SGD, lr: 1.0e+30}")
    jobs = [Job("good", lambda: short()), Job("diverging", diverging)]
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

    log = (tmp_path / "logs" / "good.log").read_text()
    stamp = (good.folder / "results.json").stat().st_mtime_ns
    [again] = run_jobs([Job("good", short())], tmp_path)
    assert (again.status, again.results, again.ran) == ("finished", good.results, False)
    assert (tmp_path / "logs" / "good.log").read_text() == log
    assert (good.folder / "results.json").stat().st_mtime_ns == stamp

    longer = Job("good", short(finetune__steps=100000))  # a resumed run may get longer
    lines = good.folder / "metrics.jsonl"

    def kill(job):
        lock = good.folder / LOCK_FILE
        if '"step": 3' in lines.read_text() and lock.exists():
            os.kill(int(lock.read_text().split()[1]), signal.SIGKILL)  # process PID on HOST

    [killed] = run_jobs([longer], tmp_path, stop_if=kill)
    assert (killed.status, killed.ran, killed.results) == ("failed", True, {})
    assert "SIGKILL" in killed.message and "good.log" in killed.message
    assert steps_in(lines)[:4] == [1, 1, 2, 3]  # pretraining, fine-tuning before and after the resume

    with pytest.raises(ConfigError, match=r"(?s)^good: .*train.seed +0 +5"):
        run_jobs([Job("new", short()), Job("good", short(train__seed=5, finetune__steps=100000))], tmp_path)
    assert not (tmp_path / "runs" / "new").exists()


@pytest.mark.slow
def test_a_signal_to_stop_reaches_the_jobs_which_save_and_resume_at_the_next_call(short, tmp_path):
    cfg = short(train__stages="[pretrain]", pretrain__steps=100000, train__checkpoint__period=100000)
    metrics = tmp_path / "runs" / "long" / "metrics.jsonl"

    def ask():
        wait_for(metrics.exists)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=ask, daemon=True).start()
    with pytest.raises(Interrupted, match="0 of 2 runs are finished") as stopped:
        run_jobs([Job("long", cfg), Job("later", cfg)], tmp_path)
    assert stopped.value.status == 143
    assert (tmp_path / "runs" / "long" / "checkpoints" / "latest").exists()
    assert not (tmp_path / "runs" / "later").exists()
    count = len(metrics.read_text().splitlines())

    def reason(job):
        return "seen enough" if len(metrics.read_text().splitlines()) > count else None

    [outcome] = run_jobs([Job("long", cfg)], tmp_path, stop_if=reason)
    assert (outcome.status, outcome.message) == ("stopped", "seen enough")
    steps = steps_in(metrics)
    assert steps == list(range(1, len(steps) + 1))


@pytest.mark.slow
def test_the_jobs_of_a_process_that_is_killed_save_and_end(process, short, tmp_path):
    LazyConfig.save(short(train__stages="[pretrain]", pretrain__steps=100000), tmp_path / "long.yaml")
    program = tmp_path / "program.py"
    program.write_text(
        "from pathlib import Path\n"
        "from bissl_zoo.config import LazyConfig\n"
        "from bissl_zoo.studies.jobs import run_jobs\n"
        "from bissl_zoo.studies.places import Job\n"
        "if __name__ == '__main__':\n"
        f"    folder = Path({str(tmp_path)!r})\n"
        "    run_jobs([Job('long', LazyConfig.load(folder / 'long.yaml'))], folder)\n"
    )
    run = tmp_path / "runs" / "long"
    with process(program) as parent:
        wait_for(lambda: (run / "metrics.jsonl").exists() or parent.poll() is not None)
        assert parent.poll() is None
        parent.kill()

    def free():
        try:
            with run_lock(run):
                return True
        except CheckpointError:
            return False

    wait_for(free)
    assert (run / "checkpoints" / "latest").exists()


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        (["a", "a"], {}, "2 jobs have the name 'a'"),
        (["../a"], {}, "Invalid job name"),
        (["a"], {"parallel": 0}, "--parallel is 0"),
        (["a"], {"rank": "0"}, "torchrun"),
    ],
)
def test_invalid_names_and_options_are_refused(tiny_config, tmp_path, monkeypatch, names, options, message):
    if "rank" in options:  # as torchrun starts processes
        monkeypatch.setenv("RANK", options.pop("rank"))
        monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=message):
        run_jobs([Job(name, tiny_config()) for name in names], tmp_path, **options)
    assert list(tmp_path.iterdir()) == []


def test_an_invalid_config_is_refused_before_any_job_starts(tiny_config, tmp_path):
    with pytest.raises(ConfigError, match="b: .*train.log_period"):
        run_jobs([Job("a", tiny_config()), Job("b", tiny_config(train__log_period=0))], tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_use_is_refused(tiny_config, tmp_path):
    with run_lock(tmp_path / ".jobs"), pytest.raises(CheckpointError, match="in use"):
        run_jobs([Job("a", tiny_config())], tmp_path)
    assert not (tmp_path / "runs").exists()


def test_a_progress_line_has_count_details_time_and_eta(tmp_path):
    outcome = JobOutcome("trial_006", tmp_path, "finished", seconds=42, done=7, total=100, eta=2470.0)
    assert progress_line(outcome, "top1 0.612") == "[  7/100] trial_006 finished  top1 0.612  0:00:42  ETA 0:41:10"
    failed = JobOutcome("b", tmp_path, "failed", message="first\nsecond", seconds=1, done=2, total=2, eta=0)
    assert progress_line(failed) == "[2/2] b failed  first  0:00:01"
