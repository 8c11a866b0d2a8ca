"""One way in for the weights of a backbone: a file of any known layout, timm, the hub, a zoo or a run."""

import importlib
import inspect
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from operator import sub
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models._manipulate import adapt_input_conv
from torch import Tensor, nn

from bissl_zoo.errors import ZooError, did_you_mean, shorten
from bissl_zoo.files import sha256_of
from bissl_zoo.weights.files import SUFFIXES, StoredBackbone, model_args_problem, named_tensors, read_file, read_stated
from bissl_zoo.weights.formats import CAFFE, CLASSIFIER, FORMATS, IMAGENET, Format, fuse, infer_architecture
from bissl_zoo.weights.hub import card_licence, checkpoint_filter, read_config, timm_config, timm_weights

logger = logging.getLogger(__name__)

BATCH_NORM_EPS = 1e-5  # of every ResNet in torchvision, timm and Detectron2

#: authors of Detectron2 files of networks that were trained on RGB images
_RGB_AUTHORS = ("torchvision", "MOCO", "solo-learn", "timm", "bissl_zoo")

#: the norm before pooling or the classifier, which masked autoencoders do not train
_FINAL_NORM = r"(?:(?:head\.|fc_)?norm)\.(?:weight|bias)"

#: readers `(name, zoo) -> StoredBackbone` of sources that belong to higher layers, imported when they are named
_READERS = {"zoo": "bissl_zoo.zoo.create:read_entry", "run": "bissl_zoo.engine.init:read_run"}


def read_weights(
    source: str | Path,
    architecture: str | None = None,
    build: Callable[[StoredBackbone], nn.Module] | None = None,
    zoo: Any = None,
    allow_partial: bool = False,
    channel_order: str | None = None,
    skip_objects: bool = False,
) -> StoredBackbone:
    """Read the weights of a backbone from any source, under timm's names.

    The layout of a file is recognised by its tensor names (`formats.FORMATS`). Checkpoints of transformers pass
    through timm's own filters, which resample position embeddings to the image size of the network. A first convolution
    for another number of channels is adapted as timm does, one for BGR images is converted to RGB. Nothing is run
    (`files.read_file`).

    Args:
        source: `zoo:NAME`, `timm:NAME` or `timm:NAME.TAG`, `hf-hub:USER/REPO`, a run directory, a folder with
            `config.json` and weights, or a file of a project in `formats.FORMATS`.
        architecture: timm's name; None takes that of the source, or infers ResNet-18, 34, 50, 101 and 152.
        build: returns the network that will hold the weights, from what the source states (without state); by default
            timm's, with the arguments that the source states.
        zoo: a Zoo or its location for `zoo:NAME`; None for the default one.
        allow_partial: accept an incomplete backbone, and unknown tensors in it.
        channel_order: "RGB" or "BGR", for Detectron2 files that do not state it.
        skip_objects: leave out objects that are not plain data (argparse.Namespace); see `files.read_file`.
    Raises:
        ZooError: the source is not found or refused, its layout is unknown, or it is not a complete backbone of this
            architecture; the message has the number of tensors that match.
    """
    stored, content = _open(str(source), architecture, zoo, skip_objects)
    tensors = named_tensors(content)
    architecture = architecture or stored.architecture or infer_architecture(tensors, source)
    stored = replace(stored, architecture=stored.architecture or architecture).checked(str(source), architecture)
    model = (build or _empty_model)(stored)
    expected = model.state_dict()
    layout, parts = _recognise(tensors, expected, architecture, model, source)
    order, pixels = find_pixels(layout, content, tensors, channel_order, Path(source))
    if order == "BGR" and "conv1.weight" in parts.backbone:
        parts.backbone["conv1.weight"] = parts.backbone["conv1.weight"].flip(1)
    _adapt_channels(parts.backbone, expected, model, stored.model_args.get("in_chans", 3))
    state, missing = _fit(parts.backbone, expected)
    named_by_timm = str(source).startswith(("timm:", "hf-hub:"))
    notes = _complete(state, missing, expected, layout, named_by_timm)
    if (missing or (parts.stray and not named_by_timm)) and not allow_partial:
        raise ZooError(_incomplete(source, layout, architecture, expected, missing, parts))
    model_args = _model_args(layout, state) | dict(stored.model_args)
    return replace(
        stored,
        state={name: state[name].contiguous() for name in expected if name in state},
        architecture=architecture,
        format=layout.name if stored.format == "file" else stored.format,
        missing=missing,
        unexpected=[*map(_named, parts.stray.items()), *map(_named, parts.rest.items())],
        head={**stored.head, **parts.head},
        pixels=stored.pixels or pixels,
        model_args=model_args,
        notes=(*notes, *_notes(layout, order, state, model_args)),
    )


