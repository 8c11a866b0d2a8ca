"""tools/runs.py: the state that it tells of each run, what it says of damage, and what pruning leaves."""

import json
import os
import shlex
import shutil
import socket
import time

import pytest
from command_line import load_tool

from bissl_zoo.engine.init import load_init
from bissl_zoo.runs.checkpoint import MANIFEST_FILE
from bissl_zoo.runs.listing import find_runs, look_at
from bissl_zoo.runs.lock import LOCK_FILE, run_lock

STAGES = ["pretrain", "head_warmup", "bissl", "finetune_pretrained", "finetune"]


@pytest.fixture
def runs(capsys):
    """Call the command line: status, standard output and standard error."""
    tool = load_tool("runs")

    def call(*arguments):
        status = tool.main([str(argument) for argument in arguments])
        said = capsys.readouterr()
        return status, said.out, said.err

    return call


@pytest.fixture
def line(runs):
    """The one line that `list` has of a folder, as a dictionary."""

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


def snapshot(folder):
    return {path: path.lstat().st_mtime_ns for path in folder.rglob("*")}


def unfinish(folder, step=1):
    """As if the run had been killed in its last stage."""
    for path in folder.glob("checkpoints/finetune/step_*"):
        if int(path.name[5:]) > step:
            shutil.rmtree(path)
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:-1]))
    (folder / "results.json").unlink()
    (folder / "zoo_entry.json").unlink()
    return folder


def lock(folder, **changed):
    facts = {"id": "x", "host": socket.gethostname(), "pid": os.getpid(), "started": "1", **changed}
    (folder / LOCK_FILE).write_text(json.dumps(facts))
    return folder / LOCK_FILE


def damage(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_finished_run_is_told_with_its_result(line, finished):
    told = line(finished)
    result = json.loads((finished / "results.json").read_text())["bissl"]["AP"]
    assert told["state"] == "finished" and told["last"] == f"AP {result:.4g} (bissl)"
    assert (told["stage"], told["step"], told["checkpoint"], told["note"]) == ("finetune", "2 of 2", "finetune 2", "")


def test_a_run_that_was_stopped_is_interrupted_where_its_last_stage_was(line, run_copy):
    told = line(unfinish(run_copy))
    assert (told["state"], told["step"], told["checkpoint"]) == ("interrupted", "1 of 2", "finetune 1")
    assert told["last"].startswith("total_loss ")


def test_a_run_that_may_go_on_for_longer_is_not_finished(line, run_copy):
    text = (run_copy / "config.yaml").read_text()
    assert "alternations: 2" in text
    (run_copy / "config.yaml").write_text(text.replace("alternations: 2", "alternations: 3"))
    assert line(run_copy)["state"] == "interrupted"


def test_a_run_without_a_checkpoint_says_so(line, run_copy):
    shutil.rmtree(run_copy / "checkpoints")
    told = line(run_copy)
    assert (told["state"], told["checkpoint"], told["step"]) == ("no checkpoint", "-", "2 of 2")
    (run_copy / "metrics.jsonl").unlink()
    (run_copy / "results.json").unlink()
    assert line(run_copy)["step"] == "-"


def test_a_run_is_running_while_the_process_that_holds_its_lock_lives(line, run_copy):
    with run_lock(run_copy):
        assert line(run_copy)["state"] == "running"
    assert line(run_copy)["state"] == "finished"
    lock(run_copy)  # of an earlier process of this number
    assert line(run_copy)["state"] == "finished"


def test_a_run_of_another_machine_is_running_while_its_lock_is_fresh(line, run_copy):
    path = lock(run_copy, host="elsewhere")
    assert line(run_copy)["state"] == "running"
    os.utime(path, (time.time() - 3600,) * 2)
    assert line(run_copy)["state"] == "finished"


def test_looking_waits_for_nobody_and_changes_nothing(runs, run_copy):
    unfinish(run_copy)
    lock(run_copy, host="elsewhere")
    before = snapshot(run_copy)
    for command in (["list"], ["show", "--verify"], ["show", "--json"], ["list", "--json"]):
        assert runs(*command, run_copy)[0] == 0
    assert snapshot(run_copy) == before


def test_runs_are_found_at_any_depth_and_not_inside_of_each_other(runs, finished, tmp_path):
    (tmp_path / "a" / "deep").mkdir(parents=True)
    (tmp_path / "a" / "deep" / "metrics.jsonl").touch()
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "config.yaml").touch()
    (tmp_path / "linked").symlink_to(finished)
    (tmp_path / "round").symlink_to(tmp_path)
    shutil.copytree(tmp_path / ".hidden", tmp_path / "a" / "deep" / "inside")
    assert list(find_runs(tmp_path)) == [tmp_path / "a" / "deep", tmp_path / "linked"]
    told = json.loads(runs("list", "--json", tmp_path)[1])
    assert [run["state"] for run in told] == ["no checkpoint", "finished"]


