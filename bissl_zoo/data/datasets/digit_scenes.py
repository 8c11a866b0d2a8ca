"""Digit scenes: a small detection set drawn from real images, so that everything runs without a download.

Handwritten digits (Alpaydin and Kaynak, Optical Recognition of Handwritten Digits, UCI 1998) are drawn at several
sizes on crops of two photographs; both come with scikit-learn. The result is a VOC devkit of JPEG and XML.
"""

import hashlib
import json
import shutil
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from bissl_zoo.data.datasets.catalog import datasets_root
from bissl_zoo.data.datasets.voc import VOCDetection
from bissl_zoo.errors import DatasetError, did_you_mean
from bissl_zoo.registry import DATASETS

CLASSES = tuple("0123456789")
# Share of the handwritten samples that each split draws from; no sample serves two splits.
_SAMPLE_SHARES = {"unlabeled": 0.45, "train": 0.35, "val": 0.07, "test": 0.13}
_FORMAT = 1  # part of the folder's digest; increase it when the drawing changes


@DATASETS.register("digit_scenes")
class DigitScenes(VOCDetection):
    """Scenes of 1 to 3 handwritten digits on photographic background; 10 classes, "0" to "9".

    Written once to `<datasets root>/digit_scenes-<digest of the arguments>` and then read as a VOC devkit. Digits of
    different splits are different handwriting samples, and the backgrounds of val and test are another part of the
    photographs than those of train and unlabeled.

    Args:
        split: "train", "val" or "test"; or "unlabeled", whose targets are None.
        image_size: side of the square scenes in pixels; digits are 0.19 to 0.5 of it high.
        seed: of everything random; the same arguments give the same bytes.
        unlabeled, train, val, test: number of images in each split.

    Raises:
        DatasetError: an unknown split, an impossible size or count, or a datasets root that cannot be written.
    """

    def __init__(
        self,
        split: str = "train",
        image_size: int = 96,
        seed: int = 0,
        unlabeled: int = 2000,
        train: int = 1000,
        val: int = 200,
        test: int = 300,
    ):
        counts = {"unlabeled": unlabeled, "train": train, "val": val, "test": test}
        if split not in counts:
            raise DatasetError(
                f"Digit scenes: no split '{split}'.{did_you_mean(split, counts)} There are {', '.join(counts)}."
            )
        folder = write_digit_scenes(image_size=image_size, seed=seed, counts=counts)
        labelled = split != "unlabeled"
        super().__init__(str(folder), (f"2007_{split}",), classes=CLASSES if labelled else None, labelled=labelled)


def write_digit_scenes(image_size: int, seed: int, counts: dict[str, int]) -> Path:
    """Write the set if it does not exist, and return its folder, which holds `VOCdevkit`.

    The folder appears complete or not at all. If several processes write at once, the first one wins.

    Raises:
        DatasetError: see :class:`DigitScenes`.
    """
    if image_size < 32 or min(counts.values()) < 1:
        raise DatasetError(
            f"Digit scenes: image_size {image_size}, images {counts}. Scenes are at least 32 pixels wide, "
            "and every split has at least one image."
        )
    settings = {"format": _FORMAT, "image_size": image_size, "seed": seed, "counts": counts}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
    root = datasets_root().absolute()
    folder = root / f"digit_scenes-{digest}"
    if folder.is_dir():
        return folder
    try:
        root.mkdir(parents=True, exist_ok=True)
        # mkdtemp's folder is private to the user; the set is written one level below, with ordinary permissions.
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=root))
        try:
            _write_devkit(temporary / "set", image_size, seed, counts)
            try:
                (temporary / "set").rename(folder)
            except OSError:  # another process was faster, if the folder exists
                if not folder.is_dir():
                    raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise DatasetError(
            f"Digit scenes cannot be written to {folder} ({error}). Make room or make it writable there, "
            "or set BISSL_ZOO_DATASETS to another folder."
        ) from error
    return folder


class Sources(NamedTuple):
    """Sources of one split: `ink` (N, 8, 8) float in [0, 1], `labels` (N,), and `photos` (H, W, 3) uint8."""

    ink: np.ndarray
    labels: np.ndarray
    photos: list[np.ndarray]


def _sources(seed: int) -> dict[str, Sources]:
    """Return the digits and photographs of each split."""
    from sklearn.datasets import load_digits, load_sample_images

    digits, photos = load_digits(), load_sample_images().images
    order = np.random.default_rng(seed).permutation(len(digits.target))
    ends = np.round(np.cumsum(list(_SAMPLE_SHARES.values())) * len(order)).astype(int)[:-1]
    left = [photo[:, : round(photo.shape[1] * 0.6)] for photo in photos]
    right = [photo[:, round(photo.shape[1] * 0.6) :] for photo in photos]
    parts = {"unlabeled": left, "train": left, "val": right, "test": right}
    return {
        split: Sources(digits.images[chosen] / 16.0, digits.target[chosen], parts[split])
        for split, chosen in zip(_SAMPLE_SHARES, np.split(order, ends), strict=True)
    }


