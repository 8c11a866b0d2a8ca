"""Series, the common axis and the time of stages, from the records of a run."""

import json
import math

import pytest
from report_pages import harmless, report_of, small_run, write_records

from bissl_zoo.report.charts import loss_parts
from bissl_zoo.report.history import Series, make_axis, read_history, time_of


def test_damaged_lines_are_counted_and_the_others_drawn(run_copy):
    path = run_copy / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    bad = [b"no json\n", b"[1]\n", b'{"stage": "../x", "step": 1}\n', b'{"stage": "bissl", "step": -1}\n', b"\xff\n",
           b'{"stage": "bissl", "step": ' + b"9" * 5000 + b"}\n", b"[" * 100_000 + b"\n"]  # fmt: skip
    path.write_bytes(b"".join([lines[0], *bad, *lines[1:], b'{"stage": "finetune", "st']))
    history = read_history(path)
    assert history.problem.strip() == "metrics.jsonl: 7 lines cannot be read and are left out."
    assert len(history.entries) == len(lines)
    parsed = harmless(report_of(run_copy))
    assert "pretext loss" in parsed.drawn
    assert [text for text in parsed.problems if "7 lines cannot be read" in text]


def test_numbers_that_are_none_leave_gaps(tmp_path):
    run = small_run(tmp_path / "run")
    write_records(run, {"total_loss": 1.0}, {"total_loss": "nan"}, {"total_loss": math.nan}, {"total_loss": math.inf},
                  {"total_loss": 10**400}, {"total_loss": True}, {"total_loss": None}, {"total_loss": 2.0})  # fmt: skip
    assert read_history(run / "metrics.jsonl").series("total_loss", "finetune") == Series([1, 8], [1.0, 2.0])
    harmless(report_of(run))


