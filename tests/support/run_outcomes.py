"""Outputs of a run, for bitwise comparison."""

import json

import torch

from bissl_zoo.runs.checkpoint import load_checkpoint

#: prefixes of metrics that differ between runs
TIMES = ("time", "speed/")


def outcome(folder, zoo=None):
    """Return the metrics, checkpoints and results of a run without times; with `zoo`, also the digests it published."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    # a killed process leaves no record of the end of a stage
    metrics = [{k: v for k, v in line.items() if not k.startswith(TIMES)} for line in lines if "event" not in line]
    states = {}
    for path in sorted((folder / "checkpoints").glob("*/step_*")):
        states[f"{path.parent.name}/{path.name}"] = load_checkpoint(path)[1]
    index = json.loads((zoo / "index.json").read_text())["entries"] if zoo else {}
    # by digest: a killed publisher has used a version number
    published = [record["files"]["model.safetensors"]["sha256"] for record in index.values()]
    return {
        "metrics": metrics,
        "states": states,
        "results": json.loads((folder / "results.json").read_text()),
        "published": published,
    }


def assert_same(first, second, place=""):
    assert type(first) is type(second), place
    if isinstance(first, torch.Tensor):
        assert torch.equal(first, second), place
    elif isinstance(first, dict):
        assert list(first) == list(second), place
        for key in first:
            assert_same(first[key], second[key], f"{place}/{key}")
    elif isinstance(first, (list, tuple)):
        assert len(first) == len(second), place
        for number, pair in enumerate(zip(first, second, strict=True)):
            assert_same(*pair, f"{place}/{number}")
    else:
        assert first == second or first != first, place
