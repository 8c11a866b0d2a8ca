"""Classification sets by name, in their original layouts; torchvision reads those for which it has the official lists.

A reader takes the folder of a set and an official part of it: "trainval" and "test", or "train", "val" and "test" if
the original has validation images. Importing this module is fast: torch and torchvision are imported by the readers.
"""

import hashlib
import inspect
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image

from bissl_zoo.data.datasets.catalog import datasets_root, load_image, require_folder
from bissl_zoo.data.datasets.folder import draw_fraction, draw_per_class, images_in, subfolders
from bissl_zoo.errors import DatasetError, did_you_mean
from bissl_zoo.registry import DATASETS

if TYPE_CHECKING:
    from torch import Tensor

SPLITS = ("train", "val", "trainval", "test")
#: training images per class of Caltech-101
CALTECH_TRAINING = 30
#: label of a class whose objects in the image are all difficult
_DIFFICULT = {"ignore": -1, "positive": 1, "negative": 0}


class Samples(NamedTuple):
    """One official part of a set, in the order of its list.

    Attributes:
        names: N files relative to the set's folder, or `file#number` for images in an array file.
        labels: N class indices, or (N, K) of several labels per image; None without labels.
        classes: K names in the order of the labels.
        pixels: for array files, an array or sequence of N images, uint8 (H, W) or (H, W, 3).
    """

    names: Sequence[str]
    labels: Any
    classes: Sequence[str]
    pixels: Any = None


class Layout(NamedTuple):
    """A classification set that can be built by name.

    Attributes:
        description: what it shows, in a few words.
        folders: where it may lie below the datasets root; the first that exists is used.
        read: `read(folder, part, **options)` returns the `Samples` of an official part.
        images: official parts and their numbers of images.
        classes: number of classes.
        options: further arguments of `read` and their defaults.
    """

    description: str
    folders: tuple[str, ...]
    read: Callable[..., Samples]
    images: Mapping[str, int]
    classes: int
    options: Mapping[str, Any] = MappingProxyType({})

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that can be built."""
        return SPLITS + tuple(part for part in self.images if part not in SPLITS)


#: every set by its name
CLASSIFICATION_SETS: dict[str, Layout] = {}


class ClassificationSet:
    """A split of a classification set by name, in its original layout.

    A sample is `(image, label)`: the image in RGB and upright, the label an int, or for sets with several labels per
    image a float32 tensor (K,) of 1, 0, and -1 for a class to ignore.

    `trainval` and `test` are the official training and test images, and `train` and `val` share `trainval`. If the
    original has validation images (fgvc_aircraft, voc2007_classification, dtd, flowers102), those are used. Otherwise
    they are drawn from the training images: `val_fraction` of each class, rounded down, with `seed`; the default of a
    fifth is that of the BiSSL authors (arXiv 2410.02387). In addition:

    - sun397 and dtd are read in the first of their ten partitions, the usual one.
    - caltech101 has no official split: 30 images of each class, drawn once, are `trainval`, and the others `test`, as
      in SimCLR's transfer protocol (arXiv 2002.05709) and by the BiSSL authors.
    - imagenet: `test` is val/, since the official test labels are not public; `train` and `val` share train/.
    - stl10 has a split `unlabeled`.
    - voc2007_classification labels a class -1 that has only difficult objects in the image, as VOC leaves it out of
      training and evaluation; `difficult="positive"` is what the BiSSL authors do, `"negative"` the third choice.

    Args:
        split: "train", "val", "trainval", "test", and "unlabeled" for stl10.
        root: the set's own folder instead of the usual one, below the datasets root, or an absolute path. The sets that
            torchvision reads need the folder's usual name.
        labelled: False: targets and `classes` are None.
        options: `difficult` of voc2007_classification.

    Raises:
        DatasetError: an unknown split, a missing folder, list or image, or a list that cannot be read.
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
            hint = did_you_mean(str(split), layout.splits)
            raise DatasetError(f"{name} has no split '{split}'.{hint} There are {', '.join(layout.splits)}.")
        fetch = f"bissl data {name}"
        self.root = require_folder(find_folder(name, root), f"Data set '{name}', split '{split}'", fetch)
        try:
            samples, rows = _read_split(layout, self.root, split, val_fraction, seed, {**layout.options, **options})
        except Exception as error:  # on damaged lists, readers raise OSError, ValueError, KeyError, RuntimeError, ...
            problem = str(error) if isinstance(error, DatasetError) else f"{type(error).__name__}: {error}."
            raise DatasetError(
                f"Data set '{name}', split '{split}', in {self.root.absolute()}: {problem} Compare the folder with the "
                f"original by\n  bissl data --check {name}"
            ) from error
        # arrays, not lists: reference counts of a million objects would be copied into every worker
        self._names = np.array([os.fsencode(name) for name in samples.names], dtype=np.bytes_)[rows]
        self._pixels, self._rows = samples.pixels, rows
        self._labels = samples.labels[rows] if labelled and samples.labels is not None else None
        self.classes = None if self._labels is None else list(samples.classes)

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> "tuple[Image.Image, int | Tensor | None]":
        if self._pixels is None:
            image = load_image(self.source(index))
        else:
            image = Image.fromarray(self._pixels[self._rows[index]]).convert("RGB")
        return image, self.target(index)

    @property
    def targets(self) -> np.ndarray | None:
        """All labels: int64 (N,), or float32 (N, K) of several per image."""
        return self._labels

    def target(self, index: int) -> "int | Tensor | None":
        """Return the label of sample `index` without decoding its image."""
        if self._labels is None:
            return None
        if self._labels.ndim == 1:
            return int(self._labels[index])
        import torch

        return torch.from_numpy(self._labels[index].copy())

    def source(self, index: int) -> str:
        """Return the file of sample `index`, or `file#number` if it is one of an array."""
        return os.path.join(self.root, os.fsdecode(self._names[index]))

    def digest(self) -> str:
        """Return the sha256 of the sorted names of the samples, relative to the set's folder."""
        return hashlib.sha256(b"\n".join(sorted(self._names.tolist()))).hexdigest()


