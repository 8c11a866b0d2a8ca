"""Export backbones for timm, torchvision, Detectron2, ONNX runtimes and torch.export, which load them without us."""

import contextlib
import importlib.util
import json
import pickle
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from safetensors import SafetensorError
from torch import Tensor, nn

from bissl_zoo.errors import ZooError, did_you_mean, shorten
from bissl_zoo.files import replacing, replacing_folder, write_atomically
from bissl_zoo.weights import TARGETS
from bissl_zoo.weights.files import save_tensors, state_difference, unshared

ONNX_OPSET = 18
PIXEL_KEYS = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")  # of timm's pretrained_cfg
_UNKNOWN = "not stated by the source"

#: ResNets of timm that compute the same as torchvision's of the same name
TORCHVISION_RESNETS = (
    *("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "wide_resnet50_2", "wide_resnet101_2"),
    *("resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d"),
)


@dataclass(frozen=True)
class LinearHead:
    """The linear layer of a classifier on pooled features, with class names.

    Args:
        logits: the classifier, from normalised images of `size` to logits, which the exported network must equal.
    """

    weight: Tensor
    bias: Tensor
    classes: Sequence[str]
    logits: nn.Module
    size: tuple[int, int]


@dataclass(frozen=True)
class Exported:
    """A written file or folder, and what its user must know, by name."""

    path: Path
    details: dict[str, str]


def export_backbone(
    state: Mapping[str, Tensor],
    architecture: str,
    target: str,
    output: str | Path,
    model_args: Mapping[str, Any] | None = None,
    pixels: Mapping[str, Any] | None = None,
    image_size: Sequence[int] | None = None,
    head: LinearHead | None = None,
) -> Exported:
    """Write a backbone, or with `head` a classifier, for another library, atomically.

    Args:
        state: under the names of `timm.create_model(architecture, num_classes=0, **model_args)`.
        target: one of `TARGETS`. "timm" writes a folder for `local-dir:`; "torchvision" a `.pth` or `.safetensors`
            without classifier; "detectron2" a `.pkl` for its DetectionCheckpointer; "onnx" and "export" a network from
            images `(B, 3, H, W)` to pooled features, with B free.
        pixels: `mean` and `std` of RGB images scaled to [0, 1], as a zoo entry's "input" has them.
        image_size: height and width of the images that "onnx" and "export" trace with; None for the architecture's own.
        head: the linear layer of a classifier ("timm" and "torchvision").
    Raises:
        ZooError: the state does not fit, or the target cannot represent this network; the message has the reason.
    """
    if target not in TARGETS:
        raise ZooError(f"Unknown target '{target}'.{did_you_mean(target, TARGETS)} Targets: {', '.join(TARGETS)}.")
    model = _loaded(architecture, state, dict(model_args or {}), head)
    output = Path(output)
    details = {"architecture": architecture, **_pixel_details(pixels)}
    try:
        if target == "timm":
            details |= _to_timm(model, architecture, output, dict(model_args or {}), pixels, image_size)
        elif target == "torchvision":
            details |= _to_torchvision(model, architecture, output)
        elif target == "detectron2":
            details |= _to_detectron2(model, architecture, output, pixels)
        else:
            write = write_onnx if target == "onnx" else write_program
            details |= write(model, _example(model, architecture, image_size), output, architecture)
    except (OSError, SafetensorError) as error:
        raise ZooError(f"{output} cannot be written: {error}.") from error
    return Exported(output, details)


def _loaded(
    architecture: str, state: Mapping[str, Tensor], model_args: dict[str, Any], head: LinearHead | None
) -> nn.Module:
    if not timm.is_model(architecture):
        hint = did_you_mean(architecture, timm.list_models())
        raise ZooError(f"timm {timm.__version__} has no architecture '{architecture}'.{hint}")
    classes = list(head.classes) if head else []
    model = _untrained(architecture, num_classes=len(classes), **model_args)
    if head:
        name = model.pretrained_cfg["classifier"]
        if not isinstance(name, str):
            raise ZooError(f"timm's {architecture} has several classifiers.")
        state = {**state, f"{name}.weight": head.weight, f"{name}.bias": head.bias}
        model.label_names = classes
    if difference := state_difference(model.state_dict(), state):
        raise ZooError(f"The state does not fit {architecture}(num_classes={len(classes)}): {difference}.")
    model.load_state_dict(state)
    if head:
        check_same_features(f"timm's {architecture}", head.logits.cpu(), model.eval(), head.size)
    return model.eval()


def _pixel_details(pixels: Mapping[str, Any] | None) -> dict[str, str]:
    values = {key: ", ".join(f"{v:.4g}" for v in pixels[key]) if pixels else _UNKNOWN for key in ("mean", "std")}
    return {"images": "RGB, scaled to [0, 1], then normalised", **values}


def _to_timm(
    model: nn.Module, architecture: str, output: Path, model_args: dict[str, Any], pixels: Any, image_size: Any
) -> dict[str, str]:
    if not pixels:
        raise ZooError("timm's config.json needs the pixel statistics, which are unknown: pass mean and std.")
    if output.exists():
        raise ZooError(f"{output} exists. Name another folder.")
    known = {key: pixels[key] for key in PIXEL_KEYS if key in pixels}
    known.setdefault("input_size", [3, *_image_size(model, image_size)])
    classes = getattr(model, "label_names", [])
    _, config = timm_config(architecture, known, model_args, "unknown", classes)
    with replacing_folder(output) as folder:
        save_tensors(model.state_dict(), folder / "model.safetensors")
        write_atomically(folder / "config.json", json.dumps(config, indent=2) + "\n")
        loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        check_same_features("timm", model, loaded, _image_size(model, image_size))
    return {"load with": f'timm.create_model("local-dir:{output}", pretrained=True)'}


def write_state(state: Mapping[str, Tensor], output: Path) -> None:
    """Write a state dict as .pth, .pt or .safetensors, by the suffix of `output`."""
    if output.suffix not in (".pth", ".pt", ".safetensors"):
        raise ZooError(f"{output}: a torchvision state is written as .pth, .pt or .safetensors.")
    if output.suffix == ".safetensors":
        save_tensors(state, output)
    else:
        with replacing(output) as file:
            torch.save(unshared(state), file)


def _to_torchvision(model: nn.Module, architecture: str, output: Path) -> dict[str, str]:
    check_plain_resnet(model, architecture, "torchvision")
    write_state(model.state_dict(), output)
    arguments = f"num_classes={model.num_classes}" if model.num_classes else ""
    return {
        "load with": f"torchvision.models.{architecture}({arguments}).load_state_dict(state, strict={bool(arguments)})",
        **({} if model.num_classes else {"not in the file": "fc.weight, fc.bias"}),
    }


def _to_detectron2(
    model: nn.Module, architecture: str, output: Path, pixels: Mapping[str, Any] | None
) -> dict[str, str]:
    check_plain_resnet(model, architecture, "Detectron2")
    more: dict[str, Any] = {"matching_heuristics": True}
    block = model.layer1[0]
    depth = re.search(r"(18|34|50|101|152)", architecture)[1]
    details = {
        "MODEL.RESNETS.DEPTH": depth,
        "MODEL.RESNETS.STRIDE_IN_1X1": "False",
        "MODEL.RESNETS.NUM_GROUPS": str(block.conv2.groups),
        "MODEL.RESNETS.WIDTH_PER_GROUP": str(block.conv2.out_channels // block.conv2.groups),
        "MODEL.RESNETS.RES2_OUT_CHANNELS": str(model.layer1[-1].bn2.num_features if depth in ("18", "34") else 256),
        "INPUT.FORMAT": "RGB",
        "MODEL.PIXEL_MEAN": _UNKNOWN,
        "MODEL.PIXEL_STD": _UNKNOWN,
        "numpy": ">= 1.26 to read the file",
    }
    if pixels:
        more["input"] = {
            "format": "RGB",
            "pixel_mean": [255 * value for value in pixels["mean"]],
            "pixel_std": [255 * value for value in pixels["std"]],
        }
        for key in ("pixel_mean", "pixel_std"):
            details[f"MODEL.{key.upper()}"] = "[" + ", ".join(f"{value:.6g}" for value in more["input"][key]) + "]"
    write_detectron2(detectron2_state(model.state_dict()), output, more)
    return details


def write_detectron2(state: Mapping[str, Tensor], output: Path, more: Mapping[str, Any] | None = None) -> None:
    """Write a state as a pickle of arrays, which Detectron2's DetectionCheckpointer reads.

    Args:
        more: further keys of the file, of plain values.
    Raises:
        ZooError: another suffix than .pkl.
    """
    if output.suffix != ".pkl":
        raise ZooError(f"{output}: Detectron2's DetectionCheckpointer takes a .pkl.")
    arrays = {name: tensor.cpu().numpy() for name, tensor in state.items()}
    with replacing(output) as file, open(file, "wb") as stream:
        pickle.dump({"model": arrays, "__author__": "bissl_zoo", **(more or {})}, stream, protocol=4)


def write_onnx(
    model: nn.Module,
    images: Tensor,
    output: Path,
    name: str,
    outputs: Sequence[str] = ("features",),
    any_batch: bool = True,
) -> dict[str, str]:
    """Write a network on `images` (B, 3, H, W) as ONNX.

    Args:
        name: of the network, for messages.
        any_batch: B is free; otherwise it is that of `images`, as H and W are.
    """
    absent = [package for package in ("onnx", "onnxscript") if importlib.util.find_spec(package) is None]
    if absent:
        raise ZooError(f"The target 'onnx' needs {' and '.join(absent)}: pip install \"bissl_zoo[onnx]\".")
    with replacing(output) as file, _quiet_export():
        try:
            torch.onnx.export(
                model,
                (images,),
                file,
                dynamo=True,
                opset_version=ONNX_OPSET,
                input_names=["images"],
                output_names=list(outputs),
                dynamic_shapes=({0: torch.export.Dim("batch")},) if any_batch else None,
                external_data=False,
                verbose=False,
            )
        except (torch.onnx.errors.OnnxExporterError, RuntimeError) as error:
            raise ZooError(f"torch.onnx cannot export {name}: {_first_line(error)}") from error
    return {**_shapes(images, any_batch), "outputs": ", ".join(outputs), "opset": str(ONNX_OPSET)}


def write_program(
    model: nn.Module,
    images: Tensor,
    output: Path,
    name: str,
    outputs: Sequence[str] = ("features",),
    any_batch: bool = True,
) -> dict[str, str]:
    """Write a network on `images` (B, 3, H, W) as a program of torch.export; see :func:`write_onnx`."""
    if output.suffix != ".pt2":
        raise ZooError(f"{output}: a program of torch.export is written as .pt2.")
    try:
        with _quiet_export():
            shapes = ({0: torch.export.Dim("batch")},) if any_batch else None
            program = torch.export.export(model, (images,), dynamic_shapes=shapes)
    except (RuntimeError, ValueError, TypeError) as error:
        raise ZooError(f"torch.export cannot trace {name}: {_first_line(error)}") from error
    with replacing(output) as file:
        torch.export.save(program, file)
    return {**_shapes(images, any_batch), "load with": f'torch.export.load("{output}").module()'}


@contextlib.contextmanager
def _quiet_export() -> Iterator[None]:
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", FutureWarning)  # of torchvision's use of torch
        yield


def _shapes(images: Tensor, any_batch: bool) -> dict[str, str]:
    return {"input": f"images ({'batch' if any_batch else len(images)}, {', '.join(map(str, images.shape[1:]))})"}


def _example(model: nn.Module, architecture: str, size: Sequence[int] | None) -> Tensor:
    images = example_images(_image_size(model, size))
    try:
        with torch.no_grad():
            model(images)
    except (RuntimeError, AssertionError, ValueError) as error:
        sides = " x ".join(str(side) for side in images.shape[2:])
        raise ZooError(f"{architecture} does not take images of {sides}: {_first_line(error)}") from error
    return images


def _image_size(model: nn.Module, size: Sequence[int] | None) -> tuple[int, int]:
    grid = getattr(getattr(model, "patch_embed", None), "img_size", None)
    height, width = size or grid or model.pretrained_cfg["input_size"][1:]
    return height, width


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def timm_config(
    architecture: str,
    pretrained_cfg: Mapping[str, Any],
    model_args: dict[str, Any],
    licence: str,
    classes: Sequence[str] = (),
) -> tuple[nn.Module, dict[str, Any]]:
    """Return the model that timm builds without classifier, and its `config.json` in timm's format, with `classes`."""
    if architecture not in timm.list_models():
        hint = did_you_mean(architecture, timm.list_models())
        raise ZooError(f"'{architecture}' is not an architecture of timm {timm.__version__}.{hint}")
    for key in pretrained_cfg:
        if key not in PIXEL_KEYS:
            hint = did_you_mean(key, PIXEL_KEYS)
            raise ZooError(f"Unknown key '{key}' in pretrained_cfg.{hint} Accepted: {', '.join(PIXEL_KEYS)}.")
    if absent := [key for key in ("input_size", "mean", "std") if key not in pretrained_cfg]:
        raise ZooError(f"pretrained_cfg lacks {', '.join(absent)}, which users of the entry need.")
    model = _untrained(architecture, num_classes=0, **model_args)
    defaults = model.pretrained_cfg
    inherited = {key: defaults[key] for key in ("interpolation", "crop_pct", "crop_mode", "first_conv", "classifier")}
    pixels = {
        key: value if isinstance(value, str | int | float) else list(value) for key, value in pretrained_cfg.items()
    }
    fixed = defaults.get("fixed_input_size", False) and not model_args.get("dynamic_img_size", False)
    built_for = model_args.get("img_size", defaults["input_size"][1:])
    built_for = [built_for, built_for] if isinstance(built_for, int) else list(built_for)
    if fixed and built_for != pixels["input_size"][1:]:
        raise ZooError(
            f"pretrained_cfg has input_size {pixels['input_size']}, but this {architecture} was built for images of "
            f"{built_for}. Use that size, or build it with img_size."
        )
    config = {
        "architecture": architecture,
        "num_classes": len(classes),
        "num_features": model.num_features,
        "global_pool": _pooling(model),
        "pretrained_cfg": {
            **inherited,
            **pixels,
            "fixed_input_size": fixed,
            "num_classes": len(classes),
            "license": licence,
        },
        **({"label_names": list(classes)} if classes else {}),
    }
    return model, {**config, "model_args": model_args} if model_args else config


def _untrained(architecture: str, **kwargs: Any) -> nn.Module:
    with torch.random.fork_rng(devices=[]):  # the random state of a running training must not change
        return timm.create_model(architecture, **kwargs)


def _pooling(model: nn.Module) -> str:
    for owner in (model, getattr(model, "head", None)):
        pool = getattr(owner, "global_pool", None)
        pool = getattr(pool, "pool_type", pool)
        if isinstance(pool, str):
            return pool
    return ""


def check_loads_in_timm(folder: Path, expected: Mapping[str, Tensor]) -> None:
    """Load the written files with timm and compare every tensor with its stored values, bit for bit."""
    try:
        loaded = _untrained(f"local-dir:{folder}", pretrained=True).state_dict()
    except (RuntimeError, TypeError, ValueError, KeyError, AssertionError) as error:
        raise ZooError(f"timm {timm.__version__} cannot load the entry: {error}") from error
    changed = [
        key
        for key, tensor in expected.items()
        if key not in loaded or not torch.equal(loaded[key], tensor.to(loaded[key].dtype))
    ]
    if changed:
        raise ZooError(f"timm {timm.__version__} loads other values than were published: {shorten(changed)}.")


def detectron2_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename a ResNet's state to Detectron2's names: `layer1.0.bn1.weight` becomes `res2.0.conv1.norm.weight`."""
    renamed = {}
    for name, tensor in state.items():
        name = re.sub(r"^layer(\d)", lambda stage: f"res{int(stage[1]) + 1}", name)
        name = re.sub(r"\bbn(\d)\.", r"conv\1.norm.", name)
        name = name.replace("downsample.0.", "shortcut.").replace("downsample.1.", "shortcut.norm.")
        renamed[name if name.startswith("res") else f"stem.{name}"] = tensor
    return renamed


def check_plain_resnet(model: nn.Module, architecture: str, target: str) -> None:
    """Raise `ZooError` unless torchvision's network of this name (Detectron2's is equal) computes the same features."""
    if architecture not in TORCHVISION_RESNETS:
        raise ZooError(f"{target} has no network for {architecture}. It supports: {', '.join(TORCHVISION_RESNETS)}.")
    with torch.random.fork_rng(devices=[]):
        reference = getattr(torchvision.models, architecture)(num_classes=model.num_classes or 1)
    if not model.num_classes:
        reference.fc = nn.Identity()
    if difference := state_difference(reference.state_dict(), model.state_dict()):
        raise ZooError(f"{target} has another {architecture}: {difference}.")
    reference.load_state_dict(model.state_dict())
    check_same_features(target, model, reference.eval(), (64, 64))


def check_same_features(target: str, model: nn.Module, other: nn.Module, size: Sequence[int]) -> None:
    """Raise `ZooError` if two networks give different pooled features for the same random images."""
    images = example_images(size)
    with torch.no_grad():
        ours, theirs = model(images), other(images)
    if ours.shape != theirs.shape or not torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4 * float(ours.abs().max())):
        raise ZooError(f"{target}'s network computes other features from these weights; nothing was written.")


def example_images(size: Sequence[int]) -> Tensor:
    """Return two random images of this height and width, always the same."""
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
