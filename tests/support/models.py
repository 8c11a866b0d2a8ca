"""Untrained models with changed statistics, and images of noise."""

import numpy as np
import torch
from PIL import Image
from torch import nn

from bissl_zoo.backbones import share
from bissl_zoo.model import Model, describe_model
from bissl_zoo.registry import build_backbone, build_task

CLASSES = ["cat", "dog", "héron"]


def new_model(task="classification", shared_stage=None, out_features=(), name="test_resnet", **arguments):
    """Return an untrained model, by default on timm's smallest ResNet, with random batch-norm statistics."""
    torch.manual_seed(0)
    backbone_arguments = {"out_features": list(out_features)} if out_features else {}
    whole = build_backbone(name=name, **backbone_arguments)
    trunk, _ = share(whole, shared_stage, out_features)
    head = build_task(name=task, backbone=trunk, classes=CLASSES, **arguments)
    for module in (*trunk.modules(), *head.modules()):
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.1, 0.1), module.running_var.uniform_(0.5, 1.5)
    described = describe_model(
        head,
        backbone_name=name,
        backbone_arguments=backbone_arguments,
        shared_stage=shared_stage,
        task_name=task,
        task_arguments=arguments,
        metrics={"top1": 0.5, "top1/cat": 0.1},
        imports=["mine.py"],
    )
    return Model(trunk.eval(), head.eval(), described)


def photo(width=80, height=64, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)
