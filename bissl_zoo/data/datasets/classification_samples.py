"""What the readers of the original layouts return, and what they have in common: lists, class names and checks."""

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bissl_zoo.data.datasets.catalog import IMAGE_EXTENSIONS
from bissl_zoo.errors import DatasetError

#: bytes of a list, far above the longest (the 75,750 lines of Food-101's)
_LIST_LIMIT = 200_000_000


class Samples(NamedTuple):
    """One official part of a set, in the order of its list.

    Attributes:
        names: bytes (N,): files below the set's folder, or `file#number` of images in an array file.
        labels: int64 (N,); float32 (N, K) of several labels per image; None where there are none.
        classes: names in the order of the labels.
        listed_in: what names the files, for messages; empty where a folder was listed, so that they are known to exist.
        pixels: of array files, uint8 (H, W) or (H, W, 3) per number.
    """

    names: np.ndarray
    labels: np.ndarray | None
    classes: list[str]
    listed_in: str = ""
    pixels: Any = None


class MissingImages(DatasetError):
    """Images that a list names do not exist; `files` are all of them."""

    def __init__(self, message: str, files: list[str]) -> None:
        super().__init__(message)
        self.files = files


def samples(
    names: Iterable[str],
    labels: Any,
    classes: Iterable[str],
    listed_in: str | os.PathLike = "",
    pixels: Any = None,
) -> Samples:
    """Make `Samples` of plain lists."""
    if labels is not None:
        labels = np.asarray(labels)
        labels = labels.astype(np.float32 if labels.ndim == 2 else np.int64)
    encoded = np.array([os.fsencode(name) for name in names], dtype=np.bytes_)
    return Samples(encoded, labels, list(classes), str(listed_in), pixels)


def joined(parts: Sequence[Samples]) -> Samples:
    """Parts of image files, one after the other.

    Raises:
        DatasetError: their class names differ.
    """
    first = parts[0]
    for part in parts[1:]:
        same_classes(first.classes, first.listed_in, part.classes, part.listed_in)
    names = np.concatenate([part.names for part in parts])
    labels = np.concatenate([part.labels for part in parts])
    return Samples(names, labels, first.classes, " or ".join(part.listed_in for part in parts))


def same_classes(classes: Sequence[str], where: Any, others: Sequence[str], elsewhere: Any) -> None:
    """Raise DatasetError where two parts of a set name other classes."""
    if list(classes) == list(others):
        return
    differing = sorted(set(classes) ^ set(others))
    what = f"such as '{differing[0]}'" if differing else "their order does"
    raise DatasetError(f"The classes of {where} ({len(classes)}) and of {elsewhere} ({len(others)}) differ, {what}.")


def readable(name: str) -> str:
    """A class's name with spaces where files have underscores."""
    return name.replace("_", " ").strip()


def numbered(labels: Iterable[str], names: Sequence[str], where: Any) -> list[int]:
    """The places in `names` of what `where` calls its labels.

    Raises:
        DatasetError: a label that is no class.
    """
    place = {name: number for number, name in enumerate(names)}
    found = []
    for label in labels:
        if label not in place:
            raise DatasetError(f"{where} has the class '{label}', which is none of the {len(names)} classes.")
        found.append(place[label])
    return found


def read_bytes(file: Path) -> bytes:
    """The content of a small file of a set; DatasetError where it is missing or no list of any set is that large."""
    try:
        if file.stat().st_size > _LIST_LIMIT:
            raise DatasetError(f"{file} has more than {_LIST_LIMIT:,} bytes, so it is not read.")
        return file.read_bytes()
    except FileNotFoundError as error:
        raise DatasetError(f"{file.absolute()} does not exist.") from error
    except OSError as error:
        raise DatasetError(f"{file.absolute()} cannot be read: {error.strerror}.") from error


def read_lines(file: Path) -> list[str]:
    """The lines of a text list, without the empty ones.

    Raises:
        DatasetError: the file is missing, empty or no text.
    """
    try:
        lines = [line.strip() for line in read_bytes(file).decode("utf-8").splitlines()]
    except UnicodeDecodeError as error:
        raise DatasetError(f"{file.absolute()} is no text: {error}.") from error
    if not any(lines):
        raise DatasetError(f"{file.absolute()} is empty.")
    return [line for line in lines if line]


def read_table(file: Path, columns: int) -> list[list[str]]:
    """The lines of a text list as `columns` words each, the last of which may hold spaces.

    Raises:
        DatasetError: as of :func:`read_lines`, or a line has fewer words.
    """
    rows = []
    for line in read_lines(file):
        rows.append(line.split(maxsplit=columns - 1))
        if len(rows[-1]) < columns:
            raise DatasetError(f"{file.absolute()}: the line '{line}' should have {columns} columns.")
    return rows


def whole(text: str, file: Path) -> int:
    """The number that a word of a list is."""
    if not re.fullmatch(r"-?[0-9]+", text):
        raise DatasetError(f"{file.absolute()}: '{text}' should be a whole number.")
    return int(text)


def images_in(folder: Path) -> list[str]:
    """Names of the images in a folder, sorted; files that begin with a dot are not looked at."""
    names = (name for name in os.listdir(folder) if not name.startswith("."))
    return sorted(name for name in names if os.path.splitext(name)[1].lower() in IMAGE_EXTENSIONS)


def check(found: Samples, folder: Path) -> None:
    """Check all of a part that does not need decoding.

    Raises:
        DatasetError: no samples, labels and images of different number, a label that is no class, a class or an image
            named twice, or an image that does not exist.
    """
    where = found.listed_in or folder.absolute()
    if not len(found.names):
        raise DatasetError(f"{where} names no images.")
    if found.labels is not None:
        if len(found.labels) != len(found.names):
            raise DatasetError(f"{where}: {len(found.labels)} labels for {len(found.names)} images.")
        if found.labels.ndim == 1 and not 0 <= found.labels.min() <= found.labels.max() < len(found.classes):
            bad = int(np.flatnonzero((found.labels < 0) | (found.labels >= len(found.classes)))[0])
            raise DatasetError(
                f"{where}: {os.fsdecode(found.names[bad])} has label {found.labels[bad]}, but the labels are 0 to "
                f"{len(found.classes) - 1}, counted from 0."
            )
    for what, values in (("class", found.classes), ("image", found.names)):
        distinct, times = np.unique(values, return_counts=True)
        if len(distinct) < len(values):
            twice = distinct[times.argmax()]
            name = os.fsdecode(twice) if isinstance(twice, bytes) else twice
            raise DatasetError(f"{where} names the {what} '{name}' more than once.")
    if found.listed_in and found.pixels is None:
        _check_files(found, folder)


def _check_files(found: Samples, folder: Path) -> None:
    """Look for every file, by listing each folder once."""
    there: dict[str, set[str]] = {}
    missing = []
    for name in map(os.fsdecode, found.names.tolist()):
        parent, _, file = name.rpartition("/")
        if parent not in there:
            there[parent] = set(os.listdir(folder / parent)) if (folder / parent).is_dir() else set()
        if file not in there[parent]:
            missing.append(name)
    if missing:
        others = f", and {len(missing) - 1:,} more that it lists do not either" if len(missing) > 1 else ""
        message = f"The image {(folder / missing[0]).absolute()}, listed in {found.listed_in}, does not exist{others}."
        raise MissingImages(message, [str((folder / name).absolute()) for name in missing])
