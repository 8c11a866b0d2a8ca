"""Images that cannot be decoded: a run continues, counts and names them, and evaluates without them only on request."""

import json
import os
from pathlib import Path

import pytest
from forked_runs import exit_status, start_run

from bissl_zoo.data import samples
from bissl_zoo.engine import build
from bissl_zoo.engine.build import Decodable, Weights, skips_undecodable
from bissl_zoo.engine.checks import check_parts, open_context
from bissl_zoo.engine.hooks import SKIPPED
from bissl_zoo.errors import DatasetError
from bissl_zoo.report.run import RunReport

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr(samples, "RETRY_PAUSE", 0.0)


@pytest.fixture
def open_run(tiny_config, scenes_copy, monkeypatch, tmp_path):
    """`open_run(train__stages=...)` -> the context of a run on a copy of the scenes that may be damaged."""
    monkeypatch.setenv("BISSL_ZOO_DATASETS", str(scenes_copy[0]))

    def build(name="run", skip_test=False, **changed):
        cfg = tiny_config(train__output_dir=tmp_path / name, train__publish__name="null", **changed)
        if skip_test:
            cfg.dataloader.test.on_bad = "skip"
        return open_context(cfg, "test")

    return build


def spoil(context, role, *numbers):
    """Truncate the files of these samples."""
    files = [context.data[role].source(number) for number in numbers]
    for file in files:
        os.truncate(file, 300)
    return files


def go(cfg, processes=1, meeting=None):
    pids = [start_run(cfg, rank, processes, meeting) for rank in range(processes)]
    assert [exit_status(pid) for pid in pids] == [0] * processes
    folder = Path(cfg.train.output_dir)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return lines, (folder / "log.txt").read_text()


def counts(lines, stage):
    return [line.get(SKIPPED, 0) for line in lines if line["stage"] == stage and "event" not in line]


def test_a_run_continues_counts_and_names_images_that_it_cannot_decode(open_run):
    context = open_run(skip_test=True, bilevel__alternations=4)
    bad = {"pretext": spoil(context, "pretext", *range(0, 24, 4)), "train": spoil(context, "train", 0, 5)}
    (left_out,) = spoil(context, "test", 2)
    lines, log = go(context.cfg)
    found = counts(lines, "pretrain")
    assert found == sorted(found) and 0 < found[-1] <= 6
    total = len(bad["pretext"]) + len(bad["train"])
    assert counts(lines, "bissl")[-1] == total  # of both levels
    for role, (all_of_it, stage) in {"pretext": (24, "bissl"), "train": (16, "bissl")}.items():
        (line,) = [one for one in log.splitlines() if f"[{stage}] " in one and f"images of dataloader.{role}" in one]
        assert f"{len(bad[role])} of {all_of_it} images of dataloader.{role} could not be decoded" in line
        assert sum(file in line for file in bad[role]) == min(5, len(bad[role]))
        assert ("and 1 more" in line) == (role == "pretext")
    results = json.loads((Path(context.cfg.train.output_dir) / "results.json").read_text())
    assert [metrics["left_out"] for metrics in results.values()] == [1] * len(results) and "AP50" in results["bissl"]
    assert f"{left_out} does not decode" in log and "left out (1 skipped so far)" in log and "left_out 1\n" in log
    note = RunReport(Path(context.cfg.train.output_dir), images=0).datasets()[0]
    assert note.problem and f"{total} in bissl" in note.text


def test_a_resumed_run_and_one_of_two_processes_count_the_same(open_run, tmp_path):
    whole = open_run("whole", train__stages="[pretrain]", pretrain__steps=8)
    spoil(whole, "pretext", *range(0, 24, 3))
    lines, log = go(whole.cfg)
    unbroken = counts(lines, "pretrain")
    assert 0 < unbroken[0] < unbroken[-1] == 8
    parts = [open_run("parts", train__stages="[pretrain]", pretrain__steps=steps).cfg for steps in (2, 8)]
    for cfg in parts:
        lines, resumed = go(cfg)
    assert counts(lines, "pretrain") == unbroken
    (end,) = [
        one.partition("warning: ")[2] for one in log.splitlines() if "images of dataloader.pretext could not be" in one
    ]
    assert resumed.count(end) == 1
    two = open_run("two", train__stages="[pretrain]", pretrain__steps=8)
    lines, _ = go(two.cfg, processes=2, meeting=tmp_path / "meeting")
    assert counts(lines, "pretrain") == unbroken


def test_checks_before_a_run_skip_undecodable_images_if_the_loader_does(open_run, caplog):
    context = open_run(train__stages="[finetune]")
    first, second = spoil(context, "train", 0, 1)
    check_parts(context, Weights())
    output = [record.getMessage() for record in caplog.records]
    assert len(output) == 2 and first in output[0] and second in output[1]
    assert output[0].endswith("Using the next sample instead.")
    spoil(context, "train", *range(2, build.TRIES + 1))
    with pytest.raises(DatasetError, match="does not decode"):
        check_parts(context, Weights())


def test_training_loaders_skip_by_default_and_the_next_sample_is_used_instead(open_run):
    context = open_run()
    assert [skips_undecodable(context.cfg, role) for role in ("pretext", "train", "test")] == [True, True, False]
    spoil(context, "pretext", 22, 23)
    stand_in = Decodable(context.data["pretext"], context.cfg, "pretext")
    assert stand_in[22][0].tobytes() == context.data["pretext"][0][0].tobytes()  # after the last comes the first
    context.cfg.dataloader.test.on_bad = "skip"
    assert skips_undecodable(context.cfg, "test")
