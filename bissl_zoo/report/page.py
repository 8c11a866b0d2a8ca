"""Pages as blocks: what a report is made of, and the templates that turn it into one HTML file.

Jinja2 escapes all text of a block; what is markup already is made by :mod:`bissl_zoo.report.svg` alone.
"""

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

from bissl_zoo import __version__
from bissl_zoo.errors import BisslZooError
from bissl_zoo.progress.console import printable
from bissl_zoo.report.images.drawing import written

logger = logging.getLogger(__name__)

#: characters of a cell or sentence, above what any is meant to have
_LONGEST = 2000
#: what neither UTF-8 nor XML can hold
_UNFIT = re.compile("[\ud800-\udfff\ufffe\uffff]")


@dataclass(frozen=True)
class Note:
    """A sentence; `problem`: why something is not there."""

    text: str
    problem: bool = False
    kind: ClassVar[str] = "note"


@dataclass(frozen=True)
class Table:
    """Rows of text, named by their first column; the columns `numbers` are set to the right, counted from 0."""

    header: Sequence[str]
    rows: Sequence[Sequence[Any]]
    caption: str = ""
    numbers: Sequence[int] = ()
    wide: bool = False
    kind: ClassVar[str] = "table"


@dataclass(frozen=True)
class Picture:
    """A drawing or photographs; `wide`: it takes a row of its own."""

    markup: Markup
    caption: str
    wide: bool = False
    kind: ClassVar[str] = "picture"


@dataclass(frozen=True)
class Text:
    """Lines of a file, as they are."""

    text: str
    kind: ClassVar[str] = "text"


@dataclass(frozen=True)
class Fold:
    """Blocks that are shown on demand, and on paper."""

    title: str
    blocks: Sequence["Block"]
    kind: ClassVar[str] = "fold"


Block = Note | Table | Picture | Text | Fold


@dataclass(frozen=True)
class Section:
    """A chapter of a report."""

    title: str
    blocks: Sequence[Block]


@dataclass
class Chapters:
    """The sections of one run, each made by itself, so that one that fails leaves the others as they are."""

    name: str
    sections: list[Section] = field(default_factory=list)

    def add(self, title: str, *makers: Callable[[], Sequence[Block]]) -> None:
        """A section of what these make; where one raises, its reason stands in its place and is a warning."""
        blocks = [block for make in makers for block in self._made(title, make)]
        if blocks:
            self.sections.append(Section(title, blocks))

    def _made(self, title: str, make: Callable[[], Sequence[Block]]) -> Sequence[Block]:
        try:
            return make()
        except Exception as error:  # a data set that is gone, a damaged file, a fault in a drawing: all the same
            reason = reason_of(error)
            logger.warning(f"report of {self.name}, {title.lower()}: {printable(reason)}")
            return [Note(reason, problem=True)]


def reason_of(error: Exception) -> str:
    """An exception in words; those that are not for people keep the name of their type."""
    text = str(error)[:_LONGEST]
    return text if isinstance(error, BisslZooError) else f"{type(error).__name__}: {text}"


def shown(value: Any) -> str:
    """A value for a page: numbers with four digits, text without control characters and without end."""
    if value is None:
        return "\u2013"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return f"[{', '.join('null' if one is None else shown(one) for one in value)}]"
    text = _UNFIT.sub("\ufffd", printable(str(value)))
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}\u2026"


def anchor(text: str) -> str:
    """A name for a place of a page."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "part"


@cache
def _environment() -> Environment:
    loader = PackageLoader("bissl_zoo.report", "templates")
    made = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    made.filters.update(shown=shown, anchor=anchor)
    return made


def render(template: str, **content: Any) -> str:
    """A page of one of the templates; dataclasses are given as they are."""
    return _environment().get_template(template).render(**content)


def footer() -> str:
    """The last line of every page."""
    return f"Made by bissl_zoo {__version__} on {time.strftime('%Y-%m-%d at %H:%M')}."


def save_page(page: str, output: Path) -> None:
    """Write a page, complete or not at all.

    Raises:
        ConfigError: it cannot be written.
    """
    with written(output) as draft:
        draft.write_text(page, encoding="utf-8")
