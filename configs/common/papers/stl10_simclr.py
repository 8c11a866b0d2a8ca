"""Start of versions 1 and 2 of the BiSSL paper (arXiv 2410.02387): SimCLR, a ResNet-18, STL-10 without labels."""

from ..backbones.resnet import resnet18 as backbone
from ..data.classification import unlabelled
from ..optim import cosine, lr_multiplier
from ..pretext.simclr import pretext
from ..train import pretrain, train

dataloader = dict(pretext=unlabelled("stl10", split="unlabeled"))
lr_multiplier.pretrain = cosine(0.001, warmup_steps=10 * 98)  # 10 epochs of STL-10 at batch 1024

# bissl train --config-file configs/pretrain/simclr_stl10.py
train.init = "runs/simclr_stl10"
train.stages = ["bissl", "finetune"]
