"""Reports: the figures of the files, a page whatever is in a run directory, nothing unescaped, nothing from outside."""

import json
import math
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from browser import browser, find_browser

from bissl_zoo.config import LazyConfig
from bissl_zoo.engine.evaluate import (
    DETAILS_FILE,
    Details,
    details_of,
    precision_at_recalls,
    read_details,
    write_details,
)
from bissl_zoo.errors import CheckpointError
from bissl_zoo.evaluation import DetectionEvaluator, MultilabelEvaluator, TopKEvaluator
from bissl_zoo.evaluation.ranking import MOST_RANKED
from bissl_zoo.report.charts import loss_parts
from bissl_zoo.report.config import differences, leaves, shipped_config
from bissl_zoo.report.ending import report_after
from bissl_zoo.report.history import Series, make_axis, read_history
from bissl_zoo.report.timing import time_of
from bissl_zoo.report.write import write_report
from bissl_zoo.report.zoo import zoo_page
from bissl_zoo.runs.directory import load_run_config

HOSTILE = '<script>alert("x")</script><img src=x onerror=alert(1)>\'"&{{7*7}}$x_1^2$'
needs_browser = pytest.mark.skipif(find_browser() is None, reason="needs Chromium: apt-get install chromium")
LOG = "x [finetune] checkpoints: 2, 1.5 s, 3%\nx [finetune] checkpoints: 1, 0.5 s, 1%\n"
VOID = {"meta", "link", "img", "br", "input"}


class Parsed(HTMLParser):
    """A page: its elements, the text of its tables by cell, of its charts and of everything."""

    def __init__(self, page):
        super().__init__(convert_charrefs=True)
        self.elements, self.open, self.rows, self.drawn, self.text, self.problems = [], [], [], [], [], []
        self.feed(page)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        inside = [tag for tag, _ in self.open]
        if "td" in inside or "th" in inside:
            self.rows[-1][-1] += data
        if inside[-1:] == ["text"]:
            self.drawn.append(data)
        if any("problem" in attrs.get("class", "") for _, attrs in self.open):
            self.problems.append(data)
        if not {"style", "script"} & set(inside):
            self.text.append(data)

    def table(self, *header):
        """The rows of the table that has this header."""
        place = self.rows.index(list(header))
        rest = self.rows[place + 1 :]
        return [row for row in rest[: next((i for i, row in enumerate(rest) if len(row) != len(header)), None)]]


def report_of(folder, images=0, **options):
    page = folder.parent / f"{folder.name}.html"
    write_report([folder], page, images, **options)
    return page.read_text(encoding="utf-8")


def harmless(page):
    """The parsed page, after looking for what it would run or fetch."""
    parsed = Parsed(page)
    assert not [tag for tag, _ in parsed.elements if tag in ("script", "iframe", "object", "embed", "base", "form")]
    for tag, attrs in parsed.elements:
        assert not [name for name in attrs if name.startswith("on")], (tag, attrs)
        for name in ("src", "href", "xlink:href", "action", "data", "poster"):
            assert attrs.get(name, "#").startswith(("#", "data:")), (tag, attrs)
        assert "url(" not in attrs.get("style", "").replace("url(#", ""), attrs
    assert "http:" not in page and "https:" not in page and "@import" not in page
    return parsed


def edit_lines(path, change):
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(change(line)) + "\n" for line in lines))


def small_run(folder, stages=("finetune",), **config):
    """A run directory without checkpoints or data, of a few lines."""
    folder.mkdir(parents=True)
    cfg = {"train": {"stages": list(stages)}, "bilevel": {"lower_steps": 3, "upper_steps": 2}, **config}
    LazyConfig.save(cfg, folder / "config.yaml")
    return folder


def write_records(folder, *records):
    lines = ({"stage": "finetune", "step": n, "time": 1e9 + 10 * n, **one} for n, one in enumerate(records, start=1))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture(scope="module")
def whole(finished, scenes, tmp_path_factory):
    """The report of a finished run, with pictures, and how often something was missing."""
    output = tmp_path_factory.mktemp("report") / "report.html"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BISSL_ZOO_DATASETS", str(scenes))
        missing = write_report([finished], output, images=8)
    return output, missing


