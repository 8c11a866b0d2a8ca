"""Download data sets, mostly by torchvision; a folder appears complete or not at all."""

import os
import shutil
import zlib
from collections.abc import Callable, Mapping
from http.client import HTTPException
from pathlib import Path
from tarfile import TarError
from typing import Any, NamedTuple
from zipfile import BadZipFile

from bissl_zoo.errors import DatasetError

#: `download(folder, root)` makes the piece below `folder`; archives may lie below the datasets root
Download = Callable[[Path, Path], Any]


class Source(NamedTuple):
    """The origin of a data set.

    Attributes:
        page: its official page.
        pieces: its folders below the datasets root, and the download of each; None if there is none.
        by_hand: the files that must lie below the datasets root, for a download by hand.
    """

    page: str
    pieces: Mapping[str, Download | None]
    by_hand: str


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
    by_hand = f"see {source.page} and make sure that {root.absolute()} holds {source.by_hand}."
    missing = [piece for piece in source.pieces if not (root / piece).is_dir()]
    for piece in missing:
        download = source.pieces[piece]
        if download is None:
            raise DatasetError(f"{name} cannot be downloaded by a program. Please {by_hand}")
        try:
            shutil.rmtree(hidden, ignore_errors=True)  # torchvision accepts half an archive whose checksum it lacks
            hidden.mkdir(parents=True)
            download(hidden, root)
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


def from_torchvision(*calls: tuple[str, dict[str, Any]]) -> Download:
    """Return a download by torchvision's data sets of these names, with these arguments."""

    def download(folder: Path, root: Path) -> None:
        import torchvision.datasets

        for dataset, arguments in calls:
            getattr(torchvision.datasets, dataset)(str(folder), download=True, **arguments)

    return download


def from_archive(url: str, md5: str | None, below: str = "") -> Download:
    """Return a download of an archive that is unpacked into the folder `below`."""

    def download(folder: Path, root: Path) -> None:
        from torchvision.datasets.utils import download_and_extract_archive

        download_and_extract_archive(url, str(folder), str(folder / below), md5=md5)

    return download


def _imagenet(split: str) -> Download:
    """Return what unpacks the archives that the user has put into `imagenet`."""

    def download(folder: Path, root: Path) -> None:
        from torchvision.datasets import ImageNet

        (folder / "imagenet").mkdir()
        for name in (f"ILSVRC2012_img_{split}.tar", "ILSVRC2012_devkit_t12.tar.gz"):
            archive = (root / "imagenet" / name).absolute()
            if not archive.is_file():
                raise FileNotFoundError(f"{archive} does not exist")
            (folder / "imagenet" / name).symlink_to(archive)
        ImageNet(str(folder / "imagenet"), split)

    return download


def _voc(year: str, *image_sets: str) -> Download:
    return from_torchvision(*(("VOCDetection", {"year": year, "image_set": image_set}) for image_set in image_sets))


def _archive_of(page: str, folder: str, dataset: str, archive: str) -> Source:
    """Return the source of a set that is one archive, which torchvision downloads."""
    return Source(page, {folder: from_torchvision((dataset, {}))}, f"{folder}, as unpacked from {archive}")


_COCO = "http://images.cocodataset.org"
_CUB = "https://data.caltech.edu/records/65de6-vp158"
_OXFORD = "https://www.robots.ox.ac.uk/~vgg/data"
_SUN = "https://vision.princeton.edu/projects/2010/SUN"
_VOC = "http://host.robots.ox.ac.uk/pascal/VOC"
_VOC2007 = "VOCdevkit/VOC2007, as unpacked from VOCtrainval_06-Nov-2007.tar and VOCtest_06-Nov-2007.tar"
_CIFAR = "https://www.cs.toronto.edu/~kriz/cifar.html"

