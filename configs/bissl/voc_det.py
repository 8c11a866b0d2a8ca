"""SimCLR, ResNet-50, VOC07+12 detection with Faster R-CNN on C4: the BiSSL paper's detection experiment."""

from ..common.backbones.resnet import resnet50 as backbone
from ..common.data.imagenet import pretext as pretext_loader
from ..common.data.voc0712 import test
from ..common.data.voc0712 import train as train_loader
from ..common.downstream.faster_rcnn import task
from ..common.optim import lr_multiplier, optimizer
from ..common.papers.detection import search
from ..common.papers.sets import as_in_the_papers, upper
from ..common.pretext.simclr import pretext
from ..common.solvers.cg import solver
from ..common.train import bilevel, clip_grad, finetune, pretrain, train

dataloader = dict(pretext=pretext_loader, train=train_loader, test=test)
del pretext_loader, train_loader, test

train.output_dir = "runs/voc_det"
train.stages = [
    "pretrain",
    "bissl",
    "finetune",
]  # with train.init=runs/simclr_imagenet train.stages=[bissl,finetune]: the last two

as_in_the_papers(bilevel, finetune)
bilevel.shared_stage = "c4"
bilevel.head_warmup.epochs = 5
optimizer.upper.update(upper("voc_det", "simclr"))

finetune.epochs = 50