def entry_or_source(name: str) -> str:
    """Return `zoo:NAME` for a plain name on a command line, otherwise the source as it is."""
    is_place = ":" in name or Path(name).exists() or Path(name).suffix in SUFFIXES
    return name if is_place else f"zoo:{name}"


def _open(source: str, architecture: str | None, zoo: Any, skip_objects: bool) -> tuple[StoredBackbone, Any]:
    """Return what a source states, without state, and the content of its file."""
    kind, _, name = source.partition(":")
    path = Path(source)
    if kind == "timm":
        return _from_timm(name, skip_objects)
    if kind == "hf-hub":
        return _from_folder(name, source, card_licence(name), skip_objects)
    if kind == "zoo" or (path / "config.yaml").is_file():
        module, _, function = _READERS["zoo" if kind == "zoo" else "run"].partition(":")
        stored = getattr(importlib.import_module(module), function)(name if kind == "zoo" else source, zoo)
        return stored, stored.state
    if path.is_dir():
        return _from_folder(source, path.name, "unknown", skip_objects)
    if not path.is_file() and path.suffix not in SUFFIXES:
        near = did_you_mean(source, timm.list_pretrained())
        raise ZooError(
            f"{source} is neither a file nor a folder. Other sources are zoo:NAME, timm:NAME and hf-hub:USER/REPO."
            f"{near and near.replace(chr(39), chr(39) + 'timm:', 1)}"
        )
    content = read_file(path, skip_objects)
    stored = read_stated(path) or StoredBackbone({}, "")
    return replace(stored, source=path.name, sha256=sha256_of(path), format="file"), content


def _from_timm(name: str, skip_objects: bool) -> tuple[StoredBackbone, Any]:
    if name.startswith(("local-dir:", "hf-hub:")):
        place = name.partition(":")[2]
        return _from_folder(place, place, "unknown", skip_objects)
    architecture, cfg = timm_config(name)
    path = timm_weights(name, cfg)
    tag = f"{architecture}.{cfg['tag']}" if cfg.get("tag") else architecture
    return _stated_by_timm(architecture, {}, cfg, f"timm:{tag}", path), read_file(path, skip_objects)


def _from_folder(place: str, source: str, licence: str, skip_objects: bool) -> tuple[StoredBackbone, Any]:
    """Return the weights of a folder or repository with timm's, transformers' or open_clip's config."""
    config, path = read_config(place)
    content = read_file(path, skip_objects)
    cfg = config.get("pretrained_cfg", config)
    if isinstance(config.get("architecture"), str) and isinstance(cfg, dict):
        stated = _stated_by_timm(config["architecture"], config.get("model_args") or {}, cfg, source, path)
        return replace(stated, licence=licence if stated.licence == "unknown" else stated.licence), content
    stored = StoredBackbone({}, "", source=source, licence=licence, sha256=sha256_of(path), format="file")
    clip = config.get("preprocess_cfg", {})
    return replace(
        stored, pixels=as_pixels(clip["mean"], clip["std"]) if {"mean", "std"} <= clip.keys() else None
    ), content


