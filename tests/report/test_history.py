"""Series and the time of stages, from the records of a run."""

import math

import pytest
from report_pages import harmless, report_of, small_run, write_records

from bissl_zoo.report.history import Series, read_history, time_of


@pytest.mark.slow
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
    assert "loss" in parsed.drawn
    assert [text for text in parsed.problems if "7 lines cannot be read" in text]


def test_numbers_that_are_none_leave_gaps(tmp_path):
    run = small_run(tmp_path / "run")
    write_records(run, {"total_loss": 1.0}, {"total_loss": "nan"}, {"total_loss": math.nan}, {"total_loss": math.inf},
                  {"total_loss": 10**400}, {"total_loss": True}, {"total_loss": None}, {"total_loss": 2.0})  # fmt: skip
    assert read_history(run / "metrics.jsonl").series("total_loss", "finetune") == Series([1, 8], [1.0, 2.0])
    harmless(report_of(run))


def test_long_curves_are_means_of_their_parts():
    series = Series(list(map(float, range(1000))), [2.0 * x for x in range(1000)]).thinned()
    assert len(series.x) == 250 and (series.x[0], series.y[0]) == (1.5, 3.0)


def test_the_time_of_a_stage_is_the_sum_over_its_processes(tmp_path):
    run = small_run(tmp_path / "run")
    first = {"total": 10.0, "data": 1.0, "checkpoint": 2.0, "evaluation": 2.5, "probe": 0.5}
    write_records(run, {"seconds": first}, {"speed/images_per_second": 7.0}, {"seconds": {"total": 5.0, "data": 1.0}})
    (stage,) = time_of(read_history(run / "metrics.jsonl"))
    assert (stage.seconds, stage.evaluating, stage.waiting, stage.saving) == (15.0, 3.0, 2.0, 2.0)
    assert stage.speed == 7.0


@pytest.mark.parametrize("value", [-5.0, 1e300, math.nan, "x"])
def test_impossible_times_count_as_nothing(tmp_path, value):
    run = small_run(tmp_path / "run")
    seconds = dict.fromkeys(("total", "evaluation", "probe", "data", "checkpoint"), value)
    write_records(run, {"seconds": seconds}, {"seconds": value}, {"seconds": {"total": 3.0}})
    (stage,) = time_of(read_history(run / "metrics.jsonl"))
    assert stage.seconds == 3.0
    harmless(report_of(run))