def test_a_folder_without_runs_and_one_that_is_not_there_are_told(runs, tmp_path):
    assert runs("list", tmp_path) == (0, f"There are no runs in {tmp_path}.\n", "")
    assert runs("list", tmp_path / "no")[::2] == (
        1,
        f"error: {tmp_path / 'no'} cannot be read: No such file or directory. Give a folder that holds runs.\n",
    )
    for command in ("show", "prune"):
        assert "There is no run in" in runs(command, tmp_path)[2]


@pytest.mark.parametrize("content", [b"", b"{", b"[" * 100_000, b"\xff\xfe", b"[1]", b'{"a": 1}', b"\x1b[2J: 3", None])
@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "facts.json", "results.json", "zoo_entry.json"])
def test_a_damaged_file_never_stops_the_listing(runs, finished, tmp_path, name, content):
    run = tmp_path / "run"
    run.mkdir()
    for path in finished.iterdir():
        if path.name != name:
            (run / path.name).symlink_to(path)
    if content is None:
        (run / name).mkdir()
    else:
        (run / name).write_bytes(content)
    for command in ("list", "show"):
        status, out, err = runs(command, run)
        assert (status, err) == (0, "") and "\x1b" not in out
        # metrics without a whole line are those of a run that has just begun, and facts may be few
        assert name in out or name == "metrics.jsonl" or (name, content) == ("facts.json", b'{"a": 1}')


def test_a_line_of_metrics_that_was_cut_short_is_counted_unless_it_is_the_last(run_copy):
    path = run_copy / "metrics.jsonl"
    text = path.read_text()
    path.write_text(text + text[:20])
    assert look_at(run_copy).problems == []
    path.write_text(text + text[:20] + "\n" + '{"stage": "../..", "step": 1}\n' + text)
    run = look_at(run_copy)
    assert run.problems == ["metrics.jsonl: 2 lines cannot be read"] and run.stages[-1].step == 2


def test_of_long_metrics_a_list_reads_the_end(run_copy, monkeypatch):
    monkeypatch.setattr("bissl_zoo.runs.run_files.TAIL", 1500)
    short, whole = look_at(run_copy), look_at(run_copy, whole=True)
    assert short.current.metrics == whole.current.metrics and short.problems == []
    assert not short.stages[0].metrics and whole.stages[0].metrics["total_loss"]


def test_damaged_checkpoints_are_told(runs, line, run_copy):
    newest = run_copy / "checkpoints" / "finetune" / "step_000002"
    damage(newest / "state.safetensors")
    (run_copy / "checkpoints" / "finetune" / "damaged_step_000001-1234").mkdir()
    assert line(run_copy)["note"] == "" and "is damaged" not in runs("show", run_copy)[1]
    out = runs("show", "--verify", run_copy)[1]
    assert f"{newest / 'state.safetensors'} is damaged: sha256" in out and "set aside as damaged" in out
    assert out.count(" verified") == 9 and out.count("unusable") == 1
    (newest / MANIFEST_FILE).write_text('{"format": 2, "step": "x"}')
    told = line(run_copy)
    assert told["state"] == "interrupted" and "cannot be read" in told["note"]


def test_a_run_is_shown_with_all_that_it_left(runs, finished):
    status, out, err = runs("show", finished)
    entry, facts = (json.loads((finished / name).read_text()) for name in ("zoo_entry.json", "facts.json"))
    assert (status, err) == (0, "")
    assert f"{entry['name']} at {entry['location']}" in out and facts["hardware"] in out and "voc07_AP50" in out
    told = json.loads(runs("show", "--json", finished)[1])
    assert [stage["name"] for stage in told["stages"]] == STAGES
    assert told["size"] == sum(path.stat().st_size for path in finished.rglob("*") if path.is_file())


