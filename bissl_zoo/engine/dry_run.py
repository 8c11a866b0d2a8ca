"""Describe what a run would do, without doing it."""

from typing import Any

import torch
from omegaconf import DictConfig
from tabulate import tabulate
from torch import nn

from bissl_zoo.backbones import tail_input
from bissl_zoo.config import LazyConfig
from bissl_zoo.engine.build import Weights, build_downstream, build_pretext, build_split_backbone
from bissl_zoo.engine.checks import check_parts, open_context
from bissl_zoo.engine.init import load_init
from bissl_zoo.engine.stages import coupling, plan_stages


def describe(cfg: DictConfig, source: str) -> str:
    """Return stages, steps, data, shapes and parameters of a run of `cfg` as text; data sets are opened."""
    context = open_context(cfg, source)
    initial, _ = load_init(cfg.train.init, cfg)
    check_parts(context, initial)
    stages = plan_stages(context, initial)
    rows = [[f"{s.name} (baseline)" if getattr(s, "baseline", False) else s.name, *s.describe(context)] for s in stages]
    data = [
        [role, cfg.dataloader[role].dataset.name, len(dataset), len(dataset.classes or ()) or "unlabelled"]
        for role, dataset in context.data.items()
    ]
    trunk, tail = build_split_backbone(cfg)
    modules = {"shared backbone": trunk, "tail": tail}
    if "pretext" in context.data:
        modules["pretext head, tail included"] = build_pretext(cfg, initial, context.device)[1]
    if "train" in context.data:
        modules["task head"] = build_downstream(context, Weights(initial.backbone))[1]
    parts = [
        f"config {source}\n{LazyConfig.to_py(cfg)}",
        f"stages\n{tabulate(rows, headers=['stage', 'steps', 'batch'])}",
        f"data\n{tabulate(data, headers=['role', 'data set', 'images', 'classes'])}",
        f"parameters\n{tabulate([[name, f'{_count(module):,}'] for name, module in modules.items()])}",
        f"shapes\n{tabulate(_shapes(cfg, trunk, tail))}",
    ]
    if any(stage.unit == "alternation" for stage in stages):
        value, product = coupling(context), "lambda * lr_eff * lower steps"
        kind = cfg.optimizer.lower["_target_"].rpartition(".")[2]
        parts.append(
            f"{product} = {value:.3g} (useful: 1 to 10)" if value is not None else f"{product}: unknown for {kind}"
        )
    return "\n\n".join(parts)


def _shapes(cfg: DictConfig, trunk: nn.Module, tail: nn.Module) -> list[list[Any]]:
    augmentation = cfg.pretext.get("augmentation")
    size = augmentation.size if augmentation else 96
    images = torch.zeros(1, 3, size, size)
    with torch.no_grad():
        features = trunk.eval()(images)
        embedding = tail.eval()(tail_input(features, trunk.out_features[-1]))
    maps = {"pretext view": images, **{f"shared map {name}": value for name, value in features.items()}}
    return [[name, tuple(value.shape[1:])] for name, value in {**maps, "embedding": embedding}.items()]


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
