"""Pretext methods of reduced widths on tiny backbones, and batches of views for them."""

import torch

from bissl_zoo.analysis.reduced_problem import narrow_widths
from bissl_zoo.registry import build_backbone, build_pretext

VIT = {"name": "test_vit", "class_token": False, "global_pool": "avg", "img_size": 32}
#: methods that mask patches
MASKED = ("mae", "simmim")
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


def batch_of_views(method, size=4, seed=1):
    """Return the views of `size` images that a method takes."""
    generator = torch.Generator().manual_seed(seed)
    images = tuple(torch.randn(2, size, 3, 32, 32, generator=generator))
    if method == "dino":
        return *images, *torch.randn(3, size, 3, 16, 16, generator=generator)
    if method in MASKED:
        return images[0], MASK[0].expand(size, 2, 2)
    return images
