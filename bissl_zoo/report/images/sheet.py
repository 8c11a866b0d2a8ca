"""Images on a sheet, captions under them, boxes on them."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle

from bissl_zoo.report.images.drawing import (
    DPI,
    TEXT,
    TITLE,
    Entry,
    add_legend,
    as_pixels,
    colour_of,
    fitted,
    legend_height,
    line_height,
    text_width,
)

#: inches around everything, and between cells
_MARGIN, _GAP = 0.12, 0.1
#: points of the names on boxes, and of the padding around them
_NAME, _PAD = 5.5, 0.8
#: objects in an image, up to which every box has its name where the legend says it too
_NAMED = 8


class Sheet:
    """Rows of images with a caption under each.

    All is placed in inches when it is added and nothing when the figure is drawn: axes have the shape of their images,
    a pixel (x, y) of an image covers [x, x + 1] by [y, y + 1] of its axes, and text is cut to the room it has.

    Args:
        widths: of the columns, in inches; height: of the images of each row.
        lines: of text under each image; heads: above the first row.
        legend: names with the colour of each, for the foot; none for no foot.
    """

    def __init__(
        self,
        widths: Sequence[float],
        height: float,
        rows: int,
        lines: int,
        title: str,
        heads: int = 0,
        legend: Sequence[Entry] = (),
    ) -> None:
        self.widths, self.height, self.lines = list(widths), height, lines
        width = max(sum(widths) + _GAP * (len(widths) - 1), 2.0)
        foot = legend_height(legend, width)
        above = _MARGIN + line_height(TITLE) + _GAP + heads * line_height(TEXT)
        self._step = height + lines * line_height(TEXT) + _GAP
        self._size = width + 2 * _MARGIN, above + rows * self._step + foot + _MARGIN
        self._top = self._size[1] - above
        self.figure = Figure(figsize=self._size, dpi=DPI, facecolor="white")
        self._text(_MARGIN, self._size[1] - _MARGIN, fitted(title, width, TITLE, "bold"), TITLE, weight="bold")
        add_legend(self.figure, legend, width, _MARGIN / 2)

    def head(self, column: int, lines: Sequence[str]) -> None:
        """Say what a column holds."""
        self._lines(self._left(column), self._top + len(lines) * line_height(TEXT), lines, self.widths[column])

    def image(
        self,
        row: int,
        column: int,
        image: Any,
        caption: Sequence[str] = (),
        height: float | None = None,
        colours: Sequence[str] = (),
    ) -> Axes:
        """Add an image, as large as its cell allows, or `height` inches high.

        Args:
            image: PIL's, uint8 `(3, H, W)`, or float `(H, W, 3)` in [0, 1].
            caption: a text for each line below it; colours: of the lines, black by default.
        """
        pixels = as_pixels(image)
        rows, columns = pixels.shape[:2]
        room = self.widths[column]
        height = min(height or self.height, room * rows / columns)
        width = height * columns / rows
        left, top = self._left(column), self._top - row * self._step
        where = left + (room - width) / 2, top - (self.height + height) / 2, width, height
        axes = self.figure.add_axes([part / size for part, size in zip(where, self._size * 2, strict=True)])
        axes.imshow(pixels, extent=(0, columns, rows, 0), aspect="auto")
        axes.set_axis_off()
        self._lines(left, top - self.height - 0.02, caption, room, colours)
        return axes

    def _left(self, column: int) -> float:
        return _MARGIN + sum(self.widths[:column]) + column * _GAP

    def _lines(self, left: float, top: float, lines: Sequence[str], width: float, colours: Sequence[str] = ()) -> None:
        for number, line in enumerate(lines):
            colour = colours[number] if number < len(colours) else "black"
            self._text(left, top - number * line_height(TEXT), fitted(line, width, TEXT), TEXT, color=colour)

    def _text(self, left: float, top: float, text: str, size: float, **style: Any) -> None:
        x, y = left / self._size[0], top / self._size[1]
        self.figure.text(x, y, text, fontsize=size, ha="left", va="top", parse_math=False, **style)


def cell_height(images: Iterable[Any], width: float) -> float:
    """Inches that a row needs for the tallest of these images in cells of this width, and `width` at most."""
    shapes = [as_pixels(image).shape for image in images]
    return width * min(1.0, max((rows / columns for rows, columns, _ in shapes), default=1.0))


def draw_boxes(
    axes: Axes,
    boxes: Any,
    labels: Sequence[int],
    texts: Sequence[str],
    dashed: Sequence[bool] | None = None,
    legend: bool = False,
) -> None:
    """Boxes on the image of a sheet, in the colours of their classes, with a name where there is room for it.

    No name covers another. Where a legend tells the classes, a crowd of boxes has none.

    Args:
        boxes: `(N, 4)` as x0, y0, x1, y1 in pixels, the far edge outside.
        texts: what stands at each box; dashed: which are drawn so.
        legend: whether the colours say which class it is.
    """
    taken: list[tuple[float, float, float, float]] = []
    crowded = legend and len(texts) > _NAMED
    for number, (x0, y0, x1, y1) in enumerate(np.asarray(boxes, dtype=float).reshape(-1, 4).tolist()):
        colour = colour_of(labels[number])
        line = "--" if dashed is not None and dashed[number] else "-"
        look = {"edgecolor": colour, "facecolor": "none", "linewidth": 1.3, "linestyle": line}
        axes.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, **look))
        if not crowded:
            _name_box(axes, (x0, y0, x1, y1), texts[number], colour, taken)


def _name_box(
    axes: Axes, box: tuple[float, ...], text: str, colour: str, taken: list[tuple[float, float, float, float]]
) -> None:
    """Write a name at a corner of its box where it covers none of the names in `taken`, or nowhere."""
    columns, rows = axes.get_xlim()[1], axes.get_ylim()[0]
    inches = axes.get_position().width * axes.figure.get_figwidth()
    scale, pad = columns / inches, 2 * _PAD / 72
    text = fitted(text, inches - pad, _NAME)
    width, height = (text_width(text, _NAME) + pad) * scale, (_NAME * 1.15 / 72 + pad) * scale
    if height > rows:
        return
    x0, y0, x1, y1 = box
    for left, top in [(x0, y0 - height), (x0, y1), (x0, y0), (x0, y1 - height), (x1 - width, y0 - height)]:
        left, top = min(max(left, 0.0), columns - width), min(max(top, 0.0), rows - height)
        place = left, top, left + width, top + height
        if not any(_meet(place, other) for other in taken):
            taken.append(place)
            style = {"facecolor": colour, "edgecolor": "none", "boxstyle": f"square,pad={_PAD / _NAME}"}
            inset = _PAD / 72 * scale
            where = left + inset, top + height / 2
            light = np.dot([int(colour[i : i + 2], 16) for i in (1, 3, 5)], [0.299, 0.587, 0.114]) > 140
            written = {"fontsize": _NAME, "va": "center_baseline", "bbox": style, "parse_math": False}
            axes.text(*where, text, color="black" if light else "white", **written)
            return


def _meet(one: Sequence[float], other: Sequence[float]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def class_legend(labels: Iterable[int], classes: Sequence[str]) -> list[Entry]:
    """The classes that occur, with their colours; empty where two of them would share one."""
    present = sorted(set(labels))
    if len({colour_of(label) for label in present}) < len(present):
        return []
    return [(classes[label], Patch(facecolor=colour_of(label), edgecolor="0.3")) for label in present]


def dashed_line(name: str) -> Entry:
    """An entry of a legend for dashed boxes."""
    return name, Line2D([], [], color="0.3", linestyle="--", linewidth=1.1)
