"""Foreign checkpoints in: the backbone that other projects' files hold, under timm's names."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from bissl_zoo.errors import ZooError, did_you_mean
from bissl_zoo.weights.files import named_tensors, read_file
from bissl_zoo.weights.formats import FORMATS, Format, infer_architecture
from bissl_zoo.weights.pixels import as_pixels, find_pixels
from bissl_zoo.zoo.names import shorten

BATCH_NORM_EPS = 1e-5  # of every ResNet in torchvision, timm and Detectron2


@dataclass(frozen=True)
class ForeignBackbone:
    """A backbone from another project's checkpoint.

    Args:
        state: on the CPU in float32, under the names of `timm.create_model(architecture, num_classes=0, **model_args)`;
            without the tensors in `missing`.
        format: the layout that was recognised, a name of `foreign_formats.FORMATS` or "timm:...".
        matched: names of the tensors in `state`.
        missing: the backbone's tensors that the file lacks or has in another shape, with shapes.
        unexpected: the file's tensors that went neither into `state` nor into `head`, with shapes.
        head: the classifier or pretext head, under the file's names.
        pixels: `mean` and `std` of RGB images scaled to [0, 1], and `channel_order` "RGB", as `state` wants images;
            None where the file's project does not say.
        notes: sentences on what else a user must know.
    """

    state: dict[str, Tensor]
    architecture: str
    format: str
    matched: list[str]
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
    """Read the backbone out of a checkpoint of torchvision, timm, Detectron2 and the projects of self-supervision.

    The layout is recognised by its names (`foreign_formats.FORMATS`). A first convolution that was trained on BGR
    images is turned to RGB. Nothing in the file is run (`foreign_files.read_file`).

    Args:
        path: a file, or `timm:NAME` for weights that timm finds itself, such as `timm:resnet50.a1_in1k`.
        architecture: timm's name; None infers ResNet-18, 34, 50, 101 and 152 from their names and shapes.
        allow_partial: take what there is of the backbone. Otherwise it must be there whole, and nothing beside it.
        channel_order: "RGB" or "BGR", for Detectron2 files that do not say what their network was trained on.
        skip_objects: leave out objects that are not plain data (argparse.Namespace); see `foreign_files.read_file`.
        head_path: a second file that holds the pretext head alone, as the BiSSL authors save it.
    Raises:
        ZooError: the file is refused, not recognised, or not a whole backbone of this architecture.
    """
    beside = named_tensors(read_file(Path(head_path), skip_objects)) if head_path else {}
    if str(path).startswith("timm:"):
        return replace(_from_timm(str(path).removeprefix("timm:"), architecture), head=beside)
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
        raise ZooError(_not_whole(path, layout, architecture, expected, missing, parts, tensors))
    if order == "BGR" and "conv1.weight" in state:
        state["conv1.weight"] = state["conv1.weight"].flip(1)
    model_args = _model_args(layout, state)
    return ForeignBackbone(
        state={name: state[name].contiguous() for name in expected if name in state},
        architecture=architecture,
        format=layout.name,
        matched=[name for name in expected if name in state],
        missing=missing,
        unexpected=[f"{name} {_shape(tensors[name])}" for name in [*parts.stray, *parts.rest]],
        head=parts.head | beside,
        pixels=pixels,
        model_args=model_args,
        notes=(*notes, *_notes(layout, order, state, model_args)),
    )


def _from_timm(name: str, architecture: str | None) -> ForeignBackbone:
    if ":" not in name and not timm.models.is_model_pretrained(name):  # timm would go on with random weights
        hint = did_you_mean(name, timm.list_pretrained())
        raise ZooError(
            f"timm {timm.__version__} has no weights '{name}'.{hint} timm.list_pretrained() lists the names."
        )
    try:
        model = timm.create_model(name, pretrained=True, num_classes=0)
    except Exception as error:  # timm passes on what its downloader, its cache and torch raise
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
        matched=list(state),
        missing=[],
        unexpected=[],
        pixels=as_pixels(cfg["mean"], cfg["std"]),
    )


@dataclass
class _Parts:
    """A file's tensors: the backbone's under timm's names, the head's, those of no part known, and the rest."""

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
    """The first format whose marks are there and whose backbone has a name in common with the architecture."""
    for layout in FORMATS:
        if layout.fits(tensors) and any(layout.backbone_name(name) in expected for name in tensors):
            return layout
    known = ", ".join(dict.fromkeys(layout.name for layout in FORMATS))
    if tensors and all(name.startswith(("projector.", "predictor.")) for name in tensors):
        known += ". These are a pretext head's tensors: give the backbone's file, and this one as head_path"
    raise ZooError(
        f"{path} holds no backbone of this architecture in a known layout. It has {len(tensors)} tensors: "
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


def _fit(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    state, missing = {}, []
    for name, wanted in expected.items():
        if name not in found:
            missing.append(f"{name} {_shape(wanted)}")
        elif found[name].shape != wanted.shape:
            missing.append(f"{name} {_shape(wanted)}, in the file {_shape(found[name])}")
        else:
            state[name] = found[name].detach().to("cpu", wanted.dtype)
    return state, missing


def _complete(
    state: dict[str, Tensor], missing: list[str], expected: Mapping[str, Tensor], layout: Format
) -> list[str]:
    """Add what batch norm has by definition where a format leaves it out; the sentences that say so."""
    notes = []
    values = {"num_batches_tracked": 0.0}
    if layout.name in ("caffe2", "detectron2"):
        values |= {"running_mean": 0.0, "running_var": 1.0 - BATCH_NORM_EPS}
    for kind, value in values.items():
        absent = [
            name for name in expected if name.endswith(f".{kind}") and name not in state and _sibling(name) in state
        ]
        # frozen batch norm is a scale and a shift: its mean is 0 and its variance such that it divides by 1
        for name in absent:
            state[name] = torch.full(expected[name].shape, value, dtype=expected[name].dtype)
            missing.remove(f"{name} {_shape(expected[name])}")
        if absent:
            notes.append(f"The file has no {kind} for {len(absent)} batch norms; it is set to {value:g}.")
    return notes


def _sibling(name: str) -> str:
    return f"{name.rpartition('.')[0]}.weight"


def _model_args(layout: Format, state: Mapping[str, Tensor]) -> dict[str, Any]:
    """MoCo v3's ViT-S has 12 heads of 32 channels (arXiv 2104.02057), timm's 6 of 64; the shapes agree."""
    is_vit_small = "cls_token" in state and state["cls_token"].shape[-1] == 384
    return {"num_heads": 12} if layout.name == "moco_v3" and is_vit_small else {}


def _notes(layout: Format, order: str, state: Mapping[str, Tensor], model_args: Mapping[str, Any]) -> list[str]:
    notes = [f"Build the model with {key}={value}: timm's own differs." for key, value in model_args.items()]
    if order == "BGR":
        notes.append("The file's network takes BGR images; its first convolution was turned to RGB.")
    if layout.name in ("caffe2", "detectron2") and order == "BGR" and "layer1.0.conv3.weight" in state:
        notes.append(
            "MSRA's bottlenecks, which Detectron2's own models start from, have their stride in the 1x1 convolution, "
            "timm's in the 3x3: every tensor fits, but the features differ until it is trained further."
        )
    return notes


def _not_whole(
    path: Path,
    layout: Format,
    architecture: str,
    expected: Mapping[str, Tensor],
    missing: list[str],
    parts: _Parts,
    tensors: Mapping[str, Tensor],
) -> str:
    matched = len(expected) - len(missing)
    text = f"{path} (layout '{layout.name}') is not a whole {architecture}: {matched} of {len(expected)} tensors match"
    if missing:
        text += f"; {len(missing)} missing: {shorten(missing)}"
    if parts.stray:
        stray = [f"{name} {_shape(tensors[name])}" for name in parts.stray]
        text += f"; {len(stray)} that {architecture} does not have: {shorten(stray)}"
    if missing and all(name.startswith("layer4.") for name in missing):
        text += ". It ends at layer3, as a C4 backbone does"
    return (
        f"{text}. Name another architecture, or take what there is with allow_partial=True (tools/convert.py in "
        "--allow-partial)."
    )


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)
