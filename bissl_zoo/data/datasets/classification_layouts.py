"""The original layouts of classification sets of image files, one short reader for each.

A reader takes the set's folder and the name of an official part, and reads the lists that came with the set. A part is
"trainval" where the original has no validation images of its own, "train" and "val" where it has.
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from timm.data import ImageNetInfo
from torchvision.datasets import Flowers102

from bissl_zoo.data.datasets.catalog import require_folder
from bissl_zoo.data.datasets.classification_samples import (
    Samples,
    images_in,
    numbered,
    read_bytes,
    read_lines,
    read_table,
    readable,
    same_classes,
    samples,
    whole,
)
from bissl_zoo.data.datasets.folder import draw_per_class
from bissl_zoo.data.datasets.voc import VOC_CLASSES
from bissl_zoo.errors import DatasetError, did_you_mean

#: images of each class of Caltech-101 to train on
CALTECH_TRAINING = 30
#: what VOC's class lists say of a class whose objects in the image are all difficult
_DIFFICULT = {"ignore": -1, "positive": 1, "negative": 0}


def food101(folder: Path, part: str) -> Samples:
    """meta/{train,test}.json: the images of each class (Bossard et al., ECCV 2014)."""
    files = {name: folder / "meta" / f"{name}.json" for name in ("train", "test")}
    lists = {name: _food_list(file) for name, file in files.items()}
    classes = sorted(lists["train"])
    same_classes(classes, files["train"], sorted(lists["test"]), files["test"])
    name = "train" if part == "trainval" else part
    labelled = [(image, classes.index(of)) for of, images in lists[name].items() for image in images]
    names = (f"images/{image}.jpg" for image, _ in labelled)
    return samples(names, [label for _, label in labelled], map(readable, classes), files[name])


def _food_list(file: Path) -> dict[str, list[str]]:
    try:
        content = json.loads(read_bytes(file))
    except ValueError as error:
        raise DatasetError(f"{file.absolute()} is no JSON: {error}.") from error
    if not isinstance(content, dict) or not all(isinstance(images, list) for images in content.values()):
        raise DatasetError(f"{file.absolute()} should map each class to the list of its images.")
    return content


def cub200(folder: Path, part: str) -> Samples:
    """images.txt, image_class_labels.txt, train_test_split.txt and classes.txt (CUB-200-2011, Wah et al., 2011)."""
    tables = {name: folder / f"{name}.txt" for name in ("images", "image_class_labels", "train_test_split")}
    files, labels, training = (dict(read_table(file, 2)) for file in tables.values())
    for column, name in ((labels, "image_class_labels"), (training, "train_test_split")):
        if column.keys() != files.keys():
            raise DatasetError(f"{tables[name]} has {len(column)} images and {tables['images']} {len(files)}.")
    classes = [readable(name.partition(".")[2] or name) for _, name in read_table(folder / "classes.txt", 2)]
    chosen = [image for image in files if training[image] == ("1" if part == "trainval" else "0")]
    targets = [whole(labels[image], tables["image_class_labels"]) - 1 for image in chosen]
    return samples((f"images/{files[image]}" for image in chosen), targets, classes, tables["images"])


def sun397(folder: Path, part: str, partition: int) -> Samples:
    """ClassName.txt and Partitions/{Training,Testing}_01.txt to _10.txt (Xiao et al., CVPR 2010)."""
    _require(partition, range(1, 11), "partition")
    lists = next((there for there in (folder / "Partitions", folder) if _partitions_in(there)), None)
    if lists is None:
        raise DatasetError(
            f"{folder.absolute() / 'Partitions'} does not hold the official lists Training_01.txt, Testing_01.txt and "
            "so on. They come apart from the images: unpack "
            "https://vision.princeton.edu/projects/2010/SUN/download/Partitions.zip there."
        )
    listed_in = lists / f"{'Training' if part == 'trainval' else 'Testing'}_{partition:02d}.txt"
    names = [line.lstrip("/") for line in read_lines(listed_in)]
    classes = [line.lstrip("/") for line in read_lines(folder / "ClassName.txt")]
    labels = numbered((os.path.dirname(name) for name in names), classes, listed_in)
    # "a/abbey": folders by first letter
    return samples(names, labels, (readable(name.partition("/")[2]) for name in classes), listed_in)


def _partitions_in(folder: Path) -> bool:
    return any(folder.glob("Training_*.txt"))


def stanford_cars(folder: Path, part: str) -> Samples:
    """devkit/cars_train_annos.mat, cars_test_annos_withlabels.mat, devkit/cars_meta.mat (Krause et al., 2013)."""
    training = part == "trainval"
    file = folder / ("devkit/cars_train_annos.mat" if training else "cars_test_annos_withlabels.mat")
    annotations = np.atleast_1d(_mat(file, "annotations"))
    if "class" not in (annotations.dtype.names or ()):
        raise DatasetError(f"{file.absolute()} has no labels. The test set's are in cars_test_annos_withlabels.mat.")
    classes = [str(name) for name in np.atleast_1d(_mat(folder / "devkit" / "cars_meta.mat", "class_names"))]
    names = (f"{'cars_train' if training else 'cars_test'}/{name}" for name in annotations["fname"])
    return samples(names, annotations["class"].astype(np.int64) - 1, classes, file)


def fgvc_aircraft(folder: Path, part: str) -> Samples:
    """data/images_variant_{train,val,test}.txt and data/variants.txt (Maji et al., arXiv 1306.5151)."""
    file = folder / "data" / f"images_variant_{part}.txt"
    rows, classes = read_table(file, 2), read_lines(folder / "data" / "variants.txt")
    labels = numbered((variant for _, variant in rows), classes, file)
    return samples((f"data/images/{image}.jpg" for image, _ in rows), labels, classes, file)


def voc2007(folder: Path, part: str, difficult: str) -> Samples:
    """ImageSets/Main/<class>_{train,val,test}.txt (Everingham et al., IJCV 2010): 1, -1, or 0 for difficult only."""
    _require(difficult, _DIFFICULT, "difficult")
    lists = folder / "ImageSets" / "Main"
    value = {"1": 1, "-1": 0, "0": _DIFFICULT[difficult]}
    images = read_lines(lists / f"{part}.txt")
    labels = np.empty((len(images), len(VOC_CLASSES)), np.float32)
    for column, name in enumerate(VOC_CLASSES):
        file = lists / f"{name}_{part}.txt"
        rows = dict(read_table(file, 2))
        if rows.keys() != set(images):
            raise DatasetError(f"{file.absolute()} lists {len(rows)} images, not the {len(images)} of {part}.txt.")
        if wrong := sorted(set(rows.values()) - value.keys()):
            raise DatasetError(f"{file.absolute()}: '{wrong[0]}' should be 1, 0 or -1.")
        labels[:, column] = [value[rows[image]] for image in images]
    return samples((f"JPEGImages/{image}.jpg" for image in images), labels, VOC_CLASSES, lists / f"{part}.txt")


def dtd(folder: Path, part: str, partition: int) -> Samples:
    """labels/{train,val,test}1.txt to 10.txt, of `class/image.jpg` (Cimpoi et al., CVPR 2014)."""
    _require(partition, range(1, 11), "partition")
    files = {name: folder / "labels" / f"{name}{partition}.txt" for name in ("train", "val", "test")}
    lists = {name: read_lines(file) for name, file in files.items()}
    classes = {name: sorted({line.partition("/")[0] for line in lines}) for name, lines in lists.items()}
    for name in ("val", "test"):
        same_classes(classes["train"], files["train"], classes[name], files[name])
    labels = numbered((line.partition("/")[0] for line in lists[part]), classes[part], files[part])
    return samples((f"images/{line}" for line in lists[part]), labels, map(readable, classes[part]), files[part])


def oxford_pets(folder: Path, part: str) -> Samples:
    """annotations/{trainval,test}.txt, of `Breed_name_7 label species breed` (Parkhi et al., CVPR 2012)."""
    files = {name: folder / "annotations" / f"{name}.txt" for name in ("trainval", "test")}
    rows = {name: read_table(file, 4) for name, file in files.items()}
    classes = {name: _breeds(rows[name], file) for name, file in files.items()}
    same_classes(classes["trainval"], files["trainval"], classes["test"], files["test"])
    names = (f"images/{image}.jpg" for image, *_ in rows[part])
    return samples(names, [whole(row[1], files[part]) - 1 for row in rows[part]], classes[part], files[part])


def _breeds(rows: Iterable[list[str]], file: Path) -> list[str]:
    """The breeds in the order of their labels, which the file names tell."""
    found: dict[int, str] = {}
    for image, label, *_ in rows:
        breed = readable(image.rpartition("_")[0]).title()
        if found.setdefault(whole(label, file), breed) != breed:
            raise DatasetError(f"{file.absolute()} gives label {label} to both '{found[int(label)]}' and '{breed}'.")
    return [breed for _, breed in sorted(found.items())]


def caltech101(folder: Path, part: str, partition: int) -> Samples:
    """101_ObjectCategories/<class>/image_0001.jpg (Fei-Fei et al., 2004), without BACKGROUND_Google, which is no class.

    There are no official parts: `partition` draws 30 images per class to train on, and the rest is to test on.
    """
    if isinstance(partition, bool) or not isinstance(partition, int) or partition < 1:
        raise DatasetError(f"partition is {partition!r}; it must be a whole number from 1 on.")
    categories = require_folder(folder / "101_ObjectCategories", "Caltech-101's images")
    classes = [name for name in _folders_in(categories) if name != "BACKGROUND_Google"]
    names, labels = _by_folder(categories, classes)
    of_part = draw_per_class(labels, CALTECH_TRAINING, partition) == (part == "trainval")
    chosen = [f"{categories.name}/{name}" for name, kept in zip(names, of_part, strict=True) if kept]
    return samples(chosen, labels[of_part], map(readable, classes))


def flowers102(folder: Path, part: str) -> Samples:
    """imagelabels.mat, setid.mat and jpg/image_00001.jpg (Nilsback and Zisserman, ICVGIP 2008)."""
    key = {"train": "trnid", "val": "valid", "test": "tstid"}[part]
    numbers, labels = (
        np.atleast_1d(_mat(folder / file, name)).astype(np.int64)
        for file, name in (("setid.mat", key), ("imagelabels.mat", "labels"))
    )
    if numbers.min(initial=1) < 1 or numbers.max(initial=1) > len(labels):
        raise DatasetError(f"{folder / 'setid.mat'} names images up to {numbers.max()}; {len(labels)} have a label.")
    names = (f"jpg/image_{number:05d}.jpg" for number in numbers)
    return samples(names, labels[numbers - 1] - 1, Flowers102.classes, folder / "setid.mat")


def imagenet(folder: Path, part: str) -> Samples:
    """{train,val}/<WordNet id>/*.JPEG (Russakovsky et al., arXiv 1409.0575); val/ is the part "test".

    The labels of the official test images are not public, so results are given on val/.
    """
    folders = {"trainval": folder / "train", "test": folder / "val"}
    there = {name: found for name, below in folders.items() if below.is_dir() and (found := _folders_in(below))}
    if part not in there:
        raise DatasetError(
            f"There are no class folders such as n01440764 in {folders[part].absolute()}. The images of val/ come "
            "unsorted; python tools/prepare_data.py imagenet unpacks the archive into class folders."
        )
    if len(there) == 2:
        same_classes(there["trainval"], folders["trainval"], there["test"], folders["test"])
    names, labels = _by_folder(folders[part], there[part])
    return samples((f"{folders[part].name}/{name}" for name in names), labels, _descriptions(there[part]))


def _descriptions(wordnet_ids: list[str]) -> list[str]:
    """The words that WordNet has for an id; with the id where two have the same, and the id where timm knows none."""
    info = ImageNetInfo("imagenet-22k")
    known = set(info.label_names())
    words = [info.label_name_to_description(name) if name in known else name for name in wordnet_ids]
    return [
        f"{word} ({name})" if words.count(word) > 1 else word for word, name in zip(words, wordnet_ids, strict=True)
    ]


def _folders_in(folder: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))


def _by_folder(folder: Path, classes: list[str]) -> tuple[list[str], np.ndarray]:
    """The images of class folders and their labels."""
    names: list[str] = []
    counts = []
    for name in classes:
        images = images_in(folder / name)
        if not images:
            raise DatasetError(f"The class folder {(folder / name).absolute()} holds no images.")
        names += [f"{name}/{image}" for image in images]
        counts.append(len(images))
    return names, np.repeat(np.arange(len(classes)), counts)


def _mat(file: Path, variable: str) -> Any:
    """A variable of a MATLAB file."""
    from scipy.io import loadmat  # comes with scikit-learn; slow to import

    if not file.is_file():
        raise DatasetError(f"{file.absolute()} does not exist.")
    try:
        return loadmat(file, squeeze_me=True, variable_names=[variable])[variable]
    except Exception as error:  # a damaged file leads the reader anywhere
        raise DatasetError(f"{file.absolute()} has no '{variable}' ({type(error).__name__}: {error}).") from error


def _require(value: Any, choices: Iterable[Any], name: str) -> None:
    choices = list(choices)
    if isinstance(value, bool) or value not in choices:
        raise DatasetError(
            f"{name} is {value!r}; it must be one of {', '.join(map(repr, choices))}."
            f"{did_you_mean(str(value), map(str, choices))}"
        )
