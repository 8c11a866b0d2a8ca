"""Check data: sets by name against the originals, and data at a path, whose layout is recognised.

Importing this module is fast: torch is imported when data is read.
"""

import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, NamedTuple

from tabulate import tabulate
from tqdm import tqdm

from bissl_zoo.data.datasets.catalog import datasets_root
from bissl_zoo.data.datasets.classification import CLASSIFICATION_SETS, find_folder
from bissl_zoo.data.datasets.folder import images_in, shown_names, subfolders
from bissl_zoo.data.prepare.download import fetch
from bissl_zoo.errors import DatasetError, did_you_mean
from bissl_zoo.registry import DATASETS, build_dataset

#: usual names of the folders of splits
_SPLITS = ("train", "trainval", "val", "valid", "validation", "test")
#: images of a JSON file that are searched to find their folder
_MAX_SEARCHED = 20
_ACCEPTED = (
    "It may be a folder of images, of class folders, or of splits (train, test) that hold these; VOC's "
    "Annotations, JPEGImages and ImageSets; a JSON file in COCO's format, or a folder with one; or a folder of shards."
)


class KnownSet(NamedTuple):
    """A data set that can be built by name.

    Attributes:
        description: the set in a few words.
        folder: its usual folder below the datasets root.
        splits: the splits to check, with the arguments that build each.
        images: the original's number of images per split, if it is official.
        disjoint: the splits that together hold every image once.
        classes: the original's number of classes.
    """

    description: str
    folder: str
    splits: Mapping[str, dict[str, Any]]
    images: Mapping[str, int]
    disjoint: tuple[str, ...]
    classes: int


class Found(NamedTuple):
    """The size of a split; None for what it does not have."""

    split: str
    images: int
    classes: int | None
    boxes: int | None


class Survey(NamedTuple):
    """Result of a check.

    Attributes:
        where: the folder or file.
        splits: sizes of the splits.
        problems: everything that is wrong.
        notes: further information.
    """

    where: str
    splits: list[Found]
    problems: list[str]
    notes: Sequence[str] = ()

    def table(self) -> str:
        """Return the splits as a table; empty if there are none."""
        if not self.splits:
            return ""
        headers = Found._fields if any(split.boxes is not None for split in self.splits) else Found._fields[:-1]
        return tabulate([split[: len(headers)] for split in self.splits], headers, intfmt=",", missingval="none")


# sets by name


def known_sets() -> dict[str, KnownSet]:
    """Return every data set that can be prepared by name."""
    sets = {}
    for name, layout in CLASSIFICATION_SETS.items():
        images = {"trainval": layout.images.get("train", 0) + layout.images.get("val", 0), **layout.images}
        disjoint = tuple(split for split in layout.splits if split not in ("train", "val"))
        splits = {split: {"split": split} for split in layout.splits}
        sets[name] = KnownSet(layout.description, layout.folders[0], splits, images, disjoint, layout.classes)
    images = {"2007_trainval": 5_011, "2007_test": 4_952, "2012_trainval": 11_540}
    splits = {split: {"splits": [split], "classes": "voc"} for split in images}
    sets["voc_detection"] = KnownSet("VOC07+12, boxes", "VOCdevkit", splits, images, tuple(splits), 20)
    images = {"train2017": 118_287, "val2017": 5_000}
    splits = {split: {"images": split, "annotations": f"annotations/instances_{split}.json"} for split in images}
    splits["train2017"]["on_bad_annotation"] = "skip"  # as in its config: two of its boxes have no height
    sets["coco_detection"] = KnownSet("COCO 2017, boxes", "coco", splits, images, tuple(splits), 80)
    return sets


def folder_of(name: str) -> Path:
    """Return where a set lies or would lie.

    Raises:
        DatasetError: an unknown name.
    """
    sets = known_sets()
    if name not in sets:
        hint = did_you_mean(name, sets)
        raise DatasetError(f"There is no data set '{name}'.{hint} Known are {', '.join(sorted(sets))}.")
    return (find_folder(name) if name in CLASSIFICATION_SETS else datasets_root() / sets[name].folder).absolute()


def list_sets() -> str:
    """Return a table of the sets that are known by name, with the original's images and where each lies."""
    rows = []
    for name, known in known_sets().items():
        images = ", ".join(f"{split} {known.images[split]:,}" for split in known.disjoint)
        folder = folder_of(name)
        rows.append([name, known.description, images, folder if folder.is_dir() else "not there"])
    return tabulate(rows, ["name", "content", "images of the original", "folder"])


def prepare(name: str) -> tuple[list[str], Survey]:
    """Fetch what is missing of a set, and count the images.

    Returns:
        The folders that were fetched, and the survey.
    Raises:
        DatasetError: an unknown name, or a download that failed or does not exist.
    """
    folder = folder_of(name)
    usual = (datasets_root() / known_sets()[name].folder).absolute()
    fetched = fetch(name, datasets_root()) if folder == usual else []
    return fetched, survey(name)


