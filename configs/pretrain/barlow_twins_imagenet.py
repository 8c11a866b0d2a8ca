"""Barlow Twins pretraining of a ResNet-50 on ImageNet, at BiSSL's 96 pixels.

Optimizer and schedule are the paper's (arXiv 2103.03230, section 2.2): LARS, 0.2 per 256 images, 1000 epochs, a cosine
to a thousandth. There, biases and batch norm have a rate of 0.0048 and neither weight decay nor adaptation; all are
alike here.
"""

from ..common.optim import cosine
from ..common.pretext.barlow_twins import pretext
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

dataloader.pretext.batch_size = 2048
optimizer.pretrain.lr = 0.2 * 2048 / 256
optimizer.pretrain.weight_decay = 1.5e-6
lr_multiplier.pretrain = cosine(0.001, warmup_steps=10 * 626)  # 10 epochs of ImageNet at batch 2048
pretrain.epochs = 1000

train.output_dir = "runs/barlow_twins_imagenet"
train.publish.name = "resnet50.barlow_twins_in1k"
