"""Publishing a backbone as a zoo entry: complete, checked and visible, or not there at all."""

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import portalocker
import safetensors.torch
import timm
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from bissl_zoo.errors import ZooError, did_you_mean
from bissl_zoo.zoo.card import EntryMetadata, entry_facts, render_card
from bissl_zoo.zoo.hub import (
    ENTRY_FORMAT,
    INDEX_FORMAT,
    WEIGHTS_FILE,
    Zoo,
    ZooLike,
    as_zoo,
    check_name,
    read_index,
    sha256_of,
    shorten,
    split_version,
    state_difference,
)

LOCK_TIMEOUT_S = 120
_SPARE_BYTES = 1 << 20  # for the JSON files, the card and the index
_MIB = 1 << 20
_PIXEL_KEYS = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")  # of timm's pretrained_cfg


@dataclass(frozen=True)
class PublishedEntry:
    """A published entry: its name with version, its folder, and the sha256 of its `model.safetensors`."""

    name: str
    path: Path
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
) -> PublishedEntry:
    """Add a backbone to a zoo under `name`, or `name@2`, `name@3`, ... where the name is taken; entries never change.

    The files are written beside their final place, read back and loaded with plain timm before anyone can see them. The
    entry becomes visible when the index is replaced, under a lock that all publishers to this zoo share.

    Args:
        backbone_state: timm's parameter names, as in `timm.create_model(architecture, num_classes=0).state_dict()`;
            stored as contiguous float32.
        pretrained_cfg: what the images looked like, in timm's terms: `mean`, `std` and `input_size` (channels, height,
            width), and where they differ from the architecture's own `interpolation`, `crop_pct`, `crop_mode`.
        metadata: `EntryMetadata`, or a mapping of its fields.
        train_config_text: the run's resolved config as YAML.
        model_args: arguments the model was built with beyond the architecture's own (`Backbone.model_args`).
    Raises:
        ZooError: the state does not fit the architecture, a value cannot be stored, or the disk refused. The zoo is as
            it was then.
    """
    zoo = as_zoo(zoo)
    check_name(name)
    if "@" in name or name.lower().endswith((".json", ".md", ".lock")):
        raise ZooError(f"'{name}' cannot be published: leave out '@' (versions are counted here) and file endings.")
    entry = {"format": ENTRY_FORMAT, "name": name, "architecture": architecture, **entry_facts(metadata)}
    model, config = _timm_config(architecture, pretrained_cfg, dict(model_args or {}), entry["licence"])
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
    entry["input"] = {key: config["pretrained_cfg"][key] for key in _PIXEL_KEYS} | {"channel_order": "RGB"}
    zoo.records()  # an unusable index, like facts that cannot be stored, is reported before anything is written
    texts = {"config.json": _to_json(config), "train_config.yaml": train_config_text}
    _to_json(entry)

    with _staging(zoo, name, states) as folder:
        for file, text in texts.items():
            _write(folder / file, text)
        for file, state in states.items():
            safetensors.torch.save_file(state, folder / file, metadata={"format": "pt"})
            shutil.copymode(folder / "config.json", folder / file)  # safetensors lets only the owner read
            _sync(folder / file)
        _check_loads_in_timm(folder, backbone_state)
        entry["files"] = {file: _file_facts(folder / file) for file in [*states, *texts]}
        return _make_visible(zoo, name, folder, entry)


def _make_visible(zoo: Zoo, name: str, folder: Path, entry: dict[str, Any]) -> PublishedEntry:
    with portalocker.Lock(str(zoo.root / ".lock"), "a", timeout=LOCK_TIMEOUT_S):
        name = entry["name"] = _free_name(zoo, name)
        _write(folder / "README.md", render_card(entry))
        entry["files"]["README.md"] = _file_facts(folder / "README.md")
        _write(folder / "entry.json", _to_json(entry))
        record = {key: entry[key] for key in ("architecture", "pretext", "task", "metrics", "created")}
        record["parent"] = entry["lineage"]["parent"]
        record["files"] = {**entry["files"], "entry.json": _file_facts(folder / "entry.json")}
        _sync(folder)
        index, path = zoo.root / "index.json", zoo.root / name
        pending = folder.with_name(f"{folder.name}.json")
        try:
            # All writing comes before the two renames, so that a full disk cannot stop between them.
            entries = {**read_index(index), name: record}
            _write(pending, _to_json({"format": INDEX_FORMAT, "entries": entries}))
            os.rename(folder, path)
            _sync(zoo.root)
            try:
                os.replace(pending, index)
            except OSError:
                shutil.rmtree(path, ignore_errors=True)
                raise
            _sync(zoo.root)
        finally:
            pending.unlink(missing_ok=True)
    return PublishedEntry(name, path, record["files"][WEIGHTS_FILE]["sha256"])


def _free_name(zoo: Zoo, name: str) -> str:
    """The name itself or its next version; folders outside of the index count, so that nothing is overwritten."""
    newest = max((split_version(known)[1] for known in zoo.versions(name)), default=0)
    while True:
        newest += 1
        candidate = name if newest == 1 else f"{name}@{newest}"
        if not os.path.lexists(zoo.root / candidate):
            return candidate


