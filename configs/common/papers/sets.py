"""What differs from set to set in the BiSSL paper (arXiv 2410.02387): the upper level's rates and the figure.

The one table of them: the configs of `bissl/` read their set's row, those of `compare/papers_*.py` make of each row the
overrides of a data set.
"""

import json

from omegaconf import OmegaConf

from bissl_zoo.config import load_config

# learning rate and weight decay of the upper level in versions 3 to 5
_UPPER = {
    "food101": dict(simclr=(0.03, 0.001), byol=(0.035, 0.002)),
    "cifar10": dict(simclr=(0.015, 0.001), byol=(0.01, 0.001)),
    "cifar100": dict(simclr=(0.01, 0.0001), byol=(0.01, 0.001)),
    "cub200": dict(simclr=(0.03, 0.001), byol=(0.015, 0.0001)),
    "sun397": dict(simclr=(0.015, 0.00005), byol=(0.01, 0.00005)),
    "stanford_cars": dict(simclr=(0.035, 0.001), byol=(0.04, 0.002)),
    "fgvc_aircraft": dict(simclr=(0.03, 0.005), byol=(0.015, 0.003)),
    "voc2007_classification": dict(simclr=(0.015, 0.005), byol=(0.005, 0.006)),
    "dtd": dict(simclr=(0.03, 0.001), byol=(0.015, 0.0001)),
    "oxford_pets": dict(simclr=(0.03, 0.001), byol=(0.02, 0.002)),
    "caltech101": dict(simclr=(0.03, 0.0001), byol=(0.015, 0.0002)),
    "flowers102": dict(simclr=(0.05, 0.0005), byol=(0.035, 0.002)),
    "voc_det": dict(simclr=(0.015, 0.0), byol=(0.03, 0.0002)),
}
_FIGURES = {"fgvc_aircraft": "mean_per_class", "voc2007_classification": "mAP11"}  # of FGVC Aircraft also top1


def upper(name, method):
    """The upper level's rates for a set in versions 3 to 5, for `optimizer.upper.update`."""
    lr, weight_decay = _UPPER[name][method]
    return dict(lr=lr, weight_decay=weight_decay)


def figure(name):
    """What the papers compare on a classification set."""
    return _FIGURES.get(name, "top1")


def _changes(values):
    """A mapping of keys to values or sections as overrides."""
    plain = {key: OmegaConf.to_container(one) if OmegaConf.is_config(one) else one for key, one in values.items()}
    return [f"{key}={json.dumps(value)}" for key, value in plain.items()]


def names():
    """The classification sets of versions 3 to 5."""
    return [name for name in _UPPER if name != "voc_det"]


def classification_set(name, method=None):
    """The overrides that make a comparison on one classification set one on another.

    Args:
        method: whose rates the upper level takes; None leaves it those of versions 1 and 2, which all sets share.
    """
    values = {f"dataloader.{role}.dataset.name": name for role in ("train", "test")}
    if method:
        values |= {f"optimizer.upper.{key}": value for key, value in upper(name, method).items()}
    values |= {f"{section}.metric": figure(name) for section in ("compare", "search")}
    if name == "voc2007_classification":
        values["task"] = load_config("common/downstream/multilabel.py").task
    return _changes(values)


def detection_set(method):
    """The overrides that make a comparison on a classification set one on VOC07+12 detection."""
    cfg, values = load_config("bissl/voc_det.py"), {}
    for role in ("train", "test"):
        values |= {f"dataloader.{role}.{key}": cfg.dataloader[role][key] for key in ("dataset", "batch_size")}
    values |= {f"optimizer.upper.{key}": value for key, value in upper("voc_det", method).items()}
    values |= {
        "task": cfg.task,
        "bilevel.shared_stage": cfg.bilevel.shared_stage,
        "bilevel.head_warmup.epochs": cfg.bilevel.head_warmup.epochs,
        "finetune.epochs": cfg.finetune.epochs,
        "search": cfg.search,
        "compare.metric": cfg.search.metric,
        "compare.search_trials": cfg.search.trials,
    }
    return _changes(values)
