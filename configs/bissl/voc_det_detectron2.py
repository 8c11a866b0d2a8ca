"""voc_det with the RPN, box head, data mapper and evaluator of Detectron2, which must be installed."""

from ..common.downstream.detectron2_faster_rcnn import task
from .voc_det import (
    backbone,
    bilevel,
    clip_grad,
    dataloader,
    finetune,
    lr_multiplier,
    optimizer,
    pretext,
    pretrain,
    search,
    solver,
    train,
)

train.output_dir = "runs/voc_det_detectron2"
