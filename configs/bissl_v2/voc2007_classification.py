"""BiSSL for VOC2007 classification from SimCLR, ResNet-18 on STL-10 (arXiv 2410.02387, versions 1 and 2)."""

from ..common.data.classification import loaders
from ..common.papers.classification_v2 import bilevel, clip_grad, finetune, optimizer, search, solver
from ..common.papers.multilabel import task
from ..common.papers.sets import metric
from ..common.papers.stl10_simclr import backbone, dataloader, lr_multiplier, pretext, pretrain, train

dataloader.update(loaders("voc2007_classification"))
search.metric = metric("voc2007_classification")
train.output_dir = "runs/voc2007_classification_v2"