def test_the_tables_hold_the_figures_of_the_files(whole, finished):
    output, missing = whole
    parsed = harmless(output.read_text(encoding="utf-8"))
    assert missing == 0 and parsed.problems == []
    results = json.loads((finished / "results.json").read_text())
    names = [name for name in results["bissl"] if "/" not in name]
    rows = {row[0]: row[1:] for row in parsed.table("fine-tuned from", *names)}
    for start, figures in results.items():
        assert rows[start] == [f"{figures[name]:.4g}" for name in names]
    assert rows["bissl less pretrained"] == [f"{results['bissl'][n] - results['pretrained'][n]:+.4f}" for n in names]
    steps = {row[0]: row[1:4] for row in parsed.table("stage", "step", "of", "done", "checkpoints")}
    assert steps["bissl"] == ["2", "2", "yes"] and list(steps) == [
        "pretrain", "head_warmup", "bissl", "finetune_pretrained", "finetune",
    ]  # fmt: skip
    by_class = json.loads((finished / DETAILS_FILE).read_text())["bissl"]["figures"]
    cells = {row[0]: row for row in parsed.rows if len(row) == 7 and row[1] == "bissl"}
    assert cells.keys() == by_class.keys()
    for name, figures in by_class.items():
        assert cells[name][2:] == [f"{value:.4g}" for value in figures.values()]


def test_the_charts_say_what_their_axes_are_and_have_names_of_their_own(whole):
    parsed = Parsed(whole[0].read_text(encoding="utf-8"))
    drawn = set(parsed.drawn)
    assert {"pretext loss", "downstream loss", "optimizer steps since the run began", "relative residual"} <= drawn
    assert {"precision (fraction)", "recall (fraction)", "seconds", "cosine", "bissl, 6 steps"} <= drawn
    names = [attrs["id"] for _, attrs in parsed.elements if "id" in attrs]
    assert len(names) == len(set(names)) > 100
    known = {f"#{name}" for name in names}
    assert all(attrs["href"] in known for _, attrs in parsed.elements if attrs.get("href", "").startswith("#"))


def test_the_same_run_gives_the_same_page(whole, finished, at_scenes, tmp_path):
    write_report([finished], tmp_path / "again.html", images=8)
    again = (tmp_path / "again.html").read_text().splitlines()
    assert [line for line in again if "Made by" not in line] == [
        line for line in whole[0].read_text().splitlines() if "Made by" not in line
    ]


@pytest.mark.parametrize("gone", ["metrics.jsonl", "results.json", "checkpoints", "config.yaml", "metadata.json"])
def test_a_run_without_one_of_its_parts_has_a_page_that_says_so(run_copy, gone):
    path = run_copy / gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    parsed = harmless(report_of(run_copy))
    said = " ".join(parsed.text)
    expected = {
        "metrics.jsonl": "No loss has been written yet.",
        "results.json": "There are no results yet",
        "checkpoints": "no checkpoint",
        "config.yaml": "cannot read this config file",
        "metadata.json": "The whole wall time of the run is not known",
    }
    assert expected[gone] in said
    assert "Environment." in said


