"""The table of versions 1 and 2 of the BiSSL paper (arXiv 2410.02387): ResNet-18 from STL-10, 14 classification sets.

    bissl compare --config-file configs/compare/papers_v2.py --datasets food101,stl10,fashion_mnist

Per set and arm a search of 100 draws, then 10 seeds of fine-tuning at the best of them, from one BiSSL stage. Without
--datasets it is Food-101.
"""

from ..bissl_v2.food101 import (
    backbone,
    bilevel,
    clip_grad,
    dataloader,
    finetune,
    lr_multiplier,
    optimizer,
    pretext,
    pretrain,
    search,
    solver,
    task,
    train,
)
from ..common.compare import compare
from ..common.papers.sets import classification_set, names

compare.update(metric="top1", seeds=10, vary="finetune", search_trials=search.trials, arms=["pretrained", "bissl"])
compare.datasets = {name: classification_set(name) for name in [*names(), "stl10", "fashion_mnist"]}

train.output_dir = "runs/papers_v2"
