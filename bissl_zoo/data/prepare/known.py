"""Looking at the data sets that are known by name: what is there, whether it is whole, and whether every file opens."""

import contextlib
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tabulate import tabulate
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from bissl_zoo.data.datasets import coco, folder, voc  # noqa: F401 (they register their sets)
from bissl_zoo.data.datasets.boxes import DetectionSet
from bissl_zoo.data.datasets.catalog import DATASETS_VARIABLE, datasets_root
from bissl_zoo.data.datasets.classification_samples import MissingImages
from bissl_zoo.data.datasets.classification_sets import CLASSIFICATION_SETS, find_folder
from bissl_zoo.data.prepare.downloads import fetch
from bissl_zoo.errors import DatasetError, did_you_mean
from bissl_zoo.registry import DATASETS


class Entry(NamedTuple):
    """A set that is known by name.

    Attributes:
        what: the set in words.
        folder: where it lies below the data sets root.
        splits: the splits that are looked at, with the arguments that open each.
        images: the numbers of images of the original by split, as far as they are official.
        whole: the splits that hold every image once.
        classes: the number of classes of the original.
    """

    what: str
    folder: str
    splits: Mapping[str, dict[str, Any]]
    images: Mapping[str, int]
    whole: tuple[str, ...]
    classes: int


class Found(NamedTuple):
    """What a split of a set came to; None where it has no such thing."""

    split: str
    images: int
    classes: int | None
    boxes: int | None


class Survey(NamedTuple):
    """What is there of a set, and everything that is wrong with it.

    Attributes:
        where: the folder or file that was looked at.
        notes: what is as it should be, and worth knowing.
        shapes: what boxes are like, a table; empty where nothing was measured.
    """

    found: list[Found]
    problems: list[str]
    where: str
    notes: Sequence[str] = ()
    shapes: str = ""

    def table(self) -> str:
        """The splits, a line each; empty where there are none."""
        if not self.found:
            return ""
        headers = Found._fields if any(one.boxes is not None for one in self.found) else Found._fields[:-1]
        return tabulate([one[: len(headers)] for one in self.found], headers, intfmt=",", missingval="none")


def catalog() -> dict[str, Entry]:
    """Every data set that is known by name and can be prepared: the classification sets, VOC and COCO."""
    entries = {}
    for name, layout in CLASSIFICATION_SETS.items():
        images = dict(layout.parts)
        images.setdefault("trainval", images.get("train", 0) + images.get("val", 0))
        splits = {split: {"split": split} for split in layout.splits}
        entries[name] = Entry(layout.what, layout.folders[0], splits, images, layout.whole, layout.classes)
    images = {"2007_trainval": 5_011, "2007_test": 4_952, "2012_trainval": 11_540}
    splits = {split: {"splits": [split], "classes": "voc"} for split in images}
    entries["voc_detection"] = Entry("VOC07+12, boxes", "VOCdevkit", splits, images, tuple(splits), 20)
    images = {"train2017": 118_287, "val2017": 5_000}
    splits = {split: {"images": split, "annotations": f"annotations/instances_{split}.json"} for split in images}
    splits["train2017"]["on_bad_annotation"] = "skip"  # as its config does: two of its boxes have no height
    entries["coco_detection"] = Entry("COCO 2017, boxes", "coco", splits, images, tuple(splits), 80)
    return entries


def is_known(name: str) -> bool:
    """Whether a set is known by this name."""
    return name in catalog()


def known(name: str) -> Entry:
    """The entry of a set; DatasetError with the nearest name where there is none."""
    entries = catalog()
    if name not in entries:
        raise DatasetError(
            f"There is no data set '{name}'.{did_you_mean(name, entries)} Known are {', '.join(sorted(entries))}."
        )
    return entries[name]


def folder_of(name: str) -> Path:
    """Where a set lies or would lie."""
    return (find_folder(name) if name in CLASSIFICATION_SETS else datasets_root() / known(name).folder).absolute()


def prepare(name: str) -> tuple[list[str], Survey]:
    """Fetch what is missing of a set, and count what is there.

    Returns:
        The folders that were fetched, and the survey, which finds what an interrupted download of others has left.
    Raises:
        DatasetError: an unknown name, or a download that failed or that no program can do.
    """
    usual = (datasets_root() / known(name).folder).absolute()
    fetched = fetch(name, datasets_root()) if folder_of(name) == usual else []
    return fetched, survey(name)


