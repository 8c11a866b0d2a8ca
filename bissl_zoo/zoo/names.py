"""Names of zoo entries and their files, and how they are told."""

import hashlib
import re
from pathlib import Path
from typing import Any

from bissl_zoo.errors import ZooError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}(@[1-9][0-9]{0,5})?", re.ASCII)


def is_name(text: Any) -> bool:
    """Whether this can be an entry's or a file's name: one path component that cannot leave its folder."""
    return isinstance(text, str) and _NAME.fullmatch(text) is not None


def check_name(name: str, where: str = "") -> None:
    """Raise `ZooError` for a name that is no entry's: such names could otherwise leave the zoo's folder."""
    if not is_name(name):
        raise ZooError(
            f"{where}{name!r:.100} is not a name for a zoo entry. A name has up to 100 letters, digits and '.', '_', "
            "'-', begins with a letter or digit, and may end in a version such as '@2'."
        )


def split_version(name: str) -> tuple[str, int]:
    """`"x@2"` as `("x", 2)`; a name without a version is the first one."""
    base, _, version = name.partition("@")
    return base, int(version or 1)


def pin(entry: str) -> str:
    """The name that will mean this very version whatever is published later: `x@1` for an entry called `x`."""
    return entry if "@" in entry else f"{entry}@1"


def shorten(names: list[str], limit: int = 8) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def is_sha256(text: Any) -> bool:
    """Whether a value is 64 lower-case hex digits."""
    return isinstance(text, str) and re.fullmatch(r"[0-9a-f]{64}", text) is not None


def sha256_of(path: Path) -> str:
    """The sha256 of a file's bytes as they are on disk now, in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
