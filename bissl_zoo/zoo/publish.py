"""Publishing a backbone as a zoo entry: complete, checked and visible, or not there at all."""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from bissl_zoo.errors import ZooError
from bissl_zoo.weights.timm_format import PIXEL_KEYS, check_loads_in_timm, timm_config
from bissl_zoo.zoo.card import EntryMetadata, entry_facts, render_card
from bissl_zoo.zoo.create import state_difference
from bissl_zoo.zoo.figure import FIGURE_FILE, draw_metrics
from bissl_zoo.zoo.hub import WEIGHTS_FILE, ZooLike, as_zoo
from bissl_zoo.zoo.index import ENTRY_FORMAT, Index, to_json
from bissl_zoo.zoo.names import check_name, sha256_of, split_version
from bissl_zoo.zoo.stores import writable
from bissl_zoo.zoo.transactions import add_entry, read_index

#: of an entry.json, what the index repeats
_RECORD_KEYS = ("architecture", "pretext", "task", "solver", "metrics", "licence", "created")


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
    zoo: ZooLike = None,
    once: bool = False,
) -> PublishedEntry:
    """Add a backbone to a zoo under `name`, or `name@2`, `name@3`, ... where the name is taken; entries never change.

    The files are written on this machine, read back and loaded with plain timm before any of them goes to the zoo. The
    entry becomes visible when the index is replaced, which is the last step (see `transactions`).

    Args:
        backbone_state: timm's parameter names, as in `timm.create_model(architecture, num_classes=0).state_dict()`;
            stored as contiguous float32.
        pretrained_cfg: what the images looked like, in timm's terms: `mean`, `std` and `input_size` (channels, height,
            width), and where they differ from the architecture's own `interpolation`, `crop_pct`, `crop_mode`.
        metadata: `EntryMetadata`, or a mapping of its fields.
        train_config_text: the run's resolved config as YAML.
        model_args: arguments the model was built with beyond the architecture's own (`Backbone.model_args`).
        zoo: a location, or a Zoo, of which the first location is published to.
        once: where a version of `name` has these very weights, heads and configuration, return that one: for a
            publisher who cannot know whether it came so far before it was interrupted.
    Raises:
        ZooError: the state does not fit the architecture, a value cannot be stored, or the zoo refused. It is as it
            was then.
    """
    store = writable(as_zoo(zoo).stores[0])
    check_name(name)
    if "@" in name or name.lower().endswith((".json", ".md", ".lock")):
        raise ZooError(f"'{name}' cannot be published: leave out '@' (versions are counted here) and file endings.")
    entry = {"format": ENTRY_FORMAT, "name": name, "architecture": architecture, **entry_facts(metadata)}
    model, config = timm_config(architecture, pretrained_cfg, dict(model_args or {}), entry["licence"])
    backbone_state = _storable("backbone", backbone_state, torch.float32)
    difference = state_difference(model.state_dict(), backbone_state)
    if difference:
        raise ZooError(
            f"The backbone state does not fit {architecture}(num_classes=0), so it is not published: {difference}."
        )
    states = {WEIGHTS_FILE: backbone_state}
    for file, state in (("pretext_head", pretext_head_state), ("task_head", task_head_state)):
        if state is not None:
            states[f"{file}.safetensors"] = _storable(file, state)
    entry["input"] = {key: config["pretrained_cfg"][key] for key in PIXEL_KEYS} | {"channel_order": "RGB"}
    # an unusable index, like facts that cannot be stored, is reported before anything is written
    index, _ = read_index(store)
    texts = {"config.json": to_json(config), "train_config.yaml": train_config_text}
    to_json(entry)
    try:
        with tempfile.TemporaryDirectory(prefix="bissl_zoo-") as folder:
            files = _write_files(Path(folder), texts, states, entry)
            check_loads_in_timm(Path(folder), backbone_state)
            named = _same_entry(index, name, files) if once else None
            named = named or add_entry(store, name, lambda given: _complete(Path(folder), entry, files, given))
    except (OSError, SafetensorError) as error:
        raise ZooError(
            f"Publishing '{name}' to {store.location} failed in the folder for temporary files, "
            f"{tempfile.gettempdir()}: {error}. Make room there, or name another one by TMPDIR."
        ) from error
    except ZooError as error:
        raise ZooError(f"Publishing '{name}' to {store.location} failed: {error}") from error
    return PublishedEntry(named, f"{store.location.rstrip('/')}/{named}", files[WEIGHTS_FILE]["sha256"])


def _same_entry(index: Index, name: str, files: Mapping[str, dict[str, Any]]) -> str | None:
    """The newest version of `name` whose tensors and configuration are these files'."""
    telling = {file for file in files if file.endswith(".safetensors")} | {"train_config.yaml"}
    same = [
        entry
        for entry, record in index.records.items()
        if split_version(entry)[0] == name and all(record["files"].get(file) == files[file] for file in telling)
    ]
    return max(same, key=lambda entry: split_version(entry)[1], default=None)


def _write_files(
    folder: Path, texts: Mapping[str, str], states: Mapping[str, Mapping[str, Tensor]], entry: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """All that does not depend on the entry's version; returns size and sha256 by file."""
    for file, text in texts.items():
        (folder / file).write_text(text, encoding="utf-8", newline="\n")
    for file, state in states.items():
        safetensors.torch.save_file(state, folder / file, metadata={"format": "pt"})
    if entry["metrics"]:
        draw_metrics(entry["metrics"], folder / FIGURE_FILE)
    return {path.name: _file_facts(path) for path in folder.iterdir()}


def _complete(
    folder: Path, entry: dict[str, Any], files: Mapping[str, dict[str, Any]], name: str
) -> tuple[dict[str, Path], dict[str, Any]]:
    """The files of an entry that is called `name`, and its index record."""
    entry = {**entry, "name": name, "files": dict(files)}
    for file, render in (("README.md", render_card), ("entry.json", to_json)):
        (folder / file).write_text(render(entry), encoding="utf-8", newline="\n")
        entry["files"] = {**entry["files"], file: _file_facts(folder / file)}
    record = {key: entry[key] for key in _RECORD_KEYS}
    record |= {"parent": entry["lineage"]["parent"], "files": entry["files"]}
    return {file: folder / file for file in entry["files"]}, record


def _storable(what: str, state: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Contiguous copies on the CPU that share no memory (safetensors refuses shared), floats in `dtype` where given."""
    stored = {}
    for key, value in state.items():
        if not isinstance(value, Tensor):
            raise ZooError(
                f"The {what} state holds a {type(value).__name__} as '{key}'; only tensors can be published."
            )
        kind = dtype if dtype is not None and value.is_floating_point() else value.dtype
        stored[key] = value.detach().to("cpu", kind, copy=True, memory_format=torch.contiguous_format)
        if not torch.isfinite(stored[key]).all():
            raise ZooError(
                f"The {what} tensor '{key}' has values that are NaN or infinite: a diverged run is not published."
            )
    return stored


def _file_facts(path: Path) -> dict[str, Any]:
    return {"sha256": sha256_of(path), "size": path.stat().st_size}
