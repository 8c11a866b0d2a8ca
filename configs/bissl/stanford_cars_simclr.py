"""BiSSL for Stanford Cars from SimCLR, ResNet-50 on ImageNet (arXiv 2410.02387, versions 3 to 5)."""

from ..common.data.classification import loaders
from ..common.papers.classification import bilevel, clip_grad, finetune, optimizer, search, solver, task
from ..common.papers.imagenet_simclr import backbone, dataloader, lr_multiplier, pretext, pretrain, train
from ..common.papers.sets import upper

dataloader.update(loaders("stanford_cars"))
optimizer.upper.update(upper("stanford_cars", "simclr"))
train.output_dir = "runs/stanford_cars_simclr"
