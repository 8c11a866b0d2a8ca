"""tools/zoo.py: output and exit status of each command."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from command_line import load_tool
from tiny_entries import publish_tiny

from bissl_zoo.zoo import create_backbone
from bissl_zoo.zoo.commands import COMMANDS

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def zoo_tool():
    """The command `bissl zoo`."""
    return load_tool("zoo")


@pytest.fixture
def run(zoo_tool, capsys, monkeypatch, zoo):
    """Call the command line with `zoo` as the default zoo; return status, standard output and standard error."""
    monkeypatch.setenv("BISSL_ZOO", str(zoo))
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")

    def call(*arguments, typed=""):
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        status = zoo_tool.cli([str(argument) for argument in arguments])
        output = capsys.readouterr()
        return status, output.out, output.err

    return call


def publish(zoo, name, seed=0, **metadata):
    publish_tiny(zoo, name, seed, config="train: {seed: 0}\n", **{"seeds": [0, 1], **metadata})


STARTS = ("pretrained", "bissl")
METRICS = {f"{name} ({start})": [0.41, 0.43] for name in ("AP", "AP50", "AP75") for start in STARTS}
DETECTION = "resnet18.simclr_bissl_digit_scenes"


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A zoo with two versions of a long name and a pretrained entry; read-only."""
    root = tmp_path_factory.mktemp("published") / "zoo"
    for seed in (0, 1):
        publish(root, DETECTION, seed, pretext="simclr", task="detection", solver="minres", metrics=METRICS)
    publish(root, "byol", 2, pretext="byol", seeds=[], licence="Apache-2.0")
    return root


@pytest.fixture
def zoo(published, tmp_path):
    return Path(shutil.copytree(published, tmp_path / "zoo"))


@pytest.fixture
def empty(tmp_path):
    (tmp_path / "empty").mkdir()
    return tmp_path / "empty"


def test_a_list_has_a_line_per_entry_with_one_metric_and_its_gain(run, zoo):
    status, out, err = run("list")
    assert (status, err) == (0, "")
    lines = [re.split(r"\s{2,}", line.strip()) for line in out.splitlines()]
    assert lines[0] == [str(zoo)] and lines[2] == ["entry", "backbone", "MB", "made by", "metric (gain by BiSSL)"]
    assert [line[0] for line in lines[4:7]] == ["byol", DETECTION, f"{DETECTION}@2"]
    assert lines[4][1:] == ["test_resnet", "1.5", "byol", "-"]
    assert lines[5][1:] == ["test_resnet", "1.5", "simclr, detection, minres", "AP 0.42 ± 0.014 (+0.0000)"]


def test_a_list_can_be_filtered(run, empty, zoo):
    assert f"{DETECTION}@2" in run("list", "*simclr*", "--task", "det*", "--metric", "AP50*")[1]
    assert run("list", "*simclr*", "--pretext", "byol")[1] == f"{zoo} has 3 entries, but none matches.\n"
    assert run("list", "--zoo", empty) == (0, f"{empty} has no entries.\n", "")
    assert "byol" not in run("list", "--architecture", "resnet*")[1]
    assert list(json.loads(run("list", "--pretext", "byol", "--json")[1])) == ["byol"]


def test_show_and_card_print_the_entry(run, zoo):
    status, out, err = run("show", "byol")
    assert (status, err) == (0, "") and "licence: Apache-2.0" in out and f"location: {zoo / 'byol'}" in out
    assert run("card", DETECTION)[:2] == (0, (zoo / f"{DETECTION}@2" / "README.md").read_text())


def test_fetch_verifies_and_prints_how_to_load(run, zoo):
    status, out, err = run("fetch", "byol")
    assert (status, err) == (0, "") and "files, verified" in out and 'create_backbone("byol@1"' in out
    files = json.loads(run("fetch", "byol", "--json")[1])["files"]
    assert files["model.safetensors"] == str(zoo / "byol" / "model.safetensors")
    os.truncate(zoo / "byol" / "model.safetensors", 10)
    status, out, err = run("fetch", "byol")
    assert (status, out) == (1, "") and "expected 1506920 bytes, found 10" in err


