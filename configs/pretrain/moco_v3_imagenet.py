"""MoCo v3 pretraining of a ViT-S/16 on ImageNet, at BiSSL's 96 pixels.

Optimizer and schedule are the paper's for ViTs (arXiv 2104.02057, section 5): AdamW, 1.5e-4 per 256 images at batch
4096, 300 epochs of which 40 warm up. So are the heads and the temperature of `common/pretext/moco_v3.py`.
"""

from torch.optim import AdamW

from bissl_zoo.config import LazyCall as L

from ..common.backbones.vit_small import vit_small as backbone
from ..common.optim import cosine
from ..common.pretext.moco_v3 import pretext
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

dataloader.pretext.batch_size = 4096
optimizer.pretrain = L(AdamW)(lr=1.5e-4 * 4096 / 256, weight_decay=0.1)
lr_multiplier.pretrain = cosine(0.0, warmup_steps=40 * 313)  # 40 epochs of ImageNet at batch 4096
pretrain.epochs = 300

train.output_dir = "runs/moco_v3_imagenet"
train.publish.name = "vit_small_patch16_224.moco_v3_in1k"
