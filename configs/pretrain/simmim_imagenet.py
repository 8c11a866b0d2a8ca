"""SimMIM pretraining of a ViT-S/16 on ImageNet at 192 pixels.

Optimizer as in the paper (arXiv 2111.09886, section 4.1): AdamW at batch 2048, weight decay 0.05. Rate and schedule
are those of the authors' ViT-B: 1e-4 per 512 images, 800 epochs of which 10 warm up, a tenth from epoch 700 on.
"""

from fvcore.common.param_scheduler import MultiStepParamScheduler
from torch.optim import AdamW

from bissl_zoo.config import LazyCall as L
from bissl_zoo.optim import LRMultiplier

from ..common.backbones.vit_small import vit_small as backbone
from ..common.pretext.simmim import pretext
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

backbone.img_size = 192

dataloader.pretext.batch_size = 2048
optimizer.pretrain = L(AdamW)(lr=1e-4 * 2048 / 512, weight_decay=0.05)
lr_multiplier.pretrain = L(LRMultiplier)(
    scheduler=L(MultiStepParamScheduler)(values=[1.0, 0.1], milestones=[690], num_updates=790),
    warmup_steps=10 * 626,  # epochs of ImageNet at batch 2048
)
clip_grad.pretrain = 5.0  # of the authors' code
pretrain.epochs = 800

train.output_dir = "runs/simmim_imagenet"
train.publish.name = "vit_small_patch16_224.simmim_in1k"
