"""From a finished run to an entry of the zoo."""

import json
from pathlib import Path

from bissl_zoo.backbones import merge_split_states
from bissl_zoo.config import LazyConfig
from bissl_zoo.engine.build import Weights
from bissl_zoo.engine.checkpoint import Checkpointer, load_checkpoint, write_atomically
from bissl_zoo.engine.facts import arguments_of, read_facts
from bissl_zoo.engine.features import pretext_pixels
from bissl_zoo.engine.init import weights_of, zoo_of
from bissl_zoo.errors import CheckpointError
from bissl_zoo.zoo import EntryMetadata, PublishedEntry, Zoo, publish_entry

RESULTS_FILE, RECEIPT_FILE = "results.json", "zoo_entry.json"


def published(folder: Path) -> PublishedEntry | None:
    """What the run has been published as last, None where it has not, or where its receipt cannot be read."""
    receipt = folder / RECEIPT_FILE
    try:
        return PublishedEntry(**json.loads(receipt.read_text())) if receipt.exists() else None
    except (ValueError, TypeError):
        return None


def publish_run(folder: Path, name: str | None = None, zoo: Zoo | None = None, once: bool = False) -> PublishedEntry:
    """Publish the backbone that the pretext stages of a run left: the lower level's of BiSSL, or that of pretraining.

    Its pretext head completes the backbone and, with the task's head, goes along.

    Args:
        folder: the run directory.
        name: of the entry; None for `train.publish.name` of the run's config.
        zoo: None for `train.publish.zoo`, or the first of `train.zoo`.
        once: see `publish_entry`.
    Raises:
        CheckpointError: there is no run, or no finished pretext stage in it.
        ZooError: the zoo refused.
    """
    if not (folder / "config.yaml").is_file():
        raise CheckpointError(f"There is no run in {folder} (no config.yaml). Give the directory of a run.")
    cfg = LazyConfig.load(folder / "config.yaml")
    name = name or cfg.train.publish.name
    if not name:
        raise CheckpointError(f"The run in {folder} names no entry (train.publish.name). Give one, as in --name mine.")
    stage, weights = _finished(folder)
    tail = {key[len("tail.") :]: value for key, value in weights.pretext.items() if key.startswith("tail.")}
    results = json.loads((folder / RESULTS_FILE).read_text()) if (folder / RESULTS_FILE).exists() else {}
    metadata = EntryMetadata(
        pretext=cfg.pretext.name,
        task=cfg.task.name if stage == "bissl" else None,
        solver=cfg.solver.name if stage == "bissl" else None,
        shared_stage=cfg.bilevel.shared_stage,
        metrics={
            f"{metric} ({start})": value
            for start, figures in results.items()
            for metric, value in figures.items()
            if "/" not in metric
        },
        seeds=[cfg.train.seed],
        licence=cfg.train.publish.licence,
        **read_facts(folder),
    )
    entry = publish_entry(
        name=name,
        backbone_state=merge_split_states(weights.backbone, tail),
        architecture=cfg.backbone.name,
        model_args=arguments_of(cfg.backbone, "name", "out_features"),
        pretrained_cfg=pretext_pixels(cfg),
        metadata=metadata,
        train_config_text=(folder / "config.yaml").read_text(),
        pretext_head_state=weights.pretext,
        task_head_state=weights.task,
        zoo=zoo or cfg.train.publish.zoo or zoo_of(cfg),
        once=once,
    )
    facts = {"name": entry.name, "location": entry.location, "sha256": entry.sha256}
    write_atomically(folder / RECEIPT_FILE, json.dumps(facts, indent=2) + "\n")
    return entry


def _finished(folder: Path) -> tuple[str, Weights]:
    checkpoints = Checkpointer(folder / "checkpoints")
    for stage in ("bissl", "pretrain"):
        newest = checkpoints.newest(stage)
        if newest is None:
            continue
        info, state = load_checkpoint(newest)
        if not info.done:
            raise CheckpointError(
                f"The stage {stage} of {folder} is at step {info.step} of {info.total_steps}; --resume the run first."
            )
        return stage, weights_of(stage, state)
    raise CheckpointError(f"{folder} has finished neither pretrain nor bissl, so there is no backbone to publish.")
