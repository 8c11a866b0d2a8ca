"""Pages of a zoo: the card (README.md) of an entry, and MODEL_ZOO.md; text from entries is escaped."""

import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from typing import Any

import yaml

from bissl_zoo.zoo.index import Index, is_name, pin, split_version

PAGE_FILE = "MODEL_ZOO.md"


def render_card(entry: Mapping[str, Any]) -> str:
    """Return the Markdown card of an entry from the content of its `entry.json`; empty fields are left out."""
    front_matter = {
        "library_name": "timm",
        "license": entry["licence"].lower(),
        "pipeline_tag": "image-feature-extraction",
        "tags": ["timm", "bissl", "self-supervised-learning", *filter(None, [entry["pretext"], entry["task"]])],
    }
    sections = [
        f"---\n{yaml.safe_dump(front_matter, sort_keys=False)}---",
        f"# {entry['name']}",
        _summary(entry),
        entry["notes"],
        _loading(entry),
        _metrics(entry["metrics"], entry["seeds"]),
        _data(entry["datasets"]),
        _origin(entry),
        _files(entry["files"]),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def render_page(index: Index) -> str:
    """Return MODEL_ZOO.md: for each task a table of its entries with their metrics, and commands that repeat them."""
    names = sorted(index.records, key=split_version)
    tasks = sorted({index.records[name].get("task") or "" for name in names}, key=lambda task: (task == "", task))
    sections = [
        "# Model zoo",
        "Generated from `index.json` when an entry is published or removed.",
        *(_section(task, {name: index.records[name] for name in names}) for task in tasks),
    ]
    return "\n\n".join(sections if names else [*sections, "It has no entries."]) + "\n"


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return a Markdown table; a cell may contain any text."""
    lines = [[" ".join(str(cell).replace("|", "\\|").split()) for cell in line] for line in (header, *rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (lines[0], ["---"] * len(header), *lines[1:]))


def escape(text: str) -> str:
    """Return text on one line with Markdown and HTML markup as entities."""
    return " ".join(re.sub(r"[\\|`*<>&\[\]]", lambda match: f"&#{ord(match[0])};", text).split())


def format_number(value: float | None) -> str:
    """Return four significant digits; `-` for None."""
    return "-" if value is None else f"{value:.4g}"


def format_metric(metric: Mapping[str, Any] | None, seeds: bool = True) -> str:
    """Return mean and standard deviation of a metric, and with `seeds` the number of seeds."""
    if not metric:
        return "-"
    mean = format_number(metric.get("mean"))
    if metric.get("std") is None:
        return mean
    text = f"{mean} ± {metric['std']:.2g}"
    return f"{text} ({len(metric.get('values', []))} seeds)" if seeds else text


def split_metric(name: str) -> tuple[str, str]:
    """Split `"AP50 (bissl)"` into the metric and the initial weights of the model, `("AP50", "bissl")`."""
    match = re.fullmatch(r"(.*?) \((.*)\)", name, re.DOTALL)
    return (match[1], match[2]) if match else (name, "")


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
    commands = "\n".join(f"bissl train --config-file zoo:{pin(name)} train.output_dir=runs/{name}" for name in chosen)
    title = f"Aligned with {f'`{task}`' if is_name(task) else escape(task)}" if task else "Pretrained, without a task"
    return f"## {title}\n\n{table}\n\nTo repeat the run of an entry:\n\n```bash\n{commands}\n```"


def _summary(entry: Mapping[str, Any]) -> str:
    text = f"A `{entry['architecture']}` backbone without classifier"
    if entry["pretext"]:
        text += f", trained with the pretext method `{entry['pretext']}`"
    if entry["task"]:
        text += f" and aligned with the downstream task `{entry['task']}`"
    if entry["solver"]:
        text += f" by BiSSL ([arXiv 2410.02387](https://arxiv.org/abs/2410.02387), solver `{entry['solver']}`)"
    if entry["shared_stage"]:
        text += f". Both levels share it up to stage `{entry['shared_stage']}`"
    return f"{text}. Published {entry['created']}."


def _loading(entry: Mapping[str, Any]) -> str:
    pixels = entry["input"]
    mean, std = ("(" + ", ".join(f"{value:g}" for value in pixels[key]) + ")" for key in ("mean", "std"))
    name = pin(entry["name"])
    predict = f'model = bissl_zoo.load_model("zoo:{name}")  # fine-tuned\nprint(model.predict("photo.jpg"))\n'
    predict = predict if "task_model.json" in entry["files"] else ""
    return f"""## Use

```python
import bissl_zoo

{predict}backbone = bissl_zoo.create_backbone("{name}", pretrained=True)  # feature maps by stage
```

or with timm alone, from the folder that holds this file:

```python
import timm

model = timm.create_model("local-dir:path/to/{entry["name"]}", pretrained=True)  # pooled features
```

Images are {pixels["channel_order"]}, scaled to [0, 1], then normalised with mean {mean} and
standard deviation {std}; training size {" x ".join(str(side) for side in pixels["input_size"])}
(channels, height, width)."""


def _metrics(metrics: Mapping[str, Mapping[str, Any]], seeds: Sequence[int]) -> str:
    if not metrics:
        return ""
    rows = [
        (escape(name), format_number(m["mean"]), format_number(m["std"]), ", ".join(map(format_number, m["values"])))
        for name, m in metrics.items()
    ]
    table = markdown_table(("metric", "mean", "standard deviation", "per seed"), rows)
    return f"## Metrics\n\nSeeds: {', '.join(map(str, seeds))}.\n\n{table}"


def _data(datasets: Mapping[str, Mapping[str, Any]]) -> str:
    if not datasets:
        return ""
    rows = [
        [
            escape(text)
            for text in (role, str(data["name"]), "; ".join(f"{k}: {v}" for k, v in data.items() if k != "name"))
        ]
        for role, data in datasets.items()
    ]
    return "## Data\n\n" + markdown_table(("used for", "data set", "details"), rows)


def _origin(entry: Mapping[str, Any]) -> str:
    parents = [
        (escape(parent.get("name", "unnamed")), escape(parent.get("licence", "unknown")), parent["sha256"])
        for parent in entry["lineage"]["parents"]
    ]
    lines = [
        f"{'That started' if i else 'Started'} from {name}, licence {licence}, sha256 `{sha256}`."
        for i, (name, licence, sha256) in enumerate(parents)
    ] or ["Started from random weights."]
    if entry["wall_time_s"]:
        lines.append(f"Took {timedelta(seconds=round(entry['wall_time_s']))} (hours:minutes:seconds).")
    if entry["hardware"]:
        lines.append(f"Ran on {entry['hardware']}.")
    versions = ", ".join(f"{package} {version}" for package, version in entry["versions"].items())
    lines += [
        f"Licence: {entry['licence']}.",
        f"Made with {versions}.",
        "`train_config.yaml` is the resolved configuration of the run; "
        f"`bissl train --config-file zoo:{pin(entry['name'])} train.output_dir=runs/again` repeats it.",
    ]
    return "## Origin\n\n" + "\n".join(f"- {line}" for line in lines)


def _files(files: Mapping[str, Mapping[str, Any]]) -> str:
    rows = [(f"`{name}`", f"{file['size']:,}", f"`{file['sha256']}`") for name, file in sorted(files.items())]
    return "## Files\n\n" + markdown_table(("file", "bytes", "sha256"), rows)
