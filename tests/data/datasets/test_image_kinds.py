"""Pictures of every kind in the detection sets: each is read as a viewer would show it, or refused by name."""

import io
import json
import os
import signal
import struct
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from hostile_input import png_of
from PIL import Image
from sklearn.datasets import load_sample_image
from torchvision.transforms.v2.functional import pil_to_tensor

from bissl_zoo.data import COCODetection, VOCDetection
from bissl_zoo.data.datasets.catalog import load_image, load_pixels
from bissl_zoo.errors import DatasetError

SIZE = (48, 32)
PHOTO = Image.fromarray(load_sample_image("flower.jpg")[:32, :48])
#: uint16 (32, 48), from black to white
RAMP = np.linspace(0, 65535, 32 * 48).round().astype(np.uint16).reshape(32, 48)
LAYOUTS = ("voc", "coco")


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


def turned(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(PHOTO, "JPEG", exif=exif)


class Devkit:
    """One detection set in either layout, written image by image."""

    def __init__(self, layout, root):
        self.layout, self.root = layout, root
        self.year = root / "VOCdevkit" / "VOC2007"
        self.pictures = self.year / "JPEGImages" if layout == "voc" else root / "images"
        for folder in (self.year / "Annotations", self.year / "ImageSets" / "Main", self.pictures):
            folder.mkdir(parents=True, exist_ok=True)
        self.records = {"images": [], "annotations": [], "categories": [{"id": 3, "name": "thing"}]}

    def add(self, name, content, size=SIZE, boxes=((4, 2, 20, 30),)):
        """An image file and its boxes as x0, y0, x1, y1."""
        file = self.pictures / name
        file.write_bytes(content)
        if self.layout == "voc":
            self._add_voc(file.stem, size, boxes)
        else:
            self._add_coco(name, size, boxes)
        return file

    def annotation_of(self, name):
        if self.layout == "coco":
            return self.root / "boxes.json"
        return self.year / "Annotations" / f"{name.partition('.')[0]}.xml"

    def read(self, **options):
        if self.layout == "voc":
            return VOCDetection(str(self.root), ["2007_train"], classes=["thing"], **options)
        return COCODetection(str(self.root), "boxes.json", "images", **options)

    def _add_voc(self, name, size, boxes):
        sides = ("xmin", "ymin", "xmax", "ymax")
        things = ""
        for x0, y0, x1, y1 in boxes:
            written = zip(sides, (x0 + 1, y0 + 1, x1, y1), strict=True)
            corners = "".join(f"<{side}>{value}</{side}>" for side, value in written)
            things += f"<object><name>thing</name><bndbox>{corners}</bndbox></object>"
        dimensions = f"<size><width>{size[0]}</width><height>{size[1]}</height></size>"
        self.annotation_of(name).write_text(f"<annotation>{dimensions}{things}</annotation>")
        with open(self.year / "ImageSets" / "Main" / "train.txt", "a") as file:
            file.write(f"{name}\n")

    def _add_coco(self, name, size, boxes):
        number = len(self.records["images"]) + 1
        self.records["images"].append({"id": number, "file_name": name, "width": size[0], "height": size[1]})
        for x0, y0, x1, y1 in boxes:
            key = len(self.records["annotations"]) + 1
            bbox = [x0, y0, x1 - x0, y1 - y0]
            self.records["annotations"].append({"id": key, "image_id": number, "category_id": 3, "bbox": bbox})
        self.annotation_of(name).write_text(json.dumps(self.records))


@pytest.fixture(params=LAYOUTS)
def devkit(request, tmp_path):
    return Devkit(request.param, tmp_path)


@contextmanager
def soon():
    """Fails where the block waits for something that never comes."""

    def give_up(number, frame):
        raise AssertionError("it waits for ever")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, 30)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def rgb(image):
    return encoded(image, "PNG")