def test_fetch_to_a_folder_makes_an_entry_that_timm_loads(run, zoo, tmp_path):
    status, out, _ = run("fetch", "byol", "--to", tmp_path / "here" / "there")
    assert status == 0
    (location,) = re.findall(r"'(local-dir:.*?)'", out)
    model = timm.create_model(location, pretrained=True)
    expected = create_backbone("byol", zoo=zoo).state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())
    status, out, err = run("fetch", "byol", "--to", tmp_path / "here" / "there")
    assert (status, out) == (1, "") and "exists" in err


def test_verify_names_files_that_differ(run, zoo):
    assert run("verify") == (0, "3 entries, 0 files differ\n", "")
    os.truncate(zoo / "byol" / "model.safetensors", 10)
    status, out, _ = run("verify")
    assert status == 1 and "byol/model.safetensors has 10 bytes, expected 1506920: copy the entry again" in out
    status, out, err = run("verify", "--json")
    (finding,) = json.loads(out)
    assert (status, err) == (1, "") and finding["file"] == "byol/model.safetensors"


def test_publish_publishes_a_finished_run(run, run_copy, empty):
    status, out, err = run("publish", run_copy, "--name", "mine", "--zoo", empty)
    assert (status, err, out) == (0, "", f"published mine at {empty / 'mine'}\n")
    result = json.loads(run("publish", run_copy, "--name", "mine", "--zoo", empty, "--json")[1])
    assert result["name"] == "mine@2" and result["location"] == str(empty / "mine@2") and len(result["sha256"]) == 64
    assert run("verify", "--zoo", empty)[0] == 0
    assert create_backbone("mine", zoo=empty).name == "test_resnet"


@pytest.mark.parametrize("typed", ["", "n\n"])
def test_remove_asks_and_only_yes_removes(run, zoo, typed):
    status, out, err = run("remove", "byol", typed=typed)
    assert (status, out) == (1, "") and "Remove" in err and "[y/N]" in err and "Nothing was removed" in err
    assert (zoo / "byol" / "model.safetensors").exists()


def test_remove_removes_one_version_whose_name_is_not_used_again(run, zoo, run_copy):
    status, out, err = run("remove", DETECTION, "--yes")
    assert (status, out) == (1, "") and f"for example '{DETECTION}@2'" in err
    status, out, _ = run("remove", f"{DETECTION}@2", typed="y\n")
    assert (status, out) == (0, f"removed {zoo / DETECTION}@2\n") and not (zoo / f"{DETECTION}@2").exists()
    assert json.loads(run("remove", f"{DETECTION}@1", "--yes", "--json")[1]) == {"removed": DETECTION}
    result = json.loads(run("publish", run_copy, "--name", DETECTION, "--json", "--zoo", zoo)[1])
    assert result["name"] == f"{DETECTION}@3"
    assert run("verify")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "nothing"], "Unknown zoo entry 'nothing'"),
        (["list", "--zoo", "htps://zoo.example.org"], "Did you mean 'https'"),
        (["publish", "RUN", "--name", "x", "--zoo", "http://127.0.0.1:9"], "is read-only"),
        (["remove", "byol", "--yes", "--zoo", "EMPTY"], "It has no entries"),
    ],
)
def test_an_error_is_one_line_and_status_1(run, empty, run_copy, arguments, message):
    places = {"EMPTY": empty, "RUN": run_copy}
    status, out, err = run(*[places.get(argument, argument) for argument in arguments])
    assert (status, out) == (1, "") and err.startswith("error: ") and message in err and err.count("\n") == 1


@pytest.mark.slow
def test_the_program_lists_and_each_command_has_help(zoo, zoo_tool):
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "BISSL_ZOO": str(zoo)}
    command = [sys.executable, REPOSITORY / "tools" / "zoo.py", "list", "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and len(json.loads(done.stdout)) == 3
    for command in (*COMMANDS, "publish"):
        with pytest.raises(SystemExit) as caught:
            zoo_tool.cli([command, "--help"])
        assert caught.value.code == 0