def _stated_by_timm(
    architecture: str, model_args: Any, stated: Mapping[str, Any], source: str, path: Path
) -> StoredBackbone:
    if problem := model_args_problem(model_args):
        raise ZooError(f"{source} has invalid model_args: {problem}. Nothing was loaded.")
    pixels = as_pixels(stated.get("mean") or IMAGENET[0], stated.get("std") or IMAGENET[1])
    if stated.get("input_size"):
        pixels["input_size"] = list(stated["input_size"])
    licence = str(stated.get("license") or "unknown")
    return StoredBackbone({}, architecture, model_args, pixels, source, licence, sha256_of(path))


class _Parts:
    """The tensors of a file: backbone (timm's names), head, unknown ones in the backbone (stray), and the rest."""

    def __init__(self) -> None:
        self.backbone: dict[str, Tensor] = {}
        self.head: dict[str, Tensor] = {}
        self.stray: dict[str, Tensor] = {}
        self.rest: dict[str, Tensor] = {}


def _empty_model(stored: StoredBackbone) -> nn.Module:
    architecture = stored.architecture
    if not timm.is_model(architecture):
        hint = did_you_mean(architecture, timm.list_models())
        raise ZooError(f"timm {timm.__version__} has no architecture '{architecture}'.{hint}")
    try:
        with torch.device("meta"):
            return timm.create_model(architecture, num_classes=0, **stored.model_args)
    except TypeError as error:
        raise ZooError(f"timm's {architecture} does not take these arguments: {error}.") from error


def _recognise(
    tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], architecture: str, model: nn.Module, source: Any
) -> tuple[Format, _Parts]:
    """Return the first format that fits and shares most names with the architecture, and the divided tensors."""
    for layout in FORMATS:
        if layout.fits(tensors):
            parts = _divide(layout, tensors, expected, architecture, model)
            if any(name in expected for name in parts.backbone):
                return layout, parts
    known = ", ".join(dict.fromkeys(layout.name for layout in FORMATS))
    if tensors and all(name.startswith(("projector.", "predictor.")) for name in tensors):
        known += ". These are tensors of a pretext head: give the file of the backbone"
    raise ZooError(
        f"{source} has no backbone of this architecture in a known layout. It has {len(tensors)} tensors: "
        f"{shorten(list(tensors))}. Known layouts: {known}."
    )


def _divide(
    layout: Format,
    tensors: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    architecture: str,
    model: nn.Module,
) -> _Parts:
    parts, named = _Parts(), {}
    for name, tensor in tensors.items():
        renamed = layout.backbone_name(name)
        if renamed in expected and renamed not in named:
            named[renamed] = tensor
        elif (head := layout.head_name(name)) is not None:
            parts.head[head] = tensor
        elif renamed is None or renamed in named or layout.is_other(name):
            parts.rest[name] = tensor
        else:
            named[renamed] = tensor
    for name, tensor in _filtered(fuse(named, expected), expected, architecture, model).items():
        if name in expected:
            parts.backbone[name] = tensor
        elif re.match(CLASSIFIER, name):
            parts.head[name] = tensor
        else:
            parts.stray[name] = tensor
    return parts


def _filtered(
    named: dict[str, Tensor], expected: Mapping[str, Tensor], architecture: str, model: nn.Module
) -> Mapping[str, Tensor]:
    """Return tensors after timm's filter of the family, which knows official checkpoints and resamples positions."""
    if not timm.is_model(architecture) or not (convert := checkpoint_filter(architecture)):
        return named
    # timm takes a mask token as the mark of DINOv2, whose blocks have layer scales
    if "eva" not in convert.__module__ and not any(name.endswith("ls1.gamma") for name in named):
        named.pop("mask_token", None)
    arguments = (named, model)[: len(inspect.signature(convert).parameters)]  # a filter without a model takes one
    try:
        return dict(convert(*arguments))
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        # not the tensors that the filter knows; if they do not fit either, the caller raises an error with counts
        logger.debug(f"timm's filter of {architecture} leaves these tensors as they are ({_error_line(error)})")
        return named


