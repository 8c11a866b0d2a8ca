"""The original layouts of classification sets whose images are arrays in a few files: CIFAR, STL-10, Fashion-MNIST."""

import gzip
import math
import pickle
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from torchvision.datasets import FashionMNIST

from bissl_zoo.data.datasets.classification_samples import Samples, read_lines, readable, samples, whole
from bissl_zoo.errors import DatasetError

_STL_IMAGE = (3, 96, 96)
#: bytes that an idx file may unpack to, far above the 47 million of the largest
_IDX_LIMIT = 1_000_000_000
#: the globals of a pickled array; all else in the originals are containers, numbers and strings
_ARRAY_GLOBALS = {
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
}


def cifar10(folder: Path, part: str) -> Samples:
    """data_batch_1 to data_batch_5, test_batch and batches.meta, pickles of arrays (Krizhevsky, 2009)."""
    files = [f"data_batch_{number}" for number in range(1, 6)] if part == "trainval" else ["test_batch"]
    return _cifar(folder, files, "labels", "batches.meta", "label_names")


def cifar100(folder: Path, part: str) -> Samples:
    """train, test and meta, pickles of arrays, read with the 100 fine labels (Krizhevsky, 2009)."""
    return _cifar(folder, ["train" if part == "trainval" else "test"], "fine_labels", "meta", "fine_label_names")


