"""Start of versions 3 to 5 of the BiSSL paper (arXiv 2410.02387): BYOL, a ResNet-50, ImageNet at 96 pixels."""

from ..pretext.byol import pretext
from .imagenet_simclr import backbone, dataloader, lr_multiplier, pretrain, train

# bissl train --config-file configs/pretrain/byol_imagenet.py
train.init = "runs/byol_imagenet"
