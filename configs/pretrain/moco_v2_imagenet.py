"""MoCo v2 pretraining of a ResNet-50 on ImageNet, at BiSSL's 96 pixels.

SGD with 0.03 at batch 256 as in MoCo (arXiv 1911.05722, section 4), by half a cosine over 200 epochs as in MoCo v2
(arXiv 2003.04297, section 3), whose best result needs 800 epochs.
"""

from torch.optim import SGD

from bissl_zoo.config import LazyCall as L

from ..common.optim import cosine
from ..common.pretext.moco_v2 import pretext
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

dataloader.pretext.batch_size = 256
optimizer.pretrain = L(SGD)(lr=0.03, momentum=0.9, weight_decay=1e-4)
lr_multiplier.pretrain = cosine(0.0)
pretrain.epochs = 200

train.output_dir = "runs/moco_v2_imagenet"
train.publish.name = "resnet50.moco_v2_in1k"
