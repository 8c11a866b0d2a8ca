"""Folders of images: one subfolder per class, or any pile of images without labels."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from bissl_zoo.data.catalog import IMAGE_EXTENSIONS, datasets_root, load_image, load_pixels, require_folder
from bissl_zoo.errors import DatasetError
from bissl_zoo.registry import DATASETS


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
        classes: the class folders that must be there, in the order of the labels; None: those that are, sorted. Pass
            the training set's list for a test set, so that their labels agree.
        limit: keep this many images, evenly spread over the sorted list.
        as_tensor: images are `(3, H, W)` uint8 rather than PIL's, which is quicker for JPEG files. It shows where the
            workers do little else (`dataloader.pretext.views_on="device"`).

    Raises:
        DatasetError: no such folder, no images, a class without images, or class folders other than `classes`.
    """

    def __init__(
        self,
        root: str,
        split: str = "",
        labelled: bool = True,
        classes: Sequence[str] | None = None,
        limit: int | None = None,
        as_tensor: bool = False,
    ):
        self.root = require_folder(datasets_root() / root / split, f"Image folder '{Path(root) / split}'")
        if classes is not None and not labelled:
            raise DatasetError(
                "ImageFolder: classes are given for an unlabelled set. Leave them out or set labelled=True."
            )
        if limit is not None and limit < 1:
            raise DatasetError(f"ImageFolder: limit is {limit}; it must be at least 1, or None for all images.")
        self._load = load_pixels if as_tensor else load_image
        self.classes = self._class_folders(classes) if labelled else None
        files: list[str] = []
        labels: list[int] = []
        if self.classes is None:
            files = sorted(_images_below(self.root))
        else:
            for label, name in enumerate(self.classes):
                found = sorted(_images_below(self.root / name))
                if not found:
                    raise DatasetError(f"Class folder {self.root / name} holds no images. {_accepted()}")
                files += found
                labels += [label] * len(found)
        if not files:
            raise DatasetError(f"There are no images below {self.root.absolute()}. {_accepted()}")
        # Arrays, not lists of a million objects: those are copied into every worker as their reference counts change.
        self._files = np.array([os.fsencode(os.path.relpath(file, self.root)) for file in files])
        self._labels = np.array(labels, dtype=np.int64)
        if limit is not None and limit < len(files):
            kept = np.arange(limit) * len(files) // limit
            self._files = self._files[kept]
            self._labels = self._labels[kept] if labelled else self._labels

    def _class_folders(self, expected: Sequence[str] | None) -> list[str]:
        found = sorted(entry.name for entry in self.root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
        if not found:
            raise DatasetError(
                f"There are no class folders in {self.root.absolute()}. A labelled set has one folder of images "
                "per class; pass labelled=False to read the images without labels."
            )
        if expected is None:
            return found
        names = [str(name) for name in expected]
        if sorted(names) != found:
            missing = sorted(set(names) - set(found))
            surplus = sorted(set(found) - set(names))
            raise DatasetError(
                f"The class folders of {self.root.absolute()} are not the classes asked for: "
                f"missing {', '.join(missing) or 'none'}; not asked for {', '.join(surplus) or 'none'}"
                f"{'; a class is named twice' if len(set(names)) < len(names) else ''}."
            )
        return names

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> tuple[Image.Image | Tensor, int | None]:
        target = None if self.classes is None else int(self._labels[index])
        return self._load(self.source(index)), target

    def source(self, index: int) -> str:
        """The file that sample `index` comes from."""
        return os.path.join(self.root, os.fsdecode(self._files[index]))


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