SOURCES = {
    "food101": _archive_of(
        "https://data.vision.ee.ethz.ch/cvl/datasets_extra/food-101/", "food-101", "Food101", "food-101.tar.gz"
    ),
    "cifar10": _archive_of(_CIFAR, "cifar-10-batches-py", "CIFAR10", "cifar-10-python.tar.gz"),
    "cifar100": _archive_of(_CIFAR, "cifar-100-python", "CIFAR100", "cifar-100-python.tar.gz"),
    "cub200": Source(
        _CUB,
        {"CUB_200_2011": from_archive(f"{_CUB}/files/CUB_200_2011.tgz", "97eceeb196236b17998738112f37df78")},
        "CUB_200_2011, as unpacked from CUB_200_2011.tgz",
    ),
    "sun397": Source(
        f"{_SUN}/",
        {
            "SUN397": from_torchvision(("SUN397", {})),
            "SUN397/Partitions": from_archive(f"{_SUN}/download/Partitions.zip", None, "SUN397/Partitions"),
        },
        "SUN397, as unpacked from SUN397.tar.gz, and SUN397/Partitions with the lists of Partitions.zip",
    ),
    "stanford_cars": Source(
        "https://github.com/pytorch/vision/issues/7545 (the original page is gone)",
        {"stanford_cars": None},
        "stanford_cars/cars_train/00001.jpg and so on, stanford_cars/cars_test/00001.jpg and so on (from "
        "cars_train.tgz and cars_test.tgz), stanford_cars/devkit/cars_train_annos.mat "
        "and cars_meta.mat (from car_devkit.tgz), and "
        "stanford_cars/cars_test_annos_withlabels.mat",
    ),
    "fgvc_aircraft": _archive_of(
        f"{_OXFORD}/fgvc-aircraft/", "fgvc-aircraft-2013b", "FGVCAircraft", "fgvc-aircraft-2013b.tar.gz"
    ),
    "voc2007_classification": Source(
        f"{_VOC}/voc2007/", {"VOCdevkit/VOC2007": _voc("2007", "trainval", "test")}, _VOC2007
    ),
    "dtd": _archive_of(f"{_OXFORD}/dtd/", "dtd", "DTD", "dtd-r1.0.1.tar.gz"),
    "oxford_pets": _archive_of(
        f"{_OXFORD}/pets/", "oxford-iiit-pet", "OxfordIIITPet", "images.tar.gz and annotations.tar.gz"
    ),
    "caltech101": Source(
        "https://data.caltech.edu/records/mzrjq-6wc02",
        {"caltech101": from_torchvision(("Caltech101", {}))},
        "caltech101/101_ObjectCategories, as unpacked from 101_ObjectCategories.tar.gz in caltech-101.zip",
    ),
    "flowers102": Source(
        f"{_OXFORD}/flowers/102/",
        {"flowers-102": from_torchvision(("Flowers102", {}))},
        "flowers-102/jpg, as unpacked from 102flowers.tgz, flowers-102/imagelabels.mat and flowers-102/setid.mat",
    ),
    "stl10": _archive_of("https://cs.stanford.edu/~acoates/stl10/", "stl10_binary", "STL10", "stl10_binary.tar.gz"),
    "fashion_mnist": Source(
        "https://github.com/zalandoresearch/fashion-mnist",
        {"FashionMNIST": from_torchvision(("FashionMNIST", {}))},
        "FashionMNIST/raw with the four files *-ubyte.gz",
    ),
    "imagenet": Source(
        "https://image-net.org/challenges/LSVRC/2012/2012-downloads.php (with an account)",
        {"imagenet/train": _imagenet("train"), "imagenet/val": _imagenet("val")},
        "imagenet/ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and ILSVRC2012_devkit_t12.tar.gz, which this "
        "command then unpacks, or imagenet/train and imagenet/val with a folder of images for each WordNet id",
    ),
    "voc_detection": Source(
        f"{_VOC}/",
        {"VOCdevkit/VOC2007": _voc("2007", "trainval", "test"), "VOCdevkit/VOC2012": _voc("2012", "trainval")},
        f"{_VOC2007}, and VOCdevkit/VOC2012, as unpacked from VOCtrainval_11-May-2012.tar",
    ),
    "coco_detection": Source(
        "https://cocodataset.org/#download",
        {
            "coco/annotations": from_archive(f"{_COCO}/annotations/annotations_trainval2017.zip", None, "coco"),
            "coco/val2017": from_archive(f"{_COCO}/zips/val2017.zip", None, "coco"),
            "coco/train2017": from_archive(f"{_COCO}/zips/train2017.zip", None, "coco"),
        },
        "coco/train2017, coco/val2017 and coco/annotations, as unpacked from train2017.zip, val2017.zip and "
        "annotations_trainval2017.zip",
    ),
}
