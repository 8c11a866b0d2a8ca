"""Pages as blocks: the parts of a report, embedded figures, and the templates that make one HTML file of them.

Jinja2 escapes all text of a block. The only markup is made by :func:`embed`: figures are embedded as data URIs in `img`
elements, where a browser runs no script and loads nothing.
"""

import base64
import io
import logging
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.figure import Figure
from PIL import Image

from bissl_zoo import __version__
from bissl_zoo.errors import BisslZooError, ConfigError, printable
from bissl_zoo.files import write_atomically

logger = logging.getLogger(__name__)

#: points of text in charts, readable on a phone
TEXT = 9.0
#: metadata to leave out, so that equal figures give equal bytes
_METADATA = {"svg": {"Date": None, "Creator": None, "Format": None, "Type": None}, "png": {"Software": None}}
_MIME = {"svg": "image/svg+xml", "png": "image/png"}
_DPI = 150
_STYLE = {
    "font.size": TEXT,
    "axes.titlesize": TEXT + 1,
    "axes.labelsize": TEXT,
    "xtick.labelsize": TEXT - 1,
    "ytick.labelsize": TEXT - 1,
    "legend.fontsize": TEXT - 1,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.formatter.limits": (-4, 5),
    "axes.formatter.useoffset": False,
    "lines.linewidth": 1.4,
    "text.parse_math": False,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "font.family": ["sans-serif"],
    "svg.hashsalt": "bissl_zoo",
}
#: maximum characters of a cell or sentence
_LONGEST = 2000
#: characters that UTF-8 or XML cannot hold
_INVALID = re.compile("[\ud800-\udfff\ufffe\uffff]")


@dataclass(frozen=True)
class Note:
    """A sentence; `problem`: it gives the reason for a missing part."""

    text: str
    problem: bool = False
    kind: ClassVar[str] = "note"


@dataclass(frozen=True)
class Table:
    """Rows named by their first column; the columns `numbers`, counted from 0, are aligned to the right."""

    header: Sequence[str]
    rows: Sequence[Sequence[Any]]
    caption: str = ""
    numbers: Sequence[int] = ()
    wide: bool = False
    kind: ClassVar[str] = "table"


@dataclass(frozen=True)
class Chart:
    """A figure; `wide`: it spans all columns of the page."""

    markup: Markup
    caption: str
    wide: bool = False
    kind: ClassVar[str] = "chart"


@dataclass(frozen=True)
class Text:
    """The text of a file, unchanged."""

    text: str
    kind: ClassVar[str] = "text"


@dataclass(frozen=True)
class Fold:
    """Blocks that are shown on demand, and in print."""

    title: str
    blocks: Sequence["Block"]
    kind: ClassVar[str] = "fold"


Block = Note | Table | Chart | Text | Fold


@dataclass(frozen=True)
class Section:
    """A section of a report."""

    title: str
    blocks: Sequence[Block]


@dataclass
class Sections:
    """The sections of one run; an error in one of them does not affect the others."""

    name: str
    sections: list[Section] = field(default_factory=list)

    def add(self, title: str, *makers: Callable[[], Sequence[Block]]) -> None:
        """Add a section of the blocks that the functions return; if one raises, log a warning and show the reason."""
        blocks = [block for make in makers for block in self._make(title, make)]
        if blocks:
            self.sections.append(Section(title, blocks))

    def _make(self, title: str, make: Callable[[], Sequence[Block]]) -> Sequence[Block]:
        try:
            return make()
        except Exception as error:  # a missing data set, a damaged file, an error of a user's part
            reason = reason_of(error)
            logger.warning(f"report of {self.name}, {title.lower()}: {printable(reason)}")
            return [Note(reason, problem=True)]


def reason_of(error: Exception) -> str:
    """Return the message of an exception, with its type unless it is an error of this package."""
    text = str(error)[:_LONGEST]
    return text if isinstance(error, BisslZooError) else f"{type(error).__name__}: {text}"


def chart_style() -> rc_context:
    """Return the matplotlib settings to draw charts in."""
    return rc_context(_STYLE)


def embed(figure: Figure, alt: str, kind: str = "svg") -> Markup:
    """Return a figure as an `img` element with its data inside: `kind` "svg" for charts, "png" for photographs."""
    data = io.BytesIO()
    with chart_style():
        trim = {"bbox_inches": "tight", "pad_inches": 0.03} if kind == "png" else {}
        figure.savefig(data, format=kind, dpi=_DPI, metadata=_METADATA[kind], **trim)
    width, height = (round(96 * inches) for inches in figure.get_size_inches())
    if kind == "png":
        width, height = Image.open(data).size
    tag = Markup('<img class="{}" src="data:{};base64,{}" alt="{}" width="{}" height="{}">')
    return tag.format(kind, _MIME[kind], base64.b64encode(data.getvalue()).decode(), alt, width, height)


def shown(value: Any) -> str:
    """Return a value as text: floats with four digits, no control characters, at most 2000 characters."""
    if value is None:
        return "\u2013"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return f"[{', '.join('null' if item is None else shown(item) for item in value)}]"
    text = _INVALID.sub("\ufffd", printable(str(value)))
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}\u2026"


def anchor(text: str) -> str:
    """Return the id of a section from its title."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "part"


@cache
def _environment() -> Environment:
    loader = PackageLoader("bissl_zoo.report", "templates")
    made = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    made.filters.update(shown=shown, anchor=anchor)
    return made


def render(template: str, **content: Any) -> str:
    """Return the page of a template."""
    return _environment().get_template(template).render(**content)


def footer() -> str:
    """Return the last line of every page."""
    return f"Made by bissl_zoo {__version__} on {time.strftime('%Y-%m-%d at %H:%M')}."


def save_page(page: str, output: Path) -> None:
    """Write a page atomically.

    Raises:
        ConfigError: the file cannot be written.
    """
    try:
        write_atomically(output, page)
    except OSError as error:
        raise ConfigError(f"{output} cannot be written: {error.strerror or error}.") from error
