"""What a zoo entry says of itself: the facts of its entry.json, and its card (README.md) generated from them alone."""

import math
import platform
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import datetime, timedelta, timezone
from typing import Any

import timm
import torch
import yaml

from bissl_zoo.errors import ZooError, did_you_mean
from bissl_zoo.zoo.figure import FIGURE_FILE
from bissl_zoo.zoo.names import is_sha256, pin
from bissl_zoo.zoo.page import format_number, markdown_table


@dataclass(frozen=True)
class EntryMetadata:
    """What an entry says of itself beyond its weights.

    Args:
        pretext, task, solver: registered names of the methods the backbone came from; None where there was none.
        shared_stage: the stage up to which both levels shared the backbone.
        metrics: by name, one value per seed (a number for a single seed).
        seeds: the seeds the metrics were measured with.
        datasets: by role ("pretext", "train", "test"), a name, or a mapping with "name" and further facts.
        ancestors: the weights that training started from, those that these started from, up to the root: `name` and
            `sha256` of each; empty for random weights.
        hardware: that the run had.
        wall_time_s: of the run, in seconds.
        licence: of the weights, as an SPDX identifier.
        notes: Markdown for the card.
    """

    pretext: str | None = None
    task: str | None = None
    solver: str | None = None
    shared_stage: str | None = None
    metrics: Mapping[str, float | Sequence[float]] = field(default_factory=dict)
    seeds: Sequence[int] = ()
    datasets: Mapping[str, str | Mapping[str, Any]] = field(default_factory=dict)
    ancestors: Sequence[Mapping[str, str]] = ()
    hardware: str | None = None
    wall_time_s: float | None = None
    licence: str = "unknown"
    notes: str = ""


def entry_facts(metadata: EntryMetadata | Mapping[str, Any]) -> dict[str, Any]:
    """The part of an `entry.json` that follows from its metadata, with versions and the time (UTC) added.

    Raises:
        ZooError: for a field that does not exist, and for metrics, data sets or a parent that are not well formed.
    """
    from bissl_zoo import __version__  # here, since the package imports this module to offer publish_entry

    if not isinstance(metadata, EntryMetadata):
        metadata = _from_mapping(metadata)
    seeds, ancestors = [int(seed) for seed in metadata.seeds], [dict(ancestor) for ancestor in metadata.ancestors]
    for ancestor in ancestors:
        if not is_sha256(ancestor.get("sha256")):
            raise ZooError(f"The ancestor {ancestor} has no sha256 (64 hex digits) of the weights that it stands for.")
    metrics = {metric: _statistics(metric, values, seeds) for metric, values in metadata.metrics.items()}
    datasets = {
        role: {"name": facts} if isinstance(facts, str) else dict(facts) for role, facts in metadata.datasets.items()
    }
    if unnamed := [role for role, facts in datasets.items() if "name" not in facts]:
        raise ZooError(f"The data set for '{unnamed[0]}' has no 'name'.")
    return {
        **{key: getattr(metadata, key) for key in ("shared_stage", "pretext", "task", "solver", "licence", "notes")},
        "metrics": metrics,
        "seeds": seeds,
        "datasets": datasets,
        "lineage": {"parent": ancestors[0]["sha256"] if ancestors else None, "ancestors": ancestors},
        "hardware": metadata.hardware,
        "wall_time_s": metadata.wall_time_s,
        "versions": {
            "bissl_zoo": __version__,
            "torch": torch.__version__,
            "timm": timm.__version__,
            "python": platform.python_version(),
        },
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def render_card(entry: Mapping[str, Any]) -> str:
    """Markdown card of an entry: what it is, how to load it, metrics, data, lineage, licence, versions.

    Args:
        entry: the content of an `entry.json`. Only facts that it states appear; what is None or empty is left out.
    """
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


def _from_mapping(metadata: Mapping[str, Any]) -> EntryMetadata:
    accepted = [known.name for known in fields(EntryMetadata)]
    for key in metadata:
        if key not in accepted:
            raise ZooError(f"Unknown metadata '{key}'.{did_you_mean(key, accepted)} Accepted: {', '.join(accepted)}.")
    return EntryMetadata(**metadata)


def _statistics(metric: str, values: float | Sequence[float], seeds: Sequence[int]) -> dict[str, Any]:
    per_seed = [float(value) for value in (values if isinstance(values, Sequence) else [values])]
    if len(per_seed) != len(seeds) or not all(math.isfinite(value) for value in per_seed):
        raise ZooError(f"Metric '{metric}' needs one finite value per seed; it has {per_seed} for the seeds {seeds}.")
    spread = statistics.stdev(per_seed) if len(per_seed) > 1 else None
    return {"mean": statistics.fmean(per_seed), "std": spread, "values": per_seed}


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
    return f"""## Use

```python
import bissl_zoo

backbone = bissl_zoo.create_backbone("{pin(entry["name"])}", pretrained=True)  # feature maps by stage
```

or with timm alone, from the folder that holds this file:

```python
import timm

model = timm.create_model("local-dir:path/to/{entry["name"]}", pretrained=True)  # pooled features
```

Images are {pixels["channel_order"]}, scaled to [0, 1], then normalised with mean {_numbers(pixels["mean"])} and
standard deviation {_numbers(pixels["std"])}; training size {" x ".join(str(side) for side in pixels["input_size"])}
(channels, height, width)."""


def _metrics(metrics: Mapping[str, Mapping[str, Any]], seeds: Sequence[int]) -> str:
    if not metrics:
        return ""
    rows = [
        (
            name,
            format_number(metric["mean"]),
            format_number(metric["std"]),
            ", ".join(format_number(value) for value in metric["values"]),
        )
        for name, metric in metrics.items()
    ]
    told = ", ".join(str(seed) for seed in seeds)
    figure = f"\n\n![Metrics by what the model was fine-tuned from]({FIGURE_FILE})"
    table = markdown_table(("metric", "mean", "standard deviation", "per seed"), rows)
    return f"## Metrics\n\nSeeds: {told}.\n\n{table}{figure}"


def _data(datasets: Mapping[str, Mapping[str, Any]]) -> str:
    if not datasets:
        return ""
    rows = []
    for role, facts in datasets.items():
        details = [f"{key}: {value}" for key, value in facts.items() if key != "name"]
        rows.append((role, facts["name"], "; ".join(details)))
    return "## Data\n\n" + markdown_table(("used for", "data set", "details"), rows)


def _origin(entry: Mapping[str, Any]) -> str:
    lines = [
        f"Started from `{ancestor.get('name', 'unnamed')}`, sha256 `{ancestor['sha256']}`."
        if i == 0
        else f"That started from `{ancestor.get('name', 'unnamed')}`, sha256 `{ancestor['sha256']}`."
        for i, ancestor in enumerate(entry["lineage"]["ancestors"])
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
        f"`python tools/train_net.py --config-file zoo:{pin(entry['name'])} train.output_dir=runs/again` repeats it.",
    ]
    return "## Origin\n\n" + "\n".join(f"- {line}" for line in lines)


def _files(files: Mapping[str, Mapping[str, Any]]) -> str:
    rows = [(f"`{file}`", f"{facts['size']:,}", f"`{facts['sha256']}`") for file, facts in sorted(files.items())]
    return "## Files\n\n" + markdown_table(("file", "bytes", "sha256"), rows)


def _numbers(values: Iterable[float]) -> str:
    return "(" + ", ".join(f"{value:g}" for value in values) + ")"
