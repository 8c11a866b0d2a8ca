"""The segmentation example, whose targets no tool knows, goes through every tool."""

import json

import pytest
from PIL import Image
from report_pages import harmless

pytestmark = pytest.mark.slow
CONFIG = "examples/segmentation/shapes.py"
IMAGES = {"pretext": 24, "train": 16, "test": 8}


@pytest.fixture(scope="module")
def settings(tiny):
    """Return overrides that make the example tiny."""
    names = ("task.", "+dataloader.")
    return [one for one in tiny(train__publish__name="null") if not one.startswith(names)] + [
        f"dataloader.{role}.dataset.images={count}" for role, count in IMAGES.items()
    ]


@pytest.fixture(scope="module")
def trained(settings, train_net_process, tmp_path_factory):
    folder = tmp_path_factory.mktemp("segmentation") / "run"
    outcome = train_net_process(*settings, f"train.output_dir={folder}", config=CONFIG)
    assert outcome.status == 0, outcome.err
    return folder


@pytest.fixture
def tool(process):
    """Call a tool: `tool("report", ...)` -> its standard output."""

    def call(name, *arguments, status=0):
        with process(f"tools/{name}.py", *arguments) as running:
            out, err = running.communicate(timeout=300)
        assert running.returncode == status and "Traceback" not in err, err
        return out + err

    return call


def test_all_stages_train_it(trained):
    results = json.loads((trained / "results.json").read_text())
    assert results.keys() == {"pretrained", "bissl"} and all(0 <= one["mIoU"] <= 1 for one in results.values())


@pytest.mark.parametrize("command", ["data", "views", "predictions", "embeddings"])
def test_it_is_drawn(trained, tool, tmp_path, command):
    output = tmp_path / "image.png"
    tool("visualize", command, trained, "--images", 4, "--output", output)
    assert output.stat().st_size > 10_000


def test_the_report_has_all_parts(trained, tool, tmp_path):
    tool("report", trained, "--images", 8, "--output", tmp_path / "report.html")
    parsed = harmless((tmp_path / "report.html").read_text())
    assert parsed.problems == [] and "Metrics by class" in " ".join(parsed.text)
    assert len([tag for tag, _ in parsed.elements if tag == "img"]) >= 12


def test_its_model_predicts_where_its_task_is_imported(trained, tool, tmp_path):
    Image.effect_noise((80, 60), 50).convert("RGB").save(tmp_path / "a.png")
    arguments = [trained, tmp_path / "a.png", "--output", tmp_path / "out"]
    assert "segmentation.py" in tool("predict", *arguments, status=1)  # the file to import
    tool("predict", *arguments, "--import", "examples/segmentation/segmentation.py")
    [result] = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert sum(result["shares"].values()) == pytest.approx(1) and len(result["mask"]) == 64
    assert Image.open(tmp_path / "out" / "drawn" / "a.png").width == 600


def test_its_cost_is_measured(settings, tool):
    out = tool("analyze_model", "--config-file", CONFIG, *settings)
    assert "upper loss" in out and "finetune" in out


def test_a_probe_of_a_set_without_single_labels_is_refused(trained, settings, tool):
    assert "class labels" in tool("probe", trained, "--config-file", CONFIG, *settings, status=1)