def find_folder(name: str, root: str | None = None) -> Path:
    """Return `root` below the datasets root, or the first of the set's usual folders that exists."""
    if root is not None:
        return datasets_root() / root
    usual = [datasets_root() / folder for folder in CLASSIFICATION_SETS[name].folders]
    return next((folder for folder in usual if folder.is_dir()), usual[0])


def register_classification_set(name: str, layout: Layout) -> None:
    """Register a set by its name, with the arguments of :class:`ClassificationSet` and the options of its layout."""

    def build(**arguments: Any) -> ClassificationSet:
        return ClassificationSet(name, **arguments)

    common = [p for p in inspect.signature(ClassificationSet).parameters.values() if p.name not in ("name", "options")]
    more = [inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=v) for key, v in layout.options.items()]
    build.__signature__ = inspect.Signature([*common, *more])
    build.__qualname__ = f"ClassificationSet({layout.read.__module__}.{layout.read.__qualname__})"
    build.__doc__ = layout.description
    DATASETS.register(name)(build)
    CLASSIFICATION_SETS[name] = layout


def _read_split(
    layout: Layout, folder: Path, split: str, val_fraction: float, seed: int, options: dict[str, Any]
) -> tuple[Samples, np.ndarray]:
    """Return the samples that contain a split, and the rows of the split."""
    is_drawn = split in ("train", "val") and split not in layout.images
    parts = ["trainval"] if is_drawn else [split]
    if split == "trainval" and split not in layout.images:
        parts = ["train", "val"]
    read = [layout.read(folder, part, **options) for part in parts]
    if any(list(part.classes) != list(read[0].classes) for part in read):
        raise DatasetError("The classes of train and val differ.")
    names = [str(name) for part in read for name in part.names]
    labels = None if read[0].labels is None else np.concatenate([np.asarray(part.labels) for part in read])
    if labels is not None:
        labels = labels.astype(np.float32 if labels.ndim == 2 else np.int64)
        if len(labels) != len(names):
            raise DatasetError(f"{len(labels)} labels for {len(names)} images.")
        if labels.ndim == 1 and not 0 <= labels.min() <= labels.max() < len(read[0].classes):
            raise DatasetError(f"Labels from {labels.min()} to {labels.max()} for {len(read[0].classes)} classes.")
    if read[0].pixels is None:
        _check_files(folder, names)
    classes = [name.replace("_", " ").strip() for name in read[0].classes]
    samples = Samples(names, labels, classes, read[0].pixels)
    if not is_drawn:
        return samples, np.arange(len(names))
    return samples, np.flatnonzero(draw_fraction(labels, val_fraction, seed) == (split == "val"))


