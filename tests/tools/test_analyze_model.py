"""The tool analyze_model.py from its command line: tables, JSON, and what it refuses."""

import contextlib
import io
import json

import pytest
from command_line import load_tool


@pytest.fixture(scope="module")
def analyze(scenes):
    """Call the command line: `analyze("--no-timing", "a.b=c")` -> (status, out, err)."""
    tool = load_tool("analyze_model")

    def call(*arguments, config="quickstart/digit_scenes_det.py", datasets=scenes):
        out, err = io.StringIO(), io.StringIO()
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            patch.setenv("BISSL_ZOO_DATASETS", str(datasets))
            status = tool.cli(["--config-file", str(config), *map(str, arguments)])
        return status, out.getvalue(), err.getvalue()

    return call


def test_the_tiny_quickstart_is_counted_as_tables(analyze, tiny):
    status, out, err = analyze("--no-timing", *tiny())
    assert status == 0, err
    for title in ("backbone, one image of 3 x 32 x 32", "lower loss, one image", "upper loss, one image"):
        assert title in out
    assert "time and memory" not in out and "duration" not in out


def test_a_stage_is_measured_and_told_as_json(analyze, tiny):
    status, out, err = analyze("--json", "--batch-scale", "0.5", *tiny(), "train.stages=[pretrain]")
    assert status == 0, err
    found = json.loads(out)
    (cost,) = found["costs"]
    assert (cost["stage"], cost["what"], cost["images"]) == ("pretrain", "step", 4)
    (duration,) = found["durations"]
    assert duration["steps"] == 2
    assert duration["seconds"] == pytest.approx(2 * cost["seconds"] / 0.5)
    assert found["whole"]["parameters"] == sum(stage["count"]["parameters"] for stage in found["stages"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["pretrain.stepz=3"], "pretrain.stepz"),
        (["backbone.name=resnet1"], "resnet1"),
        (["bilevel.shared_stage=c9"], "no stage 'c9'"),
        (["--batch-scale", "3"], "scale of the batches is 3"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(analyze, tiny, arguments, said):
    status, _, err = analyze("--no-timing", *tiny(), *arguments)
    assert status == 1 and err.startswith("error: ") and said in err and "Traceback" not in err
