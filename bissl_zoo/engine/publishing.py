"""From a finished run to an entry of the zoo."""

import json
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from bissl_zoo.backbones import merge_split_states
from bissl_zoo.data.views import IMAGENET_MEAN, IMAGENET_STD
from bissl_zoo.engine.build import Context, Weights
from bissl_zoo.engine.checkpoint import write_atomically
from bissl_zoo.zoo import EntryMetadata, PublishedEntry, publish_entry


def publish_backbone(
    context: Context, folder: Path, weights: Weights, results: dict[str, dict[str, float]], parent: str | None
) -> PublishedEntry | None:
    """Publish the backbone that the pretext stages of a run left, where the config names an entry; None otherwise.

    Args:
        folder: the run directory, whose config goes with the entry.
        weights: of the BiSSL stage (the lower backbone) or of pretraining; their pretext head completes the backbone.
        results: figures of the fine-tuned models by what they started from.
        parent: sha256 of the weights the run started from.
    """
    cfg = context.cfg
    if not cfg.train.publish.name or not {"pretrain", "bissl"} & set(cfg.train.stages):
        return None
    receipt = folder / "zoo_entry.json"
    if receipt.exists():  # a finished run that was resumed
        known = json.loads(receipt.read_text())
        return PublishedEntry(known["name"], Path(known["path"]), known["sha256"])
    tail = {key[len("tail.") :]: value for key, value in weights.pretext.items() if key.startswith("tail.")}
    bissl = "bissl" in cfg.train.stages
    metadata = EntryMetadata(
        pretext=cfg.pretext.name,
        task=cfg.task.name if bissl else None,
        solver=cfg.solver.name if bissl else None,
        shared_stage=cfg.bilevel.shared_stage,
        metrics={
            f"{metric} ({start})": value
            for start, figures in results.items()
            for metric, value in figures.items()
            if "/" not in metric
        },
        seeds=[cfg.train.seed],
        datasets={
            role: {**_arguments(cfg.dataloader[role].dataset), "samples": len(dataset)}
            for role, dataset in context.data.items()
        },
        parent=parent,
        licence=cfg.train.publish.licence,
    )
    entry = publish_entry(
        name=cfg.train.publish.name,
        backbone_state=merge_split_states(weights.backbone, tail),
        architecture=cfg.backbone.name,
        model_args=_arguments(cfg.backbone, "name", "out_features"),
        pretrained_cfg=_pixels(cfg),
        metadata=metadata,
        train_config_text=(folder / "config.yaml").read_text(),
        pretext_head_state=weights.pretext,
        task_head_state=weights.task,
        zoo=cfg.train.publish.zoo,
    )
    facts = {"name": entry.name, "path": str(entry.path), "sha256": entry.sha256}
    write_atomically(receipt, json.dumps(facts, indent=2) + "\n")
    return entry


def _arguments(call: DictConfig, *leave_out: str) -> dict[str, Any]:
    """The arguments of a described call."""
    arguments = OmegaConf.to_container(call, resolve=True)
    return {key: value for key, value in arguments.items() if key not in ("_target_", *leave_out)}


def _pixels(cfg: DictConfig) -> dict[str, Any]:
    """How the pretext images looked, in timm's terms."""
    augmentation = cfg.pretext.get("augmentation") or {}
    size = augmentation.get("size", 96)
    return {
        "input_size": [3, size, size],
        "mean": list(augmentation.get("mean", IMAGENET_MEAN)),
        "std": list(augmentation.get("std", IMAGENET_STD)),
    }
