"""Drawing splits where a data set comes without: from each class alike, and the same on every machine."""

import math

import numpy as np

from bissl_zoo.errors import DatasetError


def draw_fraction(labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Draw the same part of every class, rounded down, but one of a class of two to four or so rather than none.

    Args:
        labels: int64 (N,).
    Returns:
        bool (N,), True for what is drawn; a class's own draw depends on `seed`, its label and its size alone.
    Raises:
        DatasetError: the fraction is not between 0 and 1, the seed is negative, labels are not one per sample, or
            nothing would be drawn.
    """
    if isinstance(fraction, bool) or not isinstance(fraction, (int, float)) or not 0 < fraction < 1:
        raise DatasetError(f"val_fraction is {fraction!r}; it must lie between 0 and 1, such as 0.2.")
    sizes = np.bincount(_checked(labels))
    # what a float falls short of a whole number by is no reason to round down
    counts = np.maximum(np.floor(sizes * fraction + 1e-9), 1).astype(np.int64)
    drawn = _draw(labels, np.minimum(counts, np.maximum(sizes - 1, 0)), seed)
    if not drawn.any():
        raise DatasetError("No validation images can be drawn: no class has two images.")
    return drawn


def draw_per_class(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Draw `count` samples of every class; bool (N,) as of :func:`draw_fraction`.

    Raises:
        DatasetError: a class has no more than `count`, so that none would be left, or as of :func:`draw_fraction`.
    """
    sizes = np.bincount(_checked(labels))
    few = np.flatnonzero((sizes > 0) & (sizes <= count))
    if len(few):
        raise DatasetError(
            f"Class {few[0]} has {sizes[few[0]]} images. Of each class {count} are drawn, and one must be left."
        )
    return _draw(labels, np.where(sizes > 0, count, 0), seed)


def _checked(labels: np.ndarray) -> np.ndarray:
    if labels.ndim != 1:
        raise DatasetError(
            "Splits are drawn of data with one label per image only. Use the splits that such a set comes with."
        )
    return labels


def _draw(labels: np.ndarray, counts: np.ndarray, seed: int) -> np.ndarray:
    """Draw `counts[label]` samples of each class."""
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < math.inf:
        raise DatasetError(f"seed is {seed!r}; it must be a whole number from 0 on.")
    drawn = np.zeros(len(labels), dtype=bool)
    # one stable sort rather than a pass over all labels per class
    members = np.split(np.argsort(labels, kind="stable"), np.cumsum(np.bincount(labels, minlength=len(counts)))[:-1])
    for label, (of_class, count) in enumerate(zip(members, counts.tolist(), strict=True)):
        drawn[np.random.default_rng((seed, label)).permutation(of_class)[:count]] = True
    return drawn
