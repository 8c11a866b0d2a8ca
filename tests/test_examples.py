"""The examples train, resume and publish as their pages describe."""

import json
import re
import shutil
from pathlib import Path

import pytest
import timm
from command_line import load_tool, temporary_registrations

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).resolve().parents[1]
ROTATION = "examples/my_pretext_method/digit_scenes.py"


@pytest.fixture(autouse=True)
def own_registrations():
    """Let each test register the parts of an example, as a process of its own does."""
    with temporary_registrations():
        yield


@pytest.fixture(scope="module")
def rotation(train_net, tiny, tmp_path_factory):
    """Return the directory of a tiny run of the rotation example."""
    folder = tmp_path_factory.mktemp("rotation") / "run"
    with temporary_registrations():
        outcome = train_net(*tiny(), f"train.output_dir={folder}", config=ROTATION)
    assert outcome.status == 0, outcome.err
    return folder


def test_a_method_in_one_file_is_trained_and_published(rotation):
    code = (REPOSITORY / "examples" / "my_pretext_method" / "rotation.py").read_text()
    assert len(code.splitlines()) <= 60
    receipt = json.loads((rotation / "zoo_entry.json").read_text())
    entry = json.loads((Path(receipt["location"]) / "entry.json").read_text())
    assert entry["pretext"] == "rotation" and entry["task"] == "faster_rcnn"
    assert timm.create_model(f"local-dir:{receipt['location']}", pretrained=True)
    losses = [json.loads(line) for line in (rotation / "metrics.jsonl").read_text().splitlines()]
    assert any("rotation" in key for line in losses for key in line)


def test_its_run_is_resumed_from_its_saved_config(rotation, train_net):
    (rotation / "results.json").unlink()
    shutil.rmtree(rotation / "checkpoints" / "finetune" / "step_000002")
    outcome = train_net("--resume", config=rotation / "config.yaml")
    assert outcome.status == 0, outcome.err
    assert re.search(r"bissl .*2", outcome.out) and re.search(r"resum.*finetune .*1", outcome.out)
    assert (rotation / "results.json").is_file()


def test_the_hypergradient_check_passes_on_it(rotation, tiny, tmp_path, at_scenes):
    options = ["--config-file", ROTATION, "--run", rotation, "--output-dir", tmp_path / "check"]
    assert load_tool("check").cli([*options, "--max-products", 3, "--warmup-steps", 1, *tiny()]) == 0
    assert json.loads((tmp_path / "check" / "check.json").read_text())["passed"]


def test_a_task_in_one_file_runs_through_all_stages(train_net, tiny, tmp_path):
    settings = [setting for setting in tiny() if not setting.startswith("task.")]
    settings += ["task.image_size=64", f"train.output_dir={tmp_path / 'run'}"]
    outcome = train_net(*settings, config="examples/my_task/digit_scenes.py")
    assert outcome.status == 0, outcome.err
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results.keys() == {"pretrained", "bissl"}
    for metrics in results.values():
        assert 0 < metrics["MAE"] <= metrics["RMSE"] < 10


def test_two_levels_of_other_libraries_are_aligned(process):
    pytest.importorskip("lightly", reason="lightly is not installed")
    with process(REPOSITORY / "examples" / "bilevel" / "own_modules.py", "--alternations", 1) as running:
        out, err = running.communicate(timeout=300)
    assert running.returncode == 0, err
    assert "alternation 1: pretext" in out and re.search(r"accuracy 0\.\d+ on 597 images", out)
    code = (REPOSITORY / "examples" / "bilevel" / "own_modules.py").read_text()
    levels = code[code.index("class Contrast") : code.index("# the rest is data")]
    assert len([line for line in levels.splitlines() if line.strip()]) <= 40


def test_the_core_solves_a_text_problem(process):
    short = ["--pretrain-steps", 20, "--alternations", 2, "--finetune-steps", 10]
    with process(REPOSITORY / "examples" / "text" / "masked_words.py", *short) as running:
        out, err = running.communicate(timeout=300)
    assert running.returncode == 0, err
    residuals = [float(value) for value in re.findall(r"residual (\d\.\d+)", out)]
    assert len(residuals) == 2 and max(residuals) <= 0.05
    accuracies = [float(value) for value in re.findall(r"accuracy (\d\.\d+)", out)]
    assert len(accuracies) == 2 and all(0 <= accuracy <= 1 for accuracy in accuracies)
