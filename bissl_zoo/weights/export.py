"""Backbones out: as files that timm, torchvision, Detectron2, ONNX runtimes and torch.export load without us."""

import contextlib
import importlib.util
import os
import pickle
import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from bissl_zoo.errors import ZooError, did_you_mean
from bissl_zoo.weights.plain_resnets import check_plain_resnet, check_same_features, detectron2_state, example_images
from bissl_zoo.weights.timm_format import PIXEL_KEYS, timm_config
from bissl_zoo.zoo import TARGETS
from bissl_zoo.zoo.index import to_json
from bissl_zoo.zoo.names import shorten

ONNX_OPSET = 18
_UNSTATED = "not stated by the source"


@dataclass(frozen=True)
class Exported:
    """A written file or folder, and what whoever loads it must know, by name."""

    path: Path
    facts: dict[str, str]


def export_backbone(
    state: Mapping[str, Tensor],
    architecture: str,
    target: str,
    output: str | Path,
    model_args: Mapping[str, Any] | None = None,
    pixels: Mapping[str, Any] | None = None,
    image_size: Sequence[int] | None = None,
) -> Exported:
    """Write a backbone for another library; `output` appears complete or not at all.

    Args:
        state: under the names of `timm.create_model(architecture, num_classes=0, **model_args)`.
        target: one of `TARGETS`. "timm" writes a folder for `local-dir:`; "torchvision" a `.pth` or `.safetensors`
            without classifier; "detectron2" a `.pkl` for its DetectionCheckpointer; "onnx" and "export" a network from
            images `(B, 3, H, W)` to pooled features, with B free.
        pixels: `mean` and `std` of RGB images scaled to [0, 1], as a zoo entry's "input" has them.
        image_size: height and width of the images that "onnx" and "export" trace with; None for the architecture's own.
    Raises:
        ZooError: the state does not fit, or the target cannot hold this network; the message says why.
    """
    if target not in TARGETS:
        raise ZooError(f"Unknown target '{target}'.{did_you_mean(target, TARGETS)} Targets: {', '.join(TARGETS)}.")
    model = _loaded(architecture, state, dict(model_args or {}))
    output = Path(output)
    facts = {"architecture": architecture, **_pixel_facts(pixels)}
    try:
        facts |= _WRITERS[target](model, architecture, output, dict(model_args or {}), pixels, image_size)
    except (OSError, SafetensorError) as error:
        raise ZooError(f"{output} could not be written: {error}.") from error
    return Exported(output, facts)


@contextlib.contextmanager
def draft(output: Path) -> Iterator[Path]:
    """A path beside `output` to write to, which takes its place once the block has ended well."""
    output.parent.mkdir(parents=True, exist_ok=True)
    beside = output.with_name(f".{uuid.uuid4().hex}-{output.name}")
    beside.touch()
    mode = beside.stat().st_mode  # safetensors lets only the owner read
    beside.unlink()
    try:
        yield beside
        for path in [*beside.iterdir()] if beside.is_dir() else [beside]:
            path.chmod(mode)
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        os.replace(beside, output)
    finally:
        beside.unlink(missing_ok=True) if beside.is_file() else shutil.rmtree(beside, ignore_errors=True)


def _loaded(architecture: str, state: Mapping[str, Tensor], model_args: dict[str, Any]) -> nn.Module:
    if not timm.is_model(architecture):
        hint = did_you_mean(architecture, timm.list_models())
        raise ZooError(f"timm {timm.__version__} has no architecture '{architecture}'.{hint}")
    with torch.random.fork_rng(devices=[]):
        model = timm.create_model(architecture, num_classes=0, **model_args)
    expected = model.state_dict()
    wrong = [key for key in expected if key not in state or state[key].shape != expected[key].shape]
    if wrong := wrong + [key for key in state if key not in expected]:
        raise ZooError(
            f"The state does not fit {architecture}(num_classes=0): {len(wrong)} tensors are missing, of another shape "
            f"or unexpected: {shorten(wrong)}. Only a whole backbone is exported."
        )
    model.load_state_dict(state)
    return model.eval()


def _pixel_facts(pixels: Mapping[str, Any] | None) -> dict[str, str]:
    said = {key: ", ".join(f"{v:.4g}" for v in pixels[key]) if pixels else _UNSTATED for key in ("mean", "std")}
    return {"images": "RGB, scaled to [0, 1], then normalised", **said}


def _to_timm(
    model: nn.Module, architecture: str, output: Path, model_args: dict[str, Any], pixels: Any, image_size: Any
) -> dict[str, str]:
    if not pixels:
        raise ZooError("timm's config.json states the pixel statistics, which are not known here: give mean and std.")
    if output.exists():
        raise ZooError(f"{output} exists. Name a folder that does not.")
    stated = {key: pixels[key] for key in PIXEL_KEYS if key in pixels}
    stated.setdefault("input_size", [3, *_image_size(model, image_size)])
    _, config = timm_config(architecture, stated, model_args, licence="unknown")
    with draft(output) as folder:
        folder.mkdir()
        safetensors.torch.save_file(_own_memory(model.state_dict()), folder / "model.safetensors", {"format": "pt"})
        (folder / "config.json").write_text(to_json(config))
        again = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        check_same_features("timm", model, again, _image_size(model, image_size))
    return {"load with": f'timm.create_model("local-dir:{output}", pretrained=True)'}


