"""The loop, and what the hooks do around its steps."""

import json
import math
import re

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from bissl_zoo.engine.hooks import MetricsWriter, PeriodicCheckpoint, PeriodicEvaluation, Progress, SolverWatch
from bissl_zoo.engine.trainer import Hook, Trainer, load_state
from bissl_zoo.errors import CheckpointError
from bissl_zoo.progress import writers
from bissl_zoo.runs.checkpoint import Checkpointer

CPU = torch.device("cpu")


def records_of(folder):
    """Return the records of metrics.jsonl without the events."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "event" not in line]


class Counter(Trainer):
    """A trainer whose metrics are functions of the step."""

    def run_step(self):
        return {"total_loss": 1.0 / (self.step + 1), "lr": 0.1, "status": "fine", "hidden": 3.0}

    def levels(self):
        return {}


class Recorder(Hook):
    def __init__(self):
        self.calls = []

    def before_train(self):
        self.calls.append("before")

    def before_step(self):
        self.calls.append(f"before {self.trainer.step + 1}")

    def after_step(self):
        self.calls.append(self.trainer.step)

    def after_train(self):
        self.calls.append("after")


def test_hooks_are_called_around_the_steps_that_are_left():
    trainer, hook = Counter("stage", 5), Recorder()
    trainer.load_state_dict({"step": 2, "levels": {}})
    trainer.train([hook])
    assert hook.calls == ["before", "before 3", 3, "before 4", 4, "before 5", 5, "after"]


def test_the_progress_line_has_losses_speed_and_eta(capsys):
    Counter("pretrain", 100).train([Progress(period=40)])
    lines = capsys.readouterr().out.splitlines()
    assert [re.match(r"\[pretrain +(\d+)/100\]", line).group(1) for line in lines] == ["1", "40", "80", "100"]
    assert "total_loss 0.025  lr 0.1  0.00 s/step  ETA 0:00:00" in lines[1]
    assert "hidden" not in lines[1]


def test_a_stage_can_be_viewed_in_the_middle_of_a_step():
    seen, progress = [], Progress(period=100)
    trainer = Counter("stage", 4)
    take = trainer.run_step
    trainer.run_step = lambda: (seen.append(progress.view()), take())[1]
    trainer.train([progress])
    seen.append(progress.view())
    assert [(view.step, view.total_steps) for view in seen] == [(n, 4) for n in range(5)]
    assert seen[0].seconds is None and seen[0].left is None and seen[0].metrics == {}
    assert seen[2].metrics["total_loss"] == 0.5 and 0 <= seen[2].left <= 2 * seen[2].seconds
    assert seen[4].left == 0.0


def test_metrics_are_written_every_period_and_at_the_last_step(tmp_path):
    Counter("stage", 5).train([MetricsWriter(tmp_path, period=2)])
    records = records_of(tmp_path)
    assert [record["step"] for record in records] == [2, 4, 5]
    assert records[0]["total_loss"] == 0.5 and records[0]["status"] == "fine" and records[0]["stage"] == "stage"
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in board.Scalars("stage/total_loss")] == [2, 4, 5]
    assert board.Tags()["scalars"] == ["stage/total_loss", "stage/lr", "stage/hidden"]


def test_lines_of_steps_that_are_taken_again_are_dropped_and_so_is_a_part_of_a_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [
        json.dumps({"stage": stage, "step": step}) + "\n" for stage, step in (("a", 1), ("a", 2), ("b", 1), ("b", 2))
    ]
    for content, stage, step, kept in (
        ("".join(lines), "b", 1, lines[:3]),
        ("".join(lines), "a", 1, lines[:1]),
        ("".join(lines), "c", 0, lines),
        ("".join(lines)[:-9], "b", 2, lines[:3]),
        ("".join(lines)[:-1], "b", 2, lines[:3]),  # what comes next would be on the same line
        (lines[0] + "[1]\n" + lines[1], "a", 2, lines[:1]),
    ):
        path.write_text(content)
        writers.drop_lines_after(path, stage, step)
        assert path.read_text() == "".join(kept)


def test_a_resume_warns_of_damaged_and_of_missing_lines(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"stage": "a", "step": step}) + "\n" for step in range(1, 9)]
    for content, message in (
        (lines, ""),
        ([*lines, '{"stage": "a", "st'], ""),  # a killed run leaves it
        ([*lines[:3], "rubbish\n", *lines[4:]], "line 4 is damaged, so it and 4 later lines are dropped"),
        (lines[:4], "no records of the steps 5 to 8 of a"),
        ([], "no records of the steps 1 to 8 of a"),
    ):
        path.write_text("".join(content))
        caplog.clear()
        writers.JsonWriter(tmp_path, period=2).begin("a", 8)
        assert message in caplog.text and bool(message) == bool(caplog.text)


def test_the_last_record_of_a_stage_has_its_seconds_by_activity(tmp_path):
    checkpoints = PeriodicCheckpoint(Checkpointer(tmp_path, keep=1), 1, "resnet18", CPU)
    hooks = [PeriodicEvaluation(lambda trainer: {"AP50": 0.25}, 1), MetricsWriter(tmp_path, 1), checkpoints]
    trainer = Counter("stage", 2)
    trainer.train(hooks, stop=lambda: trainer.step == 1)
    resumed = Counter("stage", 2)
    resumed.step = 1
    resumed.train(hooks)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    events = [line for line in lines if "event" in line]
    assert [(line["event"], line["stage"], line["step"]) for line in events] == [
        ("interrupted", "stage", 1),
        ("stage_end", "stage", 2),
    ]
    for line in events:
        seconds = line["seconds"]
        assert seconds["checkpoint"] > 0 and seconds["data"] == 0
        assert 0 <= seconds.get("evaluation", 0) + seconds["checkpoint"] <= seconds["total"] < 60


class Fine(Counter):
    """A trainer whose steps hold two records each."""

    record_key = "part"

    def run_step(self):
        first = 2 * self.step + 1
        self.records = [
            {"part": n, "residual": math.inf if n == 4 else 1.0 / n, "status": "fine"} for n in (first, first + 1)
        ]
        return super().run_step()


def test_finer_records_are_written_at_every_step_whatever_the_period(tmp_path, monkeypatch):
    opened = []
    monkeypatch.setattr(writers, "open", lambda *args: opened.append(args[0].name) or open(*args), raising=False)
    Fine("stage", 3).train([MetricsWriter(tmp_path, period=3)])

    def refuse(constant):
        raise ValueError(f"{constant} is not JSON")

    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    lines = [json.loads(line, parse_constant=refuse) for line in lines][:-1]  # the last is an event
    assert [(line["step"], line.get("part")) for line in lines] == [
        *((1, 1), (1, 2), (2, 3), (2, 4), (3, 5), (3, 6)),
        (3, None),
    ]
    assert all(line["stage"] == "stage" and line["time"] > 0 for line in lines)
    assert [line["residual"] for line in lines[:-1]] == [1.0, 1 / 2, 1 / 3, "inf", 1 / 5, 1 / 6]
    assert lines[-1]["total_loss"] == 1 / 3 and "residual" not in lines[-1]
    assert opened.count("metrics.jsonl") == 4  # once a step, and the event
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert board.Tags()["scalars"] == ["stage/part/residual", "stage/total_loss", "stage/lr", "stage/hidden"]
    events = board.Scalars("stage/part/residual")
    assert [event.step for event in events] == [1, 2, 3, 4, 5, 6]
    assert [event.value for event in events] == pytest.approx([1, 1 / 2, 1 / 3, math.inf, 1 / 5, 1 / 6])
    assert [event.step for event in board.Scalars("stage/total_loss")] == [3]


class Solves(Trainer):
    """A stage of prescribed statuses, one at a step."""

    def __init__(self, statuses):
        super().__init__("bissl", len(statuses))
        self.statuses = statuses

    def run_step(self):
        self.records = [{"solver/status": self.statuses[self.step], "solver/damping": 10.0}]
        return {}

    def levels(self):
        return {}


@pytest.mark.parametrize(
    ("statuses", "expected"),
    [
        (["max_iterations"] * 96, "24 of the last 24 solves .* (max_iterations 24; damping 10)"),
        (["diverged", *["max_iterations"] * 2, "converged"] * 6, "18 .* (max_iterations 12, diverged 6; damping 10)"),
        (["not_solved"] * 96, None),  # of solvers that solve nothing
        (["max_iterations"] * 23, None),  # less than the window
        (["diverged"] * 12 + ["converged"] * 12, None),  # half of it
    ],
)
def test_solves_are_warned_of_once_if_more_than_half_of_a_window_fail(capsys, statuses, expected):
    Solves(statuses).train([SolverWatch("runs/a/config.yaml")])
    warnings = capsys.readouterr().out.splitlines()
    assert len(warnings) == (expected is not None)
    for warning in warnings:
        assert all(part in warning for part in [*expected.split(" .* "), "--config-file runs/a/config.yaml"])


def test_checkpoints_are_written_every_period_and_at_the_last_step_and_their_duration_is_logged(tmp_path, capsys):
    Counter("stage", 5).train([PeriodicCheckpoint(Checkpointer(tmp_path, keep=9), 2, "resnet18", CPU)])
    assert sorted(path.name for path in (tmp_path / "stage").iterdir()) == ["step_000002", "step_000004", "step_000005"]
    assert re.search(r"\[stage\] checkpoints: 3, \d+\.\d s, \d+\.\d% of the stage's time", capsys.readouterr().out)


def test_evaluation_joins_the_metrics_of_its_step_but_not_at_the_last(tmp_path, capsys):
    evaluation = PeriodicEvaluation(lambda trainer: {"AP50": 0.25, "AP50/cat": 0.1}, period=2)
    Counter("finetune", 6).train([evaluation, MetricsWriter(tmp_path, period=1)])
    records = records_of(tmp_path)
    assert [record["step"] for record in records if record.get("test/AP50") == 0.25] == [2, 4]
    assert records[1]["test/AP50/cat"] == 0.1
    timed = {record["step"]: record["time/evaluation"] for record in records if "time/evaluation" in record}
    assert timed.keys() == {2, 4} and all(0 < seconds < 60 for seconds in timed.values())
    assert "[finetune 2/6] test  AP50 0.2500\n" in capsys.readouterr().out


def test_a_state_of_another_shape_is_refused_and_loads_nothing():
    module = torch.nn.Linear(2, 3)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"1 of 2 tensors match; 1 of another shape: weight \(3, 4\)"):
        load_state(module, {"weight": torch.zeros(3, 4), "bias": torch.zeros(3)}, "head")
    assert all(torch.equal(before[key], value) for key, value in module.state_dict().items())
