"""Train on a folder of images by one call, in a script or a notebook."""

import json
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from bissl_zoo.cli.new import backbone_of, config_text
from bissl_zoo.config import LazyConfig, config_root, load_config, with_defaults
from bissl_zoo.engine.checks import check_config
from bissl_zoo.engine.runner import run
from bissl_zoo.errors import require_extra
from bissl_zoo.model import Model, load_model
from bissl_zoo.registry import BACKBONES, DOWNSTREAM_TASKS, PRETEXT_METHODS, Registry
from bissl_zoo.report import report_after
from bissl_zoo.runs.directory import CONFIG_FILE

SOURCE = "bissl_zoo.train"
#: registry, folder of configs/common and build function of the parts that `train` selects by name
_PARTS: dict[str, tuple[Registry, str, str]] = {
    "pretext": (PRETEXT_METHODS, "pretext", "build_pretext"),
    "task": (DOWNSTREAM_TASKS, "downstream", "build_task"),
}


def train(
    *,
    labels: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    data: str | os.PathLike[str] | None = None,
    model: str = "resnet18",
    architecture: str | None = None,
    pretext: str = "simclr",
    task: str | None = None,
    overwrite: bool = False,
    resume: bool = False,
    **overrides: Any,
) -> tuple[Model, dict[str, dict[str, float]]]:
    """Align a backbone with a labelled data set, fine-tune it, and return the fine-tuned model and its test metrics.

    The config is the one that `bissl new` writes for the same folders; :func:`build_config` returns it. Its schedule is
    a first try of minutes.

    Args:
        labels: labelled images: class folders, VOC, or COCO, with a split to train and one to test on.
        output_dir: the run directory.
        data: a folder of unlabelled images; None for the labelled ones, read without labels.
        model: weights to start from, a source of `train.init` such as `timm:NAME.TAG`, `zoo:NAME` or a file; or an
            architecture of timm, which is pretrained on `data` first.
        architecture: timm's name, for a file that does not state it.
        pretext, task: registered names; None for the task that fits the labels.
        overwrite: remove an earlier run in `output_dir`.
        resume: continue the run in `output_dir` if there is one.
        overrides: values of the config, as in `finetune__steps=1000` or `**{"finetune.steps": 1000}`.
    Returns:
        The model, and metrics by what was fine-tuned from: `bissl`, and the weights before it as a baseline.
    Raises:
        BisslZooError: the data, a name or a value does not fit; nothing is removed or written then.

    Example:
        >>> model, results = bissl_zoo.train(labels="photos", model="timm:resnet18.a1_in1k", output_dir="runs/photos")
        >>> model.predict("photo.jpg")
    """
    require_extra("train", "report")
    parts = {"model": model, "architecture": architecture, "pretext": pretext, "task": task}
    cfg = build_config(labels=labels, output_dir=output_dir, data=data, **parts, **overrides)
    folder = Path(cfg.train.output_dir)
    if overwrite and not resume and (folder / CONFIG_FILE).is_file():
        check_config(cfg, SOURCE)
        shutil.rmtree(folder)
    results = run(cfg, SOURCE, "auto" if resume else False, write_report=report_after)["results"]
    return load_model(folder), results


def build_config(
    *,
    labels: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    data: str | os.PathLike[str] | None = None,
    model: str = "resnet18",
    architecture: str | None = None,
    pretext: str = "simclr",
    task: str | None = None,
    **overrides: Any,
) -> DictConfig:
    """Return the config of :func:`train`; data sets are opened to find classes and sizes."""
    weights = model if ":" in model or os.path.exists(model) else None
    architecture = model if weights is None else backbone_of(model, architecture)[0]
    BACKBONES.get(architecture)  # raises an error with the nearest name
    name = re.sub(r"\W+", "_", Path(output_dir).name).strip("_") or "mine"
    text = config_text(name, Path(labels), data and Path(data), weights, architecture)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / f"{name}.py").write_text(text, encoding="utf-8")
        cfg = with_defaults(LazyConfig.load(Path(folder) / f"{name}.py"))
    cfg.train.output_dir, cfg.train.publish.name = str(output_dir), None
    size = cfg.pretext.augmentation.size
    for section, chosen in (("pretext", pretext), ("task", task)):
        if chosen not in (None, cfg[section].name):
            cfg[section] = _part(section, chosen)
    if "augmentation" in cfg.pretext:
        cfg.pretext.augmentation.size = size
    changes = [f"{key.replace('__', '.')}={json.dumps(value)}" for key, value in overrides.items()]
    return LazyConfig.apply_overrides(cfg, changes, SOURCE)


def _part(section: str, name: str) -> DictConfig:
    """Return the shipped config of a pretext method or task, or a call without arguments of one that has none."""
    registry, folder, build = _PARTS[section]
    registry.get(name)
    if (config_root() / "common" / folder / f"{name}.py").is_file():
        return load_config(f"common/{folder}/{name}.py")[section]
    return OmegaConf.create({"_target_": f"bissl_zoo.registry.{build}", "name": name})
