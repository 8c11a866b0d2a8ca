"""What detection sets share: targets cut from arrays, and what becomes of annotations that are wrong."""

import logging
import os
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from bissl_zoo.data.datasets.catalog import load_image
from bissl_zoo.errors import DatasetError

logger = logging.getLogger(__name__)

#: pixels of a side of an image, up to which float32 has every number
SIDE_LIMIT = 1 << 24
#: pixels of a side of a box: tools write hundredths, and the logarithm of what rounding leaves is no target
_LEAST_SIDE = 1e-3

Box = tuple[float, float, float, float]


class DetectionSet(Dataset):
    """Images with boxes. A subclass reads one layout of annotations and calls :meth:`_hold` with what it found.

    A sample is `(image, target)`: the image in RGB with its pixels as stored (EXIF orientation is not applied, because
    boxes count stored pixels), the target a dict with `boxes` float32 (N, 4) as x0, y0, x1, y1 in pixels, 0-based with
    the far edge outside, `labels` int64 (N,) in 0..K-1, `difficult` bool (N,) and `image_id`, the sample's index.

    Attributes:
        layout: what messages call the set.
        classes: the K class names in the order of the labels, None for a set that is read without annotations.

    Args:
        on_bad_annotation: "error", or "skip" for a set without what is wrong; it is counted in the log.
    """

    layout: str
    classes: list[str] | None = None

    def __init__(self, on_bad_annotation: str) -> None:
        if on_bad_annotation not in ("error", "skip"):
            raise DatasetError(f'on_bad_annotation is "{on_bad_annotation}"; accepted are "error" and "skip".')
        self._skip = on_bad_annotation == "skip"
        self._left_out: Counter[str] = Counter()
        self._first_left_out: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> tuple[Image.Image, dict[str, Any] | None]:
        image = load_image(self.source(index), upright=False)
        if self.classes is None:
            return image, None
        annotated = tuple(self._sizes[index].tolist())
        if image.size != annotated:
            problem = (
                f"{self.layout} image {self.source(index)} has {image.width} x {image.height} pixels, but its "
                f"annotation says {annotated[0]} x {annotated[1]}: the boxes belong to another version of the image."
            )
            if image.size == annotated[::-1]:
                problem += " If they were drawn on the picture as its EXIF orientation turns it, store it turned."
            raise DatasetError(problem)
        return image, self.target(index)

    def target(self, index: int) -> dict[str, Any] | None:
        """The target of sample `index`, without decoding its image."""
        if self.classes is None:
            return None
        index = range(len(self))[index]
        objects = slice(self._starts[index], self._starts[index + 1])
        return {
            "boxes": torch.from_numpy(self._boxes[objects].copy()),
            "labels": torch.from_numpy(self._labels[objects].copy()),
            "difficult": torch.from_numpy(self._difficult[objects].copy()),
            "image_id": index,
        }

    def source(self, index: int) -> str:
        """The image file that sample `index` comes from."""
        return os.fsdecode(self._files[index])

    def _hold(
        self,
        files: Sequence[str],
        sizes: Sequence[tuple[int, int]] = (),
        image_of: Sequence[int] = (),
        boxes: Sequence[Box] = (),
        labels: Sequence[int] = (),
        difficult: Sequence[bool] = (),
    ) -> None:
        """Take in all images (`files`, `sizes` as width and height) and all objects, which are of `files[image_of]`."""
        # Arrays, not lists of a million objects: those are copied into every worker as their reference counts change.
        self._files = np.array([os.fsencode(file) for file in files])
        self._sizes = np.array(sizes, dtype=np.int32).reshape(-1, 2)
        by_image = np.argsort(np.array(image_of, dtype=np.int64), kind="stable")
        counts = np.bincount(np.array(image_of, dtype=np.int64), minlength=len(files))
        self._starts = np.concatenate([[0], np.cumsum(counts)])
        self._boxes = np.array(boxes, dtype=np.float32).reshape(-1, 4)[by_image]
        self._labels = np.array(labels, dtype=np.int64)[by_image]
        self._difficult = np.array(difficult, dtype=bool)[by_image]

    def _leave_out(self, kind: str, why: str, problem: str) -> None:
        """Count one of `kind` ("objects" or "images") that is left out, or raise where nothing is."""
        if not self._skip:
            raise DatasetError(
                f'{problem} Fix the file, or pass on_bad_annotation="skip" to leave such {kind} out '
                "(they are counted in the log)."
            )
        self._left_out[f"{kind} {why}"] += 1
        self._first_left_out.setdefault(f"{kind} {why}", problem)

    @property
    def boxes(self) -> np.ndarray:
        """The boxes of all objects, float32 (M, 4)."""
        return self._boxes

    @property
    def difficult(self) -> np.ndarray:
        """Which of them are left out of training, bool (M,)."""
        return self._difficult

    @property
    def sizes(self) -> np.ndarray:
        """Width and height of the images as annotated, int32 (N, 2)."""
        return self._sizes

    @property
    def left_out(self) -> list[tuple[str, str]]:
        """What was left out, as "2 objects with an impossible box", each with the first of it in words or nothing."""
        reasons = sorted(self._left_out.items())
        return [(f"{count:,} {reason}", self._first_left_out.get(reason, "")) for reason, count in reasons]

    def _tell_left_out(self, what: str) -> None:
        if self._left_out:
            logger.warning("%s %s: left out %s", self.layout, what, ", ".join(count for count, _ in self.left_out))


def has_area(box: Box) -> bool:
    """Whether a box has an area worth the name, with the precision in which it is kept."""
    x0, y0, x1, y1 = np.array(box, dtype=np.float32).tolist()
    return min(x1 - x0, y1 - y0) >= _LEAST_SIDE


def first_repeated(values: Sequence[Any]) -> Any:
    """The first of `values` that is there more than once, None where all differ."""
    return next((value for value, count in Counter(values).items() if count > 1), None)
