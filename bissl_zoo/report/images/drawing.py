"""What all pictures share: colours, text that is measured, and saving.

Figures are matplotlib's, without pyplot, so that drawing one touches no global state.
"""

import contextlib
import math
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.artist import Artist
from matplotlib.backends.backend_agg import RendererAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from PIL import Image
from torch import Tensor

from bissl_zoo.errors import ConfigError
from bissl_zoo.progress.console import printable
from bissl_zoo.weights.export import draft

#: of Okabe and Ito (2008), told apart with any colour vision; the last is not for what lies on photographs
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#F0E442", "#000000")
#: formats by the ending of a file, with what is left out of it: program and time
FORMATS = {".png": {"Software": None}, ".pdf": {"CreationDate": None}, ".svg": {"Date": None}}
DPI = 150
#: points of text
TITLE, TEXT = 9.0, 7.0
#: of a legend: from a line to the next and between columns, in lines of text; the longest name, in inches
_ROW, _SPACING, _LONGEST = 1.45, 1.4, 2.2


def colour_of(label: int) -> str:
    """The colour of a class on photographs."""
    return COLOURS[label % (len(COLOURS) - 1)]


def as_pixels(image: Any) -> np.ndarray:
    """An image `(H, W, 3)` as matplotlib takes it, of PIL's, of a uint8 tensor `(3, H, W)` or as it is."""
    if isinstance(image, Image.Image):
        return np.asarray(image.convert("RGB"))
    return image.permute(1, 2, 0).numpy() if isinstance(image, Tensor) else np.asarray(image)


def unnormalized(view: Tensor, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """The colours `(H, W, 3)` in [0, 1] of a view `(3, H, W)` that was normalised by these."""
    colours = view.detach().float().cpu() * torch.tensor(std).view(3, 1, 1) + torch.tensor(mean).view(3, 1, 1)
    return colours.clamp(0, 1).permute(1, 2, 0).numpy()


def fitted(text: str, width: float, size: float, weight: str = "normal") -> str:
    """A line of text, its middle left out where it is wider than `width` inches in `size` points."""
    text = " ".join(printable(text).split())
    if text_width(text, size, weight) <= width:
        return text
    fewest, most = 0, len(text)  # characters that are kept: `fewest` fit, `most` do not
    while most - fewest > 1:
        kept = (fewest + most) // 2
        if text_width(_shortened(text, kept), size, weight) <= width:
            fewest = kept
        else:
            most = kept
    return _shortened(text, fewest)


def _shortened(text: str, kept: int) -> str:
    return f"{text[: kept - kept // 2]}\u2026{text[len(text) - kept // 2 :]}"


def text_width(text: str, size: float, weight: str = "normal") -> float:
    """Inches that a line takes in `size` points of the usual font."""
    font = FontProperties(size=size, weight=weight)
    width, _, _ = _renderer().get_text_width_height_descent(text, font, ismath=False)
    return width / DPI


@cache
def _renderer() -> RendererAgg:
    return RendererAgg(1, 1, DPI)


def line_height(size: float) -> float:
    """Inches from a line to the next."""
    return size * 1.3 / 72


Entry = tuple[str, Artist]


def legend_height(entries: Sequence[Entry], width: float) -> float:
    """Inches that a legend of this width takes."""
    return math.ceil(len(entries) / _legend_columns(entries, width)) * _ROW * TEXT / 72 if entries else 0.0


def add_legend(figure: Figure, entries: Sequence[Entry], width: float, bottom: float) -> None:
    """Say at the foot of a figure what its colours mean, `bottom` inches from below."""
    if not entries:
        return
    legend = figure.legend(
        handles=[artist for _, artist in entries],
        labels=["x"] * len(entries),  # matplotlib drops labels that begin with an underscore
        loc="lower center",
        bbox_to_anchor=(0.5, bottom / figure.get_figheight()),
        ncols=_legend_columns(entries, width),
        fontsize=TEXT,
        frameon=False,
        handlelength=1.6,
        labelspacing=0.4,
        columnspacing=_SPACING,
        borderpad=0.0,
        borderaxespad=0.0,
    )
    for text, (name, _) in zip(legend.get_texts(), entries, strict=True):
        text.set_parse_math(False)  # a dollar sign is one
        text.set_text(fitted(name, min(width, _LONGEST), TEXT))


def _legend_columns(entries: Sequence[Entry], width: float) -> int:
    widest = max(text_width(fitted(name, min(width, _LONGEST), TEXT), TEXT) for name, _ in entries)
    return max(1, min(len(entries), int(width / (widest + (1.6 + 0.8 + _SPACING) * TEXT / 72))))


def check_format(path: Path) -> Path:
    """Return the path of a picture, if its ending is one of a format that can be written.

    Raises:
        ConfigError: it is not.
    """
    if path.suffix.lower() not in FORMATS:
        raise ConfigError(f"{path}: a picture's name ends in {', '.join(FORMATS)}, which says its format.")
    return path


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure at 150 dpi in the format that the ending names; the file appears complete or not at all.

    Raises:
        ConfigError: another ending, or it cannot be written.
    """
    ending = check_format(path).suffix.lower()
    with written(path) as file:
        figure.savefig(file, dpi=DPI, format=ending[1:], metadata=FORMATS[ending])


@contextlib.contextmanager
def written(path: Path) -> Iterator[Path]:
    """A file beside `path` to write to, which takes its place once the block has ended well.

    Raises:
        ConfigError: it cannot be written.
    """
    try:
        with draft(path) as file:
            yield file
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror or error}.") from error
