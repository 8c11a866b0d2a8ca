"""Folders of images: one subfolder per class, or any pile of images without labels."""

import logging
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from bissl_zoo.data.datasets.boxes import distinct_classes, shown_names
from bissl_zoo.data.datasets.catalog import IMAGE_EXTENSIONS, datasets_root, load_image, load_pixels, require_folder
from bissl_zoo.errors import DatasetError, did_you_mean
from bissl_zoo.registry import DATASETS

logger = logging.getLogger(__name__)


@DATASETS.register("image_folder")
class ImageFolder(Dataset):
    """Images below `<datasets root>/<root>/<split>`, labelled by their class folder or not at all.

    Extensions (any case): jpg, jpeg, png, bmp, webp, tif, tiff. Files and folders whose name begins with a dot are not
    looked at. Files are sorted by path, so that an index means the same image everywhere. Pictures are turned upright
    by their EXIF orientation.

    Args:
        root: folder below the datasets root, or an absolute path.
        split: subfolder of it, e.g. "train".
        labelled: True: `split` holds one subfolder per class, and targets are class indices (int). False: every image
            at any depth is taken, targets and `classes` are None; a labelled set can be read this way too.
        classes: the classes in the order of the labels; None: the class folders that are there, sorted. A class without
            a folder or without images has no samples, and is named in a warning. Pass the same list for the training
            and the test set where one lacks a class of the other, so that their labels agree.
        part: "train" or "val" where validation images are to be drawn from a labelled set: `val_fraction` of each
            class, rounded down, or the others; None for all. Which ones depends on `val_fraction`, `seed`, and each
            class's place and number of files, so that both parts need the same `classes`, and are the same on any
            machine.
        limit: keep this many images, evenly spread over the sorted list.
        as_tensor: images are `(3, H, W)` uint8 rather than PIL's, which is quicker for JPEG files. It shows where the
            workers do little else (`dataloader.pretext.augment_on="device"`).

    Raises:
        DatasetError: no such folder, no images, a class folder without images that `classes` does not name or one
            besides `classes`, or a part that cannot be drawn.
    """

    def __init__(
        self,
        root: str,
        split: str = "",
        labelled: bool = True,
        classes: Sequence[str] | None = None,
        limit: int | None = None,
        as_tensor: bool = False,
        part: str | None = None,
        val_fraction: float = 0.2,
        seed: int = 0,
    ):
        self.root = require_folder(datasets_root() / root / split, f"Image folder '{Path(root) / split}'")
        if classes is not None and not labelled:
            raise DatasetError(
                "ImageFolder: classes are given for an unlabelled set. Leave them out or set labelled=True."
            )
        if limit is not None and limit < 1:
            raise DatasetError(f"ImageFolder: limit is {limit}; it must be at least 1, or None for all images.")
        _check_part(part, labelled)
        self._load = load_pixels if as_tensor else load_image
        folders = self._class_folders() if labelled else []
        self.classes = self._named(classes, folders) if labelled else None
        files: list[str] = []
        labels: list[int] = []
        if self.classes is None:
            files = sorted(_images_below(self.root))
        else:
            for label, name in enumerate(self.classes):
                found = sorted(_images_below(self.root / name)) if name in folders else []
                if not found and classes is None:
                    raise DatasetError(
                        f"Class folder {self.root / name} holds no images. {_accepted()} Remove the folder, or give "
                        "all classes by name as `classes`, of which some may have no images."
                    )
                files += found
                labels += [label] * len(found)
            self._tell_empty(labels)
        if not files:
            raise DatasetError(f"There are no images below {self.root.absolute()}. {_accepted()}")
        # Arrays, not lists of a million objects: those are copied into every worker as their reference counts change.
        self._files = np.array([os.fsencode(os.path.relpath(file, self.root)) for file in files])
        self._labels = np.array(labels, dtype=np.int64)
        if part is not None:
            self._keep(np.flatnonzero(draw_fraction(self._labels, val_fraction, seed) == (part == "val")))
        if limit is not None and limit < len(self):
            self._keep(np.arange(limit) * len(self) // limit)

    def _class_folders(self) -> list[str]:
        found = sorted(entry.name for entry in self.root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
        if not found:
            raise DatasetError(
                f"There are no class folders in {self.root.absolute()}. A labelled set has one folder of images "
                "per class; pass labelled=False to read the images without labels."
            )
        return found

    def _named(self, classes: Sequence[str] | None, folders: list[str]) -> list[str]:
        """The names of the classes; DatasetError where there is a folder besides those of `classes`."""
        if classes is None:
            return folders
        names = distinct_classes(classes)
        if surplus := [name for name in folders if name not in names]:
            missing = [name for name in names if name not in folders]
            raise DatasetError(
                f"{self.root.absolute()} has class folders that `classes` does not name: {shown_names(surplus)}."
                f"{did_you_mean(surplus[0], missing)} Add them to `classes`, of this set and of those it is used with, "
                "or take the folders away."
            )
        return names

    def _tell_empty(self, labels: list[int]) -> None:
        """Name the classes that have no images."""
        held = set(labels)
        if empty := [name for label, name in enumerate(self.classes) if label not in held]:
            logger.warning(
                "%s has no images of %d of the %d classes: %s",
                self.root.absolute(),
                len(empty),
                len(self.classes),
                shown_names(empty),
            )

    def _keep(self, kept: np.ndarray) -> None:
        self._files = self._files[kept]
        self._labels = self._labels[kept] if self.classes is not None else self._labels

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> tuple[Image.Image | Tensor, int | None]:
        target = None if self.classes is None else int(self._labels[index])
        return self._load(self.source(index)), target

    def source(self, index: int) -> str:
        """The file that sample `index` comes from."""
        return os.path.join(self.root, os.fsdecode(self._files[index]))


def _check_part(part: str | None, labelled: bool) -> None:
    if part not in (None, "train", "val"):
        raise DatasetError(f'ImageFolder: part is {part!r}; accepted are "train", "val" and None for all images.')
    if part is not None and not labelled:
        raise DatasetError(
            f'ImageFolder: part="{part}" is drawn from each class alike, so it needs labels. Leave it out or set '
            "labelled=True."
        )


def _accepted() -> str:
    return f"Accepted are {', '.join(sorted(extension[1:] for extension in IMAGE_EXTENSIONS))} in either case."


def _images_below(folder: str | os.PathLike, above: tuple[str, ...] = ()) -> Iterator[str]:
    """Paths of the images below `folder`. Links to folders are followed, except back to one that contains them."""
    real = os.path.realpath(folder)
    if real in above:
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                yield from _images_below(entry.path, (*above, real))
            elif os.path.splitext(entry.name)[1].lower() in IMAGE_EXTENSIONS:
                yield entry.path


def draw_fraction(labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Draw the same part of every class, rounded down, but one of a class of two to four or so rather than none.

    Args:
        labels: int64 (N,).
    Returns:
        bool (N,), True for what is drawn; a class's own draw depends on `seed`, its label and its size alone.
    Raises:
        DatasetError: the fraction is not between 0 and 1, the seed is negative, labels are not one per sample, or
            nothing would be drawn.
    """
    if isinstance(fraction, bool) or not isinstance(fraction, (int, float)) or not 0 < fraction < 1:
        raise DatasetError(f"val_fraction is {fraction!r}; it must lie between 0 and 1, such as 0.2.")
    sizes = np.bincount(_checked(labels))
    # what a float falls short of a whole number by is no reason to round down
    counts = np.maximum(np.floor(sizes * fraction + 1e-9), 1).astype(np.int64)
    drawn = _draw(labels, np.minimum(counts, np.maximum(sizes - 1, 0)), seed)
    if not drawn.any():
        raise DatasetError("No validation images can be drawn: no class has two images.")
    return drawn


def draw_per_class(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Draw `count` samples of every class; bool (N,) as of :func:`draw_fraction`.

    Raises:
        DatasetError: a class has no more than `count`, so that none would be left, or as of :func:`draw_fraction`.
    """
    sizes = np.bincount(_checked(labels))
    few = np.flatnonzero((sizes > 0) & (sizes <= count))
    if len(few):
        raise DatasetError(
            f"Class {few[0]} has {sizes[few[0]]} images. Of each class {count} are drawn, and one must be left."
        )
    return _draw(labels, np.where(sizes > 0, count, 0), seed)


def _checked(labels: np.ndarray) -> np.ndarray:
    if labels.ndim != 1:
        raise DatasetError(
            "Splits are drawn of data with one label per image only. Use the splits that such a set comes with."
        )
    return labels


def _draw(labels: np.ndarray, counts: np.ndarray, seed: int) -> np.ndarray:
    """Draw `counts[label]` samples of each class."""
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < math.inf:
        raise DatasetError(f"seed is {seed!r}; it must be a whole number from 0 on.")
    drawn = np.zeros(len(labels), dtype=bool)
    # one stable sort rather than a pass over all labels per class
    members = np.split(np.argsort(labels, kind="stable"), np.cumsum(np.bincount(labels, minlength=len(counts)))[:-1])
    for label, (of_class, count) in enumerate(zip(members, counts.tolist(), strict=True)):
        drawn[np.random.default_rng((seed, label)).permutation(of_class)[:count]] = True
    return drawn
