"""The command line of tools/analyze_model.py."""

import contextlib
import io
import json

import pytest
from command_line import load_tool

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def analyze(scenes):
    """Call the command line: `analyze("--no-timing", "a.b=c")` -> (status, out, err)."""
    tool = load_tool("analyze_model")

    def call(*arguments):
        out, err = io.StringIO(), io.StringIO()
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            patch.setenv("BISSL_ZOO_DATASETS", str(scenes))
            status = tool.cli(["--config-file", "quickstart/digit_scenes_det.py", *map(str, arguments)])
        return status, out.getvalue(), err.getvalue()

    return call


def test_the_tiny_quickstart_is_counted_as_tables(analyze, tiny):
    status, out, err = analyze("--no-timing", *tiny())
    assert status == 0, err
    for title in ("backbone, one image of 3 x 32 x 32", "lower loss, one image", "upper loss, one image"):
        assert title in out
    assert "time and memory" not in out and "duration" not in out


def test_the_measurement_of_a_stage_is_printed_as_json(analyze, tiny):
    status, out, err = analyze("--json", *tiny(), "train.stages=[pretrain]")
    assert status == 0, err
    result = json.loads(out)
    (cost,) = result["costs"]
    assert (cost["stage"], cost["what"], cost["images"]) == ("pretrain", "step", 8)
    (duration,) = result["durations"]
    assert duration["steps"] == 2
    assert duration["seconds"] == pytest.approx(2 * cost["seconds"])
    assert result["whole"]["parameters"] == sum(stage["count"]["parameters"] for stage in result["stages"])
