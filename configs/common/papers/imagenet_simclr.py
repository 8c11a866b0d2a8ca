"""Start of versions 3 to 5 of the BiSSL paper (arXiv 2410.02387): SimCLR, a ResNet-50, ImageNet at 96 pixels."""

from ..backbones.resnet import resnet50 as backbone
from ..data.imagenet import pretext as pretext_loader
from ..optim import lr_multiplier
from ..pretext.simclr import pretext
from ..train import pretrain, train

dataloader = dict(pretext=pretext_loader)
del pretext_loader

# bissl train --config-file configs/pretrain/simclr_imagenet.py
train.init = "runs/simclr_imagenet"
train.stages = ["bissl", "finetune"]
