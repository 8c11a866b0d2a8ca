"""VICReg pretraining of a ResNet-50 on ImageNet, at BiSSL's 96 pixels.

Optimizer and schedule are the paper's (arXiv 2105.04906, section 4.2): LARS, 0.2 per 256 images, 1000 epochs, a cosine
to 0.002. The authors' code leaves biases and batch norm out of weight decay and adaptation; all are alike here.
"""

from ..common.optim import cosine
from ..common.pretext.vicreg import pretext
from .simclr_imagenet import (
    backbone,
    bilevel,
    clip_grad,
    dataloader,
    finetune,
    lr_multiplier,
    optimizer,
    pretrain,
    solver,
    task,
    train,
)

dataloader.pretext.batch_size = 2048
optimizer.pretrain.lr = 0.2 * 2048 / 256
optimizer.pretrain.weight_decay = 1e-6
lr_multiplier.pretrain = cosine(0.002 / 1.6, warmup_steps=10 * 626)  # 10 epochs of ImageNet at batch 2048
pretrain.epochs = 1000

train.output_dir = "runs/vicreg_imagenet"
train.publish.name = "resnet50.vicreg_in1k"