def survey(name: str, open_files: bool = False, num_workers: int = 4) -> Survey:
    """Open the splits of a set, count, and compare with the numbers of the original.

    Args:
        open_files: decode every image too, in `num_workers` processes, look for images that splits share, and name
            every file that is missing.
    Raises:
        DatasetError: an unknown name.
    """
    entry, found, problems, notes = known(name), [], [], []
    split_of: dict[str, str] = {}
    for split, arguments in entry.splits.items():
        try:
            dataset = DATASETS.build(name, **arguments)
        except DatasetError as error:
            missing = error.__cause__.files if open_files and isinstance(error.__cause__, MissingImages) else []
            problems += [f"Image {file} does not exist." for file in missing] or [str(error)]
            continue
        found.append(count(dataset, split))
        problems += _differences(name, entry, found[-1])
        for what, first in getattr(dataset, "left_out", ()):
            told = notes if what.split()[1] == "objects" else problems
            told.append(f"{name}, split {split}: left out {what}. {first}")
        if open_files and split in entry.whole:
            problems += _shared(dataset, name, split, split_of) + bad_files(dataset, f"{name} {split}", num_workers)
    return Survey(found, list(dict.fromkeys(problems)), str(folder_of(name)), notes)  # splits share images


def count(dataset: Any, split: str) -> Found:
    """What a data set holds."""
    classes = None if dataset.classes is None else len(dataset.classes)
    boxed = isinstance(dataset, DetectionSet) and classes is not None
    return Found(split, len(dataset), classes, len(dataset.boxes) if boxed else None)


def _differences(name: str, entry: Entry, found: Found) -> list[str]:
    """Where a split is not of the original's size."""
    numbers = [("images", found.images, entry.images.get(found.split)), ("classes", found.classes, entry.classes)]
    return [
        f"{name}, split {found.split}: {number:,} {what}, but the original has {original:,}."
        for what, number, original in numbers
        if None not in (number, original) and number != original
    ]


def _shared(dataset: Any, name: str, split: str, split_of: dict[str, str]) -> list[str]:
    """Which other splits have images of this one; enters its images into `split_of`."""
    firsts = Counter(split_of.setdefault(dataset.source(index), split) for index in range(len(dataset)))
    del firsts[split]
    return [f"{name}: {count:,} images are both in {one} and in {split}." for one, count in firsts.items()]


def listing() -> str:
    """A table of every set that is known by name, and what is there of it."""
    rows = []
    for name, entry in catalog().items():
        there = _present(name, entry) if folder_of(name).is_dir() else "not there"
        rows.append([name, entry.what, there])
    return tabulate(rows, ["name", "what it is", "images"])


def _present(name: str, entry: Entry) -> str:
    """What is there of a set, in a line, without the annotations of boxes, which take minutes to read."""
    found, problems = [], 0
    for split, arguments in entry.splits.items():
        try:
            found.append(count(_images_alone(name, arguments), split))
            problems += len(_differences(name, entry, found[-1]))
        except DatasetError:
            problems += 1
    there = ", ".join(f"{one.split} {one.images:,}" for one in found if one.split in entry.whole)
    return there + (f" ({problems} problems)" if problems else "")


def _images_alone(name: str, arguments: Mapping[str, Any]) -> Dataset:
    """The images of a split; of classification sets with their labels, which are in the same lists."""
    if name == "coco_detection":
        if not (datasets_root() / "coco" / arguments["annotations"]).is_file():
            raise DatasetError(f"The annotations {arguments['annotations']} are not there.")
        return DATASETS.build("image_folder", root=f"coco/{arguments['images']}", labelled=False)
    if name == "voc_detection":
        arguments = {"splits": arguments["splits"], "labelled": False}
    return DATASETS.build(name, **arguments)


@contextlib.contextmanager
def datasets_in(root: str | os.PathLike | None) -> Iterator[None]:
    """Take `root` for the data sets root; None leaves it as it is."""
    before = os.environ.get(DATASETS_VARIABLE)
    if root is not None:
        os.environ[DATASETS_VARIABLE] = os.fspath(root)
    try:
        yield
    finally:
        if before is not None:
            os.environ[DATASETS_VARIABLE] = before
        elif root is not None:
            del os.environ[DATASETS_VARIABLE]


class _Opened(Dataset):
    """What is wrong with each sample of a set; empty text for those that open."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> str:
        try:
            self.dataset[index]
        except DatasetError as error:
            return str(error)
        return ""


def bad_files(dataset: Dataset, what: str, num_workers: int) -> list[str]:
    """What is wrong with the samples of a set that cannot be read, in `num_workers` processes."""
    # a loader without a generator of its own draws from the global one
    loader = DataLoader(_Opened(dataset), batch_size=None, num_workers=num_workers, generator=torch.Generator())
    return [problem for problem in tqdm(loader, desc=what, unit="image") if problem]
