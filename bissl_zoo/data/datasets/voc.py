"""Detection sets in the layout of the Pascal VOC devkit (Everingham et al., IJCV 2010)."""

import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from defusedxml import DefusedXmlException
from defusedxml import ElementTree as SafeXML

from bissl_zoo.data.datasets.boxes import MAX_SIDE, Box, DetectionSet, has_area
from bissl_zoo.data.datasets.catalog import datasets_root, require_folder, require_regular_file
from bissl_zoo.data.datasets.folder import distinct_classes, images_in
from bissl_zoo.errors import DatasetError, did_you_mean
from bissl_zoo.registry import DATASETS

VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip

_SIDES = ("xmin", "ymin", "xmax", "ymax")
#: largest annotation file in bytes, far above any of VOC
_MAX_BYTES = 10_000_000


class Annotation(NamedTuple):
    """The content of an XML file: image size, and name, (xmin, ymin, xmax, ymax) as written and flag per object."""

    path: Path
    width: int
    height: int
    names: list[str]
    boxes: list[Box]
    difficult: list[bool]


@DATASETS.register("voc_detection")
class VOCDetection(DetectionSet):
    """Images with boxes, from a folder that holds `VOCdevkit/VOC<year>/{JPEGImages,Annotations,ImageSets/Main}`.

    A folder that holds these three itself is read too; its splits have no year.

    Samples are those of `DetectionSet`. VOC writes 1-based coordinates with both ends inside the box, so x0 = xmin - 1,
    y0 = ymin - 1, x1 = xmax, y1 = ymax: 0-based, the far edge outside, width x1 - x0. Devkits written 0-based load as
    well: a minimum of 0 stays 0.

    All annotations of the splits are read and checked at construction; images are decoded on access.

    Args:
        root: the folder that holds `VOCdevkit`, or the three folders, below the datasets root, or an absolute path.
        splits: names like "2007_trainval": the year, and a list in that year's ImageSets/Main; "trainval" if the three
            folders lie in `root`. They are concatenated.
        classes: the class names in the order of the labels; "voc": the twenty of VOC; None: every name that occurs in
            the annotations of the splits' years, sorted, so that train and test agree.
        on_bad_annotation: "error", or "skip" to leave out objects with an impossible box or an unknown class, and
            images whose file is missing or whose annotation cannot be read; both are counted in the log.
        labelled: False reads no annotations: targets and `classes` are None.

    Raises:
        DatasetError: a missing folder, list or image, an empty split, or a wrong annotation.
    """

    layout = "VOC"

    def __init__(
        self,
        root: str = "",
        splits: Sequence[str] = ("2007_trainval",),
        classes: Sequence[str] | str | None = None,
        on_bad_annotation: str = "error",
        labelled: bool = True,
    ):
        super().__init__(on_bad_annotation)
        self.splits = [splits] if isinstance(splits, str) else list(splits)
        if not self.splits:
            raise DatasetError("VOCDetection: no split is given. splits holds names like '2007_trainval'.")
        folders = {split: _year_folder(root, split) for split in self.splits}
        files = [file for split in self.splits for file in self._listed_images(folders[split], _list_of(split))]
        if len(set(files)) < len(files):
            repeated = next(file for file in files if files.count(file) > 1)
            raise DatasetError(f"The splits {', '.join(self.splits)} list {repeated} more than once.")
        parsed: dict[Path, Annotation] = {}
        if not labelled:
            self._store(files)
        else:
            if classes is None:
                every = sorted({file for year in folders.values() for file in (year / "Annotations").glob("*.xml")})
                parsed = {path: read for path in every if (read := self._read(path, count=False)) is not None}
                self.classes = sorted({name for annotation in parsed.values() for name in annotation.names if name})
            elif isinstance(classes, str) and classes != "voc":
                raise DatasetError(f'classes is "{classes}"; give a list of names, "voc" or None.')
            else:
                self.classes = distinct_classes(VOC_CLASSES if classes == "voc" else classes)
            self._store_annotated(files, parsed)
        if not len(self):
            raise DatasetError(f"The splits {', '.join(self.splits)} hold no usable image.")
        self._log_left_out(", ".join(self.splits))

    def _listed_images(self, folder: Path, name: str) -> list[str]:
        """Return the image files that ImageSets/Main/<name>.txt lists."""
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
        folder = require_folder(folder / "JPEGImages", f"VOC images of {folder.name}")
        by_id: dict[str, list[str]] = {}
        for image in images_in(folder):
            by_id.setdefault(os.path.splitext(image)[0], []).append(image)
        for image_id in ids:
            matching = by_id.get(image_id, [])
            if not matching:
                problem = f"VOC image {folder / image_id}.jpg, listed in {file}, does not exist."
                self._leave_out("images", "without a file", problem)
            elif len(matching) > 1:
                problem = f"VOC image '{image_id}', listed in {file}, may be {' or '.join(matching)} in {folder}."
                self._leave_out("images", "of several files", problem)
        return [str(folder / by_id[image_id][0]) for image_id in ids if len(by_id.get(image_id, ())) == 1]

    def _read(self, path: Path, count: bool = True) -> Annotation | None:
        """Return an annotation, or None if it cannot be read and is to be skipped."""
        try:
            return read_annotation(path)
        except DatasetError as error:
            if count or not self._skip:
                self._leave_out("images", "with an unreadable annotation", str(error))
            return None

    def _store_annotated(self, listed: list[str], parsed: dict[Path, Annotation]) -> None:
        """Store the listed images, except those whose annotation cannot be read."""
        label_of = {name: label for label, name in enumerate(self.classes)}
        files, sizes, image_of, boxes, labels, difficult = [], [], [], [], [], []
        for file in listed:
            path = Path(file).parents[1] / "Annotations" / f"{Path(file).stem}.xml"
            annotation = parsed.get(path) or self._read(path)
            if annotation is None:
                continue
            for number, (name, box) in enumerate(zip(annotation.names, annotation.boxes, strict=True)):
                problem = _box_problem(box, annotation)
                if not problem and name not in label_of:
                    hint = did_you_mean(name, label_of)
                    problem = f"unknown class {name!r:.100}.{hint} The classes are {', '.join(label_of)}"
                if problem:
                    problem = f"VOC annotation {path}, object {number + 1}: {problem}."
                    self._leave_out("objects", "with an impossible box or an unknown class", problem)
                    continue
                image_of.append(len(files))
                boxes.append(_zero_based(box))
                labels.append(label_of[name])
                difficult.append(annotation.difficult[number])
            files.append(file)
            sizes.append((annotation.width, annotation.height))
        self._store(files, sizes, image_of, boxes, labels, difficult)


