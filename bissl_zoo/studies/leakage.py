"""Near-duplicate images between data sets: test images that were seen in training make every arm look better."""

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from bissl_zoo.errors import DatasetError
from bissl_zoo.files import read_json, write_atomically

logger = logging.getLogger(__name__)

#: the sentences about near-duplicates, in the folder of a comparison
LEAKAGE_FILE = "leakage.json"

#: rows and columns of brightness differences
_SIDE = 16
#: images whose hashes differ in at most this many of 256 bits are near-duplicates
MAX_DISTANCE = 16
#: hash bits that must be set, and unset, for an image with enough structure to compare
_MIN_STRUCTURE = 16
#: hashes compared at a time
_CHUNK = 1024


@dataclass(frozen=True)
class Leakage:
    """The near-duplicates of one data set in another.

    Attributes:
        first, second: roles of the data sets.
        count: images of `second` with a near-duplicate in `first`.
        total: images of `second`.
        examples: up to three pairs of names.
    """

    first: str
    second: str
    count: int
    total: int
    examples: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        pairs = "; ".join(" ~ ".join(pair) for pair in self.examples)
        return f"{self.count} of {self.total} images of {self.second} have a near-duplicate in {self.first}: {pairs}"


def look_for_leakage(folder: Path, data: dict[str, Dataset]) -> list[str]:
    """Return sentences about the near-duplicates between data sets; search once and keep the result in the folder.

    Args:
        data: data sets by role; those of shards, which are read as streams, are left out.
    """
    if not (folder / LEAKAGE_FILE).exists():
        logger.info("looking for near-duplicates between the data sets")
        found = find_leakage({role: each for role, each in data.items() if not hasattr(each, "stream")})
        content = {"near-duplicates": list(map(str, found))}
        write_atomically(folder / LEAKAGE_FILE, json.dumps(content, indent=2) + "\n")
    return recorded_leakage(folder)


def recorded_leakage(folder: Path) -> list[str]:
    """Return the sentences of :func:`look_for_leakage`; none if it has not been called."""
    file = folder / LEAKAGE_FILE
    return read_json(file)["near-duplicates"] if file.exists() else []


def image_hashes(dataset: Dataset) -> np.ndarray:
    """Return the difference hash of every image, uint8 (N, 32): is a pixel of the 17 x 16 image darker than the next?

    The hash hardly changes with scale, compression and brightness. Images that cannot be decoded, and those with almost
    no structure, have a hash of zeros, which is compared with no other.
    """
    hashes = np.zeros((len(dataset), _SIDE * _SIDE // 8), dtype=np.uint8)
    for index in range(len(dataset)):
        try:
            image = dataset[index][0]
        except DatasetError:
            continue
        bits = _bits(image)
        if _MIN_STRUCTURE <= bits.sum() <= bits.size - _MIN_STRUCTURE:
            hashes[index] = np.packbits(bits)
    return hashes


def _bits(image: Any) -> np.ndarray:
    if not isinstance(image, Image.Image):  # (3, H, W) uint8
        image = Image.fromarray(image.permute(1, 2, 0).numpy())
    small = np.asarray(image.convert("L").resize((_SIDE + 1, _SIDE), Image.Resampling.BOX), dtype=np.int16)
    return small[:, :-1] < small[:, 1:]


def find_leakage(data: dict[str, Dataset]) -> list[Leakage]:
    """Return the near-duplicates of test and validation images in the other data sets.

    Pairs of one and the same file are left out, and so are pretext and training images, which may be the same.

    Args:
        data: data sets by role; of a pair, the later one is the one whose images are counted.
    """
    hashes = {role: image_hashes(dataset) for role, dataset in data.items()}
    names = {role: [_name(dataset, index) for index in range(len(dataset))] for role, dataset in data.items()}
    roles, found = list(data), []
    for place, second in enumerate(roles):
        for first in roles[:place] if second in ("val", "test") else ():
            same_files = set(names[first]) & set(names[second])
            pairs = [
                (names[first][i], names[second][j])
                for i, j in _near(hashes[first], hashes[second])
                if names[second][j] not in same_files
            ]
            if pairs:
                found.append(Leakage(first, second, len(pairs), len(data[second]), tuple(pairs[:3])))
    return found


def _near(first: np.ndarray, second: np.ndarray) -> list[tuple[int, int]]:
    """Return the nearest row of `first` for each row of `second` that has one within `MAX_DISTANCE` bits."""
    pairs = []
    rows = [np.flatnonzero(hashes.any(axis=1)) for hashes in (first, second)]
    a, b = (
        np.unpackbits(hashes[kept], axis=1).astype(np.float32)
        for hashes, kept in zip((first, second), rows, strict=True)
    )
    for start in range(0, len(b) if len(a) else 0, _CHUNK):
        block = b[start : start + _CHUNK]
        distances = block.sum(1)[:, None] + a.sum(1)[None] - 2 * block @ a.T
        nearest = distances.argmin(axis=1)
        close = np.flatnonzero(distances[np.arange(len(block)), nearest] <= MAX_DISTANCE)
        pairs += [(int(rows[0][nearest[row]]), int(rows[1][start + row])) for row in close]
    return pairs


def _name(dataset: Dataset, index: int) -> str:
    return dataset.source(index) if hasattr(dataset, "source") else f"sample {index}"
