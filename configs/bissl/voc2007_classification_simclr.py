"""BiSSL for VOC2007 classification from SimCLR, ResNet-50 on ImageNet (arXiv 2410.02387, versions 3 to 5)."""

from ..common.data.classification import loaders
from ..common.papers.classification import bilevel, clip_grad, finetune, optimizer, search, solver
from ..common.papers.imagenet_simclr import backbone, dataloader, lr_multiplier, pretext, pretrain, train
from ..common.papers.multilabel import task
from ..common.papers.sets import metric, upper

dataloader.update(loaders("voc2007_classification"))
optimizer.upper.update(upper("voc2007_classification", "simclr"))
search.metric = metric("voc2007_classification")
train.output_dir = "runs/voc2007_classification_simclr"