def _to_torchvision(model: nn.Module, architecture: str, output: Path, *_: Any) -> dict[str, str]:
    check_plain_resnet(model, architecture, "torchvision")
    if output.suffix not in (".pth", ".pt", ".safetensors"):
        raise ZooError(f"{output}: a torchvision state is written as .pth, .pt or .safetensors.")
    state = _own_memory(model.state_dict())
    with draft(output) as file:
        if output.suffix == ".safetensors":
            safetensors.torch.save_file(state, file, {"format": "pt"})
        else:
            torch.save(state, file)
    return {
        "load with": f"torchvision.models.{architecture}().load_state_dict(state, strict=False)",
        "not in the file": "fc.weight, fc.bias",
    }


def _to_detectron2(
    model: nn.Module, architecture: str, output: Path, model_args: Any, pixels: Mapping[str, Any] | None, *_: Any
) -> dict[str, str]:
    check_plain_resnet(model, architecture, "Detectron2")
    if output.suffix != ".pkl":
        raise ZooError(f"{output}: Detectron2's DetectionCheckpointer takes a .pkl.")
    arrays = {name: tensor.cpu().numpy() for name, tensor in detectron2_state(model.state_dict()).items()}
    content: dict[str, Any] = {"model": arrays, "__author__": "bissl_zoo", "matching_heuristics": True}
    block = model.layer1[0]
    depth = re.search(r"(18|34|50|101|152)", architecture)[1]
    facts = {
        "MODEL.RESNETS.DEPTH": depth,
        "MODEL.RESNETS.STRIDE_IN_1X1": "False",
        "MODEL.RESNETS.NUM_GROUPS": str(block.conv2.groups),
        "MODEL.RESNETS.WIDTH_PER_GROUP": str(block.conv2.out_channels // block.conv2.groups),
        "MODEL.RESNETS.RES2_OUT_CHANNELS": str(model.layer1[-1].bn2.num_features if depth in ("18", "34") else 256),
        "INPUT.FORMAT": "RGB",
        "MODEL.PIXEL_MEAN": _UNSTATED,
        "MODEL.PIXEL_STD": _UNSTATED,
        "numpy": ">= 1.26 to read the file",
    }
    if pixels:
        content["input"] = {
            "format": "RGB",
            "pixel_mean": [255 * value for value in pixels["mean"]],
            "pixel_std": [255 * value for value in pixels["std"]],
        }
        for key in ("pixel_mean", "pixel_std"):
            facts[f"MODEL.{key.upper()}"] = "[" + ", ".join(f"{value:.6g}" for value in content["input"][key]) + "]"
    with draft(output) as file, open(file, "wb") as stream:
        pickle.dump(content, stream, protocol=4)
    return facts


def _to_onnx(
    model: nn.Module, architecture: str, output: Path, model_args: Any, pixels: Any, image_size: Sequence[int] | None
) -> dict[str, str]:
    absent = [package for package in ("onnx", "onnxscript") if importlib.util.find_spec(package) is None]
    if absent:
        raise ZooError(f"The target 'onnx' needs {' and '.join(absent)}: pip install \"bissl_zoo[onnx]\".")
    images = _example(model, architecture, image_size)
    with draft(output) as file:
        try:
            torch.onnx.export(
                model,
                (images,),
                file,
                dynamo=True,
                opset_version=ONNX_OPSET,
                input_names=["images"],
                output_names=["features"],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                external_data=False,
                verbose=False,
            )
        except (torch.onnx.errors.OnnxExporterError, RuntimeError) as error:
            raise ZooError(f"torch.onnx cannot export {architecture}: {_first_line(error)}") from error
    return {"input": f"images (batch, 3, {images.shape[2]}, {images.shape[3]})", "opset": str(ONNX_OPSET)}


def _to_export(
    model: nn.Module, architecture: str, output: Path, model_args: Any, pixels: Any, image_size: Sequence[int] | None
) -> dict[str, str]:
    if output.suffix != ".pt2":
        raise ZooError(f"{output}: a program of torch.export is written as .pt2.")
    images = _example(model, architecture, image_size)
    try:
        program = torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    except (RuntimeError, ValueError, TypeError) as error:
        raise ZooError(f"torch.export cannot trace {architecture}: {_first_line(error)}") from error
    with draft(output) as file:
        torch.export.save(program, file)
    return {
        "input": f"images (batch, 3, {images.shape[2]}, {images.shape[3]})",
        "load with": f'torch.export.load("{output}").module()',
    }


#: how each is written
_WRITERS: dict[str, Callable[..., dict[str, str]]] = {
    "timm": _to_timm,
    "torchvision": _to_torchvision,
    "detectron2": _to_detectron2,
    "onnx": _to_onnx,
    "export": _to_export,
}


def _example(model: nn.Module, architecture: str, told: Sequence[int] | None) -> Tensor:
    images = example_images(_image_size(model, told))
    try:
        with torch.no_grad():
            model(images)
    except (RuntimeError, AssertionError, ValueError) as error:
        size = " x ".join(str(side) for side in images.shape[2:])
        raise ZooError(f"{architecture} does not take images of {size}: {_first_line(error)}") from error
    return images


def _image_size(model: nn.Module, told: Sequence[int] | None) -> tuple[int, int]:
    grid = getattr(getattr(model, "patch_embed", None), "img_size", None)
    height, width = told or grid or model.pretrained_cfg["input_size"][1:]
    return height, width


def _own_memory(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().clone().contiguous() for name, tensor in state.items()}


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
