"""Does BiSSL help to detect animals, from ImageNet weights? About 10 minutes per run on two CPU cores.

Aquarium in VOC layout at $BISSL_ZOO_DATASETS/aquarium_voc/VOCdevkit/VOC2007: 638 photographs of seven classes. Each of
five seeds tests another fifth of them. Give the weights of tf_efficientnet_lite0 by `train.init`.
"""

from torch.optim import SGD, AdamW

from bissl_zoo.config import LazyCall as L
from bissl_zoo.data.loaders import build_test_loader, build_train_loader
from bissl_zoo.registry import build_backbone, build_dataset

from ..common.compare import compare
from ..common.downstream.faster_rcnn_fpn import task
from ..common.optim import cosine, lr_multiplier, optimizer
from ..common.pretext.simclr import pretext
from ..common.solvers.minres import solver
from ..common.train import bilevel, clip_grad, finetune, pretrain, train


def aquarium(split, **kwargs):
    """Return a split of the data set."""
    return L(build_dataset)(name="voc_detection", root="aquarium_voc", splits=[f"2007_{split}"], **kwargs)


dataloader = dict(
    pretext=L(build_train_loader)(dataset=aquarium("trainval", labelled=False), batch_size=64, num_workers=0),
    train=L(build_train_loader)(dataset=aquarium("trainval"), batch_size=4, num_workers=0),
    test=L(build_test_loader)(dataset=aquarium("test"), batch_size=8, num_workers=0),
)

backbone = L(build_backbone)(name="tf_efficientnet_lite0", out_features=["c2", "c3", "c4", "c5"])
pixels = dict(mean=[0.5, 0.5, 0.5], std=[0.5, 0.5, 0.5])  # those of the ImageNet weights
pretext.augmentation.update(size=64, crop_scale=[0.1, 0.6], **pixels)
task.update(min_size=192, max_size=256, fpn_channels=64, anchor_sizes=[12, 24, 48, 96, 160], **pixels)
task.update(box_head=256, rpn_proposals=[300, 150], roi_batch=64, sampling_ratio=1)

train.output_dir = "runs/compare_aquarium"
train.folds = 5
train.stages = ["bissl", "finetune"]
train.log_period = 20

bilevel["lambda"] = 0.1
bilevel.lower_steps, bilevel.upper_steps, bilevel.alternations = 4, 2, 25
bilevel.curvature_batch_size = 32
bilevel.pretext_warmup.steps = 50
bilevel.head_warmup.update(steps=50, epochs=None)
finetune.steps, finetune.epochs = 250, None

optimizer.lower = L(SGD)(lr=0.02, momentum=0.9, weight_decay=1e-4)
optimizer.upper = L(AdamW)(lr=5e-4, weight_decay=1e-4)
optimizer.head_warmup = L(AdamW)(lr=1e-3, weight_decay=1e-4)
optimizer.finetune = L(AdamW)(lr=1e-3, weight_decay=1e-2)
lr_multiplier.lower = cosine(0.1, warmup_steps=5)
lr_multiplier.finetune = cosine(0.01, warmup_steps=20)

compare.update(metric="AP50", seeds=5)
