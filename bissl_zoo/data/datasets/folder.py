"""Folders of images, with one subfolder per class or without labels; validation splits drawn from labelled images."""

import logging
import os
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image

from bissl_zoo.data.datasets.catalog import IMAGE_EXTENSIONS, datasets_root, load_image, require_folder
from bissl_zoo.errors import DatasetError, did_you_mean
from bissl_zoo.registry import DATASETS

logger = logging.getLogger(__name__)

#: names of classes in one message
_MAX_LISTED = 20


@DATASETS.register("image_folder")
class ImageFolder:
    """Images below `<datasets root>/<root>/<split>`, labelled by their class folder or not at all.

    Extensions (any case): jpg, jpeg, png, bmp, webp, tif, tiff. Files and folders whose name begins with a dot are
    ignored. Files are sorted by path, so that an index means the same image everywhere. Images are turned upright by
    their EXIF orientation.

    Args:
        root: folder below the datasets root, or an absolute path.
        split: subfolder of it, e.g. "train".
        labelled: True: `split` holds one subfolder per class, and targets are class indices (int). False: all images at
            any depth, targets and `classes` are None; a labelled set can be read this way too.
        classes: class names in the order of the labels; None: the class folders, sorted. A class without a folder or
            images is named in a warning. Pass the same list for training and test set if one lacks a class.
        limit: use this many images, evenly spread over the sorted list.
        part: "train" or "val" to draw validation images from a labelled set: `val_fraction` of each class, rounded
            down, or the others; None for all. Depends on `val_fraction`, `seed`, and each class's label and number of
            files only, so both parts need the same `classes`.

    Raises:
        DatasetError: no such folder, no images, an empty class folder that `classes` does not name, a folder that
            `classes` lacks, or a part that cannot be drawn.
    """

    def __init__(
        self,
        root: str,
        split: str = "",
        labelled: bool = True,
        classes: Sequence[str] | None = None,
        limit: int | None = None,
        part: str | None = None,
        val_fraction: float = 0.2,
        seed: int = 0,
    ):
        self.root = require_folder(datasets_root() / root / split, f"Image folder '{os.path.join(root, split)}'")
        if classes is not None and not labelled:
            raise DatasetError("ImageFolder: classes are given for an unlabelled set. Omit them or set labelled=True.")
        if part not in (None, "train", "val"):
            raise DatasetError(f'ImageFolder: part is {part!r}; accepted are "train", "val" and None for all images.')
        if part is not None and not labelled:
            raise DatasetError(f'ImageFolder: part="{part}" is drawn per class and needs labels. Set labelled=True.')
        self.classes = self._classes(classes) if labelled else None
        files, labels = self._labelled_files(classes is None) if labelled else (sorted(_images_below(self.root)), [])
        if not files:
            raise DatasetError(f"There are no images below {self.root.absolute()}. {_accepted()}")
        # arrays, not lists: reference counts of a million objects would be copied into every worker
        self._files = np.array([os.fsencode(os.path.relpath(file, self.root)) for file in files])
        self._labels = np.array(labels, dtype=np.int64)
        if part is not None:
            self._select(np.flatnonzero(draw_fraction(self._labels, val_fraction, seed) == (part == "val")))
        if limit is not None and limit < len(self):
            self._select(np.arange(limit) * len(self) // limit)

    def _classes(self, classes: Sequence[str] | None) -> list[str]:
        """Return the class names, which include all class folders."""
        folders = subfolders(self.root)
        if not folders:
            raise DatasetError(
                f"There are no class folders in {self.root.absolute()}. A labelled set has one folder of images "
                "per class; pass labelled=False to read the images without labels."
            )
        if classes is None:
            return folders
        names = distinct_classes(classes)
        if surplus := [name for name in folders if name not in names]:
            missing = [name for name in names if name not in folders]
            raise DatasetError(
                f"{self.root.absolute()} has class folders that `classes` lacks: {shown_names(surplus)}."
                f"{did_you_mean(surplus[0], missing)} Add them to `classes` of all sets used together, or remove the "
                "folders."
            )
        return names

    def _labelled_files(self, require_images: bool) -> tuple[list[str], list[int]]:
        """Return the files of all classes and their labels."""
        files: list[str] = []
        labels: list[int] = []
        folders, empty = subfolders(self.root), []
        for label, name in enumerate(self.classes):
            images = sorted(_images_below(self.root / name)) if name in folders else []
            if not images and require_images:
                raise DatasetError(
                    f"Class folder {self.root / name} holds no images. {_accepted()} Remove the folder, or pass all "
                    "class names as `classes`, of which some may have no images."
                )
            empty += [] if images else [name]
            files += images
            labels += [label] * len(images)
        if empty and files:
            logger.warning(
                "%s has no images of %d of %d classes: %s",
                self.root.absolute(), len(empty), len(self.classes), shown_names(empty),
            )  # fmt: skip
        return files, labels

    def _select(self, indices: np.ndarray) -> None:
        self._files = self._files[indices]
        self._labels = self._labels[indices] if self.classes is not None else self._labels

    @property
    def targets(self) -> np.ndarray | None:
        """Labels of all images, int64 (N,); None if the set is read without."""
        return self._labels if self.classes is not None else None

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> tuple[Image.Image, int | None]:
        return load_image(self.source(index)), self.target(index)

    def target(self, index: int) -> int | None:
        """Return the class index of sample `index` without decoding its image; None without labels."""
        return None if self.classes is None else int(self._labels[index])

    def source(self, index: int) -> str:
        """Return the file of sample `index`."""
        return os.path.join(self.root, os.fsdecode(self._files[index]))


def _accepted() -> str:
    return f"Accepted are {', '.join(sorted(extension[1:] for extension in IMAGE_EXTENSIONS))} in either case."


def _images_below(folder: str | os.PathLike, above: tuple[str, ...] = ()) -> Iterator[str]:
    """Yield paths of the images below `folder`. Links to folders are followed, except to one that contains them."""
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


def subfolders(folder: str | os.PathLike) -> list[str]:
    """Return the sorted names of the folders in `folder` that do not begin with a dot; none if it is no folder."""
    if not os.path.isdir(folder):
        return []
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))


