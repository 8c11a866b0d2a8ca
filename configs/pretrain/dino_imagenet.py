"""DINO pretraining of a ViT-S/16 on ImageNet, at BiSSL's 96 pixels.

Optimizer and schedule are the paper's (arXiv 2104.14294, section 3.2): AdamW, 0.0005 per 256 images, 10 epochs of
warm-up. Its weight decay rises from 0.04 to 0.4; here it stays where it begins, as momentum and temperatures do. Of
its runs, those of section 5 take 300 epochs and the published ViT-S/16 800.
"""

from torch.optim import AdamW

from bissl_zoo.config import LazyCall as L

from ..common.backbones.vit_small import vit_small as backbone
from ..common.optim import cosine
from ..common.pretext.dino import pretext
from .simclr_imagenet import (
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

dataloader.pretext.batch_size = 1024
optimizer.pretrain = L(AdamW)(lr=0.0005 * 1024 / 256, weight_decay=0.04)
lr_multiplier.pretrain = cosine(0.0005, warmup_steps=10 * 1252)  # 10 epochs of ImageNet at batch 1024; to 1e-6
clip_grad.pretrain = 3.0  # of the authors' code
pretrain.epochs = 300

train.output_dir = "runs/dino_imagenet"
train.publish.name = "vit_small_patch16_224.dino_in1k"