def _cifar(folder: Path, files: list[str], labels_key: str, meta: str, classes_key: str) -> Samples:
    names, labels, pixels = [], [], []
    for file in files:
        content = _unpickled(folder / file)
        data, of_file = content.get("data"), content.get(labels_key)
        if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != 3072:
            raise DatasetError(f"{folder / file}: 'data' should be an array of bytes, 3072 for each image.")
        if not isinstance(of_file, list) or not all(type(label) is int for label in of_file):
            raise DatasetError(f"{folder / file}: '{labels_key}' should be a list of whole numbers.")
        if len(of_file) != len(data):
            raise DatasetError(f"{folder / file}: {len(of_file)} labels for {len(data)} images.")
        names += [f"{file}#{number}" for number in range(len(data))]
        labels += of_file
        pixels.append(data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    classes = _unpickled(folder / meta).get(classes_key)
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise DatasetError(f"{folder / meta}: '{classes_key}' should be a list of names.")
    return samples(names, labels, map(readable, classes), folder / files[0], np.concatenate(pixels))


class _Unpickler(pickle.Unpickler):
    """Unpickles containers, numbers, strings and numpy arrays, and refuses all else, which could run code."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ARRAY_GLOBALS:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, and only arrays and plain data are read")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def _unpickled(file: Path) -> dict[str, Any]:
    try:
        with open(file, "rb") as stream:
            content = _Unpickler(stream, encoding="latin1").load()  # written by Python 2
    except FileNotFoundError as error:
        raise DatasetError(f"{file.absolute()} does not exist.") from error
    except Exception as error:  # a damaged pickle leads the reader anywhere
        raise DatasetError(f"{file.absolute()} cannot be read ({type(error).__name__}: {error}).") from error
    if not isinstance(content, dict):
        raise DatasetError(f"{file.absolute()} should hold a dictionary.")
    return content


class Records:
    """Images of one size in a binary file, read one by one, as STL-10's are too many for the memory of every worker.

    Item `row` is image `numbers[row]` of the file, uint8 (H, W, 3). The file has channels first, columns before rows.
    """

    def __init__(self, file: Path, shape: tuple[int, int, int], numbers: np.ndarray) -> None:
        self.file, self.shape, self.numbers = file, shape, numbers

    def __getitem__(self, row: int) -> np.ndarray:
        size = math.prod(self.shape)
        try:
            content = np.fromfile(self.file, np.uint8, size, offset=int(self.numbers[row]) * size)
            return content.reshape(self.shape).transpose(2, 1, 0)
        except (OSError, ValueError) as error:
            raise DatasetError(f"Image {self.numbers[row]} of {self.file} cannot be read: {error}.") from error


def stl10(folder: Path, part: str, fold: int | None) -> Samples:
    """{train,test,unlabeled}_X.bin, {train,test}_y.bin, class_names.txt, fold_indices.txt (Coates et al., 2011)."""
    name = "train" if part == "trainval" else part
    file = folder / f"{name}_X.bin"
    count, rest = divmod(_size(file), math.prod(_STL_IMAGE))
    if rest:
        raise DatasetError(f"{file.absolute()} is truncated: {rest} bytes after {count} whole images.")
    labels, classes, numbers = None, [], np.arange(count)
    if part != "unlabeled":
        classes = [readable(name) for name in read_lines(folder / "class_names.txt")]
        _size(folder / f"{name}_y.bin")
        labels = np.fromfile(folder / f"{name}_y.bin", np.uint8).astype(np.int64) - 1
        if len(labels) != count:
            raise DatasetError(f"{folder / f'{name}_y.bin'} has {len(labels)} labels for the {count} images of {file}.")
    if fold is not None and part == "trainval":
        numbers = _fold(folder / "fold_indices.txt", fold, count)
        labels = labels[numbers]
    names = (f"{file.name}#{number}" for number in numbers)
    return samples(names, labels, classes, file, Records(file, _STL_IMAGE, numbers))


def _fold(file: Path, fold: int, count: int) -> np.ndarray:
    """The images of one of the folds, of which each is a line of numbers."""
    folds = read_lines(file)
    if isinstance(fold, bool) or fold not in range(len(folds)):
        raise DatasetError(f"fold is {fold!r}; it must be 0 to {len(folds) - 1}, or None for all images.")
    numbers = np.array([whole(word, file) for word in folds[fold].split()])
    if numbers.min() < 0 or numbers.max() >= count:
        raise DatasetError(f"{file.absolute()}, line {fold + 1}: there are only {count} images, counted from 0.")
    return numbers


def fashion_mnist(folder: Path, part: str) -> Samples:
    """{train,t10k}-{images-idx3,labels-idx1}-ubyte, as they are or with .gz (Xiao et al., arXiv 1708.07747)."""
    name = "train" if part == "trainval" else "t10k"
    pixels = _idx(folder / f"{name}-images-idx3-ubyte", 3)
    labels = _idx(folder / f"{name}-labels-idx1-ubyte", 1)
    if len(labels) != len(pixels):
        raise DatasetError(f"{folder / name}-labels-idx1-ubyte: {len(labels)} labels for {len(pixels)} images.")
    file = f"{name}-images-idx3-ubyte"
    names = (f"{file}#{number}" for number in range(len(pixels)))
    return samples(names, labels, FashionMNIST.classes, folder / file, pixels)


def _idx(file: Path, dimensions: int) -> np.ndarray:
    """A file of bytes in `dimensions` dimensions: 0, 0, 8, their number, their sizes as big-endian int32, the data."""
    packed = file.with_name(f"{file.name}.gz")
    if not file.is_file():
        _size(packed)
    try:
        with open(file, "rb") if file.is_file() else gzip.open(packed) as stream:
            content = stream.read(_IDX_LIMIT + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise DatasetError(f"{packed.absolute()} cannot be read ({type(error).__name__}: {error}).") from error
    start = 4 + 4 * dimensions
    if len(content) < start or content[:4] != bytes((0, 0, 8, dimensions)):
        raise DatasetError(f"{file.absolute()} is no idx file of bytes in {dimensions} dimensions.")
    shape = [int(size) for size in np.frombuffer(content, ">i4", dimensions, 4)]
    if min(shape) < 0 or len(content) - start != math.prod(shape):
        raise DatasetError(
            f"{file.absolute()} has {len(content) - start:,} bytes of data and should have {math.prod(shape):,}: "
            "it is truncated or not what it says."
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def _size(file: Path) -> int:
    if not file.is_file():
        raise DatasetError(f"{file.absolute()} does not exist.")
    return file.stat().st_size
