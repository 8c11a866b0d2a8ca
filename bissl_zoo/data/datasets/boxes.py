"""The base class of detection sets: targets as slices of arrays, and the handling of wrong annotations."""

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

#: largest side of an image in pixels; float32 represents every integer up to it
MAX_SIDE = 1 << 24
#: smallest side of a box in pixels: tools write hundredths, and rounding errors of boxes are no targets
_MIN_SIDE = 1e-3

Box = tuple[float, float, float, float]


class DetectionSet(Dataset):
    """Images with boxes. A subclass reads one layout of annotations and calls :meth:`_store`.

    A sample is `(image, target)`: the image in RGB with its pixels as stored (EXIF orientation is not applied, because
    boxes count stored pixels), the target a dict with `boxes` float32 (N, 4) as x0, y0, x1, y1 in pixels, 0-based with
    the far edge outside, `labels` int64 (N,) in 0..K-1, `difficult` bool (N,) and `image_id`, the sample's index.

    Attributes:
        layout: name of the layout in messages.
        classes: the K class names in the order of the labels; None for a set that is read without annotations.
        boxes, difficult: of all objects, float32 (M, 4) and bool (M,); difficult objects are not used in training.
        sizes: annotated width and height of the images, int32 (N, 2).

    Args:
        on_bad_annotation: "error", or "skip" to leave out what is wrong and log the count.
    """

    layout: str
    classes: list[str] | None = None

    def __init__(self, on_bad_annotation: str) -> None:
        self._skip = on_bad_annotation == "skip"
        self._left_out: Counter[str] = Counter()
        self._first_left_out: dict[str, str] = {}

    @property
    def targets(self) -> np.ndarray | None:
        """Labels of all objects that are not difficult, int64 (M,); None if the set is read without annotations."""
        return self._labels[~self.difficult] if self.classes is not None else None

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> tuple[Image.Image, dict[str, Any] | None]:
        image = load_image(self.source(index), upright=False)
        if self.classes is None:
            return image, None
        annotated = tuple(self.sizes[index].tolist())
        if image.size != annotated:
            hint = " If they were drawn on the upright image, store it upright, without EXIF orientation."
            raise DatasetError(
                f"{self.layout} image {self.source(index)} has {image.width} x {image.height} pixels, but its "
                f"annotation has {annotated[0]} x {annotated[1]}: the boxes belong to another version of the image."
                f"{hint if image.size == annotated[::-1] else ''}"
            )
        return image, self.target(index)

    def target(self, index: int) -> dict[str, Any] | None:
        """Return the target of sample `index` without decoding its image."""
        if self.classes is None:
            return None
        index = range(len(self))[index]
        objects = slice(self._starts[index], self._starts[index + 1])
        return {
            "boxes": torch.from_numpy(self.boxes[objects].copy()),
            "labels": torch.from_numpy(self._labels[objects].copy()),
            "difficult": torch.from_numpy(self.difficult[objects].copy()),
            "image_id": index,
        }

    def source(self, index: int) -> str:
        """Return the image file of sample `index`."""
        return os.fsdecode(self._files[index])

    def _store(
        self,
        files: Sequence[str],
        sizes: Sequence[tuple[int, int]] = (),
        image_of: Sequence[int] = (),
        boxes: Sequence[Box] = (),
        labels: Sequence[int] = (),
        difficult: Sequence[bool] = (),
    ) -> None:
        """Store all images (`files`, `sizes` as width and height) and all objects, which belong to `image_of`."""
        # arrays, not lists: reference counts of a million objects would be copied into every worker
        self._files = np.array([os.fsencode(file) for file in files])
        self.sizes = np.array(sizes, dtype=np.int32).reshape(-1, 2)
        by_image = np.argsort(np.array(image_of, dtype=np.int64), kind="stable")
        counts = np.bincount(np.array(image_of, dtype=np.int64), minlength=len(files))
        self._starts = np.concatenate([[0], np.cumsum(counts)])
        self.boxes = np.array(boxes, dtype=np.float32).reshape(-1, 4)[by_image]
        self._labels = np.array(labels, dtype=np.int64)[by_image]
        self.difficult = np.array(difficult, dtype=bool)[by_image]

    def _leave_out(self, kind: str, why: str, problem: str) -> None:
        """Count a left-out object or image (`kind` is "objects" or "images").

        Raises:
            DatasetError: nothing may be left out.
        """
        if not self._skip:
            raise DatasetError(
                f'{problem} Fix the file, or pass on_bad_annotation="skip" to leave such {kind} out '
                "(they are counted in the log)."
            )
        self._left_out[f"{kind} {why}"] += 1
        self._first_left_out.setdefault(f"{kind} {why}", problem)

    @property
    def left_out(self) -> list[tuple[str, str]]:
        """Counts of what was left out, such as "2 objects with an impossible box", each with the first problem."""
        reasons = sorted(self._left_out.items())
        return [(f"{count:,} {reason}", self._first_left_out.get(reason, "")) for reason, count in reasons]

    def _log_left_out(self, what: str) -> None:
        if self._left_out:
            logger.warning("%s %s: left out %s", self.layout, what, ", ".join(count for count, _ in self.left_out))


def has_area(box: Box) -> bool:
    """Return whether both sides of a box are long enough in float32."""
    x0, y0, x1, y1 = np.array(box, dtype=np.float32).tolist()
    return min(x1 - x0, y1 - y0) >= _MIN_SIDE
