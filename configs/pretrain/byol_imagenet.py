"""BYOL pretraining of a ResNet-50 on ImageNet, at BiSSL's 96 pixels.

Optimizer and schedule are the paper's (arXiv 2006.07733, section 3.3): LARS, 0.2 per 256 images, 1000 epochs. There,
biases and batch norm are left out of weight decay and adaptation, and the teacher's decay rises to 1; neither is here.
"""

from ..common.optim import cosine
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

dataloader.pretext.batch_size = 4096
optimizer.pretrain.lr = 0.2 * 4096 / 256
optimizer.pretrain.weight_decay = 1.5e-6
lr_multiplier.pretrain = cosine(0.0, warmup_steps=10 * 313)  # 10 epochs of ImageNet at batch 4096
pretrain.epochs = 1000

train.output_dir = "runs/byol_imagenet"
train.publish.name = "resnet50.byol_in1k"
