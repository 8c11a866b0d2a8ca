"""Zoo entries built as backbones."""

from collections.abc import Iterable, Mapping
from typing import Any

import timm
from torch import Tensor

from bissl_zoo.backbones import Backbone
from bissl_zoo.errors import BisslZooError, ZooError
from bissl_zoo.registry import BACKBONES, build_backbone
from bissl_zoo.zoo.hub import Entry, ZooLike, as_zoo
from bissl_zoo.zoo.names import pin, shorten

#: arguments of `build_backbone` and `timm.create_model` that name something else, or have it fetched from elsewhere
NO_MODEL_ARGS = {
    *("name", "architecture", "out_features", "features_only", "num_classes", "device", "dtype"),
    *("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir"),
}


def create_backbone(
    name: str, pretrained: bool = True, out_features: Iterable[str] | None = None, zoo: ZooLike = None, **kwargs: Any
) -> Backbone:
    """A zoo entry's backbone in eval mode, as timm's `create_model` would give it.

    Args:
        name: an entry; without a version its newest one. With `pretrained=False` a timm architecture as well.
        pretrained: load the entry's weights, after their sha256 and size were compared with the index. Otherwise the
            same architecture with random weights.
        out_features: the stages to return, by name; None for what `build_backbone` returns by default.
        zoo: a Zoo or its location; None for `default_zoo()`.
        kwargs: passed on to `build_backbone`; they override what the entry says about its construction.
    Raises:
        ZooError: for an unknown entry, a file that is not the published one, or weights that do not fit.
    """
    zoo = as_zoo(zoo)
    if out_features is not None:
        kwargs["out_features"] = tuple(out_features)
    if name in BACKBONES and not zoo.versions(name):
        if pretrained:
            raise ZooError(
                f"{zoo} holds no entry '{name}', so there are no weights to load. '{name}' is an architecture: "
                f"pretrained=False builds it with random weights. Entries: {shorten(list(zoo.entries())) or 'none'}."
            )
        return build_backbone(name=name, **kwargs).eval()
    entry = zoo.find(name)
    architecture = entry.record["architecture"]
    if architecture not in BACKBONES:
        raise ZooError(
            f"Zoo entry '{pin(entry.name)}' needs the architecture '{architecture}', which timm {timm.__version__} "
            f"does not have. It was published with timm {_timm_version(entry)}: install that version or a newer one."
        )
    backbone = _build(entry, architecture, kwargs)
    if pretrained:
        weights = entry.weights()
        difference = state_difference(backbone.state_dict(), weights)
        if difference:
            raise ZooError(f"The weights of zoo entry '{entry.name}' do not fit {architecture}: {difference}.")
        backbone.load_state_dict(weights)
    return backbone.eval()


def _build(entry: Entry, architecture: str, kwargs: Mapping[str, Any]) -> Backbone:
    """The entry's backbone with random weights; what an entry says about its construction is not trusted."""
    model_args = entry.read_json("config.json").get("model_args", {})
    if not isinstance(model_args, dict) or NO_MODEL_ARGS & model_args.keys():
        raise ZooError(
            f"The config.json of zoo entry '{pin(entry.name)}' has model_args that no entry has: {model_args!r:.200}. "
            "Nothing of it was loaded: tell whoever keeps this zoo."
        )
    try:
        return build_backbone(name=architecture, **{**model_args, **kwargs})
    except BisslZooError:
        raise
    except Exception as error:  # timm's models raise what they like for arguments they cannot use
        raise ZooError(
            f"timm {timm.__version__} does not build the {architecture} of zoo entry '{pin(entry.name)}' with "
            f"{ {**model_args, **kwargs}!r:.200}: {type(error).__name__}: {error}"
        ) from error


def _timm_version(entry: Entry) -> Any:
    versions = entry.facts().get("versions")
    if not isinstance(versions, dict) or not isinstance(versions.get("timm"), str):
        raise ZooError(f"The entry.json of zoo entry '{pin(entry.name)}' does not say its timm version.")
    return versions["timm"]


def state_difference(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> str:
    """How two state dicts differ in names and shapes, with counts; an empty string where they agree."""
    shared = [key for key in expected if key in found]
    reshaped = [key for key in shared if found[key].shape != expected[key].shape]
    parts = {
        "missing": [key for key in expected if key not in found],
        "unexpected": sorted(key for key in found if key not in expected),
        "of another shape": [f"{k} {tuple(found[k].shape)} instead of {tuple(expected[k].shape)}" for k in reshaped],
    }
    told = [f"{len(names)} {what}: {shorten(names)}" for what, names in parts.items() if names]
    return f"{len(shared) - len(reshaped)} of {len(expected)} tensors match; {'; '.join(told)}" if told else ""
