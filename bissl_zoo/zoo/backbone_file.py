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
from bissl_zoo.zoo.export import draft
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
    return StoredBackbone(
        entry.weights(), facts["architecture"], config.get("model_args", {}), facts["input"], pin(entry.name)
    )


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
    except (ValueError, TypeError) as error:
        raise ZooError(f"{path} has metadata of this package that cannot be read: {error}.") from error
    if not stored.architecture:
        raise ZooError(f"{path} does not say its architecture. Name it: --architecture resnet50.")
    return stored