def test_data_that_is_gone_is_told_where_its_pictures_would_be(finished, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setenv("BISSL_ZOO_DATASETS", str(tmp_path / "file" / "nowhere"))
    missing = write_report([finished], tmp_path / "report.html", images=8)
    parsed = harmless((tmp_path / "report.html").read_text())
    assert missing == len(parsed.problems) == 4  # samples, views, features, predictions
    assert all(str(tmp_path / "file") in problem for problem in parsed.problems)
    said = capsys.readouterr().out.splitlines()
    assert len([line for line in said if line.startswith("warning: report of finished, ")]) == 4
    assert "pretext loss" in parsed.drawn


def test_damaged_lines_are_counted_and_the_others_drawn(run_copy):
    path = run_copy / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    bad = [b"no json\n", b"[1]\n", b'{"stage": "../x", "step": 1}\n', b'{"stage": "bissl", "step": -1}\n', b"\xff\n",
           b'{"stage": "bissl", "step": ' + b"9" * 5000 + b"}\n", b"[" * 100_000 + b"\n"]  # fmt: skip
    path.write_bytes(b"".join([lines[0], *bad, *lines[1:], b'{"stage": "finetune", "st']))
    history = read_history(path)
    assert history.problem.strip() == "metrics.jsonl: 7 lines cannot be read, and are left out."
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


def test_a_hostile_run_gives_a_page_of_plain_text(run_copy, tmp_path):
    run = run_copy.rename(tmp_path / HOSTILE.replace("/", "\u2215"))
    cfg = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(cfg + f"\nmine: {json.dumps({HOSTILE: HOSTILE})}\n")
    key = f"test/{HOSTILE.replace('/', '')}"
    odd = {"test/\ud800\uffff\x00]]>": 0.25, "solver/status": HOSTILE}
    edit_lines(run / "metrics.jsonl", lambda line: {**line, key: 0.5, **odd})
    results = json.loads((run / "results.json").read_text())
    (run / "results.json").write_text(json.dumps({HOSTILE: {HOSTILE.replace("/", ""): 0.5}, **results}))
    figures = {f"{HOSTILE}{n}": {"AP50": 0.1 * n, HOSTILE: 0.5} for n in range(4)}
    curves = {name: [0.5] * 101 for name in figures}
    write_details(run, {HOSTILE: Details(figures, [HOSTILE, "]]>", "-->"], [[1, 2, 3]] * 3, curves)})
    (run / "environment.txt").write_text(f"command: {HOSTILE}\npython: </table>{HOSTILE}\n")
    entry = {"name": HOSTILE, "location": "javascript:alert(1)", "sha256": "0" * 64}
    (run / "zoo_entry.json").write_text(json.dumps(entry))
    parsed = harmless(report_of(run))
    said = "".join(parsed.text)
    assert said.count(HOSTILE) > 10 and "49$x" not in said
    assert {key, "test/\ufffd\ufffd\\u0000]]>"} <= set(parsed.drawn) and f"from {HOSTILE}" in " ".join(parsed.text)


@pytest.mark.parametrize(
    "content",
    ["[]", '{"a": 1}', '{"a": {"figures": {"x": 1}}}', '{"a": {"figures": {"x": {"AP": 2}}}}',
     '{"a": {"classes": ["x"], "confusion": [[1, 2]]}}', '{"a": {"classes": ["x"], "confusion": [["1"]]}}',
     '{"a": {"classes": [1], "confusion": [[1]]}}', '{"a": {"curves": {"x": [0.5]}}}', "{", "[" * 9999,
     '{"a": {"seconds": -1}}', '{"a": {"seconds": "1"}}', '{"a": {"seconds": NaN}}', '{"a": {"seconds": 1e300}}'],
)  # fmt: skip
def test_figures_by_class_that_no_run_leaves_are_refused(tmp_path, content):
    (tmp_path / DETAILS_FILE).write_text(content)
    with pytest.raises(CheckpointError, match=DETAILS_FILE):
        read_details(tmp_path)


def test_details_are_those_of_the_evaluator():
    generator = torch.Generator().manual_seed(0)
    scores, targets = torch.randn(40, 3, generator=generator), torch.randint(3, (40,), generator=generator)
    evaluator = TopKEvaluator(["a", "b", "c"], topk=(1,))
    evaluator.process(scores, targets)
    details = details_of(evaluator)
    assert details.confusion == evaluator.confusion().tolist() and sum(map(sum, details.confusion)) == 40
    assert details.figures == evaluator.per_class() and details.seconds == 0
    assert details.curves == {name: precision_at_recalls(*one) for name, one in evaluator.rankings().items()}
    assert list(details.curves) == ["a", "b", "c"]


def test_precision_over_recall_is_scikit_learns():
    sklearn = pytest.importorskip("sklearn.metrics")
    generator = np.random.default_rng(0)
    right, scores = generator.random(60) < 0.4, generator.random(60)
    curve = precision_at_recalls(right[np.argsort(-scores)], int(right.sum()))
    precision, recall, _ = sklearn.precision_recall_curve(right, scores)
    # scikit-learn's last point has no threshold; 1e-9 is room for recalls that are hit exactly
    expected = [max(precision[:-1][recall[:-1] >= point / 100 - 1e-9], default=0.0) for point in range(101)]
    assert curve == pytest.approx(expected, abs=1e-5)
    assert precision_at_recalls(np.array([True, False]), 2)[50:52] == [1.0, 0.0]


def test_curves_of_detections_and_of_several_labels():
    box, far = [0.0, 0, 10, 10], [50.0, 50, 60, 60]
    evaluator = DetectionEvaluator(["x", "y"])
    truth = {"boxes": [box, far], "labels": [0, 0], "difficult": [False, False], "image_id": 1}
    found = {"boxes": [box, [80.0, 80, 90, 90], far], "labels": [0, 0, 0], "scores": [0.9, 0.8, 0.7]}
    evaluator.process([found], [truth])
    curve = details_of(evaluator).curves
    assert list(curve) == ["x"] and curve["x"][:51] == [1.0] * 51 and curve["x"][51:] == [round(2 / 3, 5)] * 50
    several = MultilabelEvaluator(["x", "y"])
    several.process(torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3]]), torch.tensor([[1, 0], [0, -1], [1, 0]]))
    assert details_of(several).curves == {"x": curve["x"]}


