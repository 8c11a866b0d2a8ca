"""Settings of the BiSSL paper (arXiv 2410.02387): what all configs share; rates of the upper level and metric per set.

The configs in `bissl/` read the row of their data set; `compare/papers_*.py` turn each row into overrides.
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
_METRICS = {"fgvc_aircraft": "mean_per_class", "voc2007_classification": "mAP11"}  # FGVC Aircraft also has top1


def as_in_the_papers(bilevel, finetune):
    """Set what all configs of the papers share and other configs do not."""
    bilevel.curvature = "hessian"
    bilevel.reset_teacher = True
    finetune.baseline = True
    finetune.sync_batch_norm = True


def crops(size):
    """Return the crops of training and test images of a classification task, for `task.update`."""
    return dict(aspect_ratio=[0.5, 1.0], interpolation="bilinear", resize=int(size / 0.875))


def upper(name, method):
    """Return the rates of the upper level in versions 3 to 5, for `optimizer.upper.update`."""
    lr, weight_decay = _UPPER[name][method]
    return dict(lr=lr, weight_decay=weight_decay)


def metric(name):
    """Return the metric of a classification set."""
    return _METRICS.get(name, "top1")


def _changes(values):
    """Return a mapping of keys to values or sections as a list of overrides."""
    plain = {key: OmegaConf.to_container(v) if OmegaConf.is_config(v) else v for key, v in values.items()}
    return [f"{key}={json.dumps(value)}" for key, value in plain.items()]


def names():
    """Return the classification sets of versions 3 to 5."""
    return [name for name in _UPPER if name != "voc_det"]


def classification_set(name, method=None):
    """Return the overrides that change a comparison to another classification set.

    Args:
        name: the data set.
        method: pretext method whose rates the upper level uses; None keeps those of versions 1 and 2.
    """
    values = {f"dataloader.{role}.dataset.name": name for role in ("train", "test")}
    if method:
        values |= {f"optimizer.upper.{key}": value for key, value in upper(name, method).items()}
    values |= {f"{section}.metric": metric(name) for section in ("compare", "search")}
    if name == "voc2007_classification":
        values["task"] = load_config("common/papers/multilabel.py").task
    return _changes(values)


def detection_set(method):
    """Return the overrides that change a comparison on a classification set to VOC07+12 detection."""
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
