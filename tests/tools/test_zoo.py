"""tools/zoo.py: each command as its help says, what it prints, and its exit status."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import timm
import torch
from command_line import load_tool
from tiny_entries import publish_tiny

from bissl_zoo.zoo import create_backbone
from bissl_zoo.zoo.commands import COMMANDS
from bissl_zoo.zoo.serve import ZooServer
from bissl_zoo.zoo.transactions import CLAIM_FILE

REPOSITORY = Path(__file__).resolve().parents[2]
TOOL = REPOSITORY / "tools" / "zoo.py"


@pytest.fixture(scope="module")
def zoo_tool():
    """The module tools/zoo.py."""
    return load_tool("zoo")


@pytest.fixture
def run(zoo_tool, capsys, monkeypatch, zoo):
    """Call the command line with `zoo` as the default one: status, standard output and standard error."""
    monkeypatch.setenv("BISSL_ZOO", str(zoo))
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")

    def call(*arguments, typed=""):
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        status = zoo_tool.main([str(argument) for argument in arguments])
        said = capsys.readouterr()
        return status, said.out, said.err

    return call


def publish(zoo, name, seed=0, **metadata):
    publish_tiny(zoo, name, seed, config="train: {seed: 0}\n", **{"seeds": [0, 1], **metadata})


STARTS = ("pretrained", "bissl")
METRICS = {f"{name} ({start})": [0.41, 0.43] for name in ("AP", "AP50", "AP75") for start in STARTS}
DETECTION = "resnet18.simclr_bissl_digit_scenes"


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A zoo with two versions of a long name and a pretrained entry, not to be changed."""
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


def test_a_list_fits_a_terminal_and_keeps_each_entry_and_metric_in_its_lines(run, zoo):
    status, out, err = run("list")
    assert (status, err) == (0, "")
    assert max(map(len, out.splitlines())) <= 100
    lines = out.splitlines()
    assert lines[0] == str(zoo)
    assert lines[2].split() == ["entry", "backbone", "made", "by", "metrics"]
    (first,) = [i for i, line in enumerate(lines) if line.startswith(f"{DETECTION} ")]
    about = [re.split(r"\s{2,}", line.strip()) for line in lines[first : first + 4]]
    assert about == [
        [DETECTION, "test_resnet", "simclr", "from", "pretrained", "bissl"],
        ["1.5 MB", "detection", "AP", "0.42 ± 0.014", "0.42 ± 0.014"],
        ["minres", "AP50", "0.42 ± 0.014", "0.42 ± 0.014"],
        ["AP75", "0.42 ± 0.014", "0.42 ± 0.014"],
    ]
    assert [line.split()[0] for line in lines if line.startswith(("byol", DETECTION))] == [
        "byol",
        DETECTION,
        f"{DETECTION}@2",
    ]


def test_a_list_can_be_narrowed_and_says_when_nothing_is_left(run, empty, zoo):
    assert f"{DETECTION}@2" in run("list", "*simclr*", "--task", "det*", "--metric", "AP50*")[1]
    assert run("list", "*simclr*", "--pretext", "byol") == (
        0,
        f"{zoo} holds 3 entries, and none of them matches.\n",
        "",
    )
    assert run("list", "--zoo", empty) == (0, f"{empty} holds no entries.\n", "")
    assert "byol" not in run("list", "--architecture", "resnet*")[1]
    assert list(json.loads(run("list", "--pretext", "byol", "--json")[1])) == ["byol"]


def test_json_is_what_the_index_holds_and_where(run, zoo, empty):
    told = json.loads(run("list", "--json")[1])
    records = json.loads((zoo / "index.json").read_text())["entries"]
    assert told == {name: {**record, "location": str(zoo / name)} for name, record in records.items()}
    assert run("list", "--json", "--zoo", empty) == (0, "{}\n", "")
    assert json.loads(run("show", "byol", "--json")[1])["location"] == str(zoo / "byol")


def test_several_zoos_are_listed_one_after_the_other_and_the_first_wins(run, zoo, tmp_path):
    other = tmp_path / "other"
    publish(other, "byol", 5)
    publish(other, "third", 6, pretext="vicreg")
    out = run("list", "--zoo", other, "--zoo", zoo)[1]
    mine, rest = out.split(f"\n{zoo}\n")
    assert mine.startswith(str(other)) and "third" in mine and "byol" in mine
    assert "byol" not in rest and DETECTION in rest


def test_show_and_card_say_what_the_entry_says(run, zoo):
    status, out, err = run("show", "byol")
    assert (status, err) == (0, "") and "licence: Apache-2.0" in out and f"location: {zoo / 'byol'}" in out
    assert run("card", DETECTION)[:2] == (0, (zoo / f"{DETECTION}@2" / "README.md").read_text())


