"""Describe what a run would do, without doing it."""

from collections.abc import Sequence

import torch
from omegaconf import DictConfig
from tabulate import tabulate

from bissl_zoo.backbones import tail_input
from bissl_zoo.config import LazyConfig, instantiate
from bissl_zoo.distributed import is_main_process
from bissl_zoo.engine.build import build_split_backbone, data_roles
from bissl_zoo.engine.checks import check_config, check_parts, open_context
from bissl_zoo.engine.init import adopt_pixels, load_init
from bissl_zoo.engine.preflight import preflight
from bissl_zoo.engine.stages import coupling, plan_stages
from bissl_zoo.errors import DatasetError
from bissl_zoo.registry import STAGES


def describe(cfg: DictConfig, source: str) -> str:
    """Return stages, steps, data, shapes and parameters of a run of `cfg` as text, after all checks of a run.

    Raises:
        DatasetError: data sets are missing; it lists them all, and the rest of the description is printed.
    """
    check_config(cfg, source)
    networks = _networks(cfg, ["a class", "another class"])  # first, since it names a missing extra
    config = f"config {source}\n{LazyConfig.to_py(cfg)}"
    try:
        context = open_context(cfg, source)
    except DatasetError:
        rows = [[name, STAGES.get(name).section or "bilevel"] for name in cfg.train.stages]
        stages = f"stages\n{tabulate(rows, headers=['stage', 'length: see'])}"
        if is_main_process():
            print("\n\n".join([config, stages, *networks, "The head is that of two classes; the data decide.\n"]))
        raise
    initial, _ = load_init(cfg.train.init, cfg)
    adopt_pixels(cfg, initial.pixels)
    check_parts(context, initial)
    stages = plan_stages(context, initial)
    preflight(context, initial, stages)
    rows = [[f"{s.name} (baseline)" if getattr(s, "baseline", False) else s.name, *s.describe(context)] for s in stages]
    data = [
        [role, cfg.dataloader[role].dataset.name, len(dataset), len(dataset.classes or ()) or "unlabelled"]
        for role, dataset in context.data.items()
    ]
    parts = [
        f"config {source}\n{LazyConfig.to_py(cfg)}",
        f"stages\n{tabulate(rows, headers=['stage', 'steps', 'batch'])}",
        f"data\n{tabulate(data, headers=['role', 'data set', 'images', 'classes'])}",
        *_networks(cfg, context.classes if "train" in context.data else ()),
    ]
    if any(stage.unit == "alternation" for stage in stages):
        value, product = coupling(context), "lambda * lr_eff * lower steps"
        kind = cfg.optimizer.lower["_target_"].rpartition(".")[2]
        parts.append(
            f"{product} = {value:.3g} (useful: 1 to 10)" if value is not None else f"{product}: unknown for {kind}"
        )
    return "\n\n".join(parts)


def _networks(cfg: DictConfig, classes: Sequence[str]) -> list[str]:
    """Return tables of the numbers of trained parameters and of the shapes of a pretext view."""
    roles = data_roles(cfg)
    trunk, tail = build_split_backbone(cfg)
    modules = {"shared backbone": trunk, "tail": tail}
    if "pretext" in roles:
        modules["pretext head, tail included"] = instantiate(cfg.pretext, backbone=trunk, tail=tail)
    if "train" in roles:
        modules["task head"] = instantiate(cfg.task, backbone=trunk, classes=list(classes))
    counts = {name: sum(p.numel() for p in module.parameters() if p.requires_grad) for name, module in modules.items()}
    augmentation = cfg.pretext.get("augmentation")
    images = torch.zeros(1, 3, *[augmentation.size if augmentation else 96] * 2)
    with torch.no_grad():
        features = trunk.eval()(images)
        embedding = tail.eval()(tail_input(features, trunk.out_features[-1]))
    maps = {"pretext view": images, **{f"shared map {name}": value for name, value in features.items()}}
    shapes = [[name, tuple(value.shape[1:])] for name, value in {**maps, "embedding": embedding}.items()]
    return [
        f"parameters\n{tabulate([[name, f'{count:,}'] for name, count in counts.items()])}",
        f"shapes\n{tabulate(shapes)}",
    ]
