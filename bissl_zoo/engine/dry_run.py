"""What a run would do, without doing it."""

from typing import Any

import torch
from omegaconf import DictConfig
from tabulate import tabulate
from torch import nn

from bissl_zoo.config import LazyConfig
from bissl_zoo.engine.build import Context, Weights, build_downstream, build_pretext, build_split_backbone
from bissl_zoo.engine.checks import check_parts
from bissl_zoo.engine.init import load_init
from bissl_zoo.engine.runner import open_context, phases_of
from bissl_zoo.engine.stages.bissl import PRETEXT_WARMUP, coupling
from bissl_zoo.engine.stages.finetune import BASELINE


def describe(cfg: DictConfig, source: str) -> str:
    """Stages, steps, data, shapes and parameters of a run of `cfg`; data sets are opened, nothing is trained."""
    context = open_context(cfg, source)
    initial, _ = load_init(cfg.train.init, cfg)
    check_parts(context, initial)
    parts = [
        f"config {source}\n{LazyConfig.to_py(cfg)}",
        f"stages\n{tabulate(_stages(context, initial), headers=['stage', 'steps', 'batch'])}",
        f"data\n{tabulate(_data(context), headers=['role', 'data set', 'images', 'classes'])}",
    ]
    trunk, tail = build_split_backbone(cfg)
    modules = {"shared backbone": trunk, "tail": tail}
    if "pretext" in context.data:
        modules["pretext head, tail included"] = build_pretext(cfg, initial, context.device)[1]
    if "train" in context.data:
        modules["task head"] = build_downstream(context, Weights(initial.backbone))[1]
    parts.append(f"parameters\n{tabulate([[name, f'{_count(m):,}'] for name, m in modules.items()])}")
    parts.append(f"shapes\n{_shapes(cfg, trunk, tail)}")
    if "bissl" in cfg.train.stages:
        parts.append(_coupling(context))
    return "\n\n".join(parts)


def _stages(context: Context, initial: Weights) -> list[list[Any]]:
    cfg = context.cfg
    batch = {role: cfg.dataloader[role].batch_size for role in context.data}
    rows = []
    for phase in phases_of(context, initial):
        if phase.name == "bissl":
            b = cfg.bilevel
            steps = f"{b.alternations} x ({b.lower_steps} lower, {b.upper_steps} upper)"
            rows.append([phase.name, steps, f"{batch['pretext']} and {batch['train']}"])
        else:
            label = f"{phase.name} (baseline)" if phase.name == BASELINE else phase.name
            role = "pretext" if phase.name in ("pretrain", PRETEXT_WARMUP) else "train"
            rows.append([label, phase.steps(context), batch[role]])
    return rows


def _data(context: Context) -> list[list[Any]]:
    return [
        [role, context.cfg.dataloader[role].dataset.name, len(dataset), len(dataset.classes or ()) or "unlabelled"]
        for role, dataset in context.data.items()
    ]


def _shapes(cfg: DictConfig, trunk: nn.Module, tail: nn.Module) -> str:
    augmentation = cfg.pretext.get("augmentation")
    size = augmentation.size if augmentation else 96
    images = torch.zeros(1, 3, size, size)
    with torch.no_grad():
        features = trunk.eval()(images)
        rows = [["pretext view", tuple(images.shape[1:])]]
        rows += [[f"shared map {name}", tuple(value.shape[1:])] for name, value in features.items()]
        rows.append(["embedding", tuple(tail.eval()(features[trunk.out_features[-1]]).shape[1:])])
    return tabulate(rows)


def _coupling(context: Context) -> str:
    value, product = coupling(context), "lambda * lr_eff * lower steps"
    if value is None:
        kind = context.cfg.optimizer.lower["_target_"].rpartition(".")[2]
        return f"{product}: not known for {kind}, whose steps are not the learning rate times the gradient"
    return f"{product} = {value:.3g} (wanted: of the order of 1 to 10)"


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
