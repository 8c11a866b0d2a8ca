"""Export of fine-tuned models for other libraries: ONNX, torch.export, torchvision, Detectron2 and timm."""

import copy
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor

from bissl_zoo.backbones import Backbone
from bissl_zoo.downstream.classification import PooledLinear
from bissl_zoo.downstream.detection import FasterRCNN
from bissl_zoo.downstream.graph import Logits
from bissl_zoo.downstream.task import DownstreamTask
from bissl_zoo.errors import ZooError, did_you_mean
from bissl_zoo.weights.export import (
    Exported,
    LinearHead,
    check_plain_resnet,
    detectron2_state,
    export_backbone,
    write_detectron2,
    write_onnx,
    write_program,
    write_state,
)

#: what a model can be exported to, and the suffixes that mean it
MODEL_TARGETS = ("onnx", "export", "torchvision", "detectron2", "timm")
SUFFIXES = {
    ".onnx": "onnx",
    ".pt2": "export",
    ".pkl": "detectron2",
    "": "timm",
    **dict.fromkeys((".pth", ".safetensors"), "torchvision"),
}
_DETECTRON2_NAMES = (
    (r"^rpn\.head\.conv\.0\.0\.", "proposal_generator.rpn_head.conv."),
    (r"^rpn\.head\.cls_logits\.", "proposal_generator.rpn_head.objectness_logits."),
    (r"^rpn\.head\.bbox_pred\.", "proposal_generator.rpn_head.anchor_deltas."),
    (r"^roi_heads\.box_head\.fc6\.", "roi_heads.box_head.fc1."),
    (r"^roi_heads\.box_head\.fc7\.", "roi_heads.box_head.fc2."),
)


def export_model(
    backbone: Backbone,
    task: DownstreamTask,
    metadata: Mapping[str, Any],
    output: Path,
    to: str | None = None,
    image_size: Sequence[int] | None = None,
) -> Exported:
    """Write a fine-tuned model for another library; see :meth:`bissl_zoo.model.Model.export`.

    Args:
        metadata: the content of `model.json`.
    Raises:
        ZooError: the target cannot represent this model, or the file cannot be written.
    """
    classes = task.classes
    name = f"{metadata['task']['name']} on {metadata['backbone']['name']}"
    to = to or SUFFIXES.get(output.suffix)
    if to not in MODEL_TARGETS:
        raise ZooError(
            f"{output}: a model is not exported to '{to or output.suffix}'.{did_you_mean(str(to), MODEL_TARGETS)} "
            f"Targets: {', '.join(MODEL_TARGETS)}. `bissl convert out` exports a backbone alone."
        )
    backbone, task = (copy.deepcopy(part).cpu().eval() for part in (backbone, task))
    if to in ("onnx", "export"):
        network = task.graph(backbone).eval()
        images = torch.rand(2, 3, *(image_size or network.size), generator=torch.Generator().manual_seed(0))
        images = images if network.any_batch else images[:1]
        write = write_onnx if to == "onnx" else write_program
        details = write(network, images, output, name, network.outputs, network.any_batch)
        return Exported(output, {"classes": ", ".join(classes), "images": "RGB in [0, 1]", **details})
    architecture, arguments = (metadata["backbone"][key] for key in ("name", "arguments"))
    arguments = {key: value for key, value in arguments.items() if key != "out_features"}
    if isinstance(task, PooledLinear):
        logits = Logits(backbone, task).eval()
        head = LinearHead(task.linear.weight, task.linear.bias, classes, logits, (task.image_size,) * 2)
        pixels = {**{key: list(getattr(task, key)) for key in ("mean", "std")}, "crop_mode": "center"}
        pixels |= {"crop_pct": task.image_size / task.resize, "interpolation": task.interpolation.value}
        pixels["input_size"] = [3, task.image_size, task.image_size]
        return export_backbone(backbone.state_dict(), architecture, to, output, arguments, pixels, head=head)
    if to not in ("torchvision", "detectron2") or not isinstance(task, FasterRCNN):
        raise ZooError(f"{output}: {name} has no form in {to}. Export it as .onnx or .pt2, if its task can.")
    check_plain_resnet(timm.create_model(architecture, num_classes=0, **arguments).eval(), architecture, to)
    states = backbone.state_dict(), task.state_dict()
    settings = {key: str(value) for key, value in metadata["task"]["arguments"].items()}
    settings["classes"] = ", ".join(classes)
    if to == "detectron2":
        anchors = task.rpn.anchor_generator
        counts = len(anchors.sizes[0]), len(anchors.aspect_ratios[0])
        write_detectron2(detectron2_detector_state(*states, task.maps, *counts), output)
        settings |= {"MODEL.ROI_BOX_HEAD.POOLER_TYPE": "ROIAlign", "INPUT.FORMAT": "RGB, in [0, 255]"}
    else:
        write_state(torchvision_detector_state(*states), output)
        settings["load with"] = "torchvision.models.detection.FasterRCNN; label 0 is the background"
    return Exported(output, settings)


def torchvision_detector_state(backbone: Mapping[str, Tensor], task: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the states of a ResNet and of `FasterRCNN` to those of `torchvision.models.detection.FasterRCNN`."""
    body = "backbone.body" if any(name.startswith("fpn.") for name in task) else "backbone"
    heads = {f"backbone.{name}" if name.startswith("fpn.") else name: tensor for name, tensor in task.items()}
    return {**{f"{body}.{name}": tensor for name, tensor in backbone.items()}, **heads}


def detectron2_detector_state(
    backbone: Mapping[str, Tensor], task: Mapping[str, Tensor], maps: Sequence[str], sizes: int, ratios: int
) -> dict[str, Tensor]:
    """Rename the states of a ResNet and of `FasterRCNN` to those of Detectron2's `GeneralizedRCNN`.

    Detectron2 orders the anchors of a place by size first, torchvision by ratio first. Its background is the last
    class, not the first, and has no box.

    Args:
        maps: names of the maps, such as c4.
        sizes, ratios: number of anchor sizes at a place, and of ratios.
    """
    pyramid = any(name.startswith("fpn.") for name in task)
    body = "backbone.bottom_up" if pyramid else "backbone"
    state = {f"{body}.{name}": tensor for name, tensor in detectron2_state(backbone).items()}
    order = anchor_order(sizes, ratios)
    for name, tensor in task.items():
        if block := re.match(r"fpn\.(inner|layer)_blocks\.(\d+)\.0\.", name):
            kind = "lateral" if block[1] == "inner" else "output"
            renamed = f"backbone.fpn_{kind}{maps[int(block[2])][1:]}.{name[block.end() :]}"
        elif name.startswith("roi_heads.box_predictor.cls_score."):
            renamed, tensor = name, torch.cat([tensor[1:], tensor[:1]])
        elif name.startswith("roi_heads.box_predictor.bbox_pred."):
            renamed, tensor = name, tensor[4:]
        else:
            renamed = name
            for pattern, replacement in _DETECTRON2_NAMES:
                renamed = re.sub(pattern, replacement, renamed)
        if "objectness_logits" in renamed:
            tensor = tensor[order]
        elif "anchor_deltas" in renamed:
            tensor = tensor.unflatten(0, (sizes * ratios, 4))[order].flatten(0, 1)
        state[renamed] = tensor
    return state


def anchor_order(sizes: int, ratios: int) -> list[int]:
    """Return torchvision's places of the anchors in Detectron2's order."""
    return [ratio * sizes + size for size in range(sizes) for ratio in range(ratios)]
