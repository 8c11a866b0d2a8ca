"""Searches of learning rate and weight decay of fine-tuning, with the ranges and trials of the BiSSL paper.

A config imports one as its section `search`: `from ..common.search import detection as search`.
"""

classification = dict(
    metric="top1",  # metric of the last fine-tuning; higher is better
    trials=100,  # number of trials; --trials overrides it and can add more later
    seed=0,  # seed of the trials
    sampler="random",  # or "tpe", which draws near the best trials so far
    space={  # key -> [low, high], drawn log-uniformly, or {choices: [...]}, drawn uniformly
        "optimizer.finetune.lr": [1e-4, 1.0],
        "optimizer.finetune.weight_decay": [1e-5, 1e-2],
    },
    overrides=[],  # overrides of the trials, such as dataloader.test.dataset.split=val
)

multilabel = dict(classification, metric="mAP11")

detection = dict(
    classification,
    metric="AP50",
    trials=50,
    space={"optimizer.finetune.lr": [1e-4, 1e-1], "optimizer.finetune.weight_decay": [1e-6, 1e-2]},
)
