"""Publish a backbone as a zoo entry: written and checked on this machine first, then added to the zoo in one step."""

import contextlib
import math
import os
import platform
import shutil
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from safetensors import SafetensorError
from torch import Tensor

from bissl_zoo.errors import ZooError, did_you_mean
from bissl_zoo.files import is_sha256, sha256_of
from bissl_zoo.weights.export import PIXEL_KEYS, check_loads_in_timm, timm_config
from bissl_zoo.weights.files import state_difference
from bissl_zoo.zoo.card import render_card
from bissl_zoo.zoo.hub import CONFIG_FILE, WEIGHTS_FILE, ZooLike, as_zoo
from bissl_zoo.zoo.index import ENTRY_FORMAT, check_name, to_json
from bissl_zoo.zoo.locks import try_lock
from bissl_zoo.zoo.stores import Draft

#: prefix of temporary folders, and the file in them that the publisher keeps locked
_DRAFT, _LOCK = "bissl_zoo-publish-", "lock"
#: fields of entry.json that the index repeats
_RECORD_KEYS = ("architecture", "pretext", "task", "solver", "metrics", "licence", "created")


@dataclass(frozen=True)
class EntryMetadata:
    """Metadata of an entry.

    Args:
        pretext, task, solver: registered names of the methods that made the backbone; None if not used.
        shared_stage: the stage up to which both levels shared the backbone.
        metrics: by name, one value per seed (a number for a single seed).
        seeds: seeds of the metrics.
        datasets: by role ("pretext", "train", "test"), a name, or a mapping with "name" and further values.
        parents: `name` and `sha256` of the weights that training started from, of those that these started from, and
            so on; empty for random weights.
        hardware: of the run.
        wall_time_s: of the run, in seconds.
        licence: of the weights, an SPDX identifier.
        notes: Markdown for the card.
    """

    pretext: str | None = None
    task: str | None = None
    solver: str | None = None
    shared_stage: str | None = None
    metrics: Mapping[str, float | Sequence[float]] = field(default_factory=dict)
    seeds: Sequence[int] = ()
    datasets: Mapping[str, str | Mapping[str, Any]] = field(default_factory=dict)
    parents: Sequence[Mapping[str, str]] = ()
    hardware: str | None = None
    wall_time_s: float | None = None
    licence: str = "unknown"
    notes: str = ""


@dataclass(frozen=True)
class PublishedEntry:
    """A published entry: its name with version, its folder or address, and the sha256 of its `model.safetensors`."""

    name: str
    location: str
    sha256: str


