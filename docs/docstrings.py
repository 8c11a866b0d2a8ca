"""Griffe extension that adapts docstrings to the parser of the site."""

import re
from typing import Any

import griffe

SECTION = re.compile(r"(?<!\n)\n(?=(?:Args|Attributes|Returns|Yields|Raises):\n)")
ROLE = re.compile(r":(?:class|data|func|meth|mod|attr):(?=`)")


class Docstrings(griffe.Extension):
    """Insert the blank line that the parser expects before `Returns:` and `Raises:`, and remove Sphinx roles."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = ROLE.sub("", SECTION.sub("\n\n", obj.docstring.value))
