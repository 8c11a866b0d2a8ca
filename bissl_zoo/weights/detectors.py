"""States of Faster R-CNN under the names of torchvision and Detectron2."""

import pickle
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from bissl_zoo.errors import ZooError
from bissl_zoo.files import replacing
from bissl_zoo.weights.export import detectron2_state

_DETECTRON2_NAMES = (
    (r"^rpn\.head\.conv\.0\.0\.", "proposal_generator.rpn_head.conv."),
    (r"^rpn\.head\.cls_logits\.", "proposal_generator.rpn_head.objectness_logits."),
    (r"^rpn\.head\.bbox_pred\.", "proposal_generator.rpn_head.anchor_deltas."),
    (r"^roi_heads\.box_head\.fc6\.", "roi_heads.box_head.fc1."),
    (r"^roi_heads\.box_head\.fc7\.", "roi_heads.box_head.fc2."),
)


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


def write_detectron2(state: Mapping[str, Tensor], output: Path) -> None:
    """Write a state as a pickle of arrays, which Detectron2's DetectionCheckpointer reads."""
    if output.suffix != ".pkl":
        raise ZooError(f"{output}: Detectron2's DetectionCheckpointer takes a .pkl.")
    content = {"model": {name: tensor.cpu().numpy() for name, tensor in state.items()}, "__author__": "bissl_zoo"}
    with replacing(output) as file, open(file, "wb") as stream:
        pickle.dump(content, stream, protocol=4)
