"""Detection sets whose annotations are one JSON file in COCO's format (Lin et al., arXiv 1405.0312)."""

import logging
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bissl_zoo.data.datasets.boxes import MAX_SIDE, Box, DetectionSet, has_area
from bissl_zoo.data.datasets.catalog import datasets_root, require_folder, require_regular_file
from bissl_zoo.data.datasets.folder import distinct_classes, shown_names
from bissl_zoo.errors import DatasetError, did_you_mean
from bissl_zoo.files import parse_json
from bissl_zoo.registry import DATASETS

logger = logging.getLogger(__name__)

#: pixels by which a box may exceed its image: COCO rounds corner and width separately, to hundredths, and some tools
#: count the last pixel twice; a box further outside belongs to another image
_TOLERANCE = 1.0
#: largest annotation file in bytes; COCO's largest has 470 MB, and Objects365's 5 GB
_MAX_BYTES = 8 << 30

Record = dict[str, Any]
Id = int | str


@DATASETS.register("coco_detection")
class COCODetection(DetectionSet):
    """Images with boxes, from a folder of images and a JSON file of annotations.

    Samples are those of `DetectionSet`, in the order of the file's images, with or without objects. COCO writes a box
    as its corner, width and height, 0-based, so x1 = x + width; what exceeds the image by up to a pixel is cut off.
    Category ids may have gaps. Of an object only box, category and `iscrowd` are read.

    A crowd, one box around many objects, is marked `difficult`: left out of training and ignored in evaluation. The
    evaluation matches it by IoU like any object, whereas COCO's accepts any detection inside it, so that results are
    slightly below COCO's own.

    The file is read and checked at construction. Images are decoded on access, and their sizes checked then.

    Args:
        root: the folder that the two others are in, below the datasets root, or an absolute path.
        annotations: the JSON file, below `root` or absolute.
        images: the folder that the file names of the images count from, below `root` or absolute.
        classes: the names of the categories to read, in the order of the labels; objects of others are left out, and
            counted in the log. A name that the file lacks is a class without objects and is logged, but refused if it
            looks like a misspelt category. None: all of the file, in the order of their ids.
        on_bad_annotation: "error", or "skip" to leave out objects with an impossible box or an unknown image or
            category, and images whose file is missing or whose record is wrong; they are counted in the log.
        labelled: False reads the list of images alone, which may then have no sizes: targets and `classes` are None.

    Raises:
        DatasetError: a missing file or folder, another format, or a wrong annotation.
    """

    layout = "COCO"

    def __init__(
        self,
        root: str = "coco",
        annotations: str = "annotations/instances_train2017.json",
        images: str = "train2017",
        classes: Sequence[str] | None = None,
        on_bad_annotation: str = "error",
        labelled: bool = True,
    ):
        super().__init__(on_bad_annotation)
        folder = datasets_root() / root
        is_official = root == "coco" and images in ("train2017", "val2017")
        fetch = "bissl data coco_detection" if is_official else ""
        self._folder = require_folder(folder / images, f"COCO set '{root}'", fetch)
        self._path = folder / annotations
        content = read_annotations(self._path, ("images", "annotations", "categories") if labelled else ("images",))
        label_of = self._labels_by_category(content["categories"], classes) if labelled else {}
        files, sizes, place_of = self._images_of(content["images"], labelled)
        if not files:
            raise DatasetError(f"COCO annotations {self._path} hold no usable image.")
        if labelled:
            self._store(files, sizes, *self._objects_of(content["annotations"], sizes, place_of, label_of))
        else:
            self._store(files)
        self._log_left_out(str(self._path))

    def _labels_by_category(self, categories: list[Any], chosen: Sequence[str] | None) -> dict[Id, int | None]:
        """Set `classes`; return the label of each category id, None for a category that is not chosen."""
        name_of: dict[Id, str] = {}
        for number, record in enumerate(categories, start=1):
            try:
                key, name = _id(record, "id"), record.get("name")
                if not isinstance(name, str) or not name:
                    raise _Wrong("it has no name")
                if key in name_of or name in name_of.values():
                    raise _Wrong(f"its id or its name, {_shown(name)}, was there before")
            except _Wrong as error:
                raise DatasetError(f"{self._at('category', number, record)}: {error}. Fix the file.") from error
            name_of[key] = name
        in_order = [name_of[key] for key in sorted(name_of, key=lambda key: (isinstance(key, str), key))]
        self.classes = in_order if chosen is None else distinct_classes(chosen)
        if not self.classes:
            raise DatasetError(f"COCO annotations {self._path}: there is no category, or none is chosen in classes.")
        absent = [name for name in self.classes if name not in in_order]
        for name in absent:
            hint = did_you_mean(name, [other for other in in_order if other not in self.classes])
            if hint or len(absent) == len(self.classes):
                raise DatasetError(
                    f"COCO annotations {self._path} have no category {_shown(name)}.{hint} If the name is right, add "
                    "it to the file's list 'categories'."
                )
        if absent:
            logger.warning("COCO %s has no category %s; no image has such objects", self._path, shown_names(absent))
        label_of_name = {name: label for label, name in enumerate(self.classes)}
        return {key: label_of_name.get(name) for key, name in name_of.items()}

    def _images_of(
        self, records: list[Any], labelled: bool
    ) -> tuple[list[str], list[tuple[int, int]], dict[Id, int | None]]:
        """Return files and sizes of the images, and the index of each image id, None for one that is left out."""
        files: dict[str, tuple[int, int]] = {}
        place_of: dict[Id, int | None] = {}
        folders: dict[Path, frozenset[str]] = {}
        for number, record in enumerate(records, start=1):
            try:
                key = _id(record, "id")
                if key in place_of:  # never skipped: it is unknown which annotations belong to which
                    raise DatasetError(f"{self._at('image', number, record)}: its id was there before. Fix the file.")
                place_of[key] = None
                path = self._path_of(record.get("file_name"))
                if path.parent not in folders:
                    folders[path.parent] = _names_in(path.parent)
                if path.name not in folders[path.parent]:
                    raise _Wrong(f"there is no such file in {self._folder}")
                if str(path) in files:
                    raise _Wrong("another image is the same file")
                size = _size(record) if labelled else (0, 0)
            except _Wrong as error:
                problem = f"{self._at('image', number, record)}: {error}."
                self._leave_out("images", "without a usable file or record", problem)
                continue
            place_of[key] = len(files)
            files[str(path)] = size
        return list(files), list(files.values()), place_of

    def _path_of(self, name: Any) -> Path:
        try:
            usable = isinstance(name, str) and b"\0" not in os.fsencode(name)
        except UnicodeEncodeError:
            usable = False
        if not usable:
            raise _Wrong("its file_name is missing or no name of a file")
        if Path(name).anchor or ".." in Path(name).parts:
            raise _Wrong(f"its file_name leads out of {self._folder}, and is not followed")
        return self._folder / name

    def _objects_of(
        self,
        records: list[Any],
        sizes: list[tuple[int, int]],
        place_of: dict[Id, int | None],
        label_of: dict[Id, int | None],
    ) -> tuple[list[int], list[Box], list[int], list[bool]]:
        """Return for each object the index of its image, its box, its label, and whether it is a crowd."""
        objects: list[tuple[int, Box, int, bool]] = []
        seen: set[Id] = set()
        for number, record in enumerate(records, start=1):
            try:
                key = _id(record, "id")
                if key in seen:
                    raise _Wrong("its id was there before")
                seen.add(key)
                place, label = _known(record, "image", place_of), _known(record, "category", label_of)
                if place is None:
                    continue
                if record.get("iscrowd", 0) not in (0, 1):
                    raise _Wrong(f"iscrowd is {_shown(record['iscrowd'])}; accepted are 0 and 1")
                box = _box(record.get("bbox"), *sizes[place])
            except _Wrong as error:
                problem = f"{self._at('annotation', number, record)}: {error}."
                self._leave_out("objects", "with an impossible box, id, image or category", problem)
                continue
            if label is None:
                self._left_out["objects of other classes"] += 1
            else:
                objects.append((place, box, label, bool(record.get("iscrowd", 0))))
        return tuple(map(list, zip(*objects, strict=True))) if objects else ([], [], [], [])

    def _at(self, what: str, number: int, record: Any) -> str:
        """Return the position of a record for a message: its number, id and file name."""
        names = {key: record.get(key) for key in ("id", "file_name")} if isinstance(record, dict) else {}
        text = ", ".join(f"{key} {_shown(value)}" for key, value in names.items() if value is not None)
        return f"COCO annotations {self._path}, {what} {number}{f' ({text})' if text else ''}"


