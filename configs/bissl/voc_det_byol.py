"""BiSSL for VOC07+12 detection from BYOL, ResNet-50 (arXiv 2410.02387, versions 3 to 5); the detector of voc_det.py."""

from ..common.papers.detection import search
from ..common.papers.imagenet_byol import backbone, lr_multiplier, pretext, pretrain, train
from ..common.papers.sets import upper
from .voc_det import bilevel, clip_grad, dataloader, finetune, optimizer, solver, task

optimizer.upper.update(upper("voc_det", "byol"))
train.output_dir = "runs/voc_det_byol"
