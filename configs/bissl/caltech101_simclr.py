"""BiSSL for Caltech-101 from SimCLR, ResNet-50 on ImageNet (arXiv 2410.02387, versions 3 to 5)."""

from ..common.data.classification import loaders
from ..common.papers.classification import bilevel, clip_grad, finetune, optimizer, search, solver, task
from ..common.papers.imagenet_simclr import backbone, dataloader, lr_multiplier, pretext, pretrain, train
from ..common.papers.sets import upper

dataloader.update(loaders("caltech101"))
optimizer.upper.update(upper("caltech101", "simclr"))
train.output_dir = "runs/caltech101_simclr"