def _check_files(folder: Path, names: list[str]) -> None:
    """Check that every file exists and is listed once, by listing each folder once."""
    if len(set(names)) < len(names):
        raise DatasetError("Its lists name an image more than once.")
    present: dict[str, set[str]] = {}
    missing = []
    for name in names:
        parent, _, file = name.rpartition("/")
        if parent not in present:
            present[parent] = set(os.listdir(folder / parent)) if (folder / parent).is_dir() else set()
        if file not in present[parent]:
            missing.append(name)
    if missing:
        more = f", and {len(missing) - 1:,} more listed images are missing" if len(missing) > 1 else ""
        raise DatasetError(f"The image {(folder / missing[0]).absolute()} is listed, but does not exist{more}.")


# readers of sets that torchvision reads


def _torchvision(name: str, folder: Path, usual: str, **arguments: Any) -> Any:
    import torchvision.datasets

    depth = usual.count("/") + 1
    if "/".join(folder.parts[-depth:]) != usual:
        raise DatasetError(f"torchvision reads it only from a folder called {usual}. Rename the folder, or link to it.")
    return getattr(torchvision.datasets, name)(folder.parents[depth - 1], **arguments)


def _files(name: str, usual: str, trainval: str = "trainval") -> Callable[[Path, str], Samples]:
    """Return a reader of a set of image files; `trainval` is torchvision's name of that part."""

    def read(folder: Path, part: str) -> Samples:
        data = _torchvision(name, folder, usual, split=trainval if part == "trainval" else part)
        files, labels = zip(*data._samples, strict=True) if name == "StanfordCars" else (None, data._labels)
        files = files or getattr(data, "_image_files", None) or data._images
        return Samples([os.path.relpath(file, folder) for file in files], labels, data.classes)

    return read


def _arrays(name: str, usual: str, files: Mapping[str, Sequence[str]]) -> Callable[[Path, str], Samples]:
    """Return a reader of a set of arrays; `files` names those of each part, which hold the same number of images."""

    def read(folder: Path, part: str) -> Samples:
        data = _torchvision(name, folder, usual, train=part == "trainval")
        each = len(data.data) // len(files[part])
        names = [f"{file}#{number}" for file in files[part] for number in range(each)]
        return Samples(names, data.targets, data.classes, np.asarray(data.data))

    return read


# readers of layouts that torchvision lacks, or of which it reads less


def _lines(file: Path) -> list[str]:
    lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not lines:
        raise DatasetError(f"{file.absolute()} is empty.")
    return lines


def _table(file: Path) -> dict[str, str]:
    """Return the lines of a text file of two columns."""
    return dict(line.split(maxsplit=1) for line in _lines(file))


def _cub200(folder: Path, part: str) -> Samples:
    """images.txt, image_class_labels.txt, train_test_split.txt and classes.txt (CUB-200-2011, Wah et al., 2011)."""
    files, labels, training, classes = (
        _table(folder / f"{name}.txt") for name in ("images", "image_class_labels", "train_test_split", "classes")
    )
    rows = [row for row in files if training[row] == ("1" if part == "trainval" else "0")]
    names = [name.partition(".")[2] for name in classes.values()]  # "001.Black_footed_Albatross"
    return Samples([f"images/{files[row]}" for row in rows], [int(labels[row]) - 1 for row in rows], names)


def _sun397(folder: Path, part: str) -> Samples:
    """ClassName.txt and Partitions/{Training,Testing}_01.txt to _10.txt (Xiao et al., CVPR 2010)."""
    lists = next((path for path in (folder / "Partitions", folder) if any(path.glob("Training_*.txt"))), None)
    if lists is None:
        raise DatasetError(
            f"{folder.absolute() / 'Partitions'} lacks the official lists Training_01.txt, Testing_01.txt and so on. "
            "Unpack https://vision.princeton.edu/projects/2010/SUN/download/Partitions.zip there."
        )
    file = lists / f"{'Training' if part == 'trainval' else 'Testing'}_01.txt"
    names = [line.lstrip("/") for line in _lines(file)]
    classes = [line.lstrip("/") for line in _lines(folder / "ClassName.txt")]
    # classes are such as "a/abbey", in folders by first letter
    labels = _indices((os.path.dirname(name) for name in names), classes)
    return Samples(names, labels, [name.partition("/")[2] for name in classes])


