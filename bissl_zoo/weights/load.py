"""Load backbones from checkpoints of other projects, under timm's names."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from operator import sub
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from bissl_zoo.errors import ZooError, did_you_mean, shorten
from bissl_zoo.weights.files import named_tensors, read_file
from bissl_zoo.weights.formats import CAFFE, FORMATS, IMAGENET, Format, infer_architecture

BATCH_NORM_EPS = 1e-5  # of every ResNet in torchvision, timm and Detectron2

#: authors of Detectron2 files of networks that were trained on RGB images
_RGB_AUTHORS = ("torchvision", "MOCO", "solo-learn", "timm", "bissl_zoo")


@dataclass(frozen=True)
class ForeignBackbone:
    """A backbone from a checkpoint of another project.

    Args:
        state: on the CPU in float32, under the names of `timm.create_model(architecture, num_classes=0, **model_args)`;
            without the tensors in `missing`.
        format: the recognised layout, a name in `formats.FORMATS` or "timm:...".
        missing: tensors of the backbone that the file lacks or has in another shape, with shapes.
        unexpected: tensors of the file that are neither in `state` nor in `head`, with shapes.
        head: the classifier or pretext head, under the names in the file.
        pixels: `mean` and `std` of RGB images scaled to [0, 1], and `channel_order` "RGB", for `state`, or None.
        notes: further sentences for the user.
    """

    state: dict[str, Tensor]
    architecture: str
    format: str
    missing: list[str]
    unexpected: list[str]
    head: dict[str, Tensor] = field(default_factory=dict)
    pixels: dict[str, Any] | None = None
    model_args: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def read_foreign(
    path: str | Path,
    architecture: str | None = None,
    allow_partial: bool = False,
    channel_order: str | None = None,
    skip_objects: bool = False,
    head_path: str | Path | None = None,
) -> ForeignBackbone:
    """Read the backbone from a checkpoint of torchvision, timm, Detectron2 or a self-supervised learning project.

    The layout is recognised by the tensor names (`formats.FORMATS`). A first convolution for BGR images is converted
    to RGB. Nothing in the file is run (`files.read_file`).

    Args:
        path: a file, or `timm:NAME` for weights that timm downloads, such as `timm:resnet50.a1_in1k`.
        architecture: timm's name; None infers ResNet-18, 34, 50, 101 and 152 from names and shapes.
        allow_partial: accept an incomplete backbone, and unknown tensors in it.
        channel_order: "RGB" or "BGR", for Detectron2 files that do not state it.
        skip_objects: leave out objects that are not plain data (argparse.Namespace); see `files.read_file`.
        head_path: a second file with only the pretext head, as the BiSSL authors save it.
    Raises:
        ZooError: the file is refused, not recognised, or not a complete backbone of this architecture.
    """
    separate_head = named_tensors(read_file(Path(head_path), skip_objects)) if head_path else {}
    if str(path).startswith("timm:"):
        return replace(_from_timm(str(path).removeprefix("timm:"), architecture), head=separate_head)
    path = Path(path)
    content = read_file(path, skip_objects)
    tensors = named_tensors(content)
    if architecture is None:
        architecture = infer_architecture(tensors, path)
    expected = _empty_model(architecture).state_dict()
    layout = _recognise(tensors, expected, path)
    order, pixels = find_pixels(layout, content, tensors, channel_order, path)
    parts = _divide(layout, tensors, expected)
    state, missing = _fit(parts.backbone, expected)
    notes = _complete(state, missing, expected, layout)
    if (missing or parts.stray) and not allow_partial:
        raise ZooError(_incomplete(path, layout, architecture, expected, missing, parts, tensors))
    if order == "BGR" and "conv1.weight" in state:
        state["conv1.weight"] = state["conv1.weight"].flip(1)
    model_args = _model_args(layout, state)
    return ForeignBackbone(
        state={name: state[name].contiguous() for name in expected if name in state},
        architecture=architecture,
        format=layout.name,
        missing=missing,
        unexpected=[f"{name} {_shape(tensors[name])}" for name in [*parts.stray, *parts.rest]],
        head=parts.head | separate_head,
        pixels=pixels,
        model_args=model_args,
        notes=(*notes, *_notes(layout, order, state, model_args)),
    )


def _from_timm(name: str, architecture: str | None) -> ForeignBackbone:
    if ":" not in name and not timm.models.is_model_pretrained(name):  # timm would continue with random weights
        hint = did_you_mean(name, timm.list_pretrained())
        raise ZooError(
            f"timm {timm.__version__} has no weights '{name}'.{hint} timm.list_pretrained() lists the names."
        )
    try:
        model = timm.create_model(name, pretrained=True, num_classes=0)
    except Exception as error:  # errors of the downloader, the cache and torch
        raise ZooError(
            f"timm {timm.__version__} does not load 'timm:{name}' ({type(error).__name__}: {error}). Without a "
            "network, give a file, or a folder with timm's config.json as 'timm:local-dir:FOLDER'."
        ) from error
    cfg = model.pretrained_cfg
    if architecture not in (None, cfg["architecture"]):
        raise ZooError(f"'timm:{name}' is a {cfg['architecture']}, not a {architecture}.")
    state = model.state_dict()
    return ForeignBackbone(
        state=state,
        architecture=cfg["architecture"],
        format=f"timm:{name}",
        missing=[],
        unexpected=[],
        pixels=as_pixels(cfg["mean"], cfg["std"]),
    )


@dataclass
class _Parts:
    """The tensors of a file: backbone (timm's names), head, unknown ones in the backbone (stray), and the rest."""

    backbone: dict[str, Tensor] = field(default_factory=dict)
    head: dict[str, Tensor] = field(default_factory=dict)
    stray: list[str] = field(default_factory=list)
    rest: list[str] = field(default_factory=list)


def _empty_model(architecture: str) -> nn.Module:
    if not timm.is_model(architecture):
        hint = did_you_mean(architecture, timm.list_models())
        raise ZooError(f"timm {timm.__version__} has no architecture '{architecture}'.{hint}")
    with torch.device("meta"):
        return timm.create_model(architecture, num_classes=0)


def _recognise(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], path: Path) -> Format:
    """Return the first format whose marks exist and whose backbone shares a name with the architecture."""
    for layout in FORMATS:
        if layout.fits(tensors) and any(layout.backbone_name(name) in expected for name in tensors):
            return layout
    known = ", ".join(dict.fromkeys(layout.name for layout in FORMATS))
    if tensors and all(name.startswith(("projector.", "predictor.")) for name in tensors):
        known += ". These are tensors of a pretext head: pass the file of the backbone, and this one as head_path"
    raise ZooError(
        f"{path} has no backbone of this architecture in a known layout. It has {len(tensors)} tensors: "
        f"{shorten(list(tensors))}. Known layouts: {known}."
    )