def read_annotation(path: Path) -> Annotation:
    """Parse one VOC XML file, safely for untrusted files (no entities, no external references).

    Coordinates that are missing or not numbers are NaN, a missing name is "".

    Raises:
        DatasetError: the file is missing, not a regular file, too large, not XML, or has no image size.
    """
    try:
        require_regular_file(path, "VOC annotation")
        with open(path, "rb") as file:
            content = file.read(_MAX_BYTES + 1)
        if len(content) > _MAX_BYTES:
            raise DatasetError(f"VOC annotation {path} has more than {_MAX_BYTES:,} bytes, so it is not read.")
        root = SafeXML.fromstring(content)
    except FileNotFoundError as error:
        raise DatasetError(f"VOC annotation {path} does not exist.") from error
    except DefusedXmlException as error:
        raise DatasetError(f"VOC annotation {path} is refused: it defines XML entities ({error}).") from error
    except (SafeXML.ParseError, ValueError, LookupError, OSError) as error:
        raise DatasetError(f"VOC annotation {path} does not parse: {error}.") from error
    width, height = _number(root, "size/width"), _number(root, "size/height")
    if not (1 <= width <= MAX_SIDE and 1 <= height <= MAX_SIDE):
        raise DatasetError(f"VOC annotation {path} gives no image size (a positive size/width and size/height).")
    objects = root.findall("object")
    return Annotation(
        path=path,
        width=int(width),
        height=int(height),
        names=[(element.findtext("name") or "").strip() for element in objects],
        boxes=[tuple(_number(element, f"bndbox/{side}") for side in _SIDES) for element in objects],
        difficult=[(element.findtext("difficult") or "").strip() == "1" for element in objects],
    )


def _number(element: Any, path: str) -> float:
    try:
        value = float(element.findtext(path) or "nan")
    except ValueError:
        return math.nan
    return value if math.isfinite(value) else math.nan


def _box_problem(box: Box, annotation: Annotation) -> str:
    """Return the problem of a box as written, or an empty string."""
    for side, value in zip(_SIDES, box, strict=True):
        size, limit = ("width", annotation.width) if side[0] == "x" else ("height", annotation.height)
        if math.isnan(value):
            return f"{side} is missing or not a number"
        if not 0 <= value <= limit:
            return f"{side} {value:g} lies outside the image ({size} {limit})"
    xmin, ymin, xmax, ymax = box
    if xmax <= xmin or ymax <= ymin or not has_area(_zero_based(box)):
        return f"the box has no area (xmin {xmin:g}, ymin {ymin:g}, xmax {xmax:g}, ymax {ymax:g})"
    return ""


def _zero_based(box: Box) -> Box:
    xmin, ymin, xmax, ymax = box
    return max(xmin - 1, 0), max(ymin - 1, 0), xmax, ymax


def _list_of(split: str) -> str:
    """Return the list in ImageSets/Main of a split: its name without the year."""
    return re.sub(r"^\d{4}_(?=.)", "", split)


def _year_folder(root: str, split: str) -> Path:
    name = _list_of(split)
    if name == split:
        if (datasets_root() / root / "ImageSets" / "Main").is_dir():
            return datasets_root() / root
        raise DatasetError(
            f"VOC split '{split}' is not '<year>_<list in ImageSets/Main>', like '2007_trainval', and "
            f"{datasets_root() / root} holds no ImageSets/Main itself."
        )
    year = split.split("_", 1)[0]
    folder = datasets_root() / root / "VOCdevkit" / f"VOC{year}"
    fetch = "bissl data voc_detection" if not root and year in ("2007", "2012") else ""
    return require_folder(folder, f"Pascal VOC set '{root or 'VOCdevkit'}', split '{split}'", fetch)
