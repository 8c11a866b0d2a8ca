"""A backbone as one .safetensors file under timm's names, with what its user must know in the file's metadata."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bissl_zoo.errors import ZooError
from bissl_zoo.weights.export import draft
from bissl_zoo.zoo.create import NO_MODEL_ARGS
from bissl_zoo.zoo.hub import ZooLike, as_zoo
from bissl_zoo.zoo.names import pin

_KEY = "bissl_zoo"


@dataclass(frozen=True)
class StoredBackbone:
    """A backbone's weights and its facts.

    Args:
        state: under the names of `timm.create_model(architecture, num_classes=0, **model_args)`.
        pixels: `mean` and `std` of RGB images scaled to [0, 1]; None where they are not known.
        source: the layout or zoo entry it came from.
    """

    state: Mapping[str, Tensor]
    architecture: str
    model_args: Mapping[str, Any] = field(default_factory=dict)
    pixels: Mapping[str, Any] | None = None
    source: str = ""


def save_backbone(backbone: StoredBackbone, output: str | os.PathLike[str]) -> None:
    """Write a backbone; the file appears complete or not at all.

    Raises:
        ZooError: the name does not end in .safetensors, or the disk refused.
    """
    facts = {key: getattr(backbone, key) for key in ("architecture", "model_args", "pixels", "source")}
    save_tensors(backbone.state, output, {_KEY: json.dumps(facts)})


def save_tensors(
    state: Mapping[str, Tensor], output: str | os.PathLike[str], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors to a .safetensors file, complete or not at all.

    Raises:
        ZooError: the name does not end in .safetensors, or the disk refused.
    """
    output = Path(output)
    if output.suffix != ".safetensors":
        raise ZooError(f"{output}: tensors are written as .safetensors.")
    own = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in state.items()}
    try:
        with draft(output) as file:
            safetensors.torch.save_file(own, file, {"format": "pt", **(metadata or {})})
    except (OSError, SafetensorError) as error:
        raise ZooError(f"{output} could not be written: {error}.") from error


def read_backbone(
    source: str | os.PathLike[str], architecture: str | None = None, zoo: ZooLike = None
) -> StoredBackbone:
    """A backbone by the name of its zoo entry or from a .safetensors file under timm's names.

    Args:
        architecture: of a file without metadata of ours; of another it must be the one stated.
    Raises:
        ZooError: there is none of that name, it is damaged, or its architecture is not known or another.
    """
    path = Path(source)
    stored = _from_file(path, architecture) if path.suffix == ".safetensors" else _from_entry(os.fspath(source), zoo)
    if architecture not in (None, stored.architecture):
        raise ZooError(f"{source} is a {stored.architecture}, not a {architecture}.")
    return stored


def _from_entry(name: str, zoo: ZooLike) -> StoredBackbone:
    entry = as_zoo(zoo).find(name)
    facts, config = entry.facts(), entry.read_json("config.json")
    stored = StoredBackbone(
        entry.weights(),
        facts.get("architecture", ""),
        config.get("model_args", {}),
        facts.get("input"),
        pin(entry.name),
    )
    return _checked(stored, f"Zoo entry '{entry.name}'")


def _from_file(path: Path, architecture: str | None) -> StoredBackbone:
    if not path.is_file():
        raise ZooError(f"There is no file {path}.")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        state = safetensors.torch.load_file(path)
    except (SafetensorError, OSError) as error:
        raise ZooError(f"{path} cannot be read as safetensors: {error}.") from error
    try:
        facts = {"architecture": architecture, **json.loads(metadata.get(_KEY, "{}"))}
        stored = StoredBackbone(state, **facts)
    except (ValueError, TypeError, RecursionError) as error:
        raise ZooError(f"{path} has metadata of this package that cannot be read: {error}.") from error
    if not stored.architecture:
        raise ZooError(f"{path} does not say its architecture. Name it: --architecture resnet50.")
    return _checked(stored, str(path))


def _checked(stored: StoredBackbone, where: str) -> StoredBackbone:
    """The same backbone; `ZooError` where its facts are of other kinds than they have to be."""
    pixels = stored.pixels
    if not isinstance(stored.architecture, str) or not stored.architecture:
        problem = "an architecture that is not a name"
    elif not isinstance(stored.model_args, dict) or NO_MODEL_ARGS & stored.model_args.keys():
        problem = f"model_args that no backbone has: {stored.model_args!r:.200}"
    elif pixels is not None and not (isinstance(pixels, dict) and all(_is_rgb(pixels.get(k)) for k in ("mean", "std"))):
        problem = "pixels without a mean and a std of three numbers each"
    elif not isinstance(stored.source, str):
        problem = "a source that is not text"
    else:
        return stored
    raise ZooError(f"{where} states {problem}. Fetch it again, or ask whoever made it.")


def _is_rgb(values: Any) -> bool:
    numbers = isinstance(values, list) and all(type(value) in (int, float) for value in values)
    return numbers and len(values) == 3 and all(abs(value) < 1e6 for value in values)
