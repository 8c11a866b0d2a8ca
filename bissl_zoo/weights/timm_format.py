"""Entries as timm reads them: its `config.json`, and the proof that it loads what was written."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from bissl_zoo.errors import ZooError, did_you_mean
from bissl_zoo.zoo.names import shorten

PIXEL_KEYS = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")  # of timm's pretrained_cfg


def timm_config(
    architecture: str, pretrained_cfg: Mapping[str, Any], model_args: dict[str, Any], licence: str
) -> tuple[nn.Module, dict[str, Any]]:
    """The model that timm will build for the entry, and the `config.json` (timm's own format) that makes it do so."""
    if architecture not in timm.list_models():
        hint = did_you_mean(architecture, timm.list_models())
        raise ZooError(f"'{architecture}' is not an architecture of timm {timm.__version__}, which entries need.{hint}")
    for key in pretrained_cfg:
        if key not in PIXEL_KEYS:
            hint = did_you_mean(key, PIXEL_KEYS)
            raise ZooError(f"Unknown key '{key}' in pretrained_cfg.{hint} Accepted: {', '.join(PIXEL_KEYS)}.")
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


def check_loads_in_timm(folder: Path, expected: Mapping[str, Tensor]) -> None:
    """Load the written files as their users will, and compare every tensor bit for bit."""
    try:
        loaded = _untrained(f"local-dir:{folder}", pretrained=True).state_dict()
    except (RuntimeError, TypeError, ValueError, KeyError, AssertionError) as error:
        raise ZooError(f"timm {timm.__version__} does not load the entry, so it is not published: {error}") from error
    changed = [key for key, tensor in expected.items() if key not in loaded or not torch.equal(loaded[key], tensor)]
    if changed:
        raise ZooError(f"timm {timm.__version__} loads other values than were published: {shorten(changed)}.")
