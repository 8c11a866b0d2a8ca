"""Build backbones from zoo entries."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import timm

from bissl_zoo.backbones import Backbone
from bissl_zoo.errors import BisslZooError, ZooError, shorten
from bissl_zoo.registry import BACKBONES, build_backbone
from bissl_zoo.weights.files import StoredBackbone, model_args_problem, read_backbone_file, state_difference
from bissl_zoo.zoo.hub import Entry, ZooLike, as_zoo
from bissl_zoo.zoo.index import pin


def create_backbone(
    name: str, pretrained: bool = True, out_features: Iterable[str] | None = None, zoo: ZooLike = None, **kwargs: Any
) -> Backbone:
    """Build the backbone of a zoo entry in eval mode, as `timm.create_model` would.

    Args:
        name: an entry; without a version its newest one. With `pretrained=False` also a timm architecture.
        pretrained: load the verified weights of the entry; otherwise the weights are random.
        out_features: names of the stages to return; None for the default of `build_backbone`.
        zoo: a Zoo or its location; None for `default_zoo()`.
        kwargs: arguments of `build_backbone`, which override those stored in the entry.
    Raises:
        ZooError: an unknown or damaged entry, or weights that do not fit.
    """
    zoo = as_zoo(zoo)
    if out_features is not None:
        kwargs["out_features"] = tuple(out_features)
    if name in BACKBONES and not zoo.versions(name):
        if pretrained:
            raise ZooError(
                f"'{name}' is an architecture, and {zoo} has no entry of this name. Use pretrained=False for random "
                f"weights. Entries: {shorten(list(zoo.entries())) or 'none'}."
            )
        return build_backbone(name=name, **kwargs).eval()
    entry = zoo.find(name)
    architecture = entry.record["architecture"]
    if architecture not in BACKBONES:
        versions = entry.metadata().get("versions")
        published = versions.get("timm") if isinstance(versions, dict) else None
        raise ZooError(
            f"Zoo entry '{pin(entry.name)}' needs the architecture '{architecture}', which timm {timm.__version__} "
            f"does not have. It was published with timm {str(published):.20}: install that version or a newer one."
        )
    backbone = _build(entry, architecture, kwargs)
    if pretrained:
        weights = entry.weights()
        if difference := state_difference(backbone.state_dict(), weights):
            raise ZooError(f"The weights of zoo entry '{entry.name}' do not fit {architecture}: {difference}.")
        backbone.load_state_dict(weights)
    return backbone.eval()


def read_backbone(
    source: str | os.PathLike[str], architecture: str | None = None, zoo: ZooLike = None
) -> StoredBackbone:
    """Read a backbone from a .safetensors file under timm's names, or from the zoo entry of this name.

    Args:
        architecture: required for a file without metadata of this package; otherwise it must match.
    Raises:
        ZooError: not found, damaged, or of another or unknown architecture.
    """
    if Path(source).suffix == ".safetensors":
        return read_backbone_file(Path(source), architecture)
    entry = as_zoo(zoo).find(os.fspath(source))
    metadata, config = entry.metadata(), entry.read_json("config.json")
    stored = StoredBackbone(
        entry.weights(),
        metadata.get("architecture", ""),
        config.get("model_args", {}),
        metadata.get("input"),
        pin(entry.name),
    )
    return stored.checked(f"Zoo entry '{entry.name}'", architecture)


def _build(entry: Entry, architecture: str, kwargs: Mapping[str, Any]) -> Backbone:
    """Build the backbone of an entry with random weights; its stored arguments are not trusted."""
    model_args = entry.read_json("config.json").get("model_args", {})
    if problem := model_args_problem(model_args):
        raise ZooError(
            f"The config.json of zoo entry '{pin(entry.name)}' has invalid model_args: {problem}. Nothing was loaded; "
            "report it to the owner of the zoo."
        )
    try:
        return build_backbone(name=architecture, **{**model_args, **kwargs})
    except BisslZooError:
        raise
    except Exception as error:  # timm's models raise many types for invalid arguments
        raise ZooError(
            f"timm {timm.__version__} cannot build the {architecture} of zoo entry '{pin(entry.name)}' with "
            f"{ {**model_args, **kwargs}!r:.200}: {type(error).__name__}: {error}"
        ) from error
