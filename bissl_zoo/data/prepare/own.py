"""Looking at data of one's own: which layout a path has, whether every file opens, and how large the boxes are."""

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate
from torch.utils.data import Subset

from bissl_zoo.data.datasets.boxes import DetectionSet, shown_names
from bissl_zoo.data.datasets.classification_samples import images_in
from bissl_zoo.data.datasets.coco import names_in, read_annotations
from bissl_zoo.data.prepare.known import Survey, bad_files, count
from bissl_zoo.data.prepare.pack import check_shards
from bissl_zoo.data.shards_index import INDEX_FILE
from bissl_zoo.errors import DatasetError
from bissl_zoo.registry import build_dataset

_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
#: what folders of splits are called
_SPLITS = ("train", "trainval", "val", "valid", "validation", "test")
#: images of a JSON file that are looked for, to find their folder
_LOOKED_FOR = 20
_ACCEPTED = (
    "It may be a folder of images, of class folders, or of splits (train, test) that hold these; VOC's "
    "Annotations, JPEGImages and ImageSets; a JSON file in COCO's format, or a folder with one; or a folder of shards."
)

#: by split, what `build_dataset` takes
Splits = dict[str, dict[str, Any]]


def survey_path(path: str | os.PathLike, images: str | os.PathLike | None = None, num_workers: int = 4) -> Survey:
    """Find out which layout a path has, count what is there, open every file and measure the boxes.

    Args:
        images: of annotations in COCO's format, the folder that their file names count from; None looks for it around
            the file.
    Raises:
        DatasetError: there is nothing at `path`, or nothing that is known.
    """
    path = Path(path).absolute()
    if not path.exists():
        raise DatasetError(f"There is no {path}. {_ACCEPTED}")
    if (path / INDEX_FILE).exists() or (path.is_dir() and any(path.glob("*.tar"))):
        return _survey_shards(path, num_workers)
    datasets, problems = {}, []
    splits = splits_of(path, images)
    for split, arguments in splits.items():
        try:
            datasets[split] = build_dataset(**arguments)
        except DatasetError as error:
            problems.append(f"{split}: {error}")
    problems += [problem for split, dataset in datasets.items() for problem in _left_out(split, dataset)]
    problems += list(_unreadable(datasets, num_workers))
    notes = [f"{split} is read by {_call(splits[split])}" for split in datasets] + _unlike_classes(datasets)
    found = [count(dataset, split) for split, dataset in datasets.items()]
    return Survey(found, list(dict.fromkeys(problems)), str(path), notes, box_shapes(datasets))


def splits_of(path: Path, images: str | os.PathLike | None = None) -> Splits:
    """The splits of a set by its layout, each with what `build_dataset` takes to read it.

    Raises:
        DatasetError: no layout that is known.
    """
    if path.is_dir():
        splits = _voc(path) or _coco(_json_files(path), images) or _image_folders(path)
    else:
        splits = _coco([path], images) if path.suffix.lower() == ".json" else {}
        if not splits and path.suffix.lower() == ".json":
            read_annotations(path, ("images", "annotations", "categories"))  # says what is wrong with it
    if not splits:
        raise DatasetError(f"What {path} holds is not known. {_ACCEPTED}")
    if images and not any(arguments["name"] == "coco_detection" for arguments in splits.values()):
        raise DatasetError(f"--images goes with annotations in COCO's format, and {path} holds none.")
    return splits


def box_shapes(datasets: Mapping[str, Any]) -> str:
    """Quantiles of the boxes that are trained on, at the images' own sizes; empty where there are none.

    Anchors have sizes and aspect ratios like these (both libraries of detectors count a ratio as height / width), once
    images are scaled so that their shorter side is `min_size`.
    """
    rows = []
    for split, dataset in datasets.items():
        if not isinstance(dataset, DetectionSet) or dataset.classes is None or dataset.difficult.all():
            continue
        width, height = (dataset.boxes[:, 2:] - dataset.boxes[:, :2])[~dataset.difficult].T
        measured = {
            "box: sqrt(width x height), pixels": np.sqrt(width * height),
            "box: height / width": height / width,
            "image: shorter side, pixels": dataset.sizes.min(axis=1),
        }
        rows += [[split, what, *np.quantile(values, _QUANTILES)] for what, values in measured.items()]
    headers = ["split", "quantile", *(f"{quantile:.0%}" for quantile in _QUANTILES)]
    return tabulate(rows, headers, floatfmt=".4g") if rows else ""


def _survey_shards(path: Path, num_workers: int) -> Survey:
    shards, problems = check_shards(path, num_workers)
    images = sum(shard.samples for shard in shards)
    return Survey([], problems, f"{path}: {len(shards)} shards, {images} images")