def _write_devkit(folder: Path, image_size: int, seed: int, counts: dict[str, int]) -> None:
    year = folder / "VOCdevkit" / "VOC2007"
    for name in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (year / name).mkdir(parents=True)
    sources = _sources(seed)
    with tqdm(total=sum(counts.values()), desc="Writing digit scenes", unit="image", mininterval=1.0) as progress:
        for number, (split, count) in enumerate(sorted(counts.items())):
            names = [f"{split}_{index:06d}" for index in range(count)]
            for index, name in enumerate(names):
                # One generator per image: a split's first images do not depend on how many there are of any split.
                scene, boxes, labels = draw_scene(
                    np.random.default_rng((seed, number, index)), sources[split], image_size
                )
                scene.save(year / "JPEGImages" / f"{name}.jpg", quality=92)
                if split != "unlabeled":
                    xml = _annotation(f"{name}.jpg", image_size, boxes, labels)
                    (year / "Annotations" / f"{name}.xml").write_text(xml, encoding="utf-8")
                progress.update()
            (year / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(names) + "\n", encoding="utf-8")


def draw_scene(
    rng: np.random.Generator, sources: Sources, image_size: int
) -> tuple[Image.Image, list[tuple[int, int, int, int]], list[int]]:
    """Draw a scene: the image, its boxes (x0, y0, x1, y1; 0-based, far edges outside) and the digits in them."""
    canvas = _background(rng, sources.photos, image_size)
    boxes: list[tuple[int, int, int, int]] = []
    labels: list[int] = []
    wanted = int(rng.integers(1, 4))
    for _ in range(20 * wanted):
        if len(boxes) == wanted:
            break
        chosen = int(rng.integers(len(sources.labels)))
        alpha = _digit_alpha(sources.ink[chosen], round(image_size * rng.uniform(0.19, 0.5)))
        height, width = alpha.shape
        x, y = int(rng.integers(0, image_size - width + 1)), int(rng.integers(0, image_size - height + 1))
        box = (x, y, x + width, y + height)
        if any(_covered(box, other) > 0.1 for other in boxes):
            continue
        region = canvas[y : y + height, x : x + width]
        colour = _ink_colour(rng, region.mean(axis=(0, 1)))
        region += alpha[..., None] * (colour - region)
        boxes.append(box)
        labels.append(int(sources.labels[chosen]))
    canvas += rng.normal(0, 3, canvas.shape)
    return Image.fromarray(canvas.clip(0, 255).astype(np.uint8)), boxes, labels


def _background(rng: np.random.Generator, photos: list[np.ndarray], image_size: int) -> np.ndarray:
    """A random square of a photograph at random scale, flipped, brighter or darker; (S, S, 3) float."""
    photo = photos[rng.integers(len(photos))]
    side = int(rng.integers(64, min(photo.shape[:2]) * 3 // 4 + 1))
    y, x = int(rng.integers(photo.shape[0] - side + 1)), int(rng.integers(photo.shape[1] - side + 1))
    crop = Image.fromarray(np.ascontiguousarray(photo[y : y + side, x : x + side]))
    canvas = np.asarray(crop.resize((image_size, image_size), Image.Resampling.BICUBIC), dtype=np.float64)
    if rng.random() < 0.5:
        canvas = canvas[:, ::-1]
    return (canvas * rng.uniform(0.6, 1.3) + rng.uniform(-20, 20)).clip(0, 255)


def _digit_alpha(ink: np.ndarray, height: int) -> np.ndarray:
    """The digit's opacity in [0, 1], enlarged so that its ink is `height` pixels high, and cut tight around the ink."""
    inked = np.flatnonzero(ink.max(axis=1) > 0.3)
    scale = height / (inked[-1] - inked[0] + 1)
    padded = Image.fromarray(np.pad(ink, 2).astype(np.float32))
    side = round(padded.width * scale)
    smooth = np.asarray(padded.resize((side, side), Image.Resampling.BICUBIC), dtype=np.float64)
    alpha = ((smooth - 0.3) / 0.45).clip(0, 1)
    rows, columns = np.flatnonzero((alpha > 0.5).any(axis=1)), np.flatnonzero((alpha > 0.5).any(axis=0))
    # Cutting also the faint rim keeps box and ink the same thing.
    return alpha[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _ink_colour(rng: np.random.Generator, background: np.ndarray) -> np.ndarray:
    """A random colour whose luminance differs from the background's by a third of the range or more."""
    weights = np.array([0.299, 0.587, 0.114])
    while True:
        colour = rng.uniform(0, 255, 3)
        if abs((colour - background) @ weights) > 85:
            return colour


def _covered(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> float:
    """Intersection over the smaller of two boxes."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    smaller = min((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))
    return max(width, 0) * max(height, 0) / smaller


def _annotation(filename: str, size: int, boxes: list[tuple[int, int, int, int]], labels: list[int]) -> str:
    objects = "".join(
        f"  <object>\n    <name>{CLASSES[label]}</name>\n    <difficult>0</difficult>\n    <bndbox>"
        f"<xmin>{x0 + 1}</xmin><ymin>{y0 + 1}</ymin><xmax>{x1}</xmax><ymax>{y1}</ymax></bndbox>\n  </object>\n"
        for (x0, y0, x1, y1), label in zip(boxes, labels, strict=True)
    )
    return (
        f"<annotation>\n  <folder>VOC2007</folder>\n  <filename>{filename}</filename>\n"
        f"  <size><width>{size}</width><height>{size}</height><depth>3</depth></size>\n{objects}</annotation>\n"
    )
