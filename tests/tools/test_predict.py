"""`bissl predict`: results as JSON or in COCO's format, and drawn images."""

import json

import pytest
from command_line import load_tool
from PIL import Image
from pycocotools.coco import COCO

from bissl_zoo.model import load_model

pytestmark = pytest.mark.slow  # uses a finished run
TOOL = load_tool("predict")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    (folder / "below").mkdir()
    for name, size in (("a.png", (96, 64)), ("below/b.jpg", (64, 96))):
        Image.effect_noise(size, 80).convert("RGB").save(folder / name)
    (folder / "c.jpg").write_bytes(b"no image")
    return folder


def test_results_and_drawn_images_of_a_folder(finished, photos, tmp_path, capsys):
    out = tmp_path / "out"
    assert TOOL.cli([finished, photos, "--output", out, "--threshold", 0, "--batch-size", 1]) == 0
    printed = capsys.readouterr().out
    assert "c.jpg does not decode" in printed and "2 images" in printed
    results = json.loads((out / "predictions.json").read_text())
    model = load_model(finished)
    for result, name in zip(results, ("a.png", "below/b.jpg"), strict=True):
        expected = model.predict(photos / name, threshold=0.0)
        assert result["image"] == str(photos / name) and result["scores"] == pytest.approx(expected["scores"], abs=1e-4)
        assert Image.open(out / "drawn" / name).width >= 600
    assert not (out / "drawn" / "c.jpg").exists()


def test_coco_results_load_with_its_tools(finished, photos, tmp_path):
    options = ["--output", tmp_path, "--format", "coco", "--threshold", 0.0, "--no-drawings"]
    assert TOOL.cli([finished, photos / "a.png", *options]) == 0
    loaded = COCO(tmp_path / "coco.json")
    expected = load_model(finished).predict(photos / "a.png", threshold=0.0)
    boxes = [(x, y, x + w, y + h) for x, y, w, h in (a["bbox"] for a in loaded.loadAnns(loaded.getAnnIds()))]
    assert boxes == [pytest.approx(box) for box in expected["boxes"]] and boxes
    names = [loaded.loadCats(a["category_id"])[0]["name"] for a in loaded.loadAnns(loaded.getAnnIds())]
    assert names == expected["labels"] and [path.name for path in tmp_path.iterdir()] == ["coco.json"]


def test_without_output_the_results_are_printed(finished, photos, capsys):
    assert TOOL.cli([finished, photos / "a.png", "--threshold", 0.0]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["width"] == 96 and len(printed["boxes"]) == len(printed["labels"])
    assert TOOL.cli([finished, photos / "absent.png"]) == 1
    assert TOOL.cli([photos, photos]) == 1 and "no fine-tuned model" in capsys.readouterr().err