def _divide(layout: Format, tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> _Parts:
    parts = _Parts()
    for name, tensor in tensors.items():
        renamed = layout.backbone_name(name)
        if renamed in expected and renamed not in parts.backbone:
            parts.backbone[renamed] = tensor
        elif (head := layout.head_name(name)) is not None:
            parts.head[head] = tensor
        elif renamed is None or renamed in expected or layout.is_other(name):
            parts.rest.append(name)
        else:
            parts.stray.append(name)
    return parts


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
    state: dict[str, Tensor], missing: list[str], expected: Mapping[str, Tensor], layout: Format
) -> list[str]:
    """Add batch-norm buffers that a format leaves out; return notes about them."""
    notes = []
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
    path: Path,
    layout: Format,
    architecture: str,
    expected: Mapping[str, Tensor],
    missing: list[str],
    parts: _Parts,
    tensors: Mapping[str, Tensor],
) -> str:
    matched = len(expected) - len(missing)
    text = (
        f"{path} (layout '{layout.name}') is not a complete {architecture}: {matched} of {len(expected)} tensors match"
    )
    if missing:
        text += f"; {len(missing)} missing: {shorten(missing)}"
    if parts.stray:
        stray = [f"{name} {_shape(tensors[name])}" for name in parts.stray]
        text += f"; {len(stray)} unknown to {architecture}: {shorten(stray)}"
    if missing and all(name.startswith("layer4.") for name in missing):
        text += ". It ends at layer3, as a C4 backbone does"
    return (
        f"{text}. Name another architecture, or accept a partial backbone with allow_partial=True (bissl convert in "
        "--allow-partial)."
    )


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


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