def test_the_command_that_resumes_a_run_resumes_it_where_it_lies(runs, tool, capsys, finished, run_copy, at_scenes):
    for folder in (finished, run_copy):
        command = shlex.split(json.loads(runs("show", "--json", folder)[1])["resume"])
        assert command[:2] == ["python", "tools/train_net.py"]
        assert tool.cli(command[2:]) == 0
        assert f"the run in {folder} is finished" in capsys.readouterr().out


def test_pruning_shows_first_and_leaves_what_others_start_from(runs, run_copy, tiny_config):
    before, size = checkpoints(run_copy), look_at(run_copy).size
    status, out, _ = runs("prune", run_copy)
    assert status == 0 and "5 folders" in out and "would be removed" in out and checkpoints(run_copy) == before
    status, out, _ = runs("prune", run_copy, "--yes")
    assert status == 0 and "removed 5 folders" in out
    assert checkpoints(run_copy) == [f"{stage}/step_000002" for stage in sorted(STAGES)]
    assert look_at(run_copy).size < size and look_at(run_copy).state == "finished"
    assert not (run_copy / LOCK_FILE).exists()
    assert load_init(str(run_copy), tiny_config())[0].pretext
    assert load_init(str(run_copy), tiny_config(), evaluate=True)[0].task
    assert "There is nothing to remove." in runs("prune", run_copy, "--yes")[1]


def test_of_an_unfinished_run_two_stay_or_as_many_as_asked_for(runs, run_copy):
    before = checkpoints(unfinish(run_copy))
    runs("prune", run_copy, "--yes")
    assert checkpoints(run_copy) == before
    runs("prune", run_copy, "--yes", "--keep", 1)
    assert checkpoints(run_copy) == sorted([f"{stage}/step_000002" for stage in STAGES[:-1]] + ["finetune/step_000001"])


def test_an_older_checkpoint_stays_in_the_place_of_a_damaged_one(runs, run_copy):
    newest = run_copy / "checkpoints" / "bissl" / "step_000002"
    damage(newest / "state.json")
    out = runs("prune", run_copy, "--yes")[1]
    assert f"left alone: {newest / 'state.json'} is damaged" in out
    assert [path for path in checkpoints(run_copy) if "bissl" in path] == ["bissl/step_000001", "bissl/step_000002"]


def test_the_best_by_the_figure_of_the_config_stays(runs, run_copy):
    text = (run_copy / "config.yaml").read_text()
    assert "best: null" in text
    (run_copy / "config.yaml").write_text(text.replace("best: null", "best: test/AP50"))
    for step, value in ((1, 0.4), (2, 0.3)):
        path = run_copy / "checkpoints" / "finetune" / f"step_00000{step}" / MANIFEST_FILE
        path.write_text(json.dumps({**json.loads(path.read_text()), "metrics": {"test/AP50": value}}))
    runs("prune", run_copy, "--yes")
    assert [path for path in checkpoints(run_copy) if "000001" in path] == ["finetune/step_000001"]


def test_leftovers_go_and_what_was_set_aside_only_when_asked(runs, run_copy):
    place = run_copy / "checkpoints" / "pretrain"
    (place / ".step_000003-x").mkdir()
    aside = place / "damaged_step_000001-x"
    aside.mkdir()
    assert "--damaged removes them" in runs("prune", run_copy, "--yes")[1]
    assert sorted(path.name for path in place.iterdir()) == [aside.name, "step_000002"]
    runs("prune", run_copy, "--yes", "--damaged")
    assert [path.name for path in place.iterdir()] == ["step_000002"]


def test_what_is_linked_to_is_not_removed(runs, run_copy, tmp_path):
    stage = run_copy / "checkpoints" / "pretrain"
    shutil.move(stage, tmp_path / "elsewhere")
    stage.symlink_to(tmp_path / "elsewhere")
    assert "lies elsewhere, behind a link" in runs("prune", run_copy, "--yes")[1]
    assert len(list((tmp_path / "elsewhere").iterdir())) == 2


def test_a_run_that_is_running_is_not_pruned(runs, run_copy):
    before = checkpoints(run_copy)
    with run_lock(run_copy):
        for arguments in ((), ("--yes",)):
            status, out, err = runs("prune", run_copy, *arguments)
            assert (status, out) == (1, "") and f"written by process {os.getpid()}" in err
    assert checkpoints(run_copy) == before


def test_keeping_none_is_refused(runs, run_copy, capsys):
    with pytest.raises(SystemExit):
        runs("prune", run_copy, "--keep", 0)
    assert "--keep must be 1 or more" in capsys.readouterr().err