def publish_entry(
    *,
    name: str,
    backbone_state: Mapping[str, Tensor],
    architecture: str,
    pretrained_cfg: Mapping[str, Any],
    metadata: EntryMetadata | Mapping[str, Any],
    train_config_text: str,
    model_args: Mapping[str, Any] | None = None,
    pretext_head_state: Mapping[str, Tensor] | None = None,
    task_head_state: Mapping[str, Tensor] | None = None,
    task_model: Mapping[str, Mapping[str, Any]] | None = None,
    zoo: ZooLike = None,
    once: bool = False,
    half: bool = False,
) -> PublishedEntry:
    """Add a backbone to a zoo as `name`, or as `name@2`, `name@3`, ... if the name is taken; entries never change.

    The files are written to a temporary folder and loaded with plain timm first. The entry becomes visible when the
    index is replaced, which is the last step.

    Args:
        backbone_state: under timm's names, as in `timm.create_model(architecture, num_classes=0).state_dict()`; stored
            as contiguous float32, or float16 with `half`.
        pretrained_cfg: the training images in timm's terms: `mean`, `std`, `input_size` (channels, height, width), and
            if they differ from the architecture's defaults `interpolation`, `crop_pct`, `crop_mode`.
        metadata: `EntryMetadata`, or a mapping of its fields.
        train_config_text: the resolved config of the run as YAML.
        model_args: arguments of the model beyond the architecture's defaults (`Backbone.model_args`).
        task_model: a fine-tuned model, by file name: content of a `.json`, state of a `.safetensors`.
        zoo: a location, or a Zoo, whose first location is used.
        once: return an existing version with the same weights, heads and config; for a publisher that does not know
            whether it finished before it was interrupted.
        half: store all floating-point tensors as float16: half the size, rounded to 3 digits. Whoever loads them gets
            float32.
    Raises:
        ZooError: the state does not fit the architecture, a value cannot be stored, or the zoo cannot be written. The
            zoo is unchanged.
    """
    store = as_zoo(zoo).stores[0]
    check_name(name)
    if "@" in name or name.lower().endswith((".json", ".md", ".lock")):
        raise ZooError(f"'{name}' cannot be published: leave out '@' (versions are numbered here) and file suffixes.")
    entry = {"format": ENTRY_FORMAT, "name": name, "architecture": architecture, **entry_fields(metadata)}
    model, config = timm_config(architecture, pretrained_cfg, dict(model_args or {}), entry["licence"])
    states = {WEIGHTS_FILE: _storable("backbone", backbone_state, torch.float16 if half else torch.float32)}
    if difference := state_difference(model.state_dict(), states[WEIGHTS_FILE]):
        raise ZooError(f"The backbone state does not fit {architecture}(num_classes=0): {difference}.")
    for file, state in (("pretext_head", pretext_head_state), ("task_head", task_head_state)):
        if state is not None:
            states[f"{file}.safetensors"] = _storable(file, state, torch.float16 if half else None)
    entry["input"] = {key: config["pretrained_cfg"][key] for key in PIXEL_KEYS} | {"channel_order": "RGB"}
    texts = {"config.json": to_json(config), CONFIG_FILE: train_config_text}
    for file, content in (task_model or {}).items():
        if file.endswith(".json"):
            texts[file] = to_json(content)
        else:
            states[file] = _storable("model", content, torch.float16 if half else None)
    to_json(entry)  # raises before anything is written
    try:
        with _draft_folder() as folder:
            files = _write_files(folder, texts, states)
            check_loads_in_timm(folder, states[WEIGHTS_FILE])
            published = store.publish(Draft(name, folder, lambda final: _complete(folder, entry, files, final), once))
    except (OSError, SafetensorError) as error:
        raise ZooError(f"Publishing '{name}' failed in the folder {tempfile.gettempdir()}: {error}.") from error
    except ZooError as error:
        raise ZooError(f"Publishing '{name}' to {store.location} failed: {error}") from error
    return PublishedEntry(published, f"{store.location.rstrip('/')}/{published}", files[WEIGHTS_FILE]["sha256"])


@contextlib.contextmanager
def _draft_folder() -> Iterator[Path]:
    """Yield an empty temporary folder; remove it afterwards, and before that those of publishers that were killed."""
    for left in Path(tempfile.gettempdir()).glob(f"{_DRAFT}*/{_LOCK}"):
        with contextlib.suppress(OSError, ZooError):  # of another user, or without locks
            if (descriptor := try_lock(left)) is not None:
                shutil.rmtree(left.parent)
                os.close(descriptor)
    with tempfile.TemporaryDirectory(prefix=_DRAFT) as temporary:
        descriptor = try_lock(Path(temporary) / _LOCK)
        try:
            (folder := Path(temporary) / "entry").mkdir()
            yield folder
        finally:
            if descriptor is not None:
                os.close(descriptor)


