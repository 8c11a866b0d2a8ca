"""The index of a zoo: entry names, and one checked record per entry with size and sha256 of every file."""

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from bissl_zoo.errors import ZooError
from bissl_zoo.files import is_sha256
from bissl_zoo.limits import limit, stated

#: before the name of an entry where other sources of weights are possible
ZOO_PREFIX = "zoo:"
INDEX_FILE, CURATED_FILE = "index.json", "curated.json"
INDEX_FORMAT = ENTRY_FORMAT = 1

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}(@[1-9][0-9]{0,5})?", re.ASCII)
_RESTORE = "Restore the file from a copy."


def is_name(text: Any) -> bool:
    """Return True for an entry or file name: one path component that cannot leave its folder."""
    return isinstance(text, str) and _NAME.fullmatch(text) is not None


def check_name(name: Any, where: str = "") -> None:
    """Raise `ZooError` for an invalid entry name, which could otherwise point outside the zoo."""
    if not is_name(name):
        raise ZooError(
            f"{where}{name!r:.100} is not a valid entry name: up to 100 letters, digits, '.', '_' and '-', starting "
            "with a letter or digit, and optionally a version such as '@2'."
        )


def split_version(name: str) -> tuple[str, int]:
    """Split `"x@2"` into `("x", 2)`; a name without a version is version 1."""
    base, _, version = name.partition("@")
    return base, int(version or 1)


def join_version(base: str, version: int) -> str:
    """Return the entry name of a version: `x` for version 1, `x@2` for version 2."""
    return base if version == 1 else f"{base}@{version}"


def pin(entry: str) -> str:
    """Return the name with its version, which always means the same entry: `x@1` for an entry called `x`."""
    return entry if "@" in entry else f"{entry}@1"


@dataclass(frozen=True)
class Index:
    """Content of an index file.

    Attributes:
        records: by entry name: architecture, methods, metrics, and size (bytes) and sha256 of every file.
        removed: names of removed entries; they are never used again.
    """

    records: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    removed: tuple[str, ...] = ()

    def to_bytes(self) -> bytes:
        """Return the content of the index file."""
        content = {"format": INDEX_FORMAT, "entries": dict(self.records)}
        return to_json(content | {"removed": list(self.removed)} if self.removed else content).encode()

    def add(self, name: str, record: dict[str, Any]) -> "Index":
        """Return the index with one more entry."""
        return Index({**self.records, name: record}, self.removed)

    def remove(self, name: str) -> "Index":
        """Return the index without an entry; its name is kept as removed."""
        return Index({key: value for key, value in self.records.items() if key != name}, (*self.removed, name))

    def next_name(self, base: str, others: Iterable[str] = ()) -> str:
        """Return the name of the next version of `base`; `others` are further names that are taken."""
        versions = [split_version(name) for name in (*self.records, *self.removed, *others)]
        return join_version(base, 1 + max((version for known, version in versions if known == base), default=0))

    def find_same(self, base: str, files: Mapping[str, Any]) -> str | None:
        """Return the newest version of `base` with the same tensors and configuration as `files`, if any."""
        compared = [file for file in files if file.endswith(".safetensors") or file == "train_config.yaml"]
        same = [
            name
            for name, record in self.records.items()
            if split_version(name)[0] == base and all(record["files"].get(file) == files[file] for file in compared)
        ]
        return max(same, key=split_version, default=None)


def parse_index(content: bytes | None, where: str) -> Index:
    """Parse and check an index file.

    Names, sizes and digests are checked, so that an index cannot point outside the zoo, as are the types of all values
    that lists and pages show.

    Args:
        content: None if the file does not exist; the index is empty then.
        where: the file in messages.
    Raises:
        ZooError: not a valid index, a newer format, or more than `limits.ENTRIES` entries.
    """
    if content is None:
        return Index()
    loaded = parse_json(content, where)
    check_format(where, loaded, INDEX_FORMAT)
    records, removed = loaded.get("entries"), loaded.get("removed", [])
    if not isinstance(records, dict) or not isinstance(removed, list):
        raise ZooError(f"{where}: 'entries' is not an object or 'removed' is not a list. {_RESTORE}")
    if (count := len(records) + len(removed)) > limit("ENTRIES"):
        raise ZooError(f"{where} lists {count:,} entries; {stated('ENTRIES')}.")
    for name in [*records, *removed]:
        check_name(name, where=f"{where}: ")
    for name, record in records.items():
        if problem := _record_problem(record):
            raise ZooError(f"{where}: the record of '{name}' {problem}. {_RESTORE}")
    return Index(records, tuple(removed))


def parse_json(content: bytes, where: str) -> dict[str, Any]:
    """Parse a JSON object; raise `ZooError` for anything else, including NaN and Infinity."""
    try:
        text = content.decode("utf-8")
        loaded = json.loads(text, parse_constant=_finite, parse_float=_finite)
        if "\\u" in text:  # an escaped half surrogate pair parses but cannot be written
            json.dumps(loaded, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise ZooError(f"{where} cannot be read as JSON: {error}. {_RESTORE}") from error
    if not isinstance(loaded, dict):
        raise ZooError(f"{where} holds {type(loaded).__name__}, not a JSON object. {_RESTORE}")
    return loaded


def to_json(content: Mapping[str, Any]) -> str:
    """Return indented JSON; raise `ZooError` for values that JSON does not have."""
    try:
        return json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    except (TypeError, ValueError) as error:
        raise ZooError(f"The entry has a value that JSON cannot store: {error}.") from error


def check_format(where: str, content: Mapping[str, Any], newest: int) -> None:
    """Raise `ZooError` for a file format that is newer than this version, or invalid."""
    version = content.get("format")
    if isinstance(version, int) and version > newest:
        raise ZooError(f"{where} has format {version}; this bissl_zoo reads up to {newest}. Upgrade bissl_zoo.")
    if version != newest:
        raise ZooError(f"{where} has format {version!r:.100}, expected {newest}. {_RESTORE}")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]} is not a finite number")
    return value


def _record_problem(record: Any) -> str:
    if not isinstance(record, dict) or not isinstance(record.get("architecture"), str):
        return "has no 'architecture'"
    for key in ("pretext", "task", "solver", "licence", "created"):
        if not isinstance(record.get(key, ""), str | None):
            return f"has a '{key}' that is not text"
    if not isinstance(record.get("metrics", {}), dict):
        return "has 'metrics' that are not an object"
    for name, metric in record.get("metrics", {}).items():
        if not _is_metric(metric):
            return f"has the metric {name!r:.100} without a valid mean, std and values"
    if not isinstance(record.get("files"), dict):
        return "has no 'files'"
    for file, entry in record["files"].items():
        if not is_name(file):
            return f"lists the file {file!r:.100}, which is not a plain file name"
        sha256, size = (entry.get("sha256"), entry.get("size")) if isinstance(entry, dict) else (None, None)
        if not is_sha256(sha256) or type(size) is not int or size < 0:
            return f"has no valid sha256 and size for '{file}'"
        if size > limit("FILE_BYTES"):
            return f"lists {size:,} bytes for '{file}'; {stated('FILE_BYTES')}"
    return ""


def _is_metric(metric: Any) -> bool:
    if not isinstance(metric, dict) or not isinstance(metric.get("values", []), list):
        return False
    numbers = [metric.get("mean"), metric.get("std"), *metric.get("values", [])]
    # integers beyond the range of floats cannot be formatted as numbers
    return all(n is None or isinstance(n, float) or (type(n) is int and abs(n) < 1 << 1000) for n in numbers)
