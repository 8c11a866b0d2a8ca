"""BiSSLight for VOC2007 classification, MAE's ViT-B on ImageNet."""

from ..common.data.classification import loaders
from ..common.downstream.multilabel import task
from ..common.papers.bissl_light import (
    bilevel,
    clip_grad,
    dataloader,
    finetune,
    lr_multiplier,
    optimizer,
    pretext,
    pretrain,
    solver,
    start,
    train,
)

dataloader.update(loaders("voc2007_classification", batch_size=64))
backbone, train.init, pretext.augmentation.mask_patch = start("base")
task.image_size = 224
train.output_dir = "runs/bissl_light_voc2007_classification_vit_base"