@contextlib.contextmanager
def _staging(zoo: Zoo, name: str, states: Mapping[str, Mapping[str, Tensor]]) -> Iterator[Path]:
    """A hidden folder in the zoo to write into, gone afterwards; what fails inside becomes one `ZooError`."""
    needed = sum(t.numel() * t.element_size() for state in states.values() for t in state.values()) + _SPARE_BYTES
    existing = next(folder for folder in (zoo.root.absolute(), *zoo.root.absolute().parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    folder = zoo.root / f".publishing-{os.getpid()}-{secrets.token_hex(4)}"
    try:
        if free < needed:
            raise OSError("not enough disk space")
        zoo.root.mkdir(parents=True, exist_ok=True)
        folder.mkdir()
        yield folder
    except (OSError, SafetensorError, portalocker.LockException) as error:
        locked = isinstance(error, portalocker.LockException)
        reason = f"another process has held {zoo.root / '.lock'} for {LOCK_TIMEOUT_S} s" if locked else error
        raise ZooError(
            f"Publishing '{name}' to {zoo.root} failed: {reason}. "
            f"The zoo is as it was. The entry needs {needed / _MIB:.1f} MiB and {free / _MIB:.1f} MiB were free; "
            "make room, or choose another zoo folder with the environment variable BISSL_ZOO."
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _timm_config(
    architecture: str, pretrained_cfg: Mapping[str, Any], model_args: dict[str, Any], licence: str
) -> tuple[nn.Module, dict[str, Any]]:
    """The model that timm will build for the entry, and the `config.json` (timm's own format) that makes it do so."""
    if architecture not in timm.list_models():
        hint = did_you_mean(architecture, timm.list_models())
        raise ZooError(f"'{architecture}' is not an architecture of timm {timm.__version__}, which entries need.{hint}")
    for key in pretrained_cfg:
        if key not in _PIXEL_KEYS:
            hint = did_you_mean(key, _PIXEL_KEYS)
            raise ZooError(f"Unknown key '{key}' in pretrained_cfg.{hint} Accepted: {', '.join(_PIXEL_KEYS)}.")
    if absent := [key for key in ("input_size", "mean", "std") if key not in pretrained_cfg]:
        raise ZooError(
            f"pretrained_cfg lacks {', '.join(absent)}: whoever loads the entry must know what it was trained on."
        )
    model = _untrained(architecture, num_classes=0, **model_args)
    own = model.pretrained_cfg
    inherited = {key: own[key] for key in ("interpolation", "crop_pct", "crop_mode", "first_conv", "classifier")}
    pixels = {
        key: value if isinstance(value, str | int | float) else list(value) for key, value in pretrained_cfg.items()
    }
    fixed = own.get("fixed_input_size", False) and not model_args.get("dynamic_img_size", False)
    built_for = model_args.get("img_size", own["input_size"][1:])
    built_for = [built_for, built_for] if isinstance(built_for, int) else list(built_for)
    if fixed and built_for != pixels["input_size"][1:]:
        raise ZooError(
            f"pretrained_cfg has input_size {pixels['input_size']}, but this {architecture} was built for images of "
            f"{built_for}. State the size it was built for, or build it with img_size."
        )
    config = {
        "architecture": architecture,
        "num_classes": 0,
        "num_features": model.num_features,
        "global_pool": _pooling(model),
        "pretrained_cfg": {**inherited, **pixels, "fixed_input_size": fixed, "num_classes": 0, "license": licence},
    }
    return model, {**config, "model_args": model_args} if model_args else config


def _untrained(architecture: str, **kwargs: Any) -> nn.Module:
    with torch.random.fork_rng(devices=[]):  # publishing must not move the random numbers of a run that goes on
        return timm.create_model(architecture, **kwargs)


def _pooling(model: nn.Module) -> str:
    for owner in (model, getattr(model, "head", None)):
        pool = getattr(owner, "global_pool", None)
        pool = getattr(pool, "pool_type", pool)
        if isinstance(pool, str):
            return pool
    return ""


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


def _check_loads_in_timm(folder: Path, expected: Mapping[str, Tensor]) -> None:
    """Load the written files as their users will, and compare every tensor bit for bit."""
    try:
        loaded = _untrained(f"local-dir:{folder}", pretrained=True).state_dict()
    except (RuntimeError, TypeError, ValueError, KeyError, AssertionError) as error:
        raise ZooError(f"timm {timm.__version__} does not load the entry, so it is not published: {error}") from error
    changed = [key for key, tensor in expected.items() if key not in loaded or not torch.equal(loaded[key], tensor)]
    if changed:
        raise ZooError(f"timm {timm.__version__} loads other values than were published: {shorten(changed)}.")


def _file_facts(path: Path) -> dict[str, Any]:
    return {"sha256": sha256_of(path), "size": path.stat().st_size}


def _to_json(content: Mapping[str, Any]) -> str:
    try:
        return json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    except (TypeError, ValueError) as error:
        raise ZooError(
            f"The entry holds a value that JSON cannot: {error}. Use numbers, text, lists and mappings."
        ) from error


def _write(path: Path, text: str) -> None:
    with open(path, "x", encoding="utf-8", newline="\n") as stream:
        stream.write(text)
    _sync(path)


def _sync(path: Path) -> None:
    """Have the operating system bring a file, or a folder's list of names, to the disk."""
    if path.is_dir():
        # Some systems cannot do this for folders. What the files hold is on the disk all the same.
        with contextlib.suppress(OSError):
            _fsync(path, os.O_RDONLY)
    else:
        _fsync(path, os.O_RDWR)


def _fsync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
