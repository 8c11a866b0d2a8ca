"""Download data sets, mostly by torchvision; a folder appears complete or not at all."""

import os
import shutil
import zlib
from collections.abc import Callable, Mapping
from http.client import HTTPException
from pathlib import Path
from tarfile import TarError
from typing import NamedTuple
from zipfile import BadZipFile

from bissl_zoo.errors import DatasetError


class Source(NamedTuple):
    """The origin of a data set.

    Attributes:
        page: its official page.
        pieces: its folders below the datasets root, and what downloads each into a folder that stands for that root.
        by_hand: the files that a user must put below the datasets root if a program cannot download them.
    """

    page: str
    pieces: Mapping[str, Callable[[str], None]]
    by_hand: str = ""


#: errors of networks, disks and archives; torchvision raises RuntimeError for a wrong checksum
_FAILURES = (OSError, RuntimeError, HTTPException, TarError, BadZipFile, EOFError, zlib.error)


def fetch(name: str, root: Path) -> list[str]:
    """Download the missing folders of a set, and return them.

    Each is made in a hidden folder and renamed when it is complete, so an interrupted download leaves nothing that
    looks like a set.

    Raises:
        DatasetError: a download failed, or there is none; with the official page and the files to put there by hand.
    """
    source, hidden = SOURCES[name], root / f".downloading-{name}"
    files = source.by_hand or f"the unpacked archives of that page: {', '.join(source.pieces)}"
    by_hand = f"see {source.page} and make sure that {root.absolute()} holds {files}."
    if source.by_hand and not (root / name).is_dir():
        raise DatasetError(f"{name} cannot be downloaded by a program. Please {by_hand}")
    missing = [piece for piece in source.pieces if not (root / piece).is_dir()]
    for piece in missing:
        try:
            shutil.rmtree(hidden, ignore_errors=True)  # torchvision accepts half an archive whose checksum it lacks
            hidden.mkdir(parents=True)
            source.pieces[piece](str(hidden))
            (root / piece).parent.mkdir(parents=True, exist_ok=True)
            os.replace(hidden / piece, root / piece)
        except _FAILURES as error:
            raise DatasetError(
                f"Downloading {name} failed ({type(error).__name__}: {error}); {(root / piece).absolute()} was not "
                f"created. Try again later, or {by_hand}"
            ) from error
        finally:
            shutil.rmtree(hidden, ignore_errors=True)
    return missing


def _sets(name: str, *calls: dict[str, str]) -> Callable[[str], None]:
    """Return a download by torchvision's data set of this name, with each of these arguments."""

    def download(folder: str) -> None:
        import torchvision.datasets

        for arguments in calls or ({},):
            getattr(torchvision.datasets, name)(folder, download=True, **arguments)

    return download


def _archive(url: str, md5: str | None, below: str = "") -> Callable[[str], None]:
    """Return a download of an archive that is unpacked into the folder `below`."""

    def download(folder: str) -> None:
        from torchvision.datasets.utils import download_and_extract_archive

        download_and_extract_archive(url, folder, os.path.join(folder, below), md5=md5)

    return download


def _voc(year: str, *image_sets: str) -> Callable[[str], None]:
    return _sets("VOCDetection", *({"year": year, "image_set": image_set} for image_set in image_sets))


def _by(dataset: str, folder: str, page: str) -> Source:
    """Return the source of a set that torchvision downloads into one folder."""
    return Source(page, {folder: _sets(dataset)})


_COCO = "http://images.cocodataset.org"
_CUB = "https://data.caltech.edu/records/65de6-vp158"
_OXFORD = "https://www.robots.ox.ac.uk/~vgg/data"
_SUN = "https://vision.princeton.edu/projects/2010/SUN"
_VOC = "http://host.robots.ox.ac.uk/pascal/VOC"
_CIFAR = "https://www.cs.toronto.edu/~kriz/cifar.html"
_CUB_MD5 = "97eceeb196236b17998738112f37df78"

SOURCES = {
    "food101": _by("Food101", "food-101", "https://data.vision.ee.ethz.ch/cvl/datasets_extra/food-101/"),
    "cifar10": _by("CIFAR10", "cifar-10-batches-py", _CIFAR),
    "cifar100": _by("CIFAR100", "cifar-100-python", _CIFAR),
    "cub200": Source(_CUB, {"CUB_200_2011": _archive(f"{_CUB}/files/CUB_200_2011.tgz", _CUB_MD5)}),
    "sun397": Source(
        f"{_SUN}/",
        {
            "SUN397": _sets("SUN397"),
            "SUN397/Partitions": _archive(f"{_SUN}/download/Partitions.zip", None, "SUN397/Partitions"),
        },
    ),
    "stanford_cars": Source(
        "https://github.com/pytorch/vision/issues/7545 (the original page is gone)",
        {},
        "in stanford_cars: cars_train/00001.jpg and so on, cars_test/00001.jpg and so on, devkit/cars_train_annos.mat, "
        "devkit/cars_meta.mat and cars_test_annos_withlabels.mat",
    ),
    "fgvc_aircraft": _by("FGVCAircraft", "fgvc-aircraft-2013b", f"{_OXFORD}/fgvc-aircraft/"),
    "voc2007_classification": Source(f"{_VOC}/voc2007/", {"VOCdevkit/VOC2007": _voc("2007", "trainval", "test")}),
    "dtd": _by("DTD", "dtd", f"{_OXFORD}/dtd/"),
    "oxford_pets": _by("OxfordIIITPet", "oxford-iiit-pet", f"{_OXFORD}/pets/"),
    "caltech101": _by("Caltech101", "caltech101", "https://data.caltech.edu/records/mzrjq-6wc02"),
    "flowers102": _by("Flowers102", "flowers-102", f"{_OXFORD}/flowers/102/"),
    "stl10": _by("STL10", "stl10_binary", "https://cs.stanford.edu/~acoates/stl10/"),
    "fashion_mnist": _by("FashionMNIST", "FashionMNIST", "https://github.com/zalandoresearch/fashion-mnist"),
    "imagenet": Source(
        "https://image-net.org/challenges/LSVRC/2012/2012-downloads.php (with an account)",
        {},
        "imagenet/train and imagenet/val, with a folder of images for each WordNet id, as "
        "torchvision.datasets.ImageNet(FOLDER, SPLIT) unpacks its archives",
    ),
    "voc_detection": Source(
        f"{_VOC}/",
        {"VOCdevkit/VOC2007": _voc("2007", "trainval", "test"), "VOCdevkit/VOC2012": _voc("2012", "trainval")},
    ),
    "coco_detection": Source(
        "https://cocodataset.org/#download",
        {
            "coco/annotations": _archive(f"{_COCO}/annotations/annotations_trainval2017.zip", None, "coco"),
            "coco/val2017": _archive(f"{_COCO}/zips/val2017.zip", None, "coco"),
            "coco/train2017": _archive(f"{_COCO}/zips/train2017.zip", None, "coco"),
        },
    ),
}
