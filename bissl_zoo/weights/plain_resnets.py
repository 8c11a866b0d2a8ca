"""Which timm ResNets are torchvision's and Detectron2's as well, and what their tensors are called there."""

import re
from collections.abc import Mapping, Sequence

import torch
import torchvision
from timm.models.resnet import ResNet
from torch import Tensor, nn

from bissl_zoo.errors import ZooError

#: the ResNets whose torchvision network computes what timm's of the same name does
TORCHVISION_RESNETS = (
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "wide_resnet50_2",
    "wide_resnet101_2",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "resnext101_64x4d",
)
_EPS = 1e-5  # of batch norm in torchvision and Detectron2


def detectron2_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A ResNet's state under the names of Detectron2's: `layer1.0.bn1.weight` becomes `res2.0.conv1.norm.weight`."""
    renamed = {}
    for name, tensor in state.items():
        name = re.sub(r"^layer(\d)", lambda stage: f"res{int(stage[1]) + 1}", name)
        name = re.sub(r"\bbn(\d)\.", r"conv\1.norm.", name)
        name = name.replace("downsample.0.", "shortcut.").replace("downsample.1.", "shortcut.norm.")
        renamed[name if name.startswith("res") else f"stem.{name}"] = tensor
    return renamed


def check_plain_resnet(model: nn.Module, architecture: str, target: str) -> None:
    """Make sure that torchvision's network of this name, whose layout Detectron2 shares, computes the same features.

    Raises:
        ZooError: it does not, or there is none; the message says what is different.
    """
    if reason := _why_not_plain(model):
        raise ZooError(f"{target} has no network for {architecture}: {reason}. It takes: {_plain()}.")
    if architecture not in TORCHVISION_RESNETS:
        raise ZooError(f"{target} has no ResNet with the blocks of {architecture}. It takes: {_plain()}.")
    with torch.random.fork_rng(devices=[]):
        twin = getattr(torchvision.models, architecture)()
    twin.fc = nn.Identity()
    twin.load_state_dict(model.state_dict())
    check_same_features(target, model, twin.eval(), (64, 64))


def _why_not_plain(model: nn.Module) -> str:
    if not isinstance(model, ResNet):
        return f"it is a {type(model).__name__}, not a ResNet"
    if isinstance(model.conv1, nn.Sequential):
        return "its stem is several convolutions, not one of 7x7"
    blocks = [block for stage in (model.layer1, model.layer2, model.layer3, model.layer4) for block in stage]
    if any(getattr(block, "se", None) is not None for block in blocks):
        return "its blocks have an attention module (se)"
    if any(isinstance(module, nn.AvgPool2d) for block in blocks for module in block.modules()):
        return "its shortcuts or blocks pool by averaging"
    if any(not isinstance(block.act3 if hasattr(block, "act3") else block.act2, nn.ReLU) for block in blocks):
        return "its activation is not ReLU"
    norms = [module for name, module in model.named_modules() if re.search(r"(bn\d|downsample\.1)$", name)]
    if any(not isinstance(norm, nn.BatchNorm2d) for norm in norms):
        return f"it normalises with {type(norms[0]).__name__}, not batch norm"
    if any(norm.eps != _EPS for norm in norms):
        return f"its batch norm has eps {norms[0].eps:g}, not {_EPS:g}"
    return ""


def _plain() -> str:
    return ", ".join(TORCHVISION_RESNETS)


def check_same_features(target: str, model: nn.Module, other: nn.Module, size: Sequence[int]) -> None:
    """Raise `ZooError` where two networks give other pooled features for the same random images."""
    images = example_images(size)
    with torch.no_grad():
        ours, theirs = model(images), other(images)
    if ours.shape != theirs.shape or not torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4 * float(ours.abs().max())):
        raise ZooError(f"{target}'s network computes other features from these weights, so nothing was written.")


def example_images(size: Sequence[int]) -> Tensor:
    """Two random images of this height and width, the same ones each time."""
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
