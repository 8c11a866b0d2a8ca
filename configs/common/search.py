"""Searches of fine-tuning's learning rate and weight decay with the BiSSL paper's ranges and numbers of trials.

A config takes one as its section `search`: `from ..common.search import detection as search`.
"""

classification = dict(
    metric="top1",  # a figure of the last fine-tuning; the highest wins
    trials=100,  # how many are drawn; --trials says otherwise, and may add to them later
    seed=0,  # of the draws
    sampler="random",  # or "tpe", which draws near the best trials so far
    space={  # by key: [least, most] is drawn log-uniformly, {choices: [...]} evenly
        "optimizer.finetune.lr": [1e-4, 1.0],
        "optimizer.finetune.weight_decay": [1e-5, 1e-2],
    },
    overrides=[],  # of the trials only, such as dataloader.test.dataset.split=val
)

multilabel = dict(classification, metric="mAP11")

detection = dict(
    classification,
    metric="AP50",
    trials=50,
    space={"optimizer.finetune.lr": [1e-4, 1e-1], "optimizer.finetune.weight_decay": [1e-6, 1e-2]},
)
