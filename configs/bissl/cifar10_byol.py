"""BiSSL for CIFAR-10 from BYOL, ResNet-50 on ImageNet (arXiv 2410.02387, versions 3 to 5)."""

from ..common.data.classification import loaders
from ..common.papers.classification import bilevel, clip_grad, finetune, optimizer, search, solver, task
from ..common.papers.imagenet_byol import backbone, dataloader, lr_multiplier, pretext, pretrain, train
from ..common.papers.sets import upper

dataloader.update(loaders("cifar10"))
optimizer.upper.update(upper("cifar10", "byol"))
train.output_dir = "runs/cifar10_byol"
