"""Build backbones from any source of weights, and read those of zoo entries."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
from timm.models import is_model_pretrained
from torch import nn

from bissl_zoo.backbones import Backbone
from bissl_zoo.errors import BisslZooError, ZooError, shorten
from bissl_zoo.registry import BACKBONES, build_backbone
from bissl_zoo.weights.files import StoredBackbone, model_args_problem
from bissl_zoo.weights.hub import timm_config
from bissl_zoo.weights.load import read_weights
from bissl_zoo.zoo.hub import WEIGHTS_FILE, Entry, ZooLike, as_zoo
from bissl_zoo.zoo.index import is_name, pin


def create_backbone(
    name: str, pretrained: bool = True, out_features: Iterable[str] | None = None, zoo: ZooLike = None, **kwargs: Any
) -> Backbone:
    """Build a backbone in eval mode, as `timm.create_model` would.

    Args:
        name: a zoo entry (`NAME`, or `NAME@2` for a version), timm's `NAME.TAG`, or any source that
            :func:`bissl_zoo.weights.load.read_weights` takes, such as `hf-hub:USER/REPO` or a file; also a registered
            backbone with `pretrained=False`.
        pretrained: load the weights; otherwise they are random.
        out_features: names of the stages to return; None for the default of `build_backbone`.
        zoo: a Zoo or its location; None for `default_zoo()`.
        kwargs: arguments of `build_backbone`, which override those stored with the weights; `architecture` names that
            of a source which does not state it.
    Raises:
        ZooError: an unknown or damaged entry, or weights that do not fit.
    """
    zoo = as_zoo(zoo)
    if out_features is not None:
        kwargs["out_features"] = tuple(out_features)
    architecture = kwargs.pop("architecture", None)
    source = name
    if ":" not in name and not Path(name).exists():
        in_zoo = bool(zoo.versions(name)) if is_name(name) else False
        if not pretrained and not in_zoo and name in BACKBONES:
            return build_backbone(name=name, **kwargs).eval()
        source = f"{'timm' if not in_zoo and is_model_pretrained(name) else 'zoo'}:{name}"
        if not in_zoo and source.startswith("zoo:") and name in BACKBONES:
            raise ZooError(
                f"'{name}' is an architecture without weights in timm {timm.__version__} and in {zoo}. Use "
                f"pretrained=False for random weights. Entries: {shorten(list(zoo.entries())) or 'none'}."
            )
    if not pretrained:
        if source.startswith("zoo:"):
            entry = zoo.find(source.removeprefix("zoo:"))
            stored = StoredBackbone({}, _architecture(entry), _model_args(entry), source=pin(entry.name))
        elif source.startswith("timm:"):
            stored = StoredBackbone({}, timm_config(source.removeprefix("timm:"))[0])
        else:
            stored = read_weights(source, architecture, zoo=zoo)
        return _build(stored, kwargs).eval()
    built: list[Backbone] = []

    def network(stated: StoredBackbone) -> nn.Module:
        built.append(_build(stated, kwargs))
        return built[0].model

    stored = read_weights(source, architecture, network, zoo)
    built[0].load_state_dict(stored.state)
    return built[0].eval()


def read_entry(name: str, zoo: ZooLike = None) -> StoredBackbone:
    """Read the backbone of a zoo entry with what is known of it.

    Raises:
        ZooError: unknown, damaged, or of an architecture that the installed timm lacks.
    """
    entry = as_zoo(zoo).find(name)
    metadata = entry.metadata()
    stored = StoredBackbone(
        entry.weights(),
        metadata.get("architecture", ""),
        entry.read_json("config.json").get("model_args", {}),
        metadata.get("input"),
        pin(entry.name),
        str(metadata.get("licence") or "unknown"),
        entry.record["files"][WEIGHTS_FILE]["sha256"],
        entry.parents(),
    ).checked(f"Zoo entry '{entry.name}'")
    return replace(stored, architecture=_architecture(entry))


def _architecture(entry: Entry) -> str:
    architecture = entry.record["architecture"]
    if architecture not in BACKBONES:
        versions = entry.metadata().get("versions")
        published = versions.get("timm") if isinstance(versions, dict) else None
        raise ZooError(
            f"Zoo entry '{pin(entry.name)}' needs the architecture '{architecture}', which timm {timm.__version__} "
            f"does not have. It was published with timm {str(published):.20}: install that version or a newer one."
        )
    return architecture


def _model_args(entry: Entry) -> dict[str, Any]:
    model_args = entry.read_json("config.json").get("model_args", {})
    if problem := model_args_problem(model_args):
        raise ZooError(
            f"The config.json of zoo entry '{pin(entry.name)}' has invalid model_args: {problem}. Nothing was loaded; "
            "report it to the owner of the zoo."
        )
    return model_args


def _build(stored: StoredBackbone, kwargs: Mapping[str, Any]) -> Backbone:
    """Build the network of stored weights with random ones."""
    arguments = {**stored.model_args, **kwargs}
    try:
        return build_backbone(name=stored.architecture, **arguments)
    except BisslZooError:
        raise
    except Exception as error:  # timm's models raise many types for invalid arguments
        raise ZooError(
            f"timm {timm.__version__} cannot build the {stored.architecture} of '{stored.source}' with "
            f"{arguments!r:.200}: {type(error).__name__}: {error}"
        ) from error
