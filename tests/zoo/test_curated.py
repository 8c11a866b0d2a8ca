"""The entries that come with the repository: complete, loadable without a network, and in the README."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

import bissl_zoo
from bissl_zoo.files import sha256_of

ROOT = Path(__file__).resolve().parents[2]
ZOO = ROOT / "model_zoo"
ENTRIES = json.loads((ZOO / "curated.json").read_text())["entries"]


def test_the_repository_has_entries_of_at_most_45_mb():
    assert ENTRIES
    assert sum(file["size"] for record in ENTRIES.values() for file in record["files"].values()) <= 45e6


@pytest.mark.parametrize("name", ENTRIES)
def test_an_entry_has_its_files_and_stands_in_the_readme(name):
    for file, record in ENTRIES[name]["files"].items():
        assert sha256_of(ZOO / name / file) == record["sha256"], file
    row = next(line for line in (ROOT / "README.md").read_text().splitlines() if f"model_zoo/{name}" in line)
    for metric in ENTRIES[name]["metrics"].values():
        assert f"{metric['mean']:.3f}" in row


@pytest.mark.slow
@pytest.mark.parametrize("name", ENTRIES)
def test_an_entry_loads_as_a_backbone_and_as_a_model(name, tmp_path, monkeypatch):
    monkeypatch.setenv("BISSL_ZOO_OFFLINE", "1")
    backbone = bissl_zoo.create_backbone(name, pretrained=True, zoo=ZOO).eval()
    assert all(torch.isfinite(features).all() for features in backbone(torch.rand(1, 3, 96, 96)).values())
    Image.new("RGB", (120, 90), (90, 140, 60)).save(tmp_path / "photo.jpg")
    model = bissl_zoo.load_model(f"zoo:{name}", zoo=ZOO)
    assert model.predict(tmp_path / "photo.jpg")
