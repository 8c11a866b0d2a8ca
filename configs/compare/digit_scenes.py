"""Does BiSSL help on the embedded digit scenes? A narrow resnet18 on small scenes.

A run takes 40 s (fine-tuning alone) to 90 s (BiSSL, joint training) on one core.
"""

from ..common.compare import compare
from ..quickstart.digit_scenes_det import (
    backbone,
    bilevel,
    clip_grad,
    dataloader,
    finetune,
    lr_multiplier,
    optimizer,
    pretext,
    pretrain,
    solver,
    task,
    train,
)

backbone.channels = [32, 64, 128, 256]  # half of resnet18's

for role in dataloader:
    dataloader[role].dataset.image_size = 64
    dataloader[role].num_workers = 0
dataloader.pretext.batch_size = 32
pretext.augmentation.size = 32
task.update(min_size=64, max_size=64, anchor_sizes=[12, 16, 24, 32], box_head=64, rpn_proposals=[100, 50], roi_batch=32)

train.output_dir = "runs/compare_digit_scenes"
train.publish.name = None  # not that of the quickstart

pretrain.steps = 200
bilevel.alternations = 25  # lambda * lr_eff * lower steps is 2.8
finetune.steps = 300
optimizer.finetune.lr = 3e-3

compare.update(metric="AP50", seeds=5)
search = dict(  # with compare.search_trials, on the validation split
    metric="AP50",
    seed=0,
    space={"optimizer.finetune.lr": [1e-4, 1e-2], "optimizer.finetune.weight_decay": [1e-6, 1e-2]},
    overrides=["dataloader.test.dataset.split=val"],
)
