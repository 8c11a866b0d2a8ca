"""The command `runs`: the state of each run, and damaged files.

Most tests run on a directory that is written here, with real checkpoints of a few numbers.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command_line import load_tool

from bissl_zoo.runs import listing
from bissl_zoo.runs.checkpoint import MANIFEST_FILE, Checkpointer
from bissl_zoo.runs.listing import find_runs, look_at
from bissl_zoo.runs.lock import LOCK_FILE, run_lock

STAGES = ["pretrain", "head_warmup", "bissl", "finetune_pretrained", "finetune"]
FILES = ["config.yaml", "metrics.jsonl", "metadata.json", "results.json", "zoo_entry.json"]


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """A finished run of five stages, two steps and two checkpoints each, without a config."""
    folder = tmp_path_factory.mktemp("template")
    checkpointer = Checkpointer(folder / "checkpoints")
    lines = []
    for number, stage in enumerate(STAGES):
        for step in (1, 2):
            path = checkpointer.save(stage, step, 2, "resnet18", {"step": step, "w": torch.ones(1000)})
            lines.append(json.dumps({"stage": stage, "step": step, "time": 1.0, "total_loss": 2.5 - step}) + "\n")
        os.utime(path.parent, (number, number))
    contents = {
        "metrics.jsonl": "".join(lines),
        "metadata.json": json.dumps({"stages": dict.fromkeys(STAGES, 2), "hardware": "2 x GPU", "wall_time_s": 3700}),
        "results.json": json.dumps({"pretrained": {"AP": 0.25}, "bissl": {"AP": 0.5, "AP50/car": 0.75}}),
        "zoo_entry.json": json.dumps({"name": "resnet18.mine", "location": "/zoo/resnet18.mine@1"}),
    }
    for name, text in contents.items():
        (folder / name).write_text(text)
    return folder


@pytest.fixture
def run(template, tmp_path):
    """A copy of the template, with its config."""
    folder = Path(shutil.copytree(template, tmp_path / "run"))
    (folder / "config.yaml").write_text(f"train:\n  output_dir: {folder}\n")
    return folder


@pytest.fixture
def runs(capsys):
    """Call the command line: status, standard output and standard error."""
    tool = load_tool("runs")

    def call(*arguments):
        status = tool.cli([str(argument) for argument in arguments])
        output = capsys.readouterr()
        return status, output.out, output.err

    return call


@pytest.fixture
def line(runs):
    """The one line that `list` prints for a folder, as a dictionary."""

    def call(folder):
        status, out, err = runs("list", folder)
        assert (status, err) == (0, "")
        header, rule, row = out.splitlines()
        ends = [len(part) for part in rule.split("  ")]
        places = [sum(ends[:i]) + 2 * i for i in range(len(ends) + 1)]
        cut = [slice(start, end) for start, end in zip(places, [*places[1:-1], None], strict=False)]
        return {header[part].strip(): row[part].strip() for part in cut}

    return call


def checkpoints(folder):
    return sorted(path.relative_to(folder / "checkpoints").as_posix() for path in folder.glob("checkpoints/*/*"))


def interrupt(folder):
    """Turn the run into one that was killed after step 1 of its last stage."""
    shutil.rmtree(folder / "checkpoints" / "finetune" / "step_000002")
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:-1]))
    (folder / "results.json").unlink()
    return folder


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_run_is_listed_with_its_state_stage_checkpoint_and_last_metric(line, run):
    row = line(run)
    assert (row["state"], row["last"], row["note"]) == ("finished", "AP 0.5 (bissl)", "")
    assert (row["stage"], row["step"], row["checkpoint"]) == ("finetune", "2 of 2", "finetune 2")
    row = line(interrupt(run))
    assert (row["state"], row["step"], row["checkpoint"]) == ("interrupted", "1 of 2", "finetune 1")
    assert row["last"] == "total_loss 1.5"
    shutil.rmtree(run / "checkpoints")
    row = line(run)
    assert (row["state"], row["checkpoint"], row["step"]) == ("no checkpoint", "-", "1 of 2")


@pytest.mark.parametrize(
    ("stages", "state"),
    [
        ({}, "finished"),  # of an older version
        (dict.fromkeys(STAGES, 2) | {"bissl": 3}, "interrupted"),  # made longer
        (dict.fromkeys([*STAGES, "later"], 2), "interrupted"),
    ],
)
def test_a_run_is_finished_when_every_planned_stage_is(run, stages, state):
    edit(run / "metadata.json", stages=stages)
    assert look_at(run).state == state and [stage.name for stage in look_at(run).stages][:5] == STAGES


def test_a_run_is_running_while_a_process_holds_its_lock(line, run):
    with run_lock(run):
        assert line(run)["state"] == "running"
    (run / LOCK_FILE).write_text("process 1 on elsewhere\n")  # of a killed process
    assert line(run)["state"] == "finished"


def test_reading_changes_nothing(runs, run):
    interrupt(run)
    (run / LOCK_FILE).touch()
    before = {path: path.lstat().st_mtime_ns for path in run.rglob("*")}
    for command in (["list"], ["show", "--verify"], ["show", "--json"], ["list", "--json"]):
        assert runs(*command, run)[0] == 0
    assert {path: path.lstat().st_mtime_ns for path in run.rglob("*")} == before


@pytest.mark.slow
def test_listing_and_showing_do_not_import_torch(run):
    code = "import sys; from bissl_zoo.cli import main; sys.exit(main() or int('torch' in sys.modules))"
    for command in (["list", str(run)], ["show", str(run), "--verify"]):
        ran = subprocess.run([sys.executable, "-c", code, "runs", *command], capture_output=True, text=True)
        assert ran.returncode == 0 and "finished" in ran.stdout, ran


def test_runs_are_found_at_any_depth_and_not_inside_of_each_other(runs, run, tmp_path):
    deep = tmp_path / "a" / "deep"
    (deep / "inside").mkdir(parents=True)
    for file in (deep / "metrics.jsonl", deep / "inside" / "config.yaml"):
        file.touch()
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "config.yaml").touch()
    (tmp_path / "linked").symlink_to(run)
    (tmp_path / "circle").symlink_to(tmp_path)
    assert list(find_runs(tmp_path)) == [deep, tmp_path / "linked", run]
    states = [run["state"] for run in json.loads(runs("list", "--json", tmp_path)[1])]
    assert states == ["no checkpoint", "finished", "finished"]


def test_a_folder_without_runs_and_a_missing_one_are_reported(runs, tmp_path):
    assert runs("list", tmp_path) == (0, f"There are no runs in {tmp_path}.\n", "")
    status, _, err = runs("list", tmp_path / "no")
    assert status == 1 and err.startswith(f"error: {tmp_path / 'no'} cannot be read")
    assert "There is no run in" in runs("show", tmp_path)[2]


@pytest.mark.parametrize("content", [b"[" * 100_000, b"\xff\xfe", b'{"a": 1}', b"\x1b[2J: 3", None])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_a_note_and_never_stops_the_listing(runs, run, name, content):
    (run / name).unlink()
    if content is None:
        (run / name).mkdir()
    else:
        (run / name).write_bytes(content)
    for command in ("list", "show"):
        status, out, err = runs(command, run)
        assert (status, err) == (0, "") and "\x1b" not in out
        # metrics without a whole line are those of a run that has just begun; metadata may be incomplete
        assert name in out or name == "metrics.jsonl" or (name, content) == ("metadata.json", b'{"a": 1}')


def test_an_incomplete_line_of_metrics_is_counted_unless_it_is_the_last(run):
    path = run / "metrics.jsonl"
    text = path.read_text()
    path.write_text(text + text[:20])
    assert look_at(run).problems == []
    path.write_text(text + text[:20] + "\n" + '{"stage": "../..", "step": 1}\n{"step": 1}\n' + text)
    state = look_at(run)
    assert state.problems == ["metrics.jsonl: 3 lines cannot be read"] and state.stages[-1].step == 2


def test_only_the_end_of_long_metrics_is_read(run, monkeypatch):
    monkeypatch.setattr(listing, "TAIL", 300)
    state = look_at(run)
    assert state.current.metrics["total_loss"] == 0.5 and not state.stages[0].metrics and state.problems == []


def test_damaged_checkpoints_are_shown(runs, line, run):
    newest = run / "checkpoints" / "finetune" / "step_000002"
    flip(newest / "state.pt")
    (run / "checkpoints" / "finetune" / "damaged_step_000001-1234").mkdir()
    assert line(run)["note"] == "" and "is damaged" not in runs("show", run)[1]
    out = runs("show", "--verify", run)[1]
    assert f"{newest / 'state.pt'} is damaged: sha256" in out and "set aside as damaged" in out
    assert out.count(" verified") == 9 and out.count("unusable") == 1
    (newest / MANIFEST_FILE).write_text('{"format": 3, "step": "x"}')
    row = line(run)
    assert row["state"] == "interrupted" and "cannot be read" in row["note"]


def test_a_finished_run_is_shown_with_all_its_content_and_not_to_be_resumed(runs, run):
    status, out, err = runs("show", run)
    assert (status, err) == (0, "") and "resume" not in out
    for part in ("resnet18.mine at /zoo/resnet18.mine@1", "2 x GPU", "1 h 1.7 min", "pretrained         0.2500"):
        assert part in out
    shown = json.loads(runs("show", "--json", run)[1])
    assert [stage["name"] for stage in shown["stages"]] == STAGES
    assert shown["size"] == sum(path.stat().st_size for path in run.rglob("*") if path.is_file())


def test_an_interrupted_run_is_shown_with_the_command_that_resumes_it_where_it_is(runs, run, tmp_path):
    command = ["bissl", "train", "--config-file", str(run / "config.yaml"), "--resume"]
    assert runs("show", interrupt(run))[1].endswith(f"resume it with\n    {shlex.join(command)}\n")
    moved = Path(shutil.move(run, tmp_path / "another place"))
    shown = shlex.split(json.loads(runs("show", "--json", moved)[1])["resume"])
    assert shown == [*command[:3], str(moved / "config.yaml"), "--resume", f"train.output_dir={moved}"]


@pytest.mark.slow
def test_a_real_run_is_listed_and_its_resume_command_works(runs, tool, capsys, finished, run_copy, at_scenes):
    for folder in (finished, run_copy):
        shown = json.loads(runs("show", "--json", folder)[1])
        assert shown["state"] == "finished" and [stage["name"] for stage in shown["stages"]] == STAGES
        assert [stage["total"] for stage in shown["stages"]] == [2] * 5 and shown["entry"]["name"]
        assert tool.cli(shlex.split(shown["resume"])[2:]) == 0
        assert f"the run in {folder} is finished" in capsys.readouterr().out