def _voc(path: Path) -> Splits:
    """A folder that VOC's folders are in, a devkit of several years, or a folder with a devkit."""
    years = sorted(year for place in (path, path / "VOCdevkit") for year in place.glob("VOC[0-9]*") if _is_voc(year))
    folders = [path] if _is_voc(path) else years
    splits = {}
    for folder in folders:
        lists = sorted(file.stem for file in (folder / "ImageSets" / "Main").glob("*.txt"))
        if not lists:
            raise DatasetError(
                f"{folder} has Annotations and JPEGImages, but no list of a split. Write the names of the images "
                f"without their ending, a line each, into {folder / 'ImageSets' / 'Main' / 'train.txt'}."
            )
        for name in [name for name in _SPLITS if name in lists] or lists:  # besides VOC has lists of each class
            arguments = {"root": str(folder), "splits": [name], "on_bad_annotation": "skip"}
            splits[name if len(folders) == 1 else f"{folder.name} {name}"] = {"name": "voc_detection", **arguments}
    return splits


def _is_voc(folder: Path) -> bool:
    return (folder / "Annotations").is_dir() and (folder / "JPEGImages").is_dir()


def _json_files(path: Path) -> list[Path]:
    """JSON files where annotations usually lie: in the folder, in `annotations`, or beside the images of a split."""
    return [file for place in ("", "annotations", *_SPLITS) for file in sorted((path / place).glob("*.json"))]


def _coco(files: list[Path], images: str | os.PathLike | None) -> Splits:
    splits = {}
    for file in files:
        try:
            content = read_annotations(file, ("images", "annotations", "categories"))
        except DatasetError:
            continue  # captions and the like; the file that was asked for is told of by the caller
        names = [record.get("file_name") for record in content["images"][:_LOOKED_FOR] if isinstance(record, dict)]
        folder = Path(images).absolute() if images else _folder_of(file, [name for name in names if _is_name(name)])
        split = file.stem if len(files) == len({one.stem for one in files}) else f"{file.parent.name}/{file.stem}"
        arguments = {"root": str(file.parent), "annotations": file.name, "images": os.path.relpath(folder, file.parent)}
        splits[split] = {"name": "coco_detection", **arguments, "on_bad_annotation": "skip"}
    return splits


def _is_name(name: Any) -> bool:
    return isinstance(name, str) and "\0" not in name


def _folder_of(file: Path, names: list[str]) -> Path:
    """The folder around a JSON file that holds most of these images; of several the one of the file's name."""
    places = [file.parent, *_folders_in(file.parent), file.parent.parent, *_folders_in(file.parent.parent)]

    def fit(place: Path) -> tuple[int, bool]:
        return sum(os.path.isfile(place / name) for name in names), place.name in file.stem

    best = max(places, key=fit)
    if not fit(best)[0]:
        raise DatasetError(
            f"The images of {file}, such as {shown_names(names[:1]) or 'none'}, are not around it. Name their folder: "
            f"--check {file} --images FOLDER."
        )
    return best


def _folders_in(path: Path) -> list[Path]:
    return [path / name for name in sorted(names_in(path)) if not name.startswith(".") and (path / name).is_dir()]


def _image_folders(path: Path) -> Splits:
    """Images at any depth, class folders, or folders of splits that are either."""
    folders = _folders_in(path)
    if images_in(path):
        return {"images": _images(path, labelled=False)}
    named = [folder for folder in folders if folder.name in _SPLITS]
    # one of the classes may be called train: then it holds images, like the others
    if named and (len(named) == len(folders) or any(_folders_in(folder) for folder in named)):
        return {folder.name: _images(folder, labelled=bool(_folders_in(folder))) for folder in folders}
    return {"images": _images(path, labelled=True)} if folders else {}


def _images(path: Path, labelled: bool) -> dict[str, Any]:
    return {"name": "image_folder", "root": str(path)} | ({} if labelled else {"labelled": False})


def _left_out(split: str, dataset: Any) -> list[str]:
    """What a detection set cannot use."""
    hint = 'Training stops at it, or does without with on_bad_annotation="skip".'
    return [f"{split}: {what}. {first} {hint}" for what, first in getattr(dataset, "left_out", ())]


def _unreadable(datasets: Mapping[str, Any], num_workers: int) -> Iterator[str]:
    """The files that do not open; what several splits have is opened once."""
    seen: set[str] = set()
    for split, dataset in datasets.items():
        sources = [dataset.source(index) for index in range(len(dataset))]
        fresh = [index for index, source in enumerate(sources) if source not in seen]
        seen.update(sources)
        yield from bad_files(Subset(dataset, fresh), split, num_workers)


def _unlike_classes(datasets: Mapping[str, Any]) -> list[str]:
    """Which splits have other classes than the first."""
    labelled = {split: dataset.classes for split, dataset in datasets.items() if dataset.classes is not None}
    first = next(iter(labelled), None)
    return [
        f"{first} and {split} differ in their classes ({shown_names(sorted(set(labelled[first]) ^ set(classes)))}): "
        "give those that are used together the same list `classes`."
        for split, classes in labelled.items()
        if classes != labelled[first]
    ]


def _call(arguments: Mapping[str, Any]) -> str:
    shown = (f"{key}={value!r}" for key, value in arguments.items() if key != "on_bad_annotation")
    return re.sub(r"'([^'\"\\]*)'", r'"\1"', f"L(build_dataset)({', '.join(shown)})")
