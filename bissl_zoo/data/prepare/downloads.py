"""Where data sets come from, and fetching them, mostly by torchvision: a folder is there whole or not at all."""

import os
import shutil
import zlib
from collections.abc import Callable, Mapping
from http.client import HTTPException
from pathlib import Path
from tarfile import TarError
from typing import Any, NamedTuple
from zipfile import BadZipFile

from torchvision import datasets as torchvision_datasets
from torchvision.datasets.utils import download_and_extract_archive

from bissl_zoo.errors import DatasetError

#: brings a folder below its first argument; the second is the data sets root, where archives may lie
Fetch = Callable[[Path, Path], Any]


class Source(NamedTuple):
    """Where a set comes from.

    Attributes:
        page: its official page.
        pieces: the folders that make it, below the data sets root, and what brings each; None for what nothing does.
        by_hand: which files are to lie where.
    """

    page: str
    pieces: Mapping[str, Fetch | None]
    by_hand: str


def fetch(name: str, root: Path) -> list[str]:
    """Download those folders of a set that are not there; returns them.

    Each is downloaded and unpacked in a hidden folder beside its place, and moved when it is whole, so that an
    interrupted download leaves nothing that looks like a set.

    Raises:
        DatasetError: a download failed, or nothing downloads the set; with the page and the files to put there.
    """
    source, hidden = SOURCES[name], root / f".downloading-{name}"
    missing = [piece for piece in source.pieces if not (root / piece).is_dir()]
    for piece in missing:
        bring = source.pieces[piece]
        if bring is None:
            raise DatasetError(f"No program can download {name}. Please {_by_hand(source, root)}")
        try:
            # torchvision takes half an archive for a whole one where it knows no checksum
            shutil.rmtree(hidden, ignore_errors=True)
            hidden.mkdir(parents=True)
            bring(hidden, root)
            (root / piece).parent.mkdir(parents=True, exist_ok=True)
            os.replace(hidden / piece, root / piece)
        except _FAILURES as error:
            raise DatasetError(
                f"{name} is not downloaded ({type(error).__name__}: {error}), and nothing of it is in "
                f"{(root / piece).absolute()}. Try again later. Or {_by_hand(source, root)}"
            ) from error
        finally:
            shutil.rmtree(hidden, ignore_errors=True)
    return missing


#: what goes wrong with networks, disks and archives; torchvision raises RuntimeError for a checksum
_FAILURES = (OSError, RuntimeError, HTTPException, TarError, BadZipFile, EOFError, zlib.error)


def _by_hand(source: Source, root: Path) -> str:
    return f"see {source.page} and see to it that {root.absolute()} holds {source.by_hand}."


def from_torchvision(dataset: str, **arguments: Any) -> Fetch:
    """Have torchvision's class of this name download what it reads."""

    def bring(folder: Path, root: Path) -> None:
        getattr(torchvision_datasets, dataset)(str(folder), download=True, **arguments)

    return bring


def from_archive(url: str, md5: str | None, below: str = "") -> Fetch:
    """Download an archive and unpack it below the folder."""

    def bring(folder: Path, root: Path) -> None:
        download_and_extract_archive(url, str(folder), str(folder / below), md5=md5)

    return bring


def _voc2007(folder: Path, root: Path) -> None:
    for image_set in ("trainval", "test"):
        torchvision_datasets.VOCDetection(str(folder), "2007", image_set, download=True)


def _imagenet(split: str) -> Fetch:
    """Unpack the archives that somebody has put into `imagenet`."""

    def bring(folder: Path, root: Path) -> None:
        (folder / "imagenet").mkdir()
        for name in (f"ILSVRC2012_img_{split}.tar", "ILSVRC2012_devkit_t12.tar.gz"):
            archive = (root / "imagenet" / name).absolute()
            if not archive.is_file():
                raise FileNotFoundError(f"{archive} does not exist")
            (folder / "imagenet" / name).symlink_to(archive)
        torchvision_datasets.ImageNet(str(folder / "imagenet"), split)

    return bring


_COCO = "http://images.cocodataset.org"
_SUN = "https://vision.princeton.edu/projects/2010/SUN"
_VOC = "http://host.robots.ox.ac.uk/pascal/VOC"
_VOC2007 = "VOCdevkit/VOC2007, as VOCtrainval_06-Nov-2007.tar and VOCtest_06-Nov-2007.tar unpack"

