"""Pages of a zoo: the card (README.md) of an entry with its plot, and MODEL_ZOO.md; text from entries is escaped."""

import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import yaml

from bissl_zoo.zoo.index import Index, is_name, pin, split_version

PAGE_FILE, PLOT_FILE = "MODEL_ZOO.md", "metrics.png"

#: colours that people with colour blindness can distinguish (Okabe and Ito, 2008)
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")


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


def draw_metrics(metrics: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Plot metrics as bars: one group per metric, one colour per initial weights, one dot per seed.

    Args:
        metrics: `mean` and `values` by name; a name such as `"AP50 (bissl)"` includes the initial weights.
    """
    from matplotlib.figure import Figure

    groups: dict[str, dict[str, Mapping[str, Any]]] = {}
    for name, metric in metrics.items():
        base, start = split_metric(name)
        groups.setdefault(base, {})[start] = metric
    starts = list(dict.fromkeys(start for group in groups.values() for start in group))
    figure = Figure(figsize=(1.5 + 0.5 * len(metrics), 3.2), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    width = 0.8 / len(starts)
    for i, start in enumerate(starts):
        label: str | None = start
        for x, group in enumerate(groups.values()):
            if start in group:
                position, values = x + (i - (len(starts) - 1) / 2) * width, group[start]["values"]
                axes.bar(position, group[start]["mean"], 0.9 * width, color=_COLOURS[i % len(_COLOURS)], label=label)
                axes.plot([position] * len(values), values, "k.", markersize=4)
                label = None
    axes.set_xticks(range(len(groups)), groups, rotation=20 if len(groups) > 3 else 0)
    axes.set_ylabel("test set")
    axes.spines[["top", "right"]].set_visible(False)
    if any(starts):
        axes.legend(title="fine-tuned from", frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.savefig(path, metadata={"Software": None})  # equal metrics give equal bytes


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
        (name, format_number(m["mean"]), format_number(m["std"]), ", ".join(map(format_number, m["values"])))
        for name, m in metrics.items()
    ]
    table = markdown_table(("metric", "mean", "standard deviation", "per seed"), rows)
    plot = f"![Metrics by the initial weights of the model]({PLOT_FILE})"
    return f"## Metrics\n\nSeeds: {', '.join(map(str, seeds))}.\n\n{table}\n\n{plot}"


def _data(datasets: Mapping[str, Mapping[str, Any]]) -> str:
    if not datasets:
        return ""
    rows = [
        (role, data["name"], "; ".join(f"{key}: {value}" for key, value in data.items() if key != "name"))
        for role, data in datasets.items()
    ]
    return "## Data\n\n" + markdown_table(("used for", "data set", "details"), rows)


def _origin(entry: Mapping[str, Any]) -> str:
    lines = [
        f"{'That started' if i else 'Started'} from `{parent.get('name', 'unnamed')}`, sha256 `{parent['sha256']}`."
        for i, parent in enumerate(entry["lineage"]["parents"])
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