def test_details_are_read_as_they_were_written(tmp_path):
    one = Details({"a": {"top1": 0.5}}, ["a", "b"], [[1, 2], [3, 4]], {"a": [0.25] * 101}, 2.5)
    details = {"bissl": one, "x": Details()}
    write_details(tmp_path, details)
    assert read_details(tmp_path) == details
    assert read_details(tmp_path / "none") == {}


def test_an_evaluator_of_the_users_own_needs_none_of_it():
    class Own:
        def evaluate(self):
            return {"mine": 1.0}

    assert details_of(Own()) == Details()


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


def timing_of(run, tested=(), wall=50.0, log=LOG):
    return time_of(read_history(run / "metrics.jsonl"), {"wall_time_s": wall} if wall else {}, log, dict(tested))


def test_time_is_split_as_the_records_and_the_log_tell(tmp_path):
    run = small_run(tmp_path / "run")
    write_records(run, {"speed/waiting": 0.5}, {"speed/waiting": 0.5, "speed/images_per_second": 7.0}, {})
    timing = timing_of(run, {"bissl": 4.0})
    (stage, rest) = timing.stages
    # 20 s from the first record to the last, and 4 s of the test set after it
    assert (stage.seconds, stage.waiting, stage.saving, stage.speed) == (24.0, 5.0, 2.0, 7.0)
    assert (stage.evaluating, stage.computing) == (4.0, 13.0)
    assert (rest.name, rest.seconds, rest.computing) == ("outside of the records", 26.0, 26.0)
    assert timing.notes == [
        "Of finetune, the time before its first record (step 1) is not counted.",
        "Outside of the records: the start, publishing, what came before the first record.",
    ]
    paused = timing_of(run, {"bissl": 4.0}, wall=5.0)
    assert len(paused.stages) == 1 and any("paused" in note for note in paused.notes)


def test_the_share_of_waiting_is_of_the_time_since_the_last_that_was_told(tmp_path):
    run = small_run(tmp_path / "run")
    write_records(run, {"speed/waiting": 1.0}, {}, {}, {"speed/waiting": 0.5}, {})
    assert timing_of(run).stages[0].waiting == 15.0  # half of the 30 s to the fourth


def test_the_first_stage_begins_as_long_before_its_first_record_as_its_steps_took(tmp_path):
    run = small_run(tmp_path / "run")
    write_records(run, {"speed/seconds_per_step": 6.0, "test/AP50": 0.5, "time/evaluation": 2.0}, {})
    timing = timing_of(run, {"bissl": 1.0})
    assert (timing.stages[0].seconds, timing.stages[0].evaluating) == (6.0 + 2.0 + 10.0 + 1.0, 3.0)
    assert timing.notes == ["Outside of the records: the start, publishing."]
    # that of an evaluation may be there before a line was due
    write_records(run, {"test/AP50": 0.5, "time/evaluation": 2.0}, {"speed/seconds_per_step": 8.0})
    assert timing_of(run, {"bissl": 1.0}).stages[0].seconds == 2 * 8.0 + 1.0


def test_evaluations_and_probes_are_a_part_of_the_stage_that_they_interrupt(tmp_path):
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
    assert not any("evaluations took" in note for note in timing.notes)


