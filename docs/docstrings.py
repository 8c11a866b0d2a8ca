"""How the site reads docstrings."""

import re
from typing import Any

import griffe

SECTION = re.compile(r"(?<!\n)\n(?=(?:Args|Attributes|Returns|Yields|Raises):\n)")
ROLE = re.compile(r":(?:class|data|func|meth|mod|attr):(?=`)")


class Docstrings(griffe.Extension):
    """Have the parser find `Returns:` and `Raises:` where no blank line is above them, and leave Sphinx's roles out."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = ROLE.sub("", SECTION.sub("\n\n", obj.docstring.value))
