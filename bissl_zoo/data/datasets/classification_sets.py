"""Classification sets by name, as their original archives unpack and as torchvision's downloads leave them."""

import hashlib
import inspect
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from bissl_zoo.data.datasets import classification_arrays as arrays
from bissl_zoo.data.datasets import classification_layouts as layouts
from bissl_zoo.data.datasets.catalog import datasets_root, load_image, require_folder
from bissl_zoo.data.datasets.classification_samples import Samples, check, joined
from bissl_zoo.data.datasets.folder import draw_fraction
from bissl_zoo.errors import DatasetError, did_you_mean
from bissl_zoo.registry import DATASETS

SPLITS = ("train", "val", "trainval", "test")


class Layout(NamedTuple):
    """What is known of a set.

    Attributes:
        what: the set in words.
        folders: where it may lie below the data sets root, the first that is there.
        read: `read(folder, part, **options)`, the samples of an official part.
        parts: the official parts and their numbers of images: "trainval" or "train" and "val", "test", and others.
        classes: how many there are.
        options: what `read` takes besides, with the defaults.
    """

    what: str
    folders: tuple[str, ...]
    read: Callable[..., Samples]
    parts: Mapping[str, int]
    classes: int
    options: Mapping[str, Any] = MappingProxyType({})

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that can be asked for."""
        return SPLITS + tuple(part for part in self.parts if part not in SPLITS)

    @property
    def whole(self) -> tuple[str, ...]:
        """The splits that hold every image once."""
        return tuple(split for split in self.splits if split not in ("train", "val"))


#: every set by its name
CLASSIFICATION_SETS: dict[str, Layout] = {}


class ClassificationSet(Dataset):
    """A split of a classification set by name, in its original layout.

    A sample is `(image, label)`, the image in RGB and upright, the label an int; for sets of several labels per image a
    float32 tensor (K,) of 1, 0, and -1 for a class to be ignored. All but the decoding is checked at construction.

    Splits. `trainval` and `test` are the official training and test images, and `train` and `val` share `trainval`.
    Where the original has validation images (fgvc_aircraft, voc2007_classification, dtd, flowers102), those are used.
    Elsewhere they are drawn from the training images, `val_fraction` of each class, rounded down, with `seed`; a fifth,
    as the BiSSL authors take (arXiv 2410.02387). Besides:

    - sun397 and dtd come in ten partitions; the first is the usual one.
    - caltech101 has no official split: 30 images of each class are drawn with `partition` to be `trainval`, and the
      others are `test`, as in SimCLR's transfer protocol (arXiv 2002.05709) and the authors'.
    - imagenet's official test labels are not public: `test` is val/, and `train` and `val` share train/.
    - stl10 has a split `unlabeled` without labels; `fold` 0 to 9 makes one of its folds of 1,000 images `trainval`.
    - voc2007_classification gives -1 to a class that has none but difficult objects in the image, as VOC leaves it out
      of training and evaluation; `difficult="positive"` is what the authors do, `"negative"` the third.

    Args:
        split: "train", "val", "trainval", "test", and "unlabeled" of stl10.
        root: the set's own folder instead of the usual one, below the datasets root, or an absolute path.
        labelled: False: targets and `classes` are None.
        options: `partition` of dtd, sun397 and caltech101, `fold` of stl10, `difficult` of voc2007_classification.

    Raises:
        DatasetError: an unknown split, a missing folder, list or image, or lists that do not agree.
    """

    def __init__(
        self,
        name: str,
        split: str = "train",
        root: str | None = None,
        labelled: bool = True,
        val_fraction: float = 0.2,
        seed: int = 0,
        **options: Any,
    ):
        layout = CLASSIFICATION_SETS[name]
        if split not in layout.splits:
            raise DatasetError(
                f"{name} has no split '{split}'.{did_you_mean(str(split), layout.splits)} "
                f"There are {', '.join(layout.splits)}."
            )
        fetch = f"python tools/prepare_data.py {name}"
        self.root = require_folder(find_folder(name, root), f"Data set '{name}', split '{split}'", fetch)
        options = {**layout.options, **options}
        try:
            found, rows = _split(layout, self.root, split, val_fraction, seed, options)
        except DatasetError as error:
            hint = f"What is wrong with the whole set is told by\n  python tools/prepare_data.py --check {name}"
            raise DatasetError(f"Data set '{name}', split '{split}': {error} {hint}") from error
        # Arrays, not lists of a million objects: those are copied into every worker as their reference counts change.
        self._names, self._pixels, self._rows = found.names[rows], found.pixels, rows
        self._labels = found.labels[rows] if labelled and found.labels is not None else None
        self.classes = None if self._labels is None else found.classes

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> tuple[Image.Image, int | Tensor | None]:
        if self._pixels is None:
            image = load_image(self.source(index))
        else:
            image = Image.fromarray(self._pixels[self._rows[index]]).convert("RGB")
        return image, self.label(index)

    @property
    def targets(self) -> np.ndarray | None:
        """All labels: int64 (N,), or float32 (N, K) of several per image."""
        return self._labels

    def label(self, index: int) -> int | Tensor | None:
        """The label of sample `index`, without decoding its image."""
        if self._labels is None:
            return None
        label = self._labels[index]
        return int(label) if self._labels.ndim == 1 else torch.from_numpy(label.copy())

    def source(self, index: int) -> str:
        """The file that sample `index` comes from; `file#number` where it is one of an array."""
        return os.path.join(self.root, os.fsdecode(self._names[index]))

    def digest(self) -> str:
        """The sha256 of the sorted names of the samples below the set's folder, wherever that lies."""
        return hashlib.sha256(b"\n".join(sorted(self._names.tolist()))).hexdigest()