@pytest.mark.parametrize("tested", [{"pretrained": 7.0, "bissl": 0.0}, {"bissl": 8.0}])
def test_a_run_that_kept_no_time_of_its_evaluations_says_so(tmp_path, tested):
    run = small_run(tmp_path / "run")
    write_records(run, {}, {"test/AP50": 0.5} if len(tested) == 1 else {}, {})
    note = "How long evaluations took was not recorded, or not of all; it is in the bars."
    assert note in timing_of(run, tested).notes


def test_of_a_run_that_goes_on_the_test_set_is_told_later(tmp_path):
    run = small_run(tmp_path / "run")
    write_records(run, {}, {})
    notes = timing_of(run, wall=None, log="").notes
    assert "How long the test set took is told when the run has ended; until then it is in the bars." in notes


@pytest.mark.parametrize("value", [-5.0, 1e300, math.nan, "x", True])
def test_times_that_cannot_be_leave_parts_that_are_within_the_whole(tmp_path, value):
    run = small_run(tmp_path / "run")
    keys = ("time/evaluation", "time/probe", "speed/waiting", "speed/seconds_per_step")
    write_records(run, *[dict.fromkeys(keys, value)] * 3)
    for stage in timing_of(run).stages:
        assert min(stage.computing, stage.evaluating, stage.waiting, stage.saving) >= 0
        assert stage.computing + stage.evaluating + stage.waiting + stage.saving == pytest.approx(stage.seconds)
    harmless(report_of(run))


def test_a_run_tells_how_long_every_evaluation_took(whole, finished):
    details = read_details(finished)
    assert details.keys() == {"pretrained", "bissl"} and all(one.seconds > 0 for one in details.values())
    parsed = Parsed(whole[0].read_text(encoding="utf-8"))
    header = ("stage", "time", "evaluating", "waiting for data", "checkpoints", "images/s, last")
    rows = {row[0]: row[1:] for row in parsed.table(*header)}
    for stage, start in (("finetune_pretrained", "pretrained"), ("finetune", "bissl")):
        assert rows[stage][1] == f"{details[start].seconds:.1f} s"
    assert {"computing", "evaluating"} <= set(parsed.drawn)  # checkpoints may take no tenth of a second
    assert "not recorded" not in " ".join(parsed.text)


def test_a_run_from_before_evaluations_were_timed_has_its_report(run_copy):
    content = json.loads((run_copy / DETAILS_FILE).read_text())
    for one in content.values():
        del one["seconds"]
    (run_copy / DETAILS_FILE).write_text(json.dumps(content))
    said = " ".join(harmless(report_of(run_copy)).text)
    assert "How long evaluations took was not recorded" in said


def test_where_there_are_no_curves_the_page_says_why(tmp_path):
    run = small_run(tmp_path / "run")
    few = Details({"a": {"top1": 0.5}}, ["a", "b"], [[1, 1], [0, 2]])
    many = Details({str(n): {"top1": 0.5} for n in range(MOST_RANKED + 1)})
    write_details(run, {"pretrained": few, "bissl": many})
    said = " ".join(harmless(report_of(run)).text)
    assert "Precision over recall, fine-tuned from pretrained was not recorded." in said
    assert "Precision over recall and confusion, fine-tuned from bissl are not kept above 200 classes." in said


def test_every_alternation_of_a_run_is_in_its_chart_whatever_the_period(train_net, tiny, tmp_path):
    run = tmp_path / "run"
    changed = {"train__stages": "[bissl]", "train__publish__name": "null", "bilevel__pretext_warmup__steps": 1}
    settings = tiny(train__log_period=100, bilevel__alternations=4, **changed)
    outcome = train_net(*settings, f"train.output_dir={run}")
    assert outcome.status == 0 and len(re.findall(r"\[bissl \d/4\]", outcome.out)) == 2  # the first and the last
    history = read_history(run / "metrics.jsonl")
    assert history.series("lower/total_loss", "bissl").x == [1, 2, 3, 4]
    assert history.series("upper/total_loss", "bissl", upper=True).x == [1, 2, 3, 4]
    axis = make_axis(history, lower_steps=2, upper_steps=1)
    start = axis.spans[-1].start
    drawn = {name: [x - start for x in parts[-1].x] for name, parts in loss_parts(history, axis).items()}
    assert drawn == {"pretext loss": [2, 5, 8, 11], "downstream loss": [3, 6, 9, 12]}


