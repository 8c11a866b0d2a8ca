"""SimCLR pretraining of a ResNet-18 on STL-10's unlabelled images, where versions 1 and 2 of the BiSSL paper start.

The authors fine-tune their baseline from a separate run with pretrain.epochs=600, for the pretext steps of the stage.
"""

from ..common.data.classification import loaders
from ..common.papers.classification_v2 import bilevel, clip_grad, finetune, optimizer, solver, task
from ..common.papers.stl10_simclr import backbone, dataloader, lr_multiplier, pretext, pretrain, train

dataloader.update(loaders("stl10"))  # for train.probe

pretrain.epochs = 500

train.output_dir = "runs/simclr_stl10"
train.stages = ["pretrain"]
train.init = None
train.publish.name = "resnet18.simclr_stl10"
