"""What images a foreign checkpoint's network takes: the order of their channels, their mean and standard deviation."""

import re
from collections.abc import Mapping
from operator import sub
from pathlib import Path
from typing import Any

from torch import Tensor

from bissl_zoo.errors import ZooError
from bissl_zoo.weights.formats import CAFFE, IMAGENET, Format

#: who writes Detectron2 files of networks that were trained on RGB images
_RGB_AUTHORS = ("torchvision", "MOCO", "solo-learn", "timm", "bissl_zoo")


def find_pixels(
    layout: Format, content: Any, tensors: Mapping[str, Tensor], told: str | None, path: Path
) -> tuple[str, dict[str, Any] | None]:
    """The order of channels that a file's first convolution takes, and the pixel statistics once it is turned to RGB.

    Args:
        told: "RGB" or "BGR" from the caller, for files that do not say.
    Raises:
        ZooError: neither the file nor the caller says.
    """
    if told not in (None, "RGB", "BGR"):
        raise ZooError(f"channel_order is 'RGB' or 'BGR', not {told!r}.")
    if layout.name == "caffe2":
        return "BGR", as_pixels(*CAFFE)
    if layout.name != "detectron2":
        return told or "RGB", layout.pixels and as_pixels(*layout.pixels)
    mean, std = (_stated(tensors, content, key) for key in ("pixel_mean", "pixel_std"))
    order = told or _stated_order(content, mean)
    if order is None:
        raise ZooError(
            f"{path} (layout 'detectron2') does not say whether its network takes RGB or BGR images. Pass "
            "channel_order='BGR' for Detectron2's own models (BGR is its default for INPUT.FORMAT), or 'RGB' "
            "(tools/convert.py in --channel-order)."
        )
    if mean is None:
        return order, as_pixels(*(IMAGENET if order == "RGB" else CAFFE))
    turn = slice(None, None, -1 if order == "BGR" else 1)
    return order, as_pixels([v / 255 for v in mean[turn]], [v / 255 for v in (std or [1.0] * 3)[turn]])


def _stated_order(content: Any, mean: list[float] | None) -> str | None:
    """The order that this zoo wrote beside a model, or that follows from who wrote it or from ImageNet's mean."""
    content = content if isinstance(content, Mapping) else {}
    said = content.get("input")
    if isinstance(said, Mapping) and said.get("format") in ("RGB", "BGR"):
        return said["format"]
    if content.get("__author__") in _RGB_AUTHORS:
        return "RGB"
    known = {"RGB": [255 * value for value in CAFFE[0]], "BGR": [255 * value for value in reversed(CAFFE[0])]}
    found = [order for order, values in known.items() if mean and max(map(abs, map(sub, mean, values))) < 0.01]
    return found[0] if found else None


def _stated(tensors: Mapping[str, Tensor], content: Any, key: str) -> list[float] | None:
    """Pixel statistics that Detectron2 keeps as buffers of a model, or that this zoo writes beside one."""
    for name, tensor in tensors.items():
        if re.fullmatch(rf"(model\.)?{key}", name) and tensor.numel() == 3:
            return tensor.flatten().tolist()
    said = content.get("input") if isinstance(content, Mapping) else None
    values = said.get(key) if isinstance(said, Mapping) else None
    return [float(value) for value in values] if isinstance(values, list | tuple) and len(values) == 3 else None


def as_pixels(mean: Any, std: Any) -> dict[str, Any]:
    """Mean and standard deviation of RGB images scaled to [0, 1], as a zoo entry states them."""
    return {"channel_order": "RGB", "mean": [float(value) for value in mean], "std": [float(value) for value in std]}
