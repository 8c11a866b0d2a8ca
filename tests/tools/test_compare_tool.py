"""The command line of tools/compare.py."""

import contextlib
import io
import shutil

import pytest
from command_line import load_tool

from bissl_zoo.errors import Interrupted
from bissl_zoo.studies import compare as module

pytestmark = pytest.mark.slow
CONFIG = "compare/digit_scenes.py"


@pytest.fixture(scope="module")
def compare_tool():
    return load_tool("compare")


@pytest.fixture
def call(compare_tool, at_scenes, tiny, tmp_path):
    """`call("--dry-run", "a.b=c")` -> (status, standard output, standard error), with the config made tiny."""
    sizes = {f"dataloader.{role}.dataset.image_size": 64 for role in ("pretext", "train", "test")}
    # the shipped config names an image size already, so that it is changed and not added
    overrides = [text for text in tiny() if ".dataset.image_size" not in text and not text.startswith("backbone.name")]
    overrides += [f"{key}={value}" for key, value in sizes.items()] + [f"train.output_dir={tmp_path / 'c'}"]

    def run(*arguments):
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = compare_tool.cli(["--config-file", CONFIG, *overrides, *arguments])
        return status, out.getvalue(), err.getvalue()

    return run


def test_a_dry_run_lists_every_run_and_leaves_nothing(call, tmp_path):
    status, out, err = call("--dry-run", "--seeds", "3,5", "--arms", "pretrained,longer_pretraining")
    assert status == 0, err
    rows = {line.split()[0]: line for line in out.splitlines() if line.strip()}
    runs = [name for name in rows if "-seed" in name]
    assert runs == [f"{arm}-seed{seed}" for seed in (3, 5) for arm in ("pretrained", "longer_pretraining")]
    assert "pretrain, finetune" in rows["longer_pretraining-seed5"] and " 5 " in rows["longer_pretraining-seed5"]
    assert "pretrain.steps=4" in out and "optimizer.pretrain=" in out and "5 runs" in out
    assert not (tmp_path / "c").exists()


def test_a_weak_coupling_of_the_levels_is_warned_of(call):
    status, out, err = call("--dry-run", "--seeds", "1", "bilevel.lambda=0.0001")
    assert status == 0 and "below 0.3" in out and "almost no effect" in out
    status, out, err = call("--dry-run", "--seeds", "1", "bilevel.lambda=1.0")
    assert status == 0 and "warning" not in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--arms", "pretrained,bisl"], "Did you mean 'bissl'"),
        (["--datasets", "food101"], "compare.datasets has no 'food101'. Known: none"),
        (["--report"], "holds no comparison"),
        (["optimizer.finetune.lr=-1"], "optimizer"),
    ],
)
def test_an_invalid_comparison_is_refused_in_one_message(call, tmp_path, arguments, words):
    status, _, err = call(*arguments)
    assert status == 1 and err.startswith("error: ") and words in err and "Traceback" not in err
    assert not (tmp_path / "c").exists()


def test_an_interrupted_comparison_can_be_reported(call, finished, tmp_path, monkeypatch):
    def stopped(*arguments, engine):
        assert engine == "ray"
        raise Interrupted("Interrupted: 0 of 4 runs are finished", 130)

    monkeypatch.setattr(module, "run_jobs", stopped)
    status, _, err = call("--seeds", "2", "--arms", "pretrained,bissl", "--engine", "ray")
    assert status == 130 and err.strip().endswith("Interrupted: 0 of 4 runs are finished")
    for seed in (0, 1):  # as if they had finished
        shutil.copytree(finished, tmp_path / "c" / "runs" / f"pretrained-seed{seed}")
    status, out, err = call("--report", "--seeds", "2", "--arms", "pretrained,bissl")
    assert status == 0, err
    assert "bissl-seed1 is left out: not started" in out
    assert "no seed in common with fine-tuning alone" in out
    assert "comparison.png" in out and (tmp_path / "c" / "comparison.md").is_file()


@pytest.mark.parametrize("text", ["ten", "1,b", ""])
def test_invalid_seeds_are_refused_by_the_parser(compare_tool, capsys, text):
    with pytest.raises(SystemExit) as ended:
        compare_tool.parse_args(["--config-file", CONFIG, "--seeds", text])
    assert ended.value.code == 2 and "--seeds" in capsys.readouterr().err
    assert compare_tool.parse_args(["--config-file", CONFIG, "--seeds", "4,"]).seeds == [4]
