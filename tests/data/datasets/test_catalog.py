import contextlib
import hashlib
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin, Image
from sklearn.datasets import load_sample_image

from bissl_zoo.data.datasets.catalog import datasets_root, load_image, load_pixels, require_folder, sample_digest
from bissl_zoo.data.datasets.folder import ImageFolder
from bissl_zoo.data.views import two_views
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


class Files:
    """A data set that knows its files alone, and its folder where it has one."""

    def __init__(self, folder, names, root=None):
        self.folder, self.names = folder, names
        if root:
            self.root = root

    def __len__(self):
        return len(self.names)

    def source(self, index):
        return str(self.folder / self.names[index])


@pytest.mark.parametrize("known", [True, False])
def test_copies_of_a_set_that_lie_anywhere_have_one_digest(tmp_path, monkeypatch, known):
    monkeypatch.setenv("BISSL_ZOO_DATASETS", str(tmp_path / "datasets"))
    names = ["a/1.jpg", "b/1.jpg"]
    copies = [tmp_path / "one", tmp_path / "another" / "deeper", Path(os.path.relpath(tmp_path / "third"))]
    digests = {sample_digest(Files(copy, names, copy if known else None)) for copy in copies}
    assert digests == {hashlib.sha256(b"a/1.jpg\nb/1.jpg").hexdigest()}
    assert sample_digest(Files(copies[0], names[:1], copies[0])) not in digests


def test_a_set_below_the_data_sets_root_is_named_from_there(tmp_path, monkeypatch):
    digests = set()
    for place in ("here", "there"):
        monkeypatch.setenv("BISSL_ZOO_DATASETS", str(tmp_path / place))
        folder = tmp_path / place / "birds" / "train"
        digests.add(sample_digest(Files(folder, ["b.jpg", "a.jpg"], folder)))
    assert digests == {hashlib.sha256(b"birds/train/a.jpg\nbirds/train/b.jpg").hexdigest()}


def test_folder_that_exists_is_returned(tmp_path):
    assert require_folder(str(tmp_path), "Birds") == tmp_path


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
    with pytest.raises(DatasetError, match=rf"Image {path} is too large to decode.*600000000 pixels.*MAX_IMAGE_PIXELS"):
        load_image(path)


@pytest.mark.slow
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


@pytest.mark.parametrize("damage", ["missing", "cut", "bomb", "text"])
def test_pixels_that_cannot_be_read_are_told_as_images_are(tmp_path, damage, monkeypatch):
    path = tmp_path / "photo.jpg"
    Image.fromarray(load_sample_image("flower.jpg")[:90, :120]).save(path)
    content = path.read_bytes()
    if damage == "bomb":
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    path.write_bytes({"cut": content[: len(content) // 2], "text": b"no image"}.get(damage, content))
    if damage == "missing":
        path.unlink()
    for load in (load_image, load_pixels):
        message = {"missing": "does not exist", "bomb": "is too large to decode"}.get(damage, "does not decode")
        with pytest.raises(DatasetError, match=f"Image .*photo.jpg .*{message}|Image .*photo.jpg {message}"):
            load(path)


def test_a_folder_gives_tensors_where_it_is_asked_to_and_the_views_are_the_same(tmp_path):
    Image.fromarray(load_sample_image("flower.jpg")[:90, :120]).save(tmp_path / "photo.jpg")
    views = []
    for as_tensor in (False, True):
        image, _ = ImageFolder(str(tmp_path), labelled=False, as_tensor=as_tensor)[0]
        torch.manual_seed(0)
        views.append(two_views(size=32)(image))
    assert all(torch.equal(one, other) for one, other in zip(*views, strict=True))
