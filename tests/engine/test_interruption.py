"""Requests to stop: what is saved, how a run ends, and that it goes on as if it had not been asked."""

import functools
import itertools
import json
import os
import signal
import time

import pytest
from forked_runs import exit_status, start_run, wait_for
from run_outcomes import assert_same, outcome

from bissl_zoo.distributed import stop_request
from bissl_zoo.downstream import FasterRCNN
from bissl_zoo.engine import features
from bissl_zoo.pretext.simclr import SimCLR
from bissl_zoo.runs.checkpoint import Checkpointer, load_checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not hasattr(os, "fork"), reason="the system cannot fork")]


@pytest.fixture
def config(tiny_config, at_scenes, tmp_path):
    """A run whose checkpoints are far apart, in a directory of that name."""

    def build(name="run", **changed):
        settings = dict(train__checkpoint__period=1000, pretrain__steps=400, train__stages="[pretrain]")
        return tiny_config(train__output_dir=tmp_path / name, train__publish__name="null", **settings | changed)

    return build


def lines(folder):
    path = folder / "metrics.jsonl"
    return [line for line in path.read_text().splitlines() if '"event"' not in line] if path.exists() else []


@pytest.mark.parametrize(("number", "status"), [("SIGTERM", 143), ("SIGUSR1", 138), ("SIGHUP", 129), ("SIGINT", 130)])
def test_a_run_that_is_asked_to_stop_saves_within_a_step_and_says_how_to_go_on(config, tmp_path, number, status):
    # the tests themselves may run under nohup
    before = functools.partial(signal.signal, signal.SIGHUP, signal.SIG_DFL)
    pid = start_run(config(), before=before, errors=tmp_path / "errors")
    wait_for(lambda: len(lines(tmp_path / "run")) >= 3, pid)
    os.kill(pid, getattr(signal, number))
    assert exit_status(pid) == status
    newest = Checkpointer(tmp_path / "run" / "checkpoints").newest("pretrain")
    step = load_checkpoint(newest)[0].step
    assert step == json.loads(lines(tmp_path / "run")[-1])["step"] < 400
    errors = (tmp_path / "errors").read_text()
    assert f"{number}: saving after this step" in errors
    assert f"Interrupted at pretrain step {step}/400; checkpoint saved. Continue with --resume." in errors
    assert "Traceback" not in errors and not (tmp_path / "run" / "run.lock").exists()


def test_a_second_ctrl_c_stops_at_once(config, tmp_path):
    def slow():
        from bissl_zoo.engine.stages.pretrain import PretrainTrainer

        step = PretrainTrainer.run_step
        PretrainTrainer.run_step = lambda self: (time.sleep(60) if self.step == 2 else None, step(self))[1]

    pid = start_run(config(), before=slow, errors=tmp_path / "errors")
    wait_for(lambda: len(lines(tmp_path / "run")) >= 2, pid)
    os.kill(pid, signal.SIGINT)
    wait_for(lambda: "again to stop now" in (tmp_path / "errors").read_text(), pid)
    os.kill(pid, signal.SIGINT)
    assert exit_status(pid) == 130
    assert "Continue with --resume" in (tmp_path / "errors").read_text()
    assert Checkpointer(tmp_path / "run" / "checkpoints").newest("pretrain") is None


def test_one_of_two_processes_is_asked_and_both_stop_at_the_same_step_and_go_on_as_if_not(config, tmp_path):
    def both(name, **changed):
        cfg, meeting = config(name, pretrain__steps=16, **changed), tmp_path / f"meeting-{time.monotonic_ns()}"
        common = dict(processes=2, meeting=meeting, errors=tmp_path / "errors")
        return [start_run(cfg, rank=rank, **common) for rank in range(2)]

    pids = both("asked")
    wait_for(lambda: len(lines(tmp_path / "asked")) >= 3, pids[0])
    os.kill(pids[1], signal.SIGTERM)
    assert [exit_status(pid) for pid in pids] == [143, 143]
    assert len(lines(tmp_path / "asked")) < 16
    for name in ("asked", "whole"):
        assert [exit_status(pid) for pid in both(name)] == [0, 0]
    asked, whole = (
        load_checkpoint(tmp_path / name / "checkpoints/pretrain/step_000016")[1] for name in ("asked", "whole")
    )
    weights = [state["levels"]["level"]["backbone"] for state in (asked, whole)]
    assert all((value == weights[1][key]).all() for key, value in weights[0].items())
    steps = [json.loads(line)["step"] for line in lines(tmp_path / "asked")]
    assert steps == list(range(1, 17))


def test_a_hangup_is_ignored_under_nohup():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with stop_request() as request:
        os.kill(os.getpid(), signal.SIGHUP)
        assert not request.asked()
    signal.signal(signal.SIGHUP, before)


def test_handlers_are_put_back_and_the_first_request_is_remembered():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)]
    with stop_request() as request:
        assert not request.pending("cpu")
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert request.pending("cpu") and request.status == 138
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)] == before


def stopping_at_call(number, owner, name):
    """What has a run, in its fork, ask itself to stop when it calls `owner.name` for that time."""

    def plant():
        calls, original = itertools.count(1), getattr(owner, name)

        def armed(*args, **kwargs):
            if next(calls) == number:
                os.kill(os.getpid(), signal.SIGTERM)
            return original(*args, **kwargs)

        setattr(owner, name, armed)

    return plant


#: the preflight calls it once; of 2 calls per evaluation: the first after step 2, and the last of the final one
@pytest.mark.parametrize(("call", "measured", "progress"), [(4, 1, "step 2/3"), (7, 2, "step 3/3")])
def test_a_run_that_is_asked_to_stop_while_it_evaluates_ends_at_once_and_evaluates_when_it_goes_on(
    config, tmp_path, call, measured, progress
):
    settings = dict(train__stages="[finetune]", finetune__steps=3, finetune__eval_period=1, train__deterministic=True)
    before = stopping_at_call(call, FasterRCNN, "predict")
    pid = start_run(config("asked", **settings), before=before, errors=tmp_path / "errors")
    assert exit_status(pid) == 143
    assert f"Interrupted at finetune {progress}; checkpoint saved" in (tmp_path / "errors").read_text()
    assert sum("test/AP" in line for line in lines(tmp_path / "asked")) == measured
    for name in ("asked", "whole"):
        assert exit_status(start_run(config(name, **settings))) == 0
    asked, whole = (outcome(tmp_path / name) for name in ("asked", "whole"))
    newest = max(whole["states"])
    asked["states"], whole["states"] = ({newest: one["states"][newest]} for one in (asked, whole))
    assert_same(asked, whole)
    assert [line["step"] for line in asked["metrics"] if "test/AP" in line] == [1, 2]


def test_a_run_that_is_asked_to_stop_while_it_probes_does_so_when_it_goes_on(config, tmp_path):
    settings = dict(pretrain__steps=4, train__probe__period=2, train__deterministic=True)
    pid = start_run(config("asked", **settings), before=stopping_at_call(1, features, "collapse_metrics"))
    assert exit_status(pid) == 143  # asked after the features were there: this probe is finished
    assert sum("probe/std" in line for line in lines(tmp_path / "asked")) == 1
    pid = start_run(config("asked", **settings), before=stopping_at_call(1, SimCLR, "embed"))
    assert exit_status(pid) == 143
    assert [json.loads(line)["step"] for line in lines(tmp_path / "asked")] == [1, 2, 3]
    for name in ("asked", "whole"):
        assert exit_status(start_run(config(name, **settings))) == 0
    assert_same(*(outcome(tmp_path / name)["metrics"] for name in ("asked", "whole")))