def images_in(folder: str | os.PathLike) -> list[str]:
    """Return the sorted names of the images directly in `folder`."""
    names = (name for name in os.listdir(folder) if not name.startswith("."))
    return sorted(name for name in names if os.path.splitext(name)[1].lower() in IMAGE_EXTENSIONS)


def shown_names(names: Sequence[str]) -> str:
    """Return names for a message, the first `_MAX_LISTED` of them."""
    return ", ".join(names[:_MAX_LISTED]) + (f", ... ({len(names)} in all)" if len(names) > _MAX_LISTED else "")


def distinct_classes(classes: Sequence[str]) -> list[str]:
    """Return class names as a list.

    Raises:
        DatasetError: a name occurs twice, or `classes` is a string.
    """
    if isinstance(classes, str):
        raise DatasetError(f'classes is "{classes}"; give a list of names, or None for all.')
    names = [str(name) for name in classes]
    for name in names:
        if names.count(name) > 1:
            raise DatasetError(f"classes names {name} more than once.")
    return names


def draw_fraction(labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Draw the same fraction of every class, rounded down, but at least one image of a class of two or more.

    Args:
        labels: int64 (N,).
    Returns:
        bool (N,), True for what is drawn. The draw of a class depends only on `seed`, its label and its size.
    Raises:
        DatasetError: images have several labels, or no class has two images.
    """
    if labels.ndim != 1:
        raise DatasetError("Splits are drawn from data with one label per image only. Use the set's own splits.")
    sizes = np.bincount(labels)
    counts = np.maximum(np.floor(sizes * fraction + 1e-9), 1).astype(np.int64)  # 0.29 * 100 is a bit less than 29
    drawn = _draw(labels, np.minimum(counts, np.maximum(sizes - 1, 0)), seed)
    if not drawn.any():
        raise DatasetError("No validation images can be drawn: no class has two images.")
    return drawn


def draw_per_class(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Draw `count` samples of every class; bool (N,) as from :func:`draw_fraction`.

    Raises:
        DatasetError: a class has no more than `count`, so that none would be left.
    """
    sizes = np.bincount(labels)
    if len(few := np.flatnonzero((sizes > 0) & (sizes <= count))):
        raise DatasetError(f"Class {few[0]} has {sizes[few[0]]} images; {count} are drawn and one must be left.")
    return _draw(labels, np.where(sizes > 0, count, 0), seed)


def _draw(labels: np.ndarray, counts: np.ndarray, seed: int) -> np.ndarray:
    """Draw `counts[label]` samples of each class."""
    drawn = np.zeros(len(labels), dtype=bool)
    # one stable sort rather than a pass over all labels per class
    members = np.split(np.argsort(labels, kind="stable"), np.cumsum(np.bincount(labels, minlength=len(counts)))[:-1])
    for label, (indices, count) in enumerate(zip(members, counts.tolist(), strict=True)):
        drawn[np.random.default_rng((seed, label)).permutation(indices)[:count]] = True
    return drawn