def test_the_shipped_config_of_a_run_is_its_base(finished):
    cfg = load_run_config(finished)
    told = differences(cfg, "command: train_net.py --config-file quickstart/digit_scenes_det.py x=1\n")
    changed = {one.key: (one.base, one.value) for one in told.changed}
    assert told.base == "configs/quickstart/digit_scenes_det.py" and changed["bilevel.alternations"] == (12, 2)
    known = leaves(cfg)
    assert all(known.get(key) == value for key, (_, value) in changed.items())
    told = differences(cfg, "")
    changed = {one.key: (one.base, one.value) for one in told.changed}
    assert told.base == "configs/common/train.py" and changed["bilevel.alternations"] == (500, 2)
    assert all(key.split(".")[0] in ("train", "pretrain", "bilevel", "finetune", "clip_grad") for key in changed)


@pytest.mark.parametrize("command", ["a.py", "../../evil.py", "/etc/passwd", "'unclosed", "", "--config-file"])
def test_no_config_but_a_shipped_one_is_opened(command):
    assert shipped_config(f"command: train_net.py --config-file {command}") is None


def test_several_runs_stand_side_by_side(finished, run_copy, tmp_path):
    text = (run_copy / "config.yaml").read_text()
    (run_copy / "config.yaml").write_text(text.replace("lower_steps: 2", "lower_steps: 3"))
    (run_copy / "results.json").unlink()
    write_report([finished, run_copy], tmp_path / "both.html", images=0)
    parsed = harmless((tmp_path / "both.html").read_text())
    assert parsed.table("key", "finished", "run") == [["bilevel.lower_steps", "2", "3"]]
    names = list(json.loads((finished / "results.json").read_text())["bissl"])
    rows = parsed.table("run", "state", "fine-tuned from", *[name for name in names if "/" not in name])
    assert [row[:3] for row in rows] == [
        ["finished", "finished", "pretrained"], ["finished", "finished", "bissl"], ["run", "interrupted", "\u2013"],
    ]  # fmt: skip
    names = [attrs["id"] for _, attrs in parsed.elements if "id" in attrs]
    assert len(names) == len(set(names))


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="There is no run in"):
        write_report([tmp_path], tmp_path / "x.html")


def test_the_end_of_a_run_writes_its_report_and_a_failure_is_a_warning(train_net, tiny, tmp_path, monkeypatch):
    before = torch.get_rng_state()
    changed = {"train__stages": "[finetune]", "train__publish__name": "null", "train__report": "true"}
    outcome = train_net(*tiny(**changed), f"train.output_dir={tmp_path / 'run'}")
    assert outcome.status == 0 and f"report {tmp_path / 'run' / 'report.html'}" in outcome.out
    parsed = harmless((tmp_path / "run" / "report.html").read_text())
    assert parsed.problems == [] and "finished" in parsed.text and "running" not in parsed.text
    assert len([tag for tag, attrs in parsed.elements if tag == "img"]) >= 2
    monkeypatch.setattr("bissl_zoo.report.write.render", lambda *args, **kwargs: 1 / 0)
    state = torch.get_rng_state()
    report_after(tmp_path / "run")
    assert torch.equal(torch.get_rng_state(), state) and before.shape == state.shape


def test_what_a_run_does_not_ask_for_is_no_warning(train_net, tiny, tmp_path):
    changed = {"train__stages": "[pretrain]", "train__publish__name": "null", "train__report": "true"}
    outcome = train_net(*tiny(**changed), f"train.output_dir={tmp_path / 'run'}")
    assert outcome.status == 0 and "warning" not in outcome.out + outcome.err
    parsed = harmless((tmp_path / "run" / "report.html").read_text())
    assert "The run has no stage finetune, so there is no fine-tuned model." in parsed.text
    assert parsed.problems == []


def test_a_report_that_fails_is_a_warning(finished, tmp_path, capsys, monkeypatch):
    def fail(*arguments, **options):
        raise RuntimeError("no ink")

    monkeypatch.setattr("bissl_zoo.report.write.write_report", fail)
    report_after(finished)
    assert f"warning: there is no report: RuntimeError: no ink. Try python tools/report.py {finished}" in (
        capsys.readouterr().out
    )


