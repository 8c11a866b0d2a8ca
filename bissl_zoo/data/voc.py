"""Detection sets in the layout of the Pascal VOC devkit (Everingham et al., IJCV 2010)."""

import logging
import math
import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from defusedxml import DefusedXmlException
from defusedxml import ElementTree as SafeXML
from PIL import Image
from torch.utils.data import Dataset

from bissl_zoo.data.catalog import IMAGE_EXTENSIONS, datasets_root, load_image, require_folder
from bissl_zoo.errors import DatasetError, did_you_mean
from bissl_zoo.registry import DATASETS

logger = logging.getLogger(__name__)

VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip

_SIDES = ("xmin", "ymin", "xmax", "ymax")
_OFFICIAL = ("train", "val", "trainval")
#: bytes of an annotation file, far above any of VOC, and pixels of a side, up to which float32 has every number
_BYTES_LIMIT, _SIDE_LIMIT = 10_000_000, 1 << 24
_SKIP_OBJECT = 'Fix the file, or pass on_bad_annotation="skip" to leave such objects out (they are counted in the log).'
_SKIP_IMAGE = 'Fix the file, or pass on_bad_annotation="skip" to leave such images out (they are counted in the log).'


class Annotation(NamedTuple):
    """What one XML file says: image size, and per object its name, (xmin, ymin, xmax, ymax) as written, and flag."""

    path: Path
    width: int
    height: int
    names: list[str]
    boxes: list[tuple[float, ...]]
    difficult: list[bool]


