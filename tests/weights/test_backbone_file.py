import json

import pytest
import torch
from safetensors.torch import save_file
from tiny_entries import publish_tiny

from bissl_zoo.errors import ZooError
from bissl_zoo.weights.backbone_file import StoredBackbone, read_backbone, save_backbone
from bissl_zoo.zoo.names import sha256_of

STATE = {"weight": torch.arange(6.0).view(2, 3)}
FACTS = {
    "architecture": "resnet18",
    "model_args": {"in_chans": 3},
    "pixels": {"mean": [0.5] * 3, "std": [1, 0.5, 0.25]},
    "source": "x",
}


def test_a_backbone_comes_back_with_its_facts(tmp_path):
    save_backbone(StoredBackbone(STATE, **FACTS), tmp_path / "a.safetensors")
    stored = read_backbone(tmp_path / "a.safetensors")
    assert torch.equal(stored.state["weight"], STATE["weight"])
    assert {key: getattr(stored, key) for key in FACTS} == FACTS


@pytest.mark.parametrize(
    ("facts", "problem"),
    [
        ("[" * 100_000, "cannot be read"),
        ('{"architecture": "\\ud800', "cannot be read"),
        ({"state": {}}, "cannot be read"),
        ({"architecture": ["resnet18"]}, "an architecture that is not a name"),
        ({"model_args": ["in_chans"]}, "model_args that no backbone has"),
        ({"model_args": {"pretrained": True}}, "model_args that no backbone has"),
        ({"model_args": {"checkpoint_path": "/tmp/weights.pth"}}, "model_args that no backbone has"),
        ({"pixels": {"mean": [0.5] * 3}}, "pixels without a mean and a std of three numbers"),
        ({"pixels": {"mean": ["0.5"] * 3, "std": [1] * 3}}, "pixels without a mean and a std of three numbers"),
        ({"pixels": {"mean": [0.5], "std": [1]}}, "pixels without a mean and a std of three numbers"),
        ({"source": 3}, "a source that is not text"),
    ],
)
def test_metadata_that_lie_are_one_error(tmp_path, facts, problem):
    text = facts if isinstance(facts, str) else json.dumps(FACTS | facts)
    save_file(STATE, tmp_path / "a.safetensors", {"bissl_zoo": text})
    with pytest.raises(ZooError, match=rf"a\.safetensors .*{problem}"):
        read_backbone(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("file", "change", "problem"),
    [
        ("entry.json", {"architecture": None}, "an architecture that is not a name"),
        ("entry.json", {"input": [1]}, "pixels without a mean"),
        ("config.json", {"model_args": {"checkpoint_path": "/tmp/weights.pth"}}, "model_args that no backbone has"),
    ],
)
def test_an_entry_that_lies_of_itself_is_one_error(tmp_path, file, change, problem):
    publish_tiny(tmp_path)
    path, index = tmp_path / "tiny" / file, tmp_path / "index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    content = json.loads(index.read_text())
    content["entries"]["tiny"]["files"][file] = {"sha256": sha256_of(path), "size": path.stat().st_size}
    index.write_text(json.dumps(content))
    with pytest.raises(ZooError, match=f"Zoo entry 'tiny' states {problem}"):
        read_backbone("tiny", zoo=tmp_path)