def test_a_run_that_fails_says_how_to_look_at_it(train_net, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("bissl_zoo.engine.runner.write_details", lambda *arguments: 1 / 0)
    changed = {"train__stages": "[finetune]", "train__publish__name": "null"}
    with pytest.raises(ZeroDivisionError):
        train_net(*tiny(**changed), f"train.output_dir={tmp_path / 'run'}")
    assert "look at it with python tools/report.py" in (tmp_path / "run" / "log.txt").read_text()


@needs_browser
def test_a_browser_shows_the_page_on_a_phone_and_on_a_desk(whole):
    with browser() as page:
        for width in (390, 1440):
            page.open(whole[0], width)
            assert page.value("document.documentElement.scrollWidth") <= width
            widths = page.value("[...document.images].map((one) => [one.naturalWidth, one.clientWidth])")
            assert len(widths) >= 4 and all(natural > 300 and 100 < shown <= width for natural, shown in widths)
            charts = page.value("[...document.querySelectorAll('svg')].map((one) => one.getBoundingClientRect().width)")
            assert len([chart for chart in charts if 200 < chart <= width]) >= 8
            fold = "document.querySelector('details')"
            height = f"{fold}.getBoundingClientRect().height"
            closed = page.value(height)
            page.value(f"{fold}.querySelector('summary').click()")
            assert page.value(f"{fold}.open") is True and page.value(height) > closed + 50
        assert page.complaints == []
        assert {url.partition(":")[0] for url in page.requests} <= {"file", "data"}
        assert {url for url in page.requests if url.startswith("file:")} == {whole[0].absolute().as_uri()}


def record(mean, size, **changes):
    metrics = {} if mean is None else {"AP50 (bissl)": {"mean": mean, "std": None, "values": [mean]}}
    files = {"model.safetensors": {"sha256": "0" * 64, "size": size}}
    return {
        "architecture": "resnet18",
        "pretext": "simclr",
        "licence": "MIT",
        "metrics": metrics,
        "files": files,
        **changes,
    }


RECORDS = {
    "b": record(0.5, 9_000_000),
    "a": record(0.25, 10_000_000, pretext="byol"),
    "c": record(
        None, 200_000_000, architecture=HOSTILE, licence=HOSTILE, metrics={HOSTILE: {"mean": 1.0, "std": None}}
    ),
}


def test_a_zoo_is_a_plain_table_with_its_figures():
    page = zoo_page(RECORDS, HOSTILE, {"a": "voc", "c": HOSTILE})
    parsed = Parsed(page)
    assert [tag for tag, _ in parsed.elements].count("script") == 1 and "http" not in page.replace("http-equiv", "")
    assert not [name for _, attrs in parsed.elements for name in attrs if name.startswith("on")]
    rows = {row[0]: row for row in parsed.rows[1:]}
    header = parsed.rows[0]
    assert header[:7] == ["entry", "architecture", "pretext", "task", "solver", "licence", "data"]
    assert rows["b"][header.index("AP50 (bissl)")] == "0.5" and rows["c"][header.index("AP50 (bissl)")] == "\u2013"
    assert rows["c"][1] == rows["c"][6] == HOSTILE and rows["a"][header.index("size (MB)")] == "10.0"


@needs_browser
def test_a_zoo_is_sorted_and_filtered_in_the_browser(tmp_path):
    path = tmp_path / "zoo.html"
    path.write_text(zoo_page(RECORDS, "here", {"a": "voc"}), encoding="utf-8")
    order = "[...document.querySelectorAll('tbody tr')].filter((r) => !r.hidden).map((r) => r.cells[0].textContent)"
    button = "[...document.querySelectorAll('th button')].find((b) => b.textContent.startsWith('%s')).click()"
    with browser() as page:
        page.open(path, 390)
        assert page.value("document.documentElement.scrollWidth") <= 390
        assert page.value(order) == ["a", "b", "c"]
        page.value(button % "size")
        assert page.value(order) == ["b", "a", "c"]  # as numbers
        page.value(button % "AP50")
        assert page.value(order) == ["a", "b", "c"]
        page.value(button % "AP50")
        assert page.value(order) == ["b", "a", "c"]  # what has none comes last either way
        page.value(
            "const i = document.getElementById('filter'); i.value = 'BYOL voc'; i.dispatchEvent(new Event('input'))"
        )
        assert page.value(order) == ["a"] and page.value("document.getElementById('count').textContent") == "1 of 3"
        assert page.complaints == []
