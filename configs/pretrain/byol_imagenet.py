"""BYOL pretraining of a ResNet-50 on ImageNet at 96 pixels, where the BiSSL paper's BYOL experiments start.

Optimizer, schedule and length are that paper's, as for SimCLR (arXiv 2410.02387). BYOL's own (arXiv 2006.07733, section
3.3) are a batch of 4096, a rate of 3.2, a weight decay of 1.5e-6, 1000 epochs, and a teacher's decay that rises to 1.
"""

from ..common.pretext.byol import pretext
from .simclr_imagenet import (
    backbone,
    bilevel,
    clip_grad,
    dataloader,
    finetune,
    lr_multiplier,
    optimizer,
    pretrain,
    solver,
    task,
    train,
)

train.output_dir = "runs/byol_imagenet"
train.publish.name = "resnet50.byol_in1k"
