"""SimSiam pretraining of a ResNet-50 on ImageNet, at BiSSL's 96 pixels.

Optimizer and schedule are the paper's (arXiv 2011.10566, section 3): SGD, 0.05 per 256 images, no warm-up, 100 epochs.
One schedule serves all parameters here, where the authors' code keeps the predictor's rate constant (section 4.2).
"""

from torch.optim import SGD

from bissl_zoo.config import LazyCall as L

from ..common.optim import cosine
from ..common.pretext.simsiam import pretext
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

dataloader.pretext.batch_size = 512
optimizer.pretrain = L(SGD)(lr=0.05 * 512 / 256, momentum=0.9, weight_decay=1e-4)
lr_multiplier.pretrain = cosine(0.0)
pretrain.epochs = 100

train.output_dir = "runs/simsiam_imagenet"
train.publish.name = "resnet50.simsiam_in1k"
