import contextlib
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image

from bissl_zoo.data.catalog import datasets_root, load_image, require_folder
from bissl_zoo.errors import DatasetError


def test_root_is_the_variable_or_datasets_in_the_working_directory(monkeypatch):
    monkeypatch.setenv("BISSL_ZOO_DATASETS", "/somewhere")
    assert datasets_root() == Path("/somewhere")
    monkeypatch.setenv("BISSL_ZOO_DATASETS", "")
    assert datasets_root() == Path("datasets")
    monkeypatch.delenv("BISSL_ZOO_DATASETS")
    assert datasets_root() == Path("datasets")


def test_missing_folder_names_the_absolute_path_the_command_and_the_variable(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("BISSL_ZOO_DATASETS", raising=False)
    with pytest.raises(DatasetError) as caught:
        require_folder(datasets_root() / "birds", "Birds", "fetch birds")
    message = str(caught.value)
    assert message.startswith(f"Birds: there is no folder {tmp_path / 'datasets' / 'birds'}.")
    assert "fetch birds" in message and "BISSL_ZOO_DATASETS" in message and "is not set" in message


def test_missing_folder_says_where_the_variable_points(tmp_path, monkeypatch):
    monkeypatch.setenv("BISSL_ZOO_DATASETS", str(tmp_path))
    with pytest.raises(DatasetError, match=f"it is '{tmp_path}'"):
        require_folder(datasets_root() / "birds", "Birds")


def test_folder_that_exists_is_returned(tmp_path):
    assert require_folder(str(tmp_path), "Birds") == tmp_path


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK"])
def test_every_mode_comes_as_rgb(tmp_path, mode):
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    Image.new("RGB", (4, 3), (255, 255, 255)).convert(mode).save(path)
    image = load_image(path)
    assert (image.mode, image.size) == ("RGB", (4, 3))
    assert np.asarray(image).min() >= 250


def test_exif_orientation_is_applied_only_where_asked_for(tmp_path):
    image = Image.new("RGB", (40, 20))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "a.jpg", exif=exif)
    assert load_image(tmp_path / "a.jpg").size == (20, 40)
    assert load_image(tmp_path / "a.jpg", upright=False).size == (40, 20)


@pytest.mark.parametrize("kind", ["truncated", "text", "empty"])
def test_image_that_does_not_decode_is_named(tmp_path, kind):
    path = tmp_path / "a.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
    content = path.read_bytes()
    path.write_bytes({"truncated": content[: len(content) // 2], "text": b"no image", "empty": b""}[kind])
    with pytest.raises(DatasetError, match=f"Image {path} does not decode"):
        load_image(path)


def test_missing_image_is_named(tmp_path):
    with pytest.raises(DatasetError, match="a.jpg does not exist"):
        load_image(tmp_path / "a.jpg")


def test_image_of_another_format_than_its_name_is_read(tmp_path):
    Image.new("RGB", (4, 3), (9, 8, 7)).save(tmp_path / "a.jpg", "PNG")
    assert load_image(tmp_path / "a.jpg").getpixel((0, 0)) == (9, 8, 7)


def test_image_that_would_fill_the_memory_is_refused_before_it_is_decoded(tmp_path):
    path = tmp_path / "a.bmp"
    Image.new("RGB", (4, 3)).save(path)
    content = bytearray(path.read_bytes())
    content[18:26] = struct.pack("<ii", 30_000, 20_000)
    path.write_bytes(content)
    with pytest.raises(DatasetError, match=rf"Image {path} is not decoded.*600000000 pixels.*MAX_IMAGE_PIXELS"):
        load_image(path)


def test_image_that_is_a_program_is_not_run(tmp_path, monkeypatch):
    canary, path = tmp_path / "canary", tmp_path / "a.jpg"
    (tmp_path / "gs").write_text(f"#!/bin/sh\necho run > {canary}\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    Image.new("RGB", (4, 3)).save(path, "EPS")
    with contextlib.suppress(OSError), Image.open(path) as image:
        image.load()
    assert canary.exists()  # this is what Pillow alone does
    canary.unlink()
    with pytest.raises(DatasetError, match=f"Image {path} does not decode"):
        load_image(path)
    assert not canary.exists()
