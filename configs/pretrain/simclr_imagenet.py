"""SimCLR pretraining of a ResNet-50 on ImageNet at 96 pixels, where the BiSSL paper's experiments start."""

from ..bissl.voc_det import (
    backbone,
    bilevel,
    clip_grad,
    dataloader,
    finetune,
    lr_multiplier,
    optimizer,
    pretext,
    pretrain,
    solver,
    task,
    train,
)

bilevel.shared_stage = None
train.output_dir = "runs/simclr_imagenet"
train.stages = ["pretrain"]
train.publish.name = "resnet50.simclr_in1k"