def _voc2007(folder: Path, part: str, difficult: str) -> Samples:
    """ImageSets/Main/<class>_{train,val,test}.txt (Everingham et al., IJCV 2010): 1, -1, or 0 for difficult only."""
    from bissl_zoo.data.datasets.voc import VOC_CLASSES

    if difficult not in _DIFFICULT:
        hint = did_you_mean(str(difficult), _DIFFICULT)
        raise DatasetError(f"difficult is {difficult!r}; accepted are {', '.join(_DIFFICULT)}.{hint}")
    lists, value = folder / "ImageSets" / "Main", {"1": 1, "-1": 0, "0": _DIFFICULT[difficult]}
    images = _lines(lists / f"{part}.txt")
    tables = [_table(lists / f"{name}_{part}.txt") for name in VOC_CLASSES]
    labels = np.array([[value[table[image].strip()] for table in tables] for image in images], np.float32)
    return Samples([f"JPEGImages/{image}.jpg" for image in images], labels, VOC_CLASSES)


def _dtd(folder: Path, part: str) -> Samples:
    """labels/{train,val,test}1.txt to 10.txt, of `class/image.jpg` (Cimpoi et al., CVPR 2014)."""
    files = _lines(folder / "labels" / f"{part}1.txt")
    classes = sorted({file.partition("/")[0] for file in files})
    return Samples(
        [f"images/{file}" for file in files], _indices((f.partition("/")[0] for f in files), classes), classes
    )


def _caltech101(folder: Path, part: str) -> Samples:
    """101_ObjectCategories/<class>/image_0001.jpg (Fei-Fei et al., 2004); BACKGROUND_Google is not a class."""
    samples = _class_folders(folder, "101_ObjectCategories", without=("BACKGROUND_Google",))
    labels = np.array(samples.labels)
    rows = np.flatnonzero(draw_per_class(labels, CALTECH_TRAINING, seed=1) == (part == "trainval"))
    return Samples([samples.names[row] for row in rows], labels[rows], samples.classes)


def _imagenet(folder: Path, part: str) -> Samples:
    """{train,val}/<WordNet id>/*.JPEG (Russakovsky et al., arXiv 1409.0575); the part "test" is val/."""
    samples = _class_folders(folder, "train" if part == "trainval" else "val")
    from timm.data import ImageNetInfo

    info = ImageNetInfo("imagenet-22k")
    known = set(info.label_names())
    words = [info.label_name_to_description(name) if name in known else name for name in samples.classes]
    # some words stand for two classes
    classes = [
        f"{word} ({name})" if words.count(word) > 1 else word for word, name in zip(words, samples.classes, strict=True)
    ]
    return samples._replace(classes=classes)


def _class_folders(folder: Path, below: str, without: tuple[str, ...] = ()) -> Samples:
    classes = [name for name in subfolders(folder / below) if name not in without]
    if not classes:
        raise DatasetError(
            f"There are no class folders in {folder.absolute() / below}. (ImageNet's val archive is unsorted; "
            "torchvision.datasets.ImageNet unpacks it into class folders.)"
        )
    images = [images_in(folder / below / name) for name in classes]
    names = [f"{below}/{name}/{image}" for name, files in zip(classes, images, strict=True) for image in files]
    return Samples(names, np.repeat(np.arange(len(classes)), [len(files) for files in images]), classes)


def _indices(labels: Iterable[str], classes: Sequence[str]) -> list[int]:
    index = {name: number for number, name in enumerate(classes)}
    return [index[label] for label in labels]


