"""The table of versions 3 to 5 of the BiSSL paper (arXiv 2410.02387) from SimCLR: 12 classification sets and detection.

    bissl compare --config-file configs/compare/papers_simclr.py --datasets food101,dtd,voc_det

Per set and arm a search of 100 draws (50 of detection), then 10 seeds of fine-tuning at the best of them, from one
BiSSL stage. Without --datasets it is Food-101. Controls that the papers do not have:
--arms pretrained,bissl,longer_pretraining,joint.
"""

from ..bissl.food101_simclr import (
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
from ..common.papers.sets import classification_set, detection_set, names

compare.update(metric="top1", seeds=10, vary="finetune", search_trials=search.trials, arms=["pretrained", "bissl"])
compare.datasets = {name: classification_set(name, "simclr") for name in names()}
compare.datasets["voc_det"] = detection_set("simclr")

train.output_dir = "runs/papers_simclr"