def survey(name: str, open_files: bool = False, num_workers: int = 4) -> Survey:
    """Build the splits of a set, count, and compare with the original.

    Args:
        open_files: also decode every image, in `num_workers` threads, and look for images that splits share.
    Raises:
        DatasetError: an unknown name.
    """
    folder, known = folder_of(name), known_sets().get(name)
    sizes: list[Found] = []
    problems: list[str] = []
    notes: list[str] = []
    split_of: dict[str, str] = {}
    for split, arguments in known.splits.items():
        try:
            dataset = DATASETS.build(name, **arguments)
        except DatasetError as error:
            problems.append(str(error))
            continue
        sizes.append(_count(dataset, split))
        for key, number, original in (
            ("images", sizes[-1].images, known.images.get(split)),
            ("classes", sizes[-1].classes, known.classes),
        ):
            if None not in (number, original) and number != original:
                problems.append(f"{name}, split {split}: {number:,} {key}, but the original has {original:,}.")
        for what, first in getattr(dataset, "left_out", ()):
            problem = f"{name}, split {split}: left out {what}. {first}"
            (notes if what.split()[1] == "objects" else problems).append(problem)
        if open_files and split in known.disjoint:
            shared = Counter(split_of.setdefault(dataset.source(index), split) for index in range(len(dataset)))
            problems += [
                f"{name}: {number:,} images are both in {other} and in {split}."
                for other, number in shared.items()
                if other != split
            ]
            problems += unreadable(dataset, range(len(dataset)), f"{name} {split}", num_workers)
    return Survey(str(folder), sizes, list(dict.fromkeys(problems)), notes)  # splits share images


def _count(dataset: Any, split: str) -> Found:
    classes = None if dataset.classes is None else len(dataset.classes)
    boxes = len(dataset.boxes) if classes is not None and hasattr(dataset, "boxes") else None
    return Found(split, len(dataset), classes, boxes)


def unreadable(dataset: Any, indices: Sequence[int], description: str, num_workers: int) -> list[str]:
    """Return the problem of each sample that cannot be read, with `num_workers` threads."""

    def problem_of(index: int) -> str:
        try:
            dataset[index]
        except DatasetError as error:
            return str(error)
        return ""

    with ThreadPool(max(1, num_workers)) as pool:
        found = pool.imap(problem_of, indices, chunksize=16)
        problems = tqdm(found, desc=description, total=len(indices), unit="image")
        return list(filter(None, problems))


# data at a path


def survey_path(path: str | os.PathLike, images: str | os.PathLike | None = None, num_workers: int = 4) -> Survey:
    """Recognise the layout of a path, count and decode every image.

    Args:
        images: for annotations in COCO's format, the folder of the images; None searches around the file.
    Raises:
        DatasetError: nothing is at `path`, or nothing of a known layout.
    """
    path = Path(path).absolute()
    if not path.exists():
        raise DatasetError(f"There is no {path}. {_ACCEPTED}")
    if (path / "index.json").exists() or (path.is_dir() and any(path.glob("*.tar"))):
        from bissl_zoo.data.prepare.pack import check_shards

        shards, problems = check_shards(path, num_workers)
        return Survey(f"{path}: {len(shards)} shards, {sum(s.samples for s in shards)} images", [], problems)
    datasets: dict[str, Any] = {}
    problems, opened = [], set()
    splits = splits_of(path, images)
    for split, arguments in splits.items():
        try:
            datasets[split] = build_dataset(**arguments)
        except DatasetError as error:
            problems.append(f"{split}: {error}")
    for split, dataset in datasets.items():
        hint = 'Training stops there, or continues without it with on_bad_annotation="skip".'
        problems += [f"{split}: {what}. {first} {hint}" for what, first in getattr(dataset, "left_out", ())]
    for split, dataset in datasets.items():
        files = [dataset.source(index) for index in range(len(dataset))]
        fresh = [index for index, file in enumerate(files) if file not in opened]
        opened.update(files)
        problems += unreadable(dataset, fresh, split, num_workers)
    notes = [f"{split} is read by {_call(splits[split])}" for split in datasets] + list(_differing_classes(datasets))
    counts = [_count(dataset, split) for split, dataset in datasets.items()]
    return Survey(str(path), counts, list(dict.fromkeys(problems)), notes)


def splits_of(path: Path, images: str | os.PathLike | None = None) -> dict[str, dict[str, Any]]:
    """Return the splits of data at a path, each with the arguments of `build_dataset` that read it.

    Raises:
        DatasetError: an unknown layout.
    """
    if path.is_dir():
        files = [file for place in ("", "annotations", *_SPLITS) for file in sorted((path / place).glob("*.json"))]
        splits = _voc(path) or _coco(files, images) or _image_folders(path)
    else:
        splits = _coco([path], images, strict=True) if path.suffix.lower() == ".json" else {}
    if not splits:
        raise DatasetError(f"The layout of {path} is unknown. {_ACCEPTED}")
    if images and not any(arguments["name"] == "coco_detection" for arguments in splits.values()):
        raise DatasetError(f"--images goes with annotations in COCO's format, and {path} holds none.")
    return splits


