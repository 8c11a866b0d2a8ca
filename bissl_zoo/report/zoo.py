"""The index of a zoo as an HTML page: a table that a script sorts and filters; without scripts a plain table."""

import base64
import hashlib
import logging
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from markupsafe import Markup

from bissl_zoo.errors import ZooError, printable
from bissl_zoo.report.page import footer, render, save_page
from bissl_zoo.zoo import Zoo
from bissl_zoo.zoo.card import format_metric
from bissl_zoo.zoo.hub import Entry
from bissl_zoo.zoo.index import split_version

logger = logging.getLogger(__name__)

#: metrics with a column, the most frequent first
_MOST_METRICS = 12
_TEXTS = ("architecture", "pretext", "task", "solver", "licence")


class Cell(NamedTuple):
    """The text of a cell and its sort key: a number or text, or empty."""

    text: str
    key: str


def zoo_page(records: Mapping[str, Mapping[str, Any]], location: str, datasets: Mapping[str, str]) -> str:
    """Return the page of a zoo.

    Args:
        records: the records of the index by entry name.
        location: location of the zoo, as text.
        datasets: names of the data sets by entry name, if known.
    """
    counts: dict[str, int] = {}
    for record in records.values():
        for metric in record.get("metrics", {}):
            counts[metric] = counts.get(metric, 0) + 1
    metrics = sorted(counts, key=lambda metric: -counts[metric])[:_MOST_METRICS]
    header = ["entry", *_TEXTS, "data", *metrics, "size (MB)", "published"]
    rows = [_row(name, records[name], metrics, datasets) for name in sorted(records, key=split_version)]
    first = 2 + len(_TEXTS)
    script = resources.files("bissl_zoo.report").joinpath("templates/zoo.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return render(
        "zoo.html",
        header=header,
        rows=rows,
        numbers=range(first, first + len(metrics) + 1),
        location=location,
        script=Markup(script),  # the only script that the page's content security policy allows
        script_source=f"'sha256-{digest}'",
        footer=footer(),
    )


def _row(name: str, record: Mapping[str, Any], metrics: list[str], datasets: Mapping[str, str]) -> list[Cell]:
    texts = [name, *(record.get(key) or "" for key in _TEXTS), datasets.get(name, "")]
    cells = [Cell(text or "\u2013", text) for text in texts]
    for metric in metrics:
        value = record.get("metrics", {}).get(metric)
        mean = value.get("mean") if value else None
        cells.append(Cell("\u2013", "") if mean is None else Cell(format_metric(value), repr(float(mean))))
    size = sum(value["size"] for value in record["files"].values())
    cells.append(Cell(f"{size / 1e6:,.1f}", str(size)))
    created = (record.get("created") or "")[:10]
    return [*cells, Cell(created or "\u2013", created)]


def write_zoo_page(zoo: Zoo, output: Path) -> None:
    """Write the page of a zoo.

    Raises:
        ZooError: the zoo cannot be read.
        ConfigError: `output` cannot be written.
    """
    entries = zoo.entries()
    records = {name: entry.record for name, entry in entries.items()}
    save_page(zoo_page(records, str(zoo), {name: _data(entry) for name, entry in entries.items()}), output)


def _data(entry: Entry) -> str:
    """Return the distinct data sets in the `entry.json` of an entry."""
    try:
        datasets = entry.metadata().get("datasets")
    except ZooError as error:
        logger.warning(f"the data sets of '{entry.name}' are not shown. {printable(str(error))}")
        return ""
    sets = datasets.values() if isinstance(datasets, dict) else ()
    named = [str(item.get("root") or item.get("name") or "") for item in sets if isinstance(item, dict)]
    return ", ".join(filter(None, dict.fromkeys(named)))
