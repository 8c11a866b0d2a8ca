"""Does BiSSL help to detect animals, from ImageNet weights? About 10 minutes per run on two CPU cores.

Aquarium in VOC layout at $BISSL_ZOO_DATASETS/aquarium_voc/VOCdevkit/VOC2007: 638 photographs of seven classes. Each of
five seeds tests another fifth of them. Give the weights of tf_efficientnet_lite0 by `train.init`.
"""

from bissl_zoo.config import LazyCall as L
from bissl_zoo.data.loaders import build_test_loader, build_train_loader
from bissl_zoo.registry import build_dataset

from ..common.downstream.faster_rcnn_fpn import task
from .trash import (
    backbone,
    bilevel,
    clip_grad,
    compare,
    finetune,
    lr_multiplier,
    optimizer,
    pixels,
    pretext,
    pretrain,
    solver,
    train,
)


def aquarium(split, **kwargs):
    """Return a split of the data set."""
    return L(build_dataset)(name="voc_detection", root="aquarium_voc", splits=[f"2007_{split}"], **kwargs)


dataloader = dict(
    pretext=L(build_train_loader)(dataset=aquarium("trainval", labelled=False), batch_size=64, num_workers=0),
    train=L(build_train_loader)(dataset=aquarium("trainval"), batch_size=4, num_workers=0),
    test=L(build_test_loader)(dataset=aquarium("test"), batch_size=8, num_workers=0),
)

backbone.out_features = ["c2", "c3", "c4", "c5"]
pretext.augmentation.crop_scale = [0.1, 0.6]
task.update(min_size=192, max_size=256, fpn_channels=64, anchor_sizes=[12, 24, 48, 96, 160], **pixels)
task.update(box_head=256, rpn_proposals=[300, 150], roi_batch=64, sampling_ratio=1)

train.output_dir = "runs/compare_aquarium"
train.folds = 5
train.label_fraction = None

finetune.steps = 250
optimizer.upper.lr, optimizer.head_warmup.lr, optimizer.finetune.lr = 5e-4, 1e-3, 1e-3
lr_multiplier.finetune.warmup_steps = 20

compare.update(metric="AP50", seeds=5)
