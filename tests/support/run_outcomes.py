"""What runs come to, to be compared bit by bit."""

import json

import torch

from bissl_zoo.runs.checkpoint import load_checkpoint

#: how the names of figures begin that no two runs have in common
TIMES = ("time", "speed/")


def outcome(folder, zoo=None):
    """All that a run leaves, but for times; with `zoo`, also what it published there."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    metrics = [{k: v for k, v in line.items() if not k.startswith(TIMES)} for line in lines]
    states = {}
    for path in sorted((folder / "checkpoints").glob("*/step_*")):
        states[f"{path.parent.name}/{path.name}"] = load_checkpoint(path)[1]
    index = json.loads((zoo / "index.json").read_text())["entries"] if zoo else {}
    # by digest: a publisher that was killed has used up a version's number
    published = [record["files"]["model.safetensors"]["sha256"] for record in index.values()]
    return {
        "metrics": metrics,
        "states": states,
        "results": json.loads((folder / "results.json").read_text()),
        "published": published,
    }


def assert_same(one, other, place=""):
    assert type(one) is type(other), place
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), place
    elif isinstance(one, dict):
        assert list(one) == list(other), place
        for key in one:
            assert_same(one[key], other[key], f"{place}/{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), place
        for number, pair in enumerate(zip(one, other, strict=True)):
            assert_same(*pair, f"{place}/{number}")
    else:
        assert one == other or one != one, place
