"""BiSSL for FGVC Aircraft from BYOL, ResNet-50 on ImageNet (arXiv 2410.02387, versions 3 to 5)."""

from ..common.data.classification import loaders
from ..common.papers.classification import bilevel, clip_grad, finetune, optimizer, search, solver, task
from ..common.papers.imagenet_byol import backbone, dataloader, lr_multiplier, pretext, pretrain, train

dataloader.update(loaders("fgvc_aircraft"))
optimizer.upper.update(lr=0.015, weight_decay=0.003)
search.metric = "mean_per_class"  # the papers name it and top1
train.output_dir = "runs/fgvc_aircraft_byol"