def _voc(path: Path) -> dict[str, dict[str, Any]]:
    """Return the splits of VOC's three folders in `path`, or of a devkit with several years."""
    years = [*sorted(path.glob("VOC[0-9]*")), *sorted((path / "VOCdevkit").glob("VOC[0-9]*"))]
    folders = [f for f in (path, *years) if (f / "Annotations").is_dir() and (f / "JPEGImages").is_dir()]
    splits = {}
    for folder in folders:
        lists = sorted(file.stem for file in (folder / "ImageSets" / "Main").glob("*.txt"))
        if not lists:
            raise DatasetError(
                f"{folder} has Annotations and JPEGImages, but no list of a split. Write the names of the images "
                f"without extension, one per line, into {folder / 'ImageSets' / 'Main' / 'train.txt'}."
            )
        for name in [name for name in _SPLITS if name in lists] or lists:  # VOC has lists of each class, too
            arguments = {"root": str(folder), "splits": [name], "on_bad_annotation": "skip"}
            splits[name if len(folders) == 1 else f"{folder.name} {name}"] = {"name": "voc_detection", **arguments}
    return splits


def _coco(files: list[Path], images: str | os.PathLike | None, strict: bool = False) -> dict[str, dict[str, Any]]:
    """Return the splits of JSON files in COCO's format; others are skipped, or raise if `strict`."""
    from bissl_zoo.data.datasets.coco import read_annotations

    splits = {}
    for file in files:
        try:
            content = read_annotations(file, ("images", "annotations", "categories"))
        except DatasetError:
            if strict:
                raise
            continue
        records = [record for record in content["images"][:_MAX_SEARCHED] if isinstance(record, dict)]
        names = [name for r in records if isinstance(name := r.get("file_name"), str) and "\0" not in name]
        folder = Path(images).absolute() if images else _folder_of(file, names)
        split = file.stem if len(files) == len({other.stem for other in files}) else f"{file.parent.name}/{file.stem}"
        arguments = {"root": str(file.parent), "annotations": file.name, "images": os.path.relpath(folder, file.parent)}
        splits[split] = {"name": "coco_detection", **arguments, "on_bad_annotation": "skip"}
    return splits


def _folder_of(file: Path, names: list[str]) -> Path:
    """Return the folder near a JSON file that holds most of these images, preferably one named in the file's name."""
    above = (file.parent, file.parent.parent)
    places = [place for folder in above for place in (folder, *(folder / name for name in subfolders(folder)))]

    def fit(place: Path) -> tuple[int, bool]:
        return sum(os.path.isfile(place / name) for name in names), place.name in file.stem

    best = max(places, key=fit)
    if not fit(best)[0]:
        raise DatasetError(
            f"The images of {file}, such as {shown_names(names[:1]) or 'none'}, are not near it. Name their folder: "
            f"--check {file} --images FOLDER."
        )
    return best


def _image_folders(path: Path) -> dict[str, dict[str, Any]]:
    """Return the splits of images at any depth, class folders, or folders of splits with either."""
    folders = subfolders(path)
    if images_in(path):
        return {"images": _images(path, labelled=False)}
    named = [name for name in folders if name in _SPLITS]
    # a class may be called train; it then holds images, like the others
    if named and (len(named) == len(folders) or any(subfolders(path / name) for name in named)):
        return {name: _images(path / name, labelled=bool(subfolders(path / name))) for name in folders}
    return {"images": _images(path, labelled=True)} if folders else {}


def _images(path: Path, labelled: bool) -> dict[str, Any]:
    return {"name": "image_folder", "root": str(path)} | ({} if labelled else {"labelled": False})


def _differing_classes(datasets: Mapping[str, Any]) -> Iterator[str]:
    """Yield a note for each split whose classes differ from those of the first."""
    labelled = {split: dataset.classes for split, dataset in datasets.items() if dataset.classes is not None}
    first = next(iter(labelled), None)
    for split, classes in labelled.items():
        if classes != labelled[first]:
            names = shown_names(sorted(set(labelled[first]) ^ set(classes)))
            yield f"{first} and {split} differ in their classes ({names}): pass the same list `classes` to both."


def _call(arguments: Mapping[str, Any]) -> str:
    values = (f"{key}={value!r}" for key, value in arguments.items() if key != "on_bad_annotation")
    return re.sub(r"'([^'\"\\]*)'", r'"\1"', f"L(build_dataset)({', '.join(values)})")