@DATASETS.register("voc_detection")
class VOCDetection(Dataset):
    """Images with boxes, from a folder that holds `VOCdevkit/VOC<year>/{JPEGImages,Annotations,ImageSets/Main}`.

    A sample is `(image, target)`: the image in RGB with its pixels as stored (EXIF orientation is not applied, because
    boxes count stored pixels), the target a dict with `boxes` float32 (N, 4) as x0, y0, x1, y1 in pixels, `labels`
    int64 (N,) in 0..K-1, `difficult` bool (N,) and `image_id`, the sample's index.

    VOC writes 1-based coordinates with both ends inside the box, so x0 = xmin - 1, y0 = ymin - 1, x1 = xmax, y1 = ymax:
    0-based, the far edge outside, width x1 - x0. Devkits written 0-based load as well: a minimum of 0 stays 0.

    All annotations of the splits are read and checked at construction; images are decoded when asked for.

    Args:
        root: the folder that holds `VOCdevkit`, below the datasets root, or an absolute path.
        splits: names like "2007_trainval": the year, and a list in that year's ImageSets/Main; they are concatenated.
        classes: the class names in the order of the labels; "voc": the twenty of VOC; None: every name that occurs in
            the annotations of the splits' years, sorted, so that train and test agree.
        on_bad_annotation: "error", or "skip": objects with an impossible box or an unknown class are left out, as are
            images whose file is missing or whose annotation cannot be read; both are counted in the log.
        labelled: False reads no annotations: targets and `classes` are None.

    Raises:
        DatasetError: a missing folder, list or image, an empty split, or an annotation that is wrong.
    """

    def __init__(
        self,
        root: str = "",
        splits: Sequence[str] = ("2007_trainval",),
        classes: Sequence[str] | str | None = None,
        on_bad_annotation: str = "error",
        labelled: bool = True,
    ):
        if on_bad_annotation not in ("error", "skip"):
            raise DatasetError(f'on_bad_annotation is "{on_bad_annotation}"; accepted are "error" and "skip".')
        self.splits = [splits] if isinstance(splits, str) else list(splits)
        if not self.splits:
            raise DatasetError("VOCDetection: no split is given. splits holds names like '2007_trainval'.")
        self._skip = on_bad_annotation == "skip"
        self._left_out: Counter[str] = Counter()
        folders = {split: _year_folder(root, split) for split in self.splits}
        self._files = [
            file for split in self.splits for file in self._images_of(folders[split], split.split("_", 1)[1])
        ]
        if len(set(self._files)) < len(self._files):
            raise DatasetError(
                f"The splits {', '.join(self.splits)} list {_first_repeated(self._files)} more than once."
            )
        parsed: dict[Path, Annotation] = {}
        if not labelled:
            self.classes = None
        elif classes is None:
            every = sorted({file for year in folders.values() for file in (year / "Annotations").glob("*.xml")})
            parsed = {file: found for file in every if (found := self._read(file, count=False)) is not None}
            self.classes = sorted({name for annotation in parsed.values() for name in annotation.names if name})
        else:
            self.classes = list(VOC_CLASSES) if classes == "voc" else [str(name) for name in classes]
            if isinstance(classes, str) and classes != "voc":
                raise DatasetError(f'classes is "{classes}"; give a list of names, "voc" or None.')
            if len(set(self.classes)) < len(self.classes):
                raise DatasetError(f"classes names {_first_repeated(self.classes)} more than once.")
        if self.classes is not None:
            self._index(parsed)
        if not self._files:
            raise DatasetError(f"The splits {', '.join(self.splits)} hold no usable image.")
        if self._left_out:
            counts = ", ".join(f"{count} {reason}" for reason, count in sorted(self._left_out.items()))
            logger.warning("VOC %s: left out %s", ", ".join(self.splits), counts)

    def _images_of(self, folder: Path, name: str) -> list[str]:
        """The image files that ImageSets/Main/<name>.txt lists."""
        lists = folder / "ImageSets" / "Main"
        file = lists / f"{name}.txt"
        if not file.is_file():
            present = sorted(path.stem for path in lists.glob("*.txt"))
            raise DatasetError(
                f"VOC split list {file} does not exist.{did_you_mean(name, present)} "
                f"There: {', '.join(present[:20]) or 'none'}{', ...' if len(present) > 20 else ''}."
            )
        ids = list(filter(None, map(str.strip, file.read_text(encoding="utf-8", errors="replace").splitlines())))
        if not ids:
            raise DatasetError(f"VOC split list {file} is empty.")
        pictures = require_folder(folder / "JPEGImages", f"VOC images of {folder.name}")
        by_id = {os.path.splitext(entry)[0]: entry for entry in sorted(os.listdir(pictures)) if _is_image(entry)}
        found = []
        for image_id in ids:
            if image_id in by_id:
                found.append(str(pictures / by_id[image_id]))
            elif self._skip:
                self._left_out["images without a file"] += 1
            else:
                raise DatasetError(
                    f"VOC image {pictures / image_id}.jpg, listed in {file}, does not exist. {_SKIP_IMAGE}"
                )
        return found

    def _read(self, path: Path, count: bool = True) -> Annotation | None:
        """One annotation, or None where it cannot be read and is to be skipped."""
        try:
            return read_annotation(path)
        except DatasetError as error:
            if not self._skip:
                raise DatasetError(f"{error} {_SKIP_IMAGE}") from error
            self._left_out["images with an unreadable annotation"] += count
            return None

    def _index(self, parsed: dict[Path, Annotation]) -> None:
        """Fill the arrays that targets are cut from; drops the images whose annotation cannot be read."""
        label_of = {name: label for label, name in enumerate(self.classes)}
        files, sizes, counts, boxes, labels, difficult = [], [], [], [], [], []
        for file in self._files:
            path = _annotation_of(file)
            annotation = parsed.get(path) or self._read(path)
            if annotation is None:
                continue
            before = len(labels)
            for number, (name, box) in enumerate(zip(annotation.names, annotation.boxes, strict=True)):
                problem = _box_problem(box, annotation) or self._class_problem(name, label_of)
                if problem and not self._skip:
                    raise DatasetError(f"VOC annotation {path}, object {number + 1}: {problem}. {_SKIP_OBJECT}")
                if problem:
                    self._left_out["objects with an impossible box or an unknown class"] += 1
                    continue
                xmin, ymin, xmax, ymax = box
                boxes.append((max(xmin - 1, 0), max(ymin - 1, 0), xmax, ymax))
                labels.append(label_of[name])
                difficult.append(annotation.difficult[number])
            files.append(file)
            sizes.append((annotation.width, annotation.height))
            counts.append(len(labels) - before)
        self._files, self._sizes = files, sizes
        self._starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        self._boxes = np.array(boxes, dtype=np.float32).reshape(-1, 4)
        self._labels = np.array(labels, dtype=np.int64)
        self._difficult = np.array(difficult, dtype=bool)

    @staticmethod
    def _class_problem(name: str, label_of: dict[str, int]) -> str:
        if name in label_of:
            return ""
        return f"unknown class '{name}'.{did_you_mean(name, label_of)} The classes are {', '.join(label_of)}"

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> tuple[Image.Image, dict[str, Any] | None]:
        image = load_image(self._files[index], upright=False)
        if self.classes is None:
            return image, None
        if image.size != self._sizes[index]:
            raise DatasetError(
                f"VOC image {self._files[index]} has {image.width} x {image.height} pixels, but its annotation says "
                f"{self._sizes[index][0]} x {self._sizes[index][1]}: the boxes belong to another version of the image."
            )
        return image, self.target(index)

    def target(self, index: int) -> dict[str, Any] | None:
        """The target of sample `index`, without decoding its image."""
        if self.classes is None:
            return None
        index = range(len(self))[index]
        objects = slice(self._starts[index], self._starts[index + 1])
        return {
            "boxes": torch.from_numpy(self._boxes[objects].copy()),
            "labels": torch.from_numpy(self._labels[objects].copy()),
            "difficult": torch.from_numpy(self._difficult[objects].copy()),
            "image_id": index,
        }

    def source(self, index: int) -> str:
        """The image file that sample `index` comes from."""
        return self._files[index]