class _Wrong(ValueError):
    """The problem of one record."""


def _id(record: Any, key: str) -> Id:
    """Return an id; COCO's are integers, those of other tools may be text."""
    if not isinstance(record, dict):
        raise _Wrong("it is no JSON object")
    if type(record.get(key)) not in (int, str):
        raise _Wrong(f"{key} is missing, or neither a whole number nor text")
    return record[key]


def _known(record: Any, what: str, known: dict[Id, int | None]) -> int | None:
    key = _id(record, f"{what}_id")
    if key not in known:
        raise _Wrong(f"{what}_id {_shown(key)} is no {what} of the file")
    return known[key]


def _size(record: Record) -> tuple[int, int]:
    width, height = record.get("width"), record.get("height")
    if not all(_is_number(side) and side == int(side) and 1 <= side <= MAX_SIDE for side in (width, height)):
        raise _Wrong("it has no size (a positive whole width and height)")
    return int(width), int(height)


def _box(written: Any, width: int, height: int) -> Box:
    """Return x0, y0, x1, y1 of a bbox within its image."""
    if not isinstance(written, list) or len(written) != 4 or not all(map(_is_number, written)):
        raise _Wrong("bbox is missing, or not four numbers")
    x, y, w, h = written
    shape = f"(x {x:g}, y {y:g}, width {w:g}, height {h:g})"
    if w > 0 and h > 0 and min(x, y, width - (x + w), height - (y + h)) < -_TOLERANCE:
        raise _Wrong(f"the box {shape} lies outside the image ({width} x {height})")
    box = (max(x, 0), max(y, 0), min(x + w, width), min(y + h, height))
    if not has_area(box):
        raise _Wrong(f"the box has no area {shape} in the image ({width} x {height})")
    return box


