"""BiSSLight for Oxford-IIIT Pets, MAE's ViT-L on ImageNet."""

from ..common.data.classification import loaders
from ..common.downstream.classification import task
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

dataloader.update(loaders("oxford_pets", batch_size=64))
backbone, train.init, pretext.augmentation.mask_patch = start("large")
task.image_size = 224
train.output_dir = "runs/bissl_light_oxford_pets_vit_large"