def read_annotation(path: Path) -> Annotation:
    """Parse one VOC XML file, as safely as for a file from a stranger (no entities, no external references).

    Coordinates that are missing or no number come back as NaN, a missing name as "": the caller names the object.

    Raises:
        DatasetError: where the file is missing, too large, does not parse, or gives no image size.
    """
    try:
        with open(path, "rb") as file:
            if len(content := file.read(_BYTES_LIMIT + 1)) > _BYTES_LIMIT:
                raise DatasetError(f"VOC annotation {path} has more than {_BYTES_LIMIT:,} bytes, so it is not read.")
        root = SafeXML.fromstring(content)
    except FileNotFoundError as error:
        raise DatasetError(f"VOC annotation {path} does not exist.") from error
    except DefusedXmlException as error:
        raise DatasetError(f"VOC annotation {path} is refused: it defines XML entities ({error}).") from error
    except (SafeXML.ParseError, ValueError, LookupError, OSError) as error:
        raise DatasetError(f"VOC annotation {path} does not parse: {error}.") from error
    width, height = _number(root, "size/width"), _number(root, "size/height")
    if not (1 <= width <= _SIDE_LIMIT and 1 <= height <= _SIDE_LIMIT):
        raise DatasetError(f"VOC annotation {path} gives no image size (a positive size/width and size/height).")
    objects = root.findall("object")
    return Annotation(
        path=path,
        width=int(width),
        height=int(height),
        names=[(one.findtext("name") or "").strip() for one in objects],
        boxes=[tuple(_number(one, f"bndbox/{side}") for side in _SIDES) for one in objects],
        difficult=[(one.findtext("difficult") or "").strip() == "1" for one in objects],
    )


def _number(element: Any, path: str) -> float:
    try:
        value = float(element.findtext(path) or "nan")
    except ValueError:
        return math.nan
    return value if math.isfinite(value) else math.nan


def _box_problem(box: tuple[float, ...], annotation: Annotation) -> str:
    """What is wrong with a box as written, or an empty string."""
    for side, value in zip(_SIDES, box, strict=True):
        size, limit = ("width", annotation.width) if side[0] == "x" else ("height", annotation.height)
        if math.isnan(value):
            return f"{side} is missing or not a number"
        if not 0 <= value <= limit:
            return f"{side} {value:g} lies outside the image ({size} {limit})"
    xmin, ymin, xmax, ymax = box
    if xmax <= xmin or ymax <= ymin:
        return f"the box has no area (xmin {xmin:g}, ymin {ymin:g}, xmax {xmax:g}, ymax {ymax:g})"
    return ""


def _year_folder(root: str, split: str) -> Path:
    if not re.fullmatch(r"\d{4}_.+", split):
        raise DatasetError(f"VOC split '{split}' is not '<year>_<list in ImageSets/Main>', like '2007_trainval'.")
    year, name = split.split("_", 1)
    folder = datasets_root() / root / "VOCdevkit" / f"VOC{year}"
    arguments = f"'{datasets_root().absolute()}', year='{year}', image_set='{name}', download=True"
    official = not root and (year, name) in {("2007", "test"), *((y, s) for y in ("2007", "2012") for s in _OFFICIAL)}
    fetch = f'python -c "from torchvision.datasets import VOCDetection as VOC; VOC({arguments})"' if official else ""
    return require_folder(folder, f"Pascal VOC set '{root or 'VOCdevkit'}', split '{split}'", fetch)


def _annotation_of(file: str) -> Path:
    picture = Path(file)
    return picture.parent.parent / "Annotations" / f"{picture.stem}.xml"


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in IMAGE_EXTENSIONS


def _first_repeated(values: list[str]) -> str:
    return next(value for value, count in Counter(values).items() if count > 1)
