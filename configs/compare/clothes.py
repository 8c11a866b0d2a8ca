"""Does BiSSL help on photographs of clothes? Folders by class at $BISSL_ZOO_DATASETS/clothing10/{train,val,test}.

The pretext data are the training photographs without their classes; any other folder of images works as well, such as
dataloader.pretext.dataset.root=cifar10/train, which `benchmarks/pretext_methods.py --unpack` writes.
"""

from bissl_zoo.config import LazyCall as L
from bissl_zoo.registry import build_dataset

from ..common.compare import compare
from ..common.downstream.classification import task
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
    train,
)


def clothes(split, **kwargs):
    """Return a split of the data set."""
    return L(build_dataset)(name="image_folder", root=f"clothing10/{split}", **kwargs)


dataloader.pretext.dataset = clothes("train", labelled=False)
dataloader.train.dataset = clothes("train")
dataloader.test.dataset = clothes("test")
dataloader.pretext.batch_size = 64
dataloader.train.batch_size = 32

backbone.channels = [32, 64, 128, 256]  # half of resnet18's
pretext.augmentation.update(size=48, crop_scale=[0.2, 1.0], flip_probability=0.5)
task.image_size = 64

train.output_dir = "runs/compare_clothes"
train.publish.name = None  # not that of the quickstart

bilevel.shared_stage = None  # the whole backbone
bilevel.alternations = 25  # lambda * lr_eff * lower steps is 2.8
pretrain.steps = 300
finetune.steps = 300

compare.update(metric="top1", seeds=10)
search = dict(  # with compare.search_trials, on the validation split
    metric="top1",
    seed=0,
    space={"optimizer.finetune.lr": [1e-4, 1e-1], "optimizer.finetune.weight_decay": [1e-6, 1e-2]},
    overrides=["dataloader.test.dataset.root=clothing10/val"],
)