def _split(
    layout: Layout, folder: Path, split: str, val_fraction: float, seed: int, options: dict[str, Any]
) -> tuple[Samples, np.ndarray]:
    """The samples that hold a split, and which of them it is."""
    drawn = split in ("train", "val") and split not in layout.parts
    wanted = ["trainval"] if drawn else [split]
    if split == "trainval" and split not in layout.parts:
        wanted = ["train", "val"]
    parts = [layout.read(folder, part, **options) for part in wanted]
    found = joined(parts) if len(parts) > 1 else parts[0]
    check(found, folder)
    if not drawn:
        return found, np.arange(len(found.names))
    of_val = draw_fraction(found.labels, val_fraction, seed)
    return found, np.flatnonzero(of_val == (split == "val"))


def find_folder(name: str, root: str | None = None) -> Path:
    """Where a set lies: `root` below the datasets root, or the first of its usual folders that is there."""
    if root is not None:
        return datasets_root() / root
    usual = [datasets_root() / folder for folder in CLASSIFICATION_SETS[name].folders]
    return next((folder for folder in usual if folder.is_dir()), usual[0])


def register_classification_set(name: str, layout: Layout) -> None:
    """Make a set known by its name, with the arguments of :class:`ClassificationSet` and the options of its own."""

    def build(**arguments: Any) -> ClassificationSet:
        return ClassificationSet(name, **arguments)

    common = [p for p in inspect.signature(ClassificationSet).parameters.values() if p.name not in ("name", "options")]
    own = [inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=v) for key, v in layout.options.items()]
    build.__signature__ = inspect.Signature([*common, *own])
    build.__qualname__ = f"ClassificationSet({layout.read.__module__}.{layout.read.__qualname__})"
    build.__doc__ = layout.what
    DATASETS.register(name)(build)
    CLASSIFICATION_SETS[name] = layout


_PARTITION = {"partition": 1}
_ORIGINALS = {
    "food101": Layout("101 dishes", ("food-101",), layouts.food101, {"trainval": 75_750, "test": 25_250}, 101),
    "cifar10": Layout(
        "things at 32 x 32", ("cifar-10-batches-py",), arrays.cifar10, {"trainval": 50_000, "test": 10_000}, 10
    ),
    "cifar100": Layout(
        "things at 32 x 32", ("cifar-100-python",), arrays.cifar100, {"trainval": 50_000, "test": 10_000}, 100
    ),
    "cub200": Layout("birds", ("CUB_200_2011",), layouts.cub200, {"trainval": 5_994, "test": 5_794}, 200),
    "sun397": Layout("scenes", ("SUN397",), layouts.sun397, {"trainval": 19_850, "test": 19_850}, 397, _PARTITION),
    "stanford_cars": Layout("cars", ("stanford_cars",), layouts.stanford_cars, {"trainval": 8_144, "test": 8_041}, 196),
    "fgvc_aircraft": Layout(
        "aircraft variants",
        ("fgvc-aircraft-2013b",),
        layouts.fgvc_aircraft,
        {"train": 3_334, "val": 3_333, "test": 3_333},
        100,
    ),
    "voc2007_classification": Layout(
        "objects, several labels per image",
        ("VOCdevkit/VOC2007",),
        layouts.voc2007,
        {"train": 2_501, "val": 2_510, "test": 4_952},
        20,
        {"difficult": "ignore"},
    ),
    "dtd": Layout(
        "textures", ("dtd/dtd", "dtd"), layouts.dtd, {"train": 1_880, "val": 1_880, "test": 1_880}, 47, _PARTITION
    ),
    "oxford_pets": Layout(
        "cats and dogs", ("oxford-iiit-pet",), layouts.oxford_pets, {"trainval": 3_680, "test": 3_669}, 37
    ),
    "caltech101": Layout(
        "objects",
        ("caltech101", "caltech-101"),
        layouts.caltech101,
        {"trainval": 3_030, "test": 5_647},
        101,
        _PARTITION,
    ),
    "flowers102": Layout(
        "flowers", ("flowers-102",), layouts.flowers102, {"train": 1_020, "val": 1_020, "test": 6_149}, 102
    ),
    "stl10": Layout(
        "things at 96 x 96",
        ("stl10_binary",),
        arrays.stl10,
        {"trainval": 5_000, "test": 8_000, "unlabeled": 100_000},
        10,
        {"fold": None},
    ),
    "fashion_mnist": Layout(
        "clothes in grey, 28 x 28",
        ("FashionMNIST/raw", "FashionMNIST"),
        arrays.fashion_mnist,
        {"trainval": 60_000, "test": 10_000},
        10,
    ),
    "imagenet": Layout("ImageNet-1k", ("imagenet",), layouts.imagenet, {"trainval": 1_281_167, "test": 50_000}, 1000),
}
for _name, _layout in _ORIGINALS.items():
    register_classification_set(_name, _layout)