SOURCES = {
    "food101": Source(
        "https://data.vision.ee.ethz.ch/cvl/datasets_extra/food-101/",
        {"food-101": from_torchvision("Food101")},
        "food-101, as food-101.tar.gz unpacks",
    ),
    "cifar10": Source(
        "https://www.cs.toronto.edu/~kriz/cifar.html",
        {"cifar-10-batches-py": from_torchvision("CIFAR10")},
        "cifar-10-batches-py, as cifar-10-python.tar.gz unpacks",
    ),
    "cifar100": Source(
        "https://www.cs.toronto.edu/~kriz/cifar.html",
        {"cifar-100-python": from_torchvision("CIFAR100")},
        "cifar-100-python, as cifar-100-python.tar.gz unpacks",
    ),
    "cub200": Source(
        "https://data.caltech.edu/records/65de6-vp158",
        {
            "CUB_200_2011": from_archive(
                "https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz",
                "97eceeb196236b17998738112f37df78",
            )
        },
        "CUB_200_2011, as CUB_200_2011.tgz unpacks",
    ),
    "sun397": Source(
        f"{_SUN}/",
        {
            "SUN397": from_torchvision("SUN397"),
            "SUN397/Partitions": from_archive(f"{_SUN}/download/Partitions.zip", None, "SUN397/Partitions"),
        },
        "SUN397, as SUN397.tar.gz unpacks, and in SUN397/Partitions the lists of Partitions.zip",
    ),
    "stanford_cars": Source(
        "https://github.com/pytorch/vision/issues/7545 (the original page is gone)",
        {"stanford_cars": None},
        "stanford_cars/cars_train/00001.jpg and so on, stanford_cars/cars_test/00001.jpg and so on (of cars_train.tgz "
        "and cars_test.tgz), stanford_cars/devkit/cars_train_annos.mat and cars_meta.mat (of car_devkit.tgz), and "
        "stanford_cars/cars_test_annos_withlabels.mat",
    ),
    "fgvc_aircraft": Source(
        "https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft/",
        {"fgvc-aircraft-2013b": from_torchvision("FGVCAircraft")},
        "fgvc-aircraft-2013b, as fgvc-aircraft-2013b.tar.gz unpacks",
    ),
    "voc2007_classification": Source(f"{_VOC}/voc2007/", {"VOCdevkit/VOC2007": _voc2007}, _VOC2007),
    "dtd": Source(
        "https://www.robots.ox.ac.uk/~vgg/data/dtd/",
        {"dtd": from_torchvision("DTD")},
        "dtd, as dtd-r1.0.1.tar.gz unpacks",
    ),
    "oxford_pets": Source(
        "https://www.robots.ox.ac.uk/~vgg/data/pets/",
        {"oxford-iiit-pet": from_torchvision("OxfordIIITPet")},
        "oxford-iiit-pet/images and oxford-iiit-pet/annotations, as images.tar.gz and annotations.tar.gz unpack",
    ),
    "caltech101": Source(
        "https://data.caltech.edu/records/mzrjq-6wc02",
        {"caltech101": from_torchvision("Caltech101")},
        "caltech101/101_ObjectCategories, as 101_ObjectCategories.tar.gz in caltech-101.zip unpacks",
    ),
    "flowers102": Source(
        "https://www.robots.ox.ac.uk/~vgg/data/flowers/102/",
        {"flowers-102": from_torchvision("Flowers102")},
        "flowers-102/jpg, as 102flowers.tgz unpacks, flowers-102/imagelabels.mat and flowers-102/setid.mat",
    ),
    "stl10": Source(
        "https://cs.stanford.edu/~acoates/stl10/",
        {"stl10_binary": from_torchvision("STL10")},
        "stl10_binary, as stl10_binary.tar.gz unpacks",
    ),
    "fashion_mnist": Source(
        "https://github.com/zalandoresearch/fashion-mnist",
        {"FashionMNIST": from_torchvision("FashionMNIST")},
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
        {
            "VOCdevkit/VOC2007": _voc2007,
            "VOCdevkit/VOC2012": from_torchvision("VOCDetection", year="2012", image_set="trainval"),
        },
        f"{_VOC2007}, and VOCdevkit/VOC2012, as VOCtrainval_11-May-2012.tar unpacks",
    ),
    "coco_detection": Source(
        "https://cocodataset.org/#download",
        {
            "coco/annotations": from_archive(f"{_COCO}/annotations/annotations_trainval2017.zip", None, "coco"),
            "coco/val2017": from_archive(f"{_COCO}/zips/val2017.zip", None, "coco"),
            "coco/train2017": from_archive(f"{_COCO}/zips/train2017.zip", None, "coco"),
        },
        "coco/train2017, coco/val2017 and coco/annotations, as train2017.zip, val2017.zip and "
        "annotations_trainval2017.zip unpack",
    ),
}