def _is_number(value: Any) -> bool:
    # integers of hundreds of digits do not fit into a float
    return type(value) in (int, float) and abs(value) < 1e9 and not math.isnan(value)


def _shown(value: Any) -> str:
    return f"{value!r:.100}" if isinstance(value, (str, int, float)) else type(value).__name__


def read_annotations(path: Path, keys: Sequence[str]) -> dict[str, list[Any]]:
    """Return the lists `keys` of a JSON file, without the masks in them.

    Raises:
        DatasetError: the file is missing, not a regular file, too large, not JSON, or lacks these lists.
    """
    try:
        if require_regular_file(path, "COCO annotations").st_size > _MAX_BYTES:
            raise DatasetError(f"COCO annotations {path} have more than {_MAX_BYTES:,} bytes, so they are not read.")
        content = parse_json(path.read_bytes(), object_hook=_without_mask)
    except FileNotFoundError as error:
        present = sorted(name for name in _names_in(path.parent) if name.endswith(".json"))
        raise DatasetError(
            f"COCO annotations {path} do not exist.{did_you_mean(path.name, present)} "
            f"There: {', '.join(present[:20]) or 'none'}{', ...' if len(present) > 20 else ''}."
        ) from error
    except (ValueError, OSError) as error:
        raise DatasetError(f"COCO annotations {path} cannot be read as JSON: {error}.") from error
    for key in keys:
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise DatasetError(
                f"COCO annotations {path} have no list '{key}', so they are not in COCO's format: a JSON object "
                "with the lists 'images', 'annotations' and 'categories'."
            )
    return {key: content[key] for key in keys}


def _without_mask(record: dict[str, Any]) -> dict[str, Any]:
    # nine tenths of COCO's file; dropped during parsing, so that they are never all in memory
    record.pop("segmentation", None)
    return record


def _names_in(folder: Path) -> frozenset[str]:
    """Return the names in a folder; empty if it does not exist."""
    try:
        return frozenset(os.listdir(folder))
    except OSError:
        return frozenset()
