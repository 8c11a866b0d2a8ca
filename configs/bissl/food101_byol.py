"""BiSSL for Food-101 from BYOL, ResNet-50 on ImageNet (arXiv 2410.02387, versions 3 to 5)."""

from ..common.data.classification import loaders
from ..common.papers.classification import bilevel, clip_grad, finetune, optimizer, search, solver, task
from ..common.papers.imagenet_byol import backbone, dataloader, lr_multiplier, pretext, pretrain, train
from ..common.papers.sets import upper

dataloader.update(loaders("food101"))
optimizer.upper.update(upper("food101", "byol"))
train.output_dir = "runs/food101_byol"
