"""BiSSL for CIFAR-10 from SimCLR, ResNet-50 on ImageNet (arXiv 2410.02387, versions 3 to 5)."""

from ..common.data.classification import loaders
from ..common.papers.classification import bilevel, clip_grad, finetune, optimizer, search, solver, task
from ..common.papers.imagenet_simclr import backbone, dataloader, lr_multiplier, pretext, pretrain, train

dataloader.update(loaders("cifar10"))
optimizer.upper.update(lr=0.015, weight_decay=0.001)
train.output_dir = "runs/cifar10_simclr"