def _error_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _adapt_channels(
    tensors: dict[str, Tensor], expected: Mapping[str, Tensor], model: nn.Module, stored_channels: int
) -> None:
    """Adapt the first convolution to the input channels of the model, as timm does."""
    convolutions = getattr(model, "pretrained_cfg", {}).get("first_conv") or ()
    for name in [convolutions] if isinstance(convolutions, str) else convolutions:
        key = f"{name}.weight"
        if key in tensors and key in expected and tensors[key].dim() == 4:
            shape, wanted = tensors[key].shape, expected[key].shape
            if shape[1] == stored_channels == 3 != wanted[1] and shape[2:] == wanted[2:]:
                tensors[key] = adapt_input_conv(wanted[1], tensors[key])


def _fit(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    state, missing = {}, []
    for name, wanted in expected.items():
        if name not in tensors:
            missing.append(f"{name} {_shape(wanted)}")
        elif tensors[name].shape != wanted.shape:
            missing.append(f"{name} {_shape(wanted)}, in the file {_shape(tensors[name])}")
        else:
            state[name] = tensors[name].detach().to("cpu", wanted.dtype)
    return state, missing


def _complete(
    state: dict[str, Tensor],
    missing: list[str],
    expected: Mapping[str, Tensor],
    layout: Format,
    named_by_timm: bool,
) -> list[str]:
    """Add batch-norm buffers that a format leaves out, and final norms that timm's weights lack; return notes."""
    notes = []
    norms = [name for name in expected if name not in state and re.fullmatch(_FINAL_NORM, name)]
    if named_by_timm and norms:
        for name in norms:
            state[name] = torch.full(expected[name].shape, float(name.endswith("weight")))
            missing.remove(f"{name} {_shape(expected[name])}")
        notes.append(f"The weights lack {', '.join(norms)}: set to the identity, as timm does.")
    values = {"num_batches_tracked": 0.0}
    if layout.name in ("caffe2", "detectron2"):
        values |= {"running_mean": 0.0, "running_var": 1.0 - BATCH_NORM_EPS}
    for kind, value in values.items():
        absent = [
            name
            for name in expected
            if name.endswith(f".{kind}") and name not in state and f"{name.rpartition('.')[0]}.weight" in state
        ]
        # frozen batch norm is a scale and a shift: its mean is 0, and its variance plus eps is 1
        for name in absent:
            state[name] = torch.full(expected[name].shape, value, dtype=expected[name].dtype)
            missing.remove(f"{name} {_shape(expected[name])}")
        if absent:
            notes.append(f"The file lacks {kind} of {len(absent)} batch norms; set to {value:g}.")
    return notes


def _model_args(layout: Format, state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return model arguments: the ViT-S of MoCo v3 has 12 heads (arXiv 2104.02057), timm's has 6 of equal shapes."""
    is_vit_small = "cls_token" in state and state["cls_token"].shape[-1] == 384
    return {"num_heads": 12} if layout.name == "moco_v3" and is_vit_small else {}


def _notes(layout: Format, order: str, state: Mapping[str, Tensor], model_args: Mapping[str, Any]) -> list[str]:
    notes = [f"Build the model with {key}={value}, which is not timm's default." for key, value in model_args.items()]
    if order == "BGR":
        notes.append("The network takes BGR images; its first convolution was converted to RGB.")
    if layout.name in ("caffe2", "detectron2") and order == "BGR" and "layer1.0.conv3.weight" in state:
        notes.append(
            "MSRA's bottlenecks have their stride in the 1x1 convolution, timm's in the 3x3 one: every tensor fits, "
            "but the features differ until it is trained further."
        )
    return notes


def _incomplete(
    path: Any,
    layout: Format,
    architecture: str,
    expected: Mapping[str, Tensor],
    missing: list[str],
    parts: _Parts,
) -> str:
    matched = len(expected) - len(missing)
    text = (
        f"{path} (layout '{layout.name}') is not a complete {architecture}: {matched} of {len(expected)} tensors match"
    )
    if missing:
        text += f"; {len(missing)} missing: {shorten(missing)}"
    if parts.stray:
        stray = [*map(_named, parts.stray.items())]
        text += f"; {len(stray)} unknown to {architecture}: {shorten(stray)}"
    if missing and all(name.startswith("layer4.") for name in missing):
        text += ". It ends at layer3, as a C4 backbone does"
    return (
        f"{text}. Name another architecture, or accept a partial backbone with allow_partial=True (bissl convert in "
        "--allow-partial)."
    )


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def _named(item: tuple[str, Tensor]) -> str:
    return f"{item[0]} {_shape(item[1])}"


def find_pixels(
    layout: Format, content: Any, tensors: Mapping[str, Tensor], stated: str | None, path: Path
) -> tuple[str, dict[str, Any] | None]:
    """Return the channel order of the first convolution in a file, and the pixel statistics in RGB order.

    Args:
        stated: "RGB" or "BGR" from the caller, for files that do not state it.
    Raises:
        ZooError: neither the file nor the caller states the order.
    """
    if stated not in (None, "RGB", "BGR"):
        raise ZooError(f"channel_order is 'RGB' or 'BGR', not {stated!r}.")
    if layout.name == "caffe2":
        return "BGR", as_pixels(*CAFFE)
    if layout.name != "detectron2":
        return stated or "RGB", layout.pixels and as_pixels(*layout.pixels)
    mean, std = (_stated(tensors, content, key) for key in ("pixel_mean", "pixel_std"))
    order = stated or _stated_order(content, mean)
    if order is None:
        raise ZooError(
            f"{path} (layout 'detectron2') does not state whether its network takes RGB or BGR images. Pass "
            "channel_order='BGR' for Detectron2's own models (BGR is its default for INPUT.FORMAT), or 'RGB' "
            "(bissl convert in --channel-order)."
        )
    if mean is None:
        return order, as_pixels(*(IMAGENET if order == "RGB" else CAFFE))
    turn = slice(None, None, -1 if order == "BGR" else 1)
    return order, as_pixels([v / 255 for v in mean[turn]], [v / 255 for v in (std or [1.0] * 3)[turn]])


def _stated_order(content: Any, mean: list[float] | None) -> str | None:
    """Return the order that the file states, or that follows from its author or from the mean of ImageNet."""
    content = content if isinstance(content, Mapping) else {}
    pixels = content.get("input")
    if isinstance(pixels, Mapping) and pixels.get("format") in ("RGB", "BGR"):
        return pixels["format"]
    if content.get("__author__") in _RGB_AUTHORS:
        return "RGB"
    known = {"RGB": [255 * value for value in CAFFE[0]], "BGR": [255 * value for value in reversed(CAFFE[0])]}
    return next((o for o, values in known.items() if mean and max(map(abs, map(sub, mean, values))) < 0.01), None)


def _stated(tensors: Mapping[str, Tensor], content: Any, key: str) -> list[float] | None:
    """Return pixel statistics from Detectron2's buffers, or as this package writes them beside a model."""
    for name, tensor in tensors.items():
        if re.fullmatch(rf"(model\.)?{key}", name) and tensor.numel() == 3:
            return tensor.flatten().tolist()
    pixels = content.get("input") if isinstance(content, Mapping) else None
    values = pixels.get(key) if isinstance(pixels, Mapping) else None
    return [float(value) for value in values] if isinstance(values, list | tuple) and len(values) == 3 else None


def as_pixels(mean: Any, std: Any) -> dict[str, Any]:
    """Return mean and standard deviation of RGB images scaled to [0, 1], in the form of a zoo entry."""
    return {"channel_order": "RGB", "mean": [float(value) for value in mean], "std": [float(value) for value in std]}
