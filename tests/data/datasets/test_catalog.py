"""Data sets' folder and digests, and images of every kind: read as a viewer shows them, or refused by name."""

import contextlib
import hashlib
import io
import os
import struct
from pathlib import Path

import numpy as np
import pytest
from hostile_input import SPECIAL_FILES, png_of, time_limit
from PIL import EpsImagePlugin, Image, ImageOps
from sklearn.datasets import load_sample_image

from bissl_zoo.data.datasets.catalog import datasets_root, load_image, require_folder, sample_digest
from bissl_zoo.errors import DatasetError

SIZE = (48, 32)
PHOTO = Image.fromarray(load_sample_image("flower.jpg")[:32, :48])
#: uint16 (32, 48), from black to white
RAMP = np.linspace(0, 65535, 32 * 48).round().astype(np.uint16).reshape(32, 48)


def test_missing_folder_names_the_absolute_path_the_command_and_the_variable(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("BISSL_ZOO_DATASETS", raising=False)
    with pytest.raises(DatasetError) as caught:
        require_folder(datasets_root() / "birds", "Birds", "fetch birds")
    message = str(caught.value)
    assert message.startswith(f"Birds: there is no folder {tmp_path / 'datasets' / 'birds'}.")
    assert "fetch birds" in message and "BISSL_ZOO_DATASETS" in message and "is not set" in message


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


# images


def encoded(image, kind, **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def photo_as(mode):
    return np.asarray(PHOTO.convert(mode).convert("RGB"))


def deep_png(colour, samples):
    """A PNG of 16 bits; `samples` uint16 (H, W, channels)."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
    return png_of(samples.shape[1], samples.shape[0], 16, colour, rows)


TRANSPARENT = PHOTO.convert("RGBA")
TRANSPARENT.putalpha(Image.linear_gradient("L").resize(SIZE))
PALETTE = PHOTO.quantize(16)
COLOURS = np.asarray(PHOTO).astype(np.uint16) * 257
#: by kind: the file, and the pixels that a viewer shows, uint8 (H, W, 3)
KINDS = {
    "gray.jpg": (encoded(PHOTO.convert("L"), "JPEG", quality=100, subsampling=0), photo_as("L")),
    "cmyk.jpg": (encoded(PHOTO.convert("CMYK"), "JPEG", quality=100, subsampling=0), np.asarray(PHOTO)),
    "palette with a clear colour.png": (encoded(PALETTE, "PNG", transparency=3), np.asarray(PALETTE.convert("RGB"))),
    "rgb with alpha.png": (encoded(TRANSPARENT, "PNG"), np.asarray(PHOTO)),
    "16-bit gray.png": (deep_png(0, RAMP[..., None]), np.repeat((RAMP >> 8)[..., None], 3, 2)),
    "16-bit gray.tif": (encoded(Image.fromarray(RAMP), "TIFF"), np.repeat((RAMP >> 8)[..., None], 3, 2)),
    "16-bit rgb.png": (deep_png(2, COLOURS), np.asarray(PHOTO)),
    "another format than its name.jpg": (encoded(PHOTO, "WEBP", lossless=True), np.asarray(PHOTO)),
}


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_image_is_read_as_viewers_show_it(tmp_path, name):
    content, expected = KINDS[name]
    (tmp_path / name).write_bytes(content)
    image = load_image(tmp_path / name)
    assert image.mode == "RGB"
    difference = np.abs(np.asarray(image).astype(int) - expected)
    # JPEG is lossless in none of its modes; the rest is
    assert difference.max() <= (4 if name.endswith("y.jpg") or "cmyk.jpg" in name else 0)


CUT_JPEGS = {
    "in the middle": encoded(PHOTO, "JPEG")[:-400],
    "progressive": encoded(PHOTO, "JPEG", progressive=True)[:-60],
    "the head alone": encoded(PHOTO, "JPEG")[:200],
}


@pytest.mark.parametrize("kind", CUT_JPEGS)
def test_truncated_jpeg_is_refused_by_name(tmp_path, kind):
    (path := tmp_path / "photo.jpg").write_bytes(CUT_JPEGS[kind])
    with pytest.raises(DatasetError, match=f"Image {path} does not decode"):
        load_image(path)


@pytest.mark.parametrize("orientation", range(10))
def test_image_is_turned_upright_by_its_orientation(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(PHOTO, "JPEG", exif=exif)
    turned = load_image(io.BytesIO(content))
    stored = load_image(io.BytesIO(content), upright=False)
    assert (
        stored.size == SIZE and turned.tobytes() == ImageOps.exif_transpose(Image.open(io.BytesIO(content))).tobytes()
    )


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


@pytest.mark.parametrize("mode", ["I", "F"])
def test_pixels_without_a_range_are_refused_and_not_clipped(tmp_path, mode):
    Image.fromarray(RAMP.astype(np.int32 if mode == "I" else np.float32)).save(tmp_path / "deep.tif")
    with pytest.raises(DatasetError, match=f"deep.tif does not decode .*32-bit pixels, mode {mode}"):
        load_image(tmp_path / "deep.tif")


@pytest.mark.parametrize("kind", SPECIAL_FILES)
def test_pipe_or_device_in_place_of_an_image_is_refused_at_once(tmp_path, kind):
    path = tmp_path / "a.jpg"
    SPECIAL_FILES[kind](path)
    with time_limit(), pytest.raises(DatasetError, match=f"Image {path} is not a regular file"):
        load_image(path)
