"""MAE pretraining of a ViT-B/16 on ImageNet (arXiv 2111.06377, appendix A.1).

AdamW at batch 4096, 1.5e-4 per 256 images, weight decay 0.05, 800 epochs of which 40 warm up.
"""

from torch.optim import AdamW

from bissl_zoo.config import LazyCall as L
from bissl_zoo.registry import build_backbone

from ..common.optim import cosine
from ..common.pretext.mae import pretext
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

backbone = L(build_backbone)(name="vit_base_patch16_224")

dataloader.pretext.batch_size = 4096
optimizer.pretrain = L(AdamW)(lr=1.5e-4 * 4096 / 256, betas=(0.9, 0.95), weight_decay=0.05)
lr_multiplier.pretrain = cosine(0.0, warmup_steps=40 * 313)  # epochs of ImageNet at batch 4096
clip_grad.pretrain = None  # of the authors' code
pretrain.epochs = 800

train.output_dir = "runs/mae_imagenet"
train.publish.name = "vit_base_patch16_224.mae_in1k"