def _stl10(folder: Path, part: str) -> Samples:
    """{train,test,unlabeled}_X.bin, {train,test}_y.bin and class_names.txt (Coates et al., 2011).

    torchvision reads all images into memory, 2.8 GB of the unlabelled ones.
    """
    name = "train" if part == "trainval" else part
    pixels = np.memmap(folder / f"{name}_X.bin", np.uint8, "r").reshape(-1, 3, 96, 96).transpose(0, 3, 2, 1)
    names = [f"{name}_X.bin#{number}" for number in range(len(pixels))]
    if part == "unlabeled":
        return Samples(names, None, [], pixels)
    labels = np.fromfile(folder / f"{name}_y.bin", np.uint8).astype(np.int64) - 1
    return Samples(names, labels, _lines(folder / "class_names.txt"), pixels)


_CIFAR10_FILES = {"trainval": [f"data_batch_{number}" for number in range(1, 6)], "test": ["test_batch"]}
_CIFAR100_FILES = {"trainval": ["train"], "test": ["test"]}
_FASHION_FILES = {"trainval": ["train-images-idx3-ubyte"], "test": ["t10k-images-idx3-ubyte"]}


def _two(trainval: int, test: int) -> dict[str, int]:
    return {"trainval": trainval, "test": test}


def _three(train: int, val: int, test: int) -> dict[str, int]:
    return {"train": train, "val": val, "test": test}


for _name, _layout in {
    # Bossard et al., ECCV 2014
    "food101": Layout("101 dishes", ("food-101",), _files("Food101", "food-101", "train"), _two(75_750, 25_250), 101),
    # Krizhevsky, 2009; of CIFAR-100 the fine labels
    "cifar10": Layout(
        "objects at 32 x 32", ("cifar-10-batches-py",), _arrays("CIFAR10", "cifar-10-batches-py", _CIFAR10_FILES),
        _two(50_000, 10_000), 10,
    ),
    "cifar100": Layout(
        "objects at 32 x 32", ("cifar-100-python",), _arrays("CIFAR100", "cifar-100-python", _CIFAR100_FILES),
        _two(50_000, 10_000), 100,
    ),
    "cub200": Layout("birds", ("CUB_200_2011",), _cub200, _two(5_994, 5_794), 200),
    "sun397": Layout("scenes", ("SUN397",), _sun397, _two(19_850, 19_850), 397),
    # Krause et al., 2013
    "stanford_cars": Layout(
        "cars", ("stanford_cars",), _files("StanfordCars", "stanford_cars", "train"), _two(8_144, 8_041), 196
    ),
    # Maji et al., arXiv 1306.5151
    "fgvc_aircraft": Layout(
        "aircraft variants", ("fgvc-aircraft-2013b",), _files("FGVCAircraft", "fgvc-aircraft-2013b"),
        _three(3_334, 3_333, 3_333), 100,
    ),
    "voc2007_classification": Layout(
        "objects, several labels per image", ("VOCdevkit/VOC2007",), _voc2007, _three(2_501, 2_510, 4_952), 20,
        {"difficult": "ignore"},
    ),
    "dtd": Layout("textures", ("dtd/dtd", "dtd"), _dtd, _three(1_880, 1_880, 1_880), 47),
    # Parkhi et al., CVPR 2012
    "oxford_pets": Layout(
        "cats and dogs", ("oxford-iiit-pet",), _files("OxfordIIITPet", "oxford-iiit-pet"), _two(3_680, 3_669), 37
    ),
    "caltech101": Layout("objects", ("caltech101", "caltech-101"), _caltech101, _two(3_030, 5_647), 101),
    # Nilsback and Zisserman, ICVGIP 2008
    "flowers102": Layout(
        "flowers", ("flowers-102",), _files("Flowers102", "flowers-102"), _three(1_020, 1_020, 6_149), 102
    ),
    "stl10": Layout(
        "objects at 96 x 96", ("stl10_binary",), _stl10, {**_two(5_000, 8_000), "unlabeled": 100_000}, 10
    ),
    # Xiao et al., arXiv 1708.07747
    "fashion_mnist": Layout(
        "clothes in gray, 28 x 28", ("FashionMNIST/raw",), _arrays("FashionMNIST", "FashionMNIST/raw", _FASHION_FILES),
        _two(60_000, 10_000), 10,
    ),
    "imagenet": Layout("ImageNet-1k", ("imagenet",), _imagenet, _two(1_281_167, 50_000), 1000),
}.items():  # fmt: skip
    register_classification_set(_name, _layout)
