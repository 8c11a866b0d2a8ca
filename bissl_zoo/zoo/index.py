"""The index of a zoo: one checked record per entry, which every file is compared with."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from bissl_zoo.errors import ZooError
from bissl_zoo.zoo.names import check_name, is_name, is_sha256

INDEX_FILE, CURATED_FILE = "index.json", "curated.json"
INDEX_FORMAT = 1
ENTRY_FORMAT = 1

#: bytes of an index, far above what any zoo has, so that a hostile one cannot fill the memory
INDEX_LIMIT = 64 << 20

#: bytes of a file, a pebibyte, so that sums of sizes stay numbers that can be shown
_SIZE_LIMIT = 1 << 50

_RESTORE = "Restore the file from a copy."


@dataclass(frozen=True)
class Index:
    """What a zoo's index says.

    Attributes:
        records: by entry name: architecture, methods, metrics, and size (bytes) and sha256 of every file.
        removed: names that were once published, which never mean anything else.
    """

    records: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    removed: tuple[str, ...] = ()

    def to_bytes(self) -> bytes:
        """The index file."""
        content = {"format": INDEX_FORMAT, "entries": dict(self.records)}
        return to_json(content | {"removed": list(self.removed)} if self.removed else content).encode()


def parse_index(content: bytes | None, where: str) -> Index:
    """An index from its file; an empty one where there is none.

    Names, sizes and digests are checked here, so that nothing in an index can point outside of the zoo, and so are the
    kinds of all that lists and pages show.

    Args:
        content: of the file, None where there is none.
        where: what errors call it.
    Raises:
        ZooError: for anything that is not an index of a format known here.
    """
    if content is None:
        return Index()
    loaded = parse_json(content, where)
    check_format(where, loaded, INDEX_FORMAT)
    records, removed = loaded.get("entries"), loaded.get("removed", [])
    if not isinstance(records, dict) or not isinstance(removed, list):
        raise ZooError(f"{where}: 'entries' is missing or not an object, or 'removed' not a list. {_RESTORE}")
    for name in [*records, *removed]:
        check_name(name, where=f"{where}: ")
    for name, record in records.items():
        problem = _record_problem(record)
        if problem:
            raise ZooError(f"{where}: the record of '{name}' {problem}. {_RESTORE}")
    return Index(records, tuple(removed))


def parse_json(content: bytes, where: str) -> dict[str, Any]:
    """A JSON object; `ZooError` for everything else."""
    try:
        text = content.decode("utf-8")
        loaded = json.loads(text, parse_constant=_finite, parse_float=_finite)
        if "\\u" in text:  # half a surrogate pair can be escaped, but not written again
            json.dumps(loaded, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise ZooError(f"{where} cannot be read as JSON: {error}. {_RESTORE}") from error
    if not isinstance(loaded, dict):
        raise ZooError(f"{where} holds {type(loaded).__name__}, not a JSON object. {_RESTORE}")
    return loaded


def to_json(content: Mapping[str, Any]) -> str:
    """JSON for people; `ZooError` for values it does not have."""
    try:
        return json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    except (TypeError, ValueError) as error:
        raise ZooError(
            f"The entry holds a value that JSON cannot: {error}. Use numbers, text, lists and mappings."
        ) from error


def check_format(where: str, content: Mapping[str, Any], newest: int) -> None:
    """Raise `ZooError` for a file format that is newer, or none at all."""
    version = content.get("format")
    if isinstance(version, int) and version > newest:
        raise ZooError(f"{where} has format {version}; this bissl_zoo reads up to {newest}. Upgrade bissl_zoo.")
    if version != newest:
        raise ZooError(f"{where} has format {version!r:.100}, where {newest} was expected. {_RESTORE}")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]} is not a finite number")
    return value


def _is_number(value: Any) -> bool:
    # integers that floats do not reach cannot be shown as numbers either
    return isinstance(value, float) or (type(value) is int and abs(value) < 1 << 1000)


def _record_problem(record: Any) -> str:
    if not isinstance(record, dict) or not isinstance(record.get("architecture"), str):
        return "has no 'architecture'"
    for key in ("pretext", "task", "solver", "licence", "created"):
        if not isinstance(record.get(key, ""), (str, type(None))):
            return f"has a '{key}' that is not text"
    if not isinstance(record.get("metrics", {}), dict):
        return "has 'metrics' that are not an object"
    for metric, facts in record.get("metrics", {}).items():
        if not _is_metric(facts):
            return f"has the metric {metric!r:.100} without a usable mean, std and values"
    if not isinstance(record.get("files"), dict):
        return "has no 'files'"
    for file, facts in record["files"].items():
        if not is_name(file):
            return f"lists the file {file!r:.100}, which is not a plain file name"
        sha256, size = (facts.get("sha256"), facts.get("size")) if isinstance(facts, dict) else (None, None)
        if not is_sha256(sha256) or type(size) is not int or not 0 <= size < _SIZE_LIMIT:
            return f"has no usable sha256 and size for '{file}'"
    return ""


def _is_metric(facts: Any) -> bool:
    if not isinstance(facts, dict) or not isinstance(facts.get("values", []), list):
        return False
    numbers = [facts.get("mean"), facts.get("std"), *facts.get("values", [])]
    return all(value is None or _is_number(value) for value in numbers)
