"""Draw images, boxes and captions on matplotlib axes; matplotlib is imported on the first call."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: colours of Okabe and Ito (2008), distinct with any colour vision, and three of Tol's for data sets of ten classes
COLOURS = (
    "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#F0E442", "#882255", "#332288", "#999933",
)  # fmt: skip
#: points of captions and of the names on boxes
CAPTION, NAME = 7.0, 5.5
#: images with more boxes are drawn without names on the boxes
_NAMED = 12


def colour_of(label: int) -> str:
    """Return the colour of a class; 10 colours repeat."""
    return COLOURS[label % len(COLOURS)]


def as_pixels(image: Any) -> np.ndarray:
    """Return an image as an array `(H, W, 3)`: a PIL image, a tensor `(3, H, W)`, or an array as it is."""
    if isinstance(image, Image.Image):
        return np.asarray(image.convert("RGB"))
    return image.permute(1, 2, 0).numpy() if isinstance(image, Tensor) else np.asarray(image)


def show_image(axes: "Axes", image: Any, caption: str = "") -> None:
    """Show an image on axes in its own pixel coordinates, with a caption above it that is cut to the axes' width."""
    pixels = as_pixels(image)
    height, width = pixels.shape[:2]
    axes.imshow(pixels, extent=(0, width, height, 0))
    axes.set_axis_off()
    write_caption(axes, caption)


def write_caption(axes: "Axes", caption: str) -> None:
    """Set the title of axes; each line is cut to the width of the axes."""
    room = axes.get_position().width * axes.figure.get_figwidth() * 72 / (0.55 * CAPTION)
    lines = [shorten(line, max(12, int(room))) for line in caption.splitlines()]
    axes.set_title("\n".join(lines), fontsize=CAPTION, parse_math=False)


def shorten(text: str, length: int) -> str:
    """Return a text without control characters and at most `length` characters long, with its middle left out."""
    text = "".join(character if character.isprintable() else " " for character in text)
    if len(text) <= length:
        return text
    room = length - 1
    return f"{text[: room - room // 2]}\u2026{text[len(text) - room // 2 :]}"


def draw_boxes(
    axes: "Axes", boxes: Any, labels: Sequence[int], names: Sequence[str], dashed: Sequence[bool] | None = None
) -> None:
    """Draw boxes in the colours of their classes, with their names if there are at most 12.

    Args:
        boxes: `(N, 4)` as x0, y0, x1, y1 in pixels.
        labels, names: class index and text of each box; dashed: boxes to draw with a dashed line.
    """
    from matplotlib.patches import Rectangle

    corners = np.asarray(boxes, dtype=float).reshape(-1, 4).tolist()
    dashed = [False] * len(corners) if dashed is None else dashed
    for (x0, y0, x1, y1), label, name, dash in zip(corners, labels, names, dashed, strict=True):
        colour, line = colour_of(label), "--" if dash else "-"
        axes.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, color=colour, linewidth=1.3, linestyle=line))
        if len(corners) <= _NAMED:
            box = {"facecolor": colour, "edgecolor": "none", "pad": 0.8}
            style = {"fontsize": NAME, "va": "bottom", "bbox": box, "parse_math": False, "clip_on": True}
            axes.text(x0, max(y0, 0.05 * axes.get_ylim()[0]), shorten(name, 30), color=_ink(colour), **style)


def _ink(colour: str) -> str:
    """Return black or white, whichever is readable on a colour."""
    red, green, blue = (int(colour[start : start + 2], 16) for start in (1, 3, 5))
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else "white"