def entry_fields(metadata: EntryMetadata | Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of `entry.json` that follow from the metadata, with versions and the time (UTC).

    Raises:
        ZooError: an unknown field, or invalid metrics, data sets or parents.
    """
    from bissl_zoo import __version__

    if not isinstance(metadata, EntryMetadata):
        accepted = [known.name for known in fields(EntryMetadata)]
        # run directories of version 0.1 have another key
        metadata = {"parents" if key == "ancestors" else key: value for key, value in metadata.items()}
        for key in metadata:
            if key not in accepted:
                hint = did_you_mean(key, accepted)
                raise ZooError(f"Unknown metadata '{key}'.{hint} Accepted: {', '.join(accepted)}.")
        metadata = EntryMetadata(**metadata)
    seeds, parents = [int(seed) for seed in metadata.seeds], [dict(parent) for parent in metadata.parents]
    for parent in parents:
        if not is_sha256(parent.get("sha256")):
            raise ZooError(f"The parent {parent} has no sha256 (64 hex digits).")
    datasets = {
        role: {"name": data} if isinstance(data, str) else dict(data) for role, data in metadata.datasets.items()
    }
    if unnamed := [role for role, data in datasets.items() if "name" not in data]:
        raise ZooError(f"The data set for '{unnamed[0]}' has no 'name'.")
    return {
        **{key: getattr(metadata, key) for key in ("shared_stage", "pretext", "task", "solver", "licence", "notes")},
        "metrics": {name: _statistics(name, values, seeds) for name, values in metadata.metrics.items()},
        "seeds": seeds,
        "datasets": datasets,
        "lineage": {"parent": parents[0]["sha256"] if parents else None, "parents": parents},
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


def _statistics(metric: str, values: float | Sequence[float], seeds: Sequence[int]) -> dict[str, Any]:
    per_seed = [float(value) for value in (values if isinstance(values, Sequence) else [values])]
    if len(per_seed) != len(seeds) or not all(map(math.isfinite, per_seed)):
        raise ZooError(f"Metric '{metric}' needs one finite value per seed; it has {per_seed} for the seeds {seeds}.")
    std = statistics.stdev(per_seed) if len(per_seed) > 1 else None
    return {"mean": statistics.fmean(per_seed), "std": std, "values": per_seed}


def _write_files(
    folder: Path, texts: Mapping[str, str], states: Mapping[str, Mapping[str, Tensor]]
) -> dict[str, dict[str, Any]]:
    """Write all files that do not depend on the final name; return size and sha256 by file."""
    for file, text in texts.items():
        (folder / file).write_text(text, encoding="utf-8", newline="\n")
    for file, state in states.items():
        safetensors.torch.save_file(state, folder / file, metadata={"format": "pt"})
    return {path.name: _file_record(path) for path in folder.iterdir()}


def _complete(folder: Path, entry: dict[str, Any], files: Mapping[str, dict[str, Any]], name: str) -> dict[str, Any]:
    """Write the card and entry.json under the final name; return the index record."""
    entry = {**entry, "name": name, "files": dict(files)}
    for file, render in (("README.md", render_card), ("entry.json", to_json)):
        (folder / file).write_text(render(entry), encoding="utf-8", newline="\n")
        entry["files"] = {**entry["files"], file: _file_record(folder / file)}
    record = {key: entry[key] for key in _RECORD_KEYS}
    return record | {"parent": entry["lineage"]["parent"], "files": entry["files"]}


def _storable(what: str, state: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Return contiguous copies on the CPU that share no memory, floats as `dtype` if given."""
    stored = {}
    for key, value in state.items():
        if not isinstance(value, Tensor):
            raise ZooError(f"The {what} state has a {type(value).__name__} as '{key}'; only tensors can be published.")
        kind = dtype if dtype is not None and value.is_floating_point() else value.dtype
        stored[key] = value.detach().to("cpu", kind, copy=True, memory_format=torch.contiguous_format)
        if not torch.isfinite(value).all():
            raise ZooError(f"The {what} tensor '{key}' contains NaN or Inf: the run diverged and is not published.")
        if not torch.isfinite(stored[key]).all():
            raise ZooError(f"The {what} tensor '{key}' has values beyond float16. Publish without --half.")
    return stored


def _file_record(path: Path) -> dict[str, Any]:
    return {"sha256": sha256_of(path), "size": path.stat().st_size}
