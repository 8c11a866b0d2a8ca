"""Does BiSSL help on blood cells? BCCD in VOC layout at $BISSL_ZOO_DATASETS/bccd_voc/VOCdevkit/VOC2007.

Pretraining reads the training images without their boxes. Searches train on `train` and measure on `val`.
"""

from bissl_zoo.config import LazyCall as L
from bissl_zoo.registry import build_dataset

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


def cells(split, **kwargs):
    """Return a split of the data set."""
    return L(build_dataset)(name="voc_detection", root="bccd_voc", splits=[f"2007_{split}"], **kwargs)


dataloader.pretext.dataset = cells("trainval", labelled=False)
dataloader.train.dataset = cells("trainval")
dataloader.test.dataset = cells("test")
dataloader.pretext.batch_size = 32
dataloader.train.batch_size = 8

backbone.channels = [32, 64, 128, 256]  # half of resnet18's
pretext.augmentation.update(size=48, crop_scale=[0.05, 0.3], flip_probability=0.5)
task.update(min_size=144, max_size=192, anchor_sizes=[12, 24, 48, 96], flip_probability=0.5)

train.output_dir = "runs/compare_cells"
train.publish.name = None  # not that of the quickstart

pretrain.steps = 300
bilevel.alternations = 25  # lambda * lr_eff * lower steps is 2.8
finetune.steps = 400

compare.update(metric="AP50", seeds=10)
search = dict(  # with compare.search_trials
    metric="AP50",
    seed=0,
    space={"optimizer.finetune.lr": [1e-4, 1e-2], "optimizer.finetune.weight_decay": [1e-6, 1e-2]},
    overrides=["dataloader.train.dataset.splits=[2007_train]", "dataloader.test.dataset.splits=[2007_val]"],
)
