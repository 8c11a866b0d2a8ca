"""BiSSL for FGVC Aircraft from SimCLR, ResNet-18 on STL-10 (arXiv 2410.02387, versions 1 and 2)."""

from ..common.data.classification import loaders
from ..common.papers.classification_v2 import bilevel, clip_grad, finetune, optimizer, search, solver, task
from ..common.papers.sets import metric
from ..common.papers.stl10_simclr import backbone, dataloader, lr_multiplier, pretext, pretrain, train

dataloader.update(loaders("fgvc_aircraft"))
search.metric = metric("fgvc_aircraft")
train.output_dir = "runs/fgvc_aircraft_v2"
