"""A zoo's index as a page: a table that is sorted and filtered in the browser, and a plain one without scripts."""

import base64
import hashlib
import logging
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from markupsafe import Markup

from bissl_zoo.errors import ZooError
from bissl_zoo.progress.console import printable
from bissl_zoo.report.page import footer, render, save_page
from bissl_zoo.zoo import Zoo
from bissl_zoo.zoo.hub import Entry
from bissl_zoo.zoo.names import split_version
from bissl_zoo.zoo.page import format_metric

logger = logging.getLogger(__name__)

#: figures that get a column of their own, the commonest first
_MOST_METRICS = 12
_TEXTS = ("architecture", "pretext", "task", "solver", "licence")


class Cell(NamedTuple):
    """What is shown, and what it is sorted by: a number or text, empty where there is nothing."""

    text: str
    key: str


def zoo_page(records: Mapping[str, Mapping[str, Any]], location: str, datasets: Mapping[str, str]) -> str:
    """The page of a zoo.

    Args:
        records: of the index, by name of the entry.
        location: of the zoo, for people.
        datasets: by name of an entry, its data sets in words, where they are known.
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
        script=Markup(script),  # ours, and the only one that the page's policy lets run
        script_source=f"'sha256-{digest}'",
        footer=footer(),
    )


def _row(name: str, record: Mapping[str, Any], metrics: list[str], datasets: Mapping[str, str]) -> list[Cell]:
    texts = [name, *(record.get(key) or "" for key in _TEXTS), datasets.get(name, "")]
    cells = [Cell(text or "\u2013", text) for text in texts]
    for metric in metrics:
        facts = record.get("metrics", {}).get(metric)
        mean = facts.get("mean") if facts else None
        cells.append(Cell("\u2013", "") if mean is None else Cell(format_metric(facts), repr(float(mean))))
    size = sum(facts["size"] for facts in record["files"].values())
    cells.append(Cell(f"{size / 1e6:,.1f}", str(size)))
    created = (record.get("created") or "")[:10]
    return [*cells, Cell(created or "\u2013", created)]


def write_zoo_page(zoo: Zoo, output: Path) -> None:
    """Write the page of what a zoo holds.

    Raises:
        ZooError: the zoo cannot be read.
        ConfigError: `output` cannot be written.
    """
    entries = zoo.entries()
    records = {name: entry.record for name, entry in entries.items()}
    save_page(zoo_page(records, str(zoo), {name: _data(entry) for name, entry in entries.items()}), output)


def _data(entry: Entry) -> str:
    """The names of an entry's data sets, each once, as its `entry.json` has them."""
    try:
        datasets = entry.facts().get("datasets")
    except ZooError as error:
        logger.warning(f"the data sets of '{entry.name}' are not shown. {printable(str(error))}")
        return ""
    sets = datasets.values() if isinstance(datasets, dict) else ()
    named = [str(one.get("root") or one.get("name") or "") for one in sets if isinstance(one, dict)]
    return ", ".join(filter(None, dict.fromkeys(named)))