def test_alternations_lie_on_the_axis_with_their_lower_and_upper_steps(tmp_path):
    path = tmp_path / "metrics.jsonl"
    records = [
        {"stage": "pretrain", "step": 10, "total_loss": 1.0},
        {"stage": "bissl", "step": 1, "upper_step": 1, "upper/total_loss": 1.0},
        {"stage": "bissl", "step": 1, "upper_step": 2, "upper/total_loss": 1.0},
        {"stage": "bissl", "step": 2, "lower/total_loss": 2.0},
        {"stage": "bissl", "step": 2, "upper_step": 3, "upper/total_loss": 1.0},
        {"stage": "finetune", "step": 4, "total_loss": 1.0},
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    history = read_history(path)
    axis = make_axis(history, lower_steps=5, upper_steps=2)
    assert [(span.stage, span.start, span.length) for span in axis.spans] == [
        ("pretrain", 0, 10), ("bissl", 10, 14), ("finetune", 24, 4),
    ]  # fmt: skip
    assert [axis.place(entry, "upper") for entry in history.entries] == [10, 16, 17, 24, 23, 28]
    assert axis.place(history.entries[3], "lower") == 22


def test_long_curves_are_means_of_their_parts():
    series = Series(list(map(float, range(1000))), [2.0 * x for x in range(1000)]).thinned()
    assert len(series.x) == 250 and (series.x[0], series.y[0]) == (1.5, 3.0)


def timing_of(run, tested=(), wall=50.0):
    return time_of(read_history(run / "metrics.jsonl"), wall, dict(tested))


def test_the_time_of_a_stage_is_split_by_its_records(tmp_path):
    run = small_run(tmp_path / "run")
    write_records(run, {"speed/waiting": 0.5}, {"speed/waiting": 0.5, "speed/images_per_second": 7.0},
                  {"seconds": {"checkpoint": 2.0}})  # fmt: skip
    timing = timing_of(run, {"bissl": 4.0})
    (stage, rest) = timing.stages
    # 20 s from the first record to the last, and 4 s of the test set after it
    assert (stage.seconds, stage.waiting, stage.saving, stage.speed) == (24.0, 5.0, 2.0, 7.0)
    assert (stage.evaluating, stage.computing) == (4.0, 13.0)
    assert (rest.name, rest.seconds, rest.computing) == ("outside of the records", 26.0, 26.0)
    assert timing.notes == [
        "Time before the first record of finetune (step 1) is not counted.",
        "Outside of the records: the start, publishing, time before the first record.",
    ]
    paused = timing_of(run, {"bissl": 4.0}, wall=5.0)
    assert len(paused.stages) == 1 and any("paused" in note for note in paused.notes)


def test_the_share_of_waiting_counts_since_the_last_record_that_has_one(tmp_path):
    run = small_run(tmp_path / "run")
    write_records(run, {"speed/waiting": 1.0}, {}, {}, {"speed/waiting": 0.5}, {})
    assert timing_of(run).stages[0].waiting == 15.0  # half of the 30 s to the fourth


def test_the_first_stage_begins_before_its_first_record_by_the_time_of_its_steps(tmp_path):
    run = small_run(tmp_path / "run")
    write_records(run, {"speed/seconds_per_step": 6.0, "test/AP50": 0.5, "time/evaluation": 2.0}, {})
    timing = timing_of(run, {"bissl": 1.0})
    assert (timing.stages[0].seconds, timing.stages[0].evaluating) == (6.0 + 2.0 + 10.0 + 1.0, 3.0)
    assert "Outside of the records: the start, publishing." in timing.notes
    # that of an evaluation may be there before a line was due
    write_records(run, {"test/AP50": 0.5, "time/evaluation": 2.0}, {"speed/seconds_per_step": 8.0})
    assert timing_of(run, {"bissl": 1.0}).stages[0].seconds == 2 * 8.0 + 1.0


def test_evaluations_and_probes_are_part_of_the_stage_that_they_interrupt(tmp_path):
    run = small_run(tmp_path / "run")
    lines = [
        {"stage": "bissl", "step": 1, "time": 100, "speed/seconds_per_step": 10.0},
        {"stage": "bissl", "step": 2, "time": 140, "probe/std": 0.5, "time/probe": 15.0},
        {"stage": "finetune_pretrained", "step": 9, "time": 170, "val/AP50": 0.5, "time/evaluation": 5.0},
        {"stage": "finetune", "step": 9, "time": 200, "val/AP50": 0.5, "time/evaluation": 6.0},
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    timing = timing_of(run, {"pretrained": 7.0, "bissl": 8.0}, wall=120.0)
    assert [(one.name, one.seconds, one.evaluating) for one in timing.stages] == [
        ("bissl", 50.0, 15.0), ("finetune_pretrained", 37.0, 12.0), ("finetune", 31.0, 14.0),
        ("outside of the records", 2.0, 0.0),
    ]  # fmt: skip
    assert not any("evaluations" in note for note in timing.notes)


@pytest.mark.parametrize("tested", [{"pretrained": 7.0, "bissl": 0.0}, {"bissl": 8.0}])
def test_missing_times_of_evaluations_are_noted(tmp_path, tested):
    run = small_run(tmp_path / "run")
    write_records(run, {}, {"test/AP50": 0.5} if len(tested) == 1 else {}, {})
    assert any("evaluations was not recorded" in note for note in timing_of(run, tested).notes)


def test_the_time_of_the_test_set_is_unknown_before_the_end_of_the_run(tmp_path):
    run = small_run(tmp_path / "run")
    write_records(run, {}, {})
    notes = timing_of(run, wall=None).notes
    assert any("test evaluation" in note for note in notes) and any("checkpoints was not" in note for note in notes)


@pytest.mark.parametrize("value", [-5.0, 1e300, math.nan, "x", True])
def test_impossible_times_leave_parts_within_the_whole(tmp_path, value):
    run = small_run(tmp_path / "run")
    keys = ("time/evaluation", "time/probe", "seconds/checkpoint", "speed/waiting", "speed/seconds_per_step")
    write_records(run, *[dict.fromkeys(keys, value)] * 3)
    for stage in timing_of(run).stages:
        assert min(stage.computing, stage.evaluating, stage.waiting, stage.saving) >= 0
        assert stage.computing + stage.evaluating + stage.waiting + stage.saving == pytest.approx(stage.seconds)
    harmless(report_of(run))


@pytest.mark.slow
def test_every_alternation_is_in_the_chart_whatever_the_log_period(train_net, tiny, tmp_path):
    run = tmp_path / "run"
    changed = {"train__stages": "[bissl]", "train__publish__name": "null", "bilevel__pretext_warmup__steps": 1}
    settings = tiny(train__log_period=100, bilevel__alternations=4, **changed)
    outcome = train_net(*settings, f"train.output_dir={run}")
    assert outcome.status == 0
    history = read_history(run / "metrics.jsonl")
    assert history.series("lower/total_loss", "bissl").x == [1, 2, 3, 4]
    assert history.series("upper/total_loss", "bissl", upper=True).x == [1, 2, 3, 4]
    axis = make_axis(history, lower_steps=2, upper_steps=1)
    start = axis.spans[-1].start
    drawn = {name: [x - start for x in parts[-1].x] for name, parts in loss_parts(history, axis).items()}
    assert drawn == {"pretext loss": [2, 5, 8, 11], "downstream loss": [3, 6, 9, 12]}