TRANSPARENT = PHOTO.convert("RGBA")
TRANSPARENT.putalpha(Image.linear_gradient("L").resize(SIZE))
PALETTE = PHOTO.quantize(16)
COLOURS = np.asarray(PHOTO).astype(np.uint16) * 257
#: by kind: the file, and the pixels that a viewer shows, uint8 (H, W, 3)
KINDS = {
    "gray.jpg": (encoded(PHOTO.convert("L"), "JPEG", quality=100, subsampling=0), photo_as("L")),
    "gray.png": (encoded(PHOTO.convert("L"), "PNG"), photo_as("L")),
    "gray with alpha.png": (encoded(TRANSPARENT.convert("LA"), "PNG"), photo_as("L")),
    "bilevel.png": (encoded(PHOTO.convert("1"), "PNG"), photo_as("1")),
    "cmyk.jpg": (encoded(PHOTO.convert("CMYK"), "JPEG", quality=100, subsampling=0), np.asarray(PHOTO)),
    "cmyk.tif": (encoded(PHOTO.convert("CMYK"), "TIFF"), np.asarray(PHOTO)),
    "palette.png": (encoded(PALETTE, "PNG"), np.asarray(PALETTE.convert("RGB"))),
    "palette with a clear colour.png": (encoded(PALETTE, "PNG", transparency=3), np.asarray(PALETTE.convert("RGB"))),
    "palette with alphas.png": (
        encoded(PALETTE, "PNG", transparency=bytes(range(0, 160, 10))),
        np.asarray(PALETTE.convert("RGB")),
    ),
    "rgb with alpha.png": (encoded(TRANSPARENT, "PNG"), np.asarray(PHOTO)),
    "rgb with a clear colour.png": (encoded(PHOTO, "PNG", transparency=(1, 2, 3)), np.asarray(PHOTO)),
    "16-bit gray.png": (deep_png(0, RAMP[..., None]), np.repeat((RAMP >> 8)[..., None], 3, 2)),
    "16-bit gray.tif": (encoded(Image.fromarray(RAMP), "TIFF"), np.repeat((RAMP >> 8)[..., None], 3, 2)),
    "16-bit gray with alpha.png": (
        deep_png(4, np.stack([RAMP, RAMP.T.reshape(RAMP.shape)], axis=2)),
        np.repeat((RAMP >> 8)[..., None], 3, 2),
    ),
    "16-bit rgb.png": (deep_png(2, COLOURS), np.asarray(PHOTO)),
    "a name that says otherwise.jpg": (encoded(PHOTO, "WEBP", lossless=True), np.asarray(PHOTO)),
}


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_image_is_read_as_viewers_show_it(devkit, name):
    content, expected = KINDS[name]
    path = devkit.add(name, content)
    image, target = devkit.read()[0]
    assert image.mode == "RGB" and target["boxes"].tolist() == [[4, 2, 20, 30]]
    difference = np.abs(np.asarray(image).astype(int) - expected)
    # JPEG is lossless in none of its modes; the rest is
    assert difference.max() <= (4 if name.endswith("y.jpg") or "cmyk.jpg" in name else 0)
    assert torch.equal(load_pixels(path), pil_to_tensor(image))


def cmyk_jpegs():
    """As Pillow writes it, inverted as Adobe's; without Adobe's mark; and marked as YCCK."""
    content = encoded(PHOTO.convert("CMYK"), "JPEG", quality=95)
    start = content.index(b"\xff\xee")
    end = start + 2 + struct.unpack(">H", content[start + 2 : start + 4])[0]
    return {
        "adobe": content,
        "unmarked": content[:start] + content[end:],
        "ycck": content[: end - 1] + b"\2" + content[end:],
    }


JPEGS = {
    **cmyk_jpegs(),
    **{f"orientation {number}": turned(number) for number in range(10)},
    "progressive": encoded(PHOTO, "JPEG", progressive=True),
    "of rgb": encoded(PHOTO, "JPEG", keep_rgb=True),
    "with restarts": encoded(PHOTO, "JPEG", restart_marker_blocks=1),
    "with more behind it": encoded(PHOTO, "JPEG") + b"more" * 20,
    "one pixel": encoded(PHOTO.resize((1, 1)), "JPEG"),
    "long": encoded(PHOTO.resize((20_000, 10)), "JPEG"),
    "cut by a byte": encoded(PHOTO, "JPEG")[:-1],
    "cut in the middle": encoded(PHOTO, "JPEG")[:-400],
    "cut progressive": encoded(PHOTO, "JPEG", progressive=True)[:-60],
    "the head alone": encoded(PHOTO, "JPEG")[:200],
}


