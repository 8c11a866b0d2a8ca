"""BiSSL for FGVC Aircraft from SimCLR, ResNet-50 on ImageNet (arXiv 2410.02387, versions 3 to 5)."""

from ..common.data.classification import loaders
from ..common.papers.classification import bilevel, clip_grad, finetune, optimizer, search, solver, task
from ..common.papers.imagenet_simclr import backbone, dataloader, lr_multiplier, pretext, pretrain, train
from ..common.papers.sets import metric, upper

dataloader.update(loaders("fgvc_aircraft"))
optimizer.upper.update(upper("fgvc_aircraft", "simclr"))
search.metric = metric("fgvc_aircraft")
train.output_dir = "runs/fgvc_aircraft_simclr"