def test_fetch_verifies_and_says_how_to_load(run, zoo):
    status, out, err = run("fetch", "byol")
    assert (status, err) == (0, "") and "files, verified" in out and 'create_backbone("byol@1"' in out
    files = json.loads(run("fetch", "byol", "--json")[1])["files"]
    assert files["model.safetensors"] == str(zoo / "byol" / "model.safetensors")
    os.truncate(zoo / "byol" / "model.safetensors", 10)
    status, out, err = run("fetch", "byol")
    assert (status, out) == (1, "") and "expected 1506920 bytes, found 10" in err


def test_fetch_from_the_web_keeps_a_copy_or_makes_a_folder_that_timm_loads(run, zoo, tmp_path, monkeypatch):
    monkeypatch.setenv("BISSL_ZOO_CACHE", str(tmp_path / "cache"))
    with ZooServer(zoo, port=0) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        files = json.loads(run("fetch", "byol", "--json", "--zoo", server.address)[1])["files"]
        assert all(Path(path).is_relative_to(tmp_path / "cache") for path in files.values())
        status, out, _ = run("fetch", "byol", "--to", tmp_path / "here" / "there", "--zoo", server.address)
        address = server.address
        server.shutdown()
    assert status == 0
    (location,) = re.findall(r"'(local-dir:.*?)'", out)
    model = timm.create_model(location, pretrained=True)
    expected = create_backbone("byol", zoo=zoo).state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())
    status, out, err = run("fetch", "byol", "--to", tmp_path / "here" / "there", "--zoo", zoo)
    assert (status, out) == (1, "") and "exists already" in err
    monkeypatch.setenv("BISSL_ZOO_OFFLINE", "1")
    assert run("fetch", "byol", "--zoo", address)[0] == 0


def test_verify_says_what_is_wrong_and_repair_mends_what_it_can(run, zoo):
    status, out, err = run("verify")
    assert (status, out) == (0, "3 entries, 0 findings, 0 left to do\n") and "byol ..." in err
    (zoo / "left").mkdir()
    (zoo / "left" / CLAIM_FILE).write_text('{"host"')
    (zoo / "MODEL_ZOO.md").unlink()
    status, out, _ = run("verify")
    assert status == 1 and "left is left over from a killed publisher: --repair mends it" in out
    assert "MODEL_ZOO.md is not what the index says: --repair mends it" in out
    assert out.endswith("3 entries, 2 findings, 2 left to do\n") and (zoo / "left").exists()
    status, out, _ = run("verify", "--repair")
    assert status == 0 and out.endswith("3 entries, 2 findings, 0 left to do\n") and not (zoo / "left").exists()
    os.truncate(zoo / "byol" / "model.safetensors", 10)
    status, out, err = run("verify", "--repair", "--json")
    (finding,) = json.loads(out)
    assert (status, err) == (1, "") and finding["where"] == "byol/model.safetensors"
    assert finding["what"] == "has 10 of 1506920 bytes" and "publish it again" in finding["advice"]


def test_what_cannot_be_mended_does_not_stop_the_rest(run, zoo):
    (zoo / "left").mkdir()
    (zoo / "left" / CLAIM_FILE).write_text("")
    (zoo / "left" / "deeper").mkdir()
    (zoo / "MODEL_ZOO.md").unlink()
    status, out, _ = run("verify", "--repair")
    assert status == 1 and "left cannot be removed" in out and (zoo / "MODEL_ZOO.md").exists()
    assert out.endswith("2 findings, 1 left to do\n")


def test_publish_takes_a_finished_run(run, run_copy, empty):
    status, out, err = run("publish", run_copy, "--name", "mine", "--zoo", empty)
    assert (status, err, out) == (0, "", f"published mine at {empty / 'mine'}\n")
    told = json.loads(run("publish", run_copy, "--name", "mine", "--zoo", empty, "--json")[1])
    assert told["name"] == "mine@2" and told["location"] == str(empty / "mine@2") and len(told["sha256"]) == 64
    assert run("verify", "--zoo", empty)[0] == 0
    assert create_backbone("mine", zoo=empty).name == "test_resnet"
    listed = run("list", "--zoo", empty)[1]
    assert max(map(len, listed.splitlines())) <= 100


def test_what_is_no_run_is_not_published(run, empty, run_copy):
    status, out, err = run("publish", empty, "--name", "x", "--zoo", empty)
    assert (status, out) == (1, "") and "There is no run in" in err and err.count("\n") == 1
    shutil.rmtree(run_copy / "checkpoints")
    status, out, err = run("publish", run_copy, "--name", "x", "--zoo", empty)
    assert (status, out) == (1, "") and "no backbone to publish" in err and not any(empty.iterdir())