@pytest.mark.parametrize("kind", JPEGS)
def test_both_ways_to_read_a_jpeg_give_the_same_or_refuse_it(tmp_path, kind):
    path = tmp_path / "photo.jpg"
    path.write_bytes(JPEGS[kind])
    if "cut" in kind or "alone" in kind:
        for load in (load_image, load_pixels):
            with pytest.raises(DatasetError, match=f"Image {path} does not decode"):
                load(path)
    else:
        assert torch.equal(load_pixels(path), pil_to_tensor(load_image(path)))


def test_adobe_cmyk_keeps_its_colours_and_a_deep_image_is_turned(tmp_path):
    path = tmp_path / "photo.jpg"
    path.write_bytes(JPEGS["adobe"])
    assert np.abs(np.asarray(load_image(path)).astype(int) - np.asarray(PHOTO)).mean() < 3
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(RAMP).save(tmp_path / "deep.png", exif=exif)
    expected = np.rot90((RAMP >> 8).astype(np.uint8), -1)
    assert np.array_equal(np.asarray(load_image(tmp_path / "deep.png"))[..., 0], expected)


@pytest.mark.parametrize("mode", ["I", "F"])
def test_pixels_without_a_range_are_refused_and_not_clipped(devkit, mode):
    pixels = RAMP.astype(np.int32 if mode == "I" else np.float32)
    path = devkit.add("deep.tif", encoded(Image.fromarray(pixels), "TIFF"))
    with pytest.raises(DatasetError, match=f"Image {path} does not decode .*32-bit pixels, mode {mode}"):
        devkit.read()[0]


def test_the_smallest_and_the_longest_images_are_read(devkit):
    devkit.add("long.png", rgb(PHOTO.resize((20_000, 10))), (20_000, 10), [(0, 0, 20_000, 10), (19_990, 2, 20_000, 9)])
    devkit.add("two.png", rgb(PHOTO.resize((2, 2))), (2, 2), [(0, 0, 2, 2)])
    devkit.add("one.png", rgb(PHOTO.resize((1, 1))), (1, 1), [])
    dataset = devkit.read()
    assert [dataset[index][0].size for index in range(3)] == [(20_000, 10), (2, 2), (1, 1)]
    assert dataset.target(0)["boxes"].tolist() == [[0, 0, 20_000, 10], [19_990, 2, 20_000, 9]]
    assert dataset.target(1)["boxes"].tolist() == [[0, 0, 2, 2]]


def test_boxes_drawn_on_the_turned_picture_are_refused_with_the_reason(devkit):
    path = devkit.add("turned.jpg", turned(6), size=SIZE[::-1], boxes=[(2, 4, 30, 20)])
    with pytest.raises(DatasetError, match=f"{path} has 48 x 32 pixels.* has 32 x 48.*EXIF orientation"):
        devkit.read()[0]


def test_an_id_of_two_files_is_refused_or_skipped(tmp_path):
    devkit = Devkit("voc", tmp_path)
    for name in ("a.jpg", "b.jpg"):
        devkit.add(name, encoded(PHOTO, "JPEG"))
    (devkit.pictures / "a.png").write_bytes(rgb(PHOTO))
    with pytest.raises(DatasetError, match=r"VOC image 'a', listed in .*, may be a\.jpg or a\.png in "):
        devkit.read()
    assert devkit.read(on_bad_annotation="skip").source(0) == str(devkit.pictures / "b.jpg")


SPECIAL = {
    "pipe": os.mkfifo,
    "device": lambda path: os.symlink("/dev/zero", path),
    "folder": os.mkdir,
}


@pytest.mark.parametrize("kind", SPECIAL)
def test_pipe_or_device_in_place_of_an_image_is_refused_at_once(devkit, kind):
    path = devkit.add("a.jpg", encoded(PHOTO, "JPEG"))
    path.unlink()
    SPECIAL[kind](path)
    dataset = devkit.read()
    with soon():
        for read in (lambda: dataset[0], lambda: load_image(path), lambda: load_pixels(path)):
            with pytest.raises(DatasetError, match=f"Image {path} is not a regular file but a folder, pipe or device"):
                read()


@pytest.mark.parametrize("kind", SPECIAL)
def test_pipe_or_device_in_place_of_annotations_is_refused_at_once(devkit, kind):
    devkit.add("a.jpg", encoded(PHOTO, "JPEG"))
    path = devkit.annotation_of("a")
    path.unlink()
    SPECIAL[kind](path)
    with soon(), pytest.raises(DatasetError, match=f"{path} is not a regular file but a folder, pipe or device"):
        devkit.read()
