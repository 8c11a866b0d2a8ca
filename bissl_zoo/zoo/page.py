"""MODEL_ZOO.md, the page that shows people what a zoo holds: one table per task, generated from the index."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bissl_zoo.zoo.index import Index
from bissl_zoo.zoo.names import is_name, pin, split_version

PAGE_FILE = "MODEL_ZOO.md"


def render_page(index: Index) -> str:
    """Markdown: the entries of each task with their metrics, and the command that repeats each."""
    names = sorted(index.records, key=split_version)
    tasks = sorted({index.records[name].get("task") or "" for name in names}, key=lambda task: (task == "", task))
    sections = [
        "# Model zoo",
        "This page is made from `index.json` whenever an entry is published or removed.",
        *(_section(task, {name: index.records[name] for name in names}) for task in tasks),
    ]
    if not names:
        sections.append("It holds no entries yet.")
    return "\n\n".join(sections) + "\n"


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; text in cells may hold anything."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def escape(text: str) -> str:
    """Text that a Markdown reader shows as it is on one line: what could be markup or HTML becomes an entity."""
    return " ".join(re.sub(r"[\\|`*<>&\[\]]", lambda found: f"&#{ord(found[0])};", text).split())


def format_number(value: float | None) -> str:
    """Four digits; `-` for None."""
    return "-" if value is None else f"{value:.4g}"


def format_metric(metric: Mapping[str, Any] | None, seeds: bool = True) -> str:
    """Mean and standard deviation over seeds, and with `seeds` how many seeds."""
    if not metric:
        return "-"
    mean = format_number(metric.get("mean"))
    if metric.get("std") is None:
        return mean
    told = f"{mean} ± {metric['std']:.2g}"
    return f"{told} ({len(metric.get('values', []))} seeds)" if seeds else told


def split_metric(name: str) -> tuple[str, str]:
    """`"AP50 (bissl)"` as `("AP50", "bissl")`: a metric, and what the model that has it was fine-tuned from."""
    found = re.fullmatch(r"(.*?) \((.*)\)", name, re.DOTALL)
    return (found[1], found[2]) if found else (name, "")


def _section(task: str, records: Mapping[str, Mapping[str, Any]]) -> str:
    chosen = {name: record for name, record in records.items() if (record.get("task") or "") == task}
    metrics = list(dict.fromkeys(metric for record in chosen.values() for metric in record.get("metrics", {})))
    rows = [
        [
            f"[{name}]({name}/README.md)",
            escape(record["architecture"]),
            escape(record.get("pretext") or "-"),
            *(format_metric(record.get("metrics", {}).get(metric)) for metric in metrics),
            escape((record.get("created") or "-")[:10]),
        ]
        for name, record in chosen.items()
    ]
    table = markdown_table(["entry", "architecture", "pretext", *map(escape, metrics), "published"], rows)
    commands = "\n".join(
        f"python tools/train_net.py --config-file zoo:{pin(name)} train.output_dir=runs/{name}" for name in chosen
    )
    title = f"Aligned with {f'`{task}`' if is_name(task) else escape(task)}" if task else "Pretrained, without a task"
    return f"## {title}\n\n{table}\n\nEach again, from its own configuration:\n\n```bash\n{commands}\n```"


def _cell(text: str) -> str:
    return " ".join(str(text).replace("|", "\\|").split())