@pytest.mark.parametrize("typed", ["", "\n", "n\n", "nonsense\n"])
def test_remove_asks_and_takes_nothing_but_yes_for_one(run, zoo, typed):
    status, out, err = run("remove", "byol", typed=typed)
    assert (status, out) == (1, "") and "Remove" in err and "[y/N]" in err and "Nothing was removed" in err
    assert (zoo / "byol" / "model.safetensors").exists()


def test_remove_takes_one_version_whose_name_is_not_used_again(run, zoo, run_copy):
    status, out, err = run("remove", DETECTION, "--yes")
    assert (status, out) == (1, "") and f"as in '{DETECTION}@2'" in err
    status, out, _ = run("remove", f"{DETECTION}@2", typed="y\n")
    assert (status, out) == (0, f"removed {zoo / DETECTION}@2\n") and not (zoo / f"{DETECTION}@2").exists()
    assert run("remove", f"{DETECTION}@1", "--yes", "--json") == (
        0,
        json.dumps({"removed": DETECTION}, indent=2) + "\n",
        "",
    )
    status, out, err = run("remove", DETECTION, "--yes")
    assert (status, out) == (1, "") and "Unknown zoo entry" in err
    told = json.loads(run("publish", run_copy, "--name", DETECTION, "--json", "--zoo", zoo)[1])
    assert told["name"] == f"{DETECTION}@3"
    assert run("verify")[0] == 0


def test_remove_works_on_the_first_zoo_alone(run, zoo, empty):
    status, _, err = run("remove", "byol", "--yes", "--zoo", empty, "--zoo", zoo)
    assert status == 1 and "Unknown zoo entry 'byol'" in err and (zoo / "byol").exists()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["show", "nothing"], "Unknown zoo entry 'nothing'"),
        (["card", "../x"], "is not a name for a zoo entry"),
        (["list", "--zoo", "htps://zoo.example.org"], "Did you mean 'https'"),
        (["serve", "--zoo", "http://127.0.0.1:9"], "is not a folder on this machine"),
        (["serve", "--zoo", "EMPTY"], "neither index.json nor curated.json"),
        (["serve", "--port", "99999"], "Cannot serve at"),
        (["publish", "RUN", "--name", "x", "--zoo", "http://127.0.0.1:9"], "can be read from, but not published to"),
        (["remove", "byol", "--yes", "--zoo", "EMPTY"], "It holds no entries"),
    ],
)
def test_what_is_wrong_is_one_line_and_status_1(run, empty, run_copy, arguments, told):
    places = {"EMPTY": empty, "RUN": run_copy}
    status, out, err = run(*[places.get(argument, argument) for argument in arguments])
    assert (status, out) == (1, "") and err.startswith("error: ") and told in err and err.count("\n") == 1


def test_an_index_of_the_web_is_not_removed_from(run, zoo):
    with ZooServer(zoo, port=0) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        status, _, err = run("remove", "byol", "--yes", "--zoo", server.address)
        server.shutdown()
    assert status == 1 and "not published to" in err.splitlines()[-1] and (zoo / "byol").exists()


@pytest.mark.parametrize("arguments", [[], ["lists"], ["show"], ["serve", "--port", "x"]])
def test_a_command_line_that_is_none_is_status_2_with_the_usage(run, capsys, arguments):
    with pytest.raises(SystemExit) as caught:
        run(*arguments)
    assert caught.value.code == 2 and "usage:" in capsys.readouterr().err


def environment(**more):
    paths = filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")])
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "NO_PROXY": "127.0.0.1", **more}


def test_as_a_program_it_lists_and_each_command_has_its_help(zoo, zoo_tool):
    done = subprocess.run(
        [sys.executable, TOOL, "list", "--json"], env=environment(BISSL_ZOO=str(zoo)), capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "") and len(json.loads(done.stdout)) == 3
    for command in (*COMMANDS, "publish"):
        with pytest.raises(SystemExit) as caught:
            zoo_tool.main([command, "--help"])
        assert caught.value.code == 0


def test_serve_offers_the_zoo_until_ctrl_c(zoo, tmp_path, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("BISSL_ZOO_CACHE", str(tmp_path / "cache"))
    command = [sys.executable, str(TOOL), "serve", "--zoo", str(zoo), "--port", "0"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment(), **pipes) as process:
        line = ""
        while "export BISSL_ZOO=" not in line:
            line = process.stdout.readline()
            assert line, process.stderr.read()
        backbone = create_backbone("byol", zoo=line.partition("=")[2].strip())
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 0
        assert process.stdout.read().endswith("Stopped.\n") and "Traceback" not in process.stderr.read()
    expected = create_backbone("byol", zoo=zoo).state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in backbone.state_dict().items())
