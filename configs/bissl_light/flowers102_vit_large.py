"""BiSSLight for Oxford Flowers-102, MAE's ViT-L on ImageNet."""

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

dataloader.update(loaders("flowers102", batch_size=64))
backbone, train.init, pretext.augmentation.mask_patch = start("large")
task.image_size = 224
train.output_dir = "runs/bissl_light_flowers102_vit_large"
