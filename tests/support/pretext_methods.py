"""Pretext methods of reduced widths on tiny backbones, and batches of views for them."""

import torch
from torch import nn

from bissl_zoo.analysis.reduced_problem import narrow_widths
from bissl_zoo.backbones import FeatureInfo
from bissl_zoo.registry import build_backbone, build_pretext

VIT = {"name": "test_vit", "class_token": False, "global_pool": "avg", "img_size": 32}
#: methods that mask patches
MASKED = ("mae", "simmim")
#: the queue is shorter than a run of a few steps, so that it wraps, and no multiple of the batch
TINY = {"mae": {"decoder_dim": 8, "decoder_depth": 1, "decoder_heads": 2}, "moco_v2": {"queue_length": 20}}
#: cells of two images of which the tests hide some
MASK = torch.tensor([[[True, False], [True, True]], [[False, True], [False, False]]])


def draw(*shape, seed=0):
    """Return standard normal numbers in float64."""
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def shake(*modules):
    """Add noise to all parameters."""
    with torch.no_grad():
        for parameter in (p for module in modules for p in module.parameters()):
            parameter.add_(torch.randn_like(parameter), alpha=0.1)


def build_method(method, vit=None, drop_path_rate=0.0, **options):
    """Return a trunk and a method on it: on a small ResNet, or a ViT for masked patches or with arguments `vit`."""
    torch.manual_seed(0)
    vit = VIT if vit is None and method in MASKED else vit
    backbone, stage = ({"name": "test_resnet"}, "c3") if vit is None else (vit, "blocks.5")
    trunk, tail = build_backbone(**backbone, drop_path_rate=drop_path_rate).split(stage)
    widths = narrow_widths({"name": method})
    return trunk, build_pretext(name=method, backbone=trunk, tail=tail, **widths | options)


class Convolutions(nn.Module):
    """Images `(B, 3, 8, 8)` -> a map of 6 channels, with batch norm and smooth activations."""

    out_features = ("out",)
    feature_info = {"out": FeatureInfo(6, 4, "norm2")}

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.Softplus()),
            *(nn.Conv2d(4, 6, 3, padding=1, stride=2), nn.BatchNorm2d(6), nn.Softplus()),
        )

    def forward(self, images):
        return {"out": self.layers(images)}


class MeanOfMap(nn.Module):
    num_features = 6

    def forward(self, features):
        return features.mean(dim=(2, 3))


def tiny_trunk(method):
    """Return a trunk for images `(B, 3, 8, 8)`, of four patches if the method masks them, and its tail."""
    if method not in MASKED:
        return Convolutions(), MeanOfMap()
    vit = {"img_size": 8, "patch_size": 4, "embed_dim": 4, "depth": 1, "num_heads": 2}
    backbone = build_backbone(name="vit_tiny_patch16_224", class_token=False, global_pool="avg", **vit)
    return backbone.split(backbone.stages[-1])


def tiny_method(method):
    """Return a tiny trunk and a method on it."""
    trunk, tail = tiny_trunk(method)
    widths = narrow_widths({"name": method}) | TINY.get(method, {})
    return trunk, build_pretext(name=method, backbone=trunk, tail=tail, **widths)


def batch_of_views(method, size=4, seed=1):
    """Return the views of `size` images that a method takes."""
    generator = torch.Generator().manual_seed(seed)
    images = tuple(torch.randn(2, size, 3, 32, 32, generator=generator))
    if method == "dino":
        return *images, *torch.randn(3, size, 3, 16, 16, generator=generator)
    if method in MASKED:
        return images[0], MASK[0].expand(size, 2, 2)
    return images
