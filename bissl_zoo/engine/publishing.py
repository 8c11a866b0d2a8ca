"""From a finished run to an entry of the zoo."""

import json
from pathlib import Path

import timm
from omegaconf import DictConfig

from bissl_zoo.backbones import merge_split_states
from bissl_zoo.engine.build import Weights
from bissl_zoo.engine.features import pretext_pixels
from bissl_zoo.engine.init import weights_of, zoo_of
from bissl_zoo.errors import CheckpointError, ConfigError
from bissl_zoo.registry import BACKBONES
from bissl_zoo.runs.checkpoint import Checkpointer, load_checkpoint, write_atomically
from bissl_zoo.runs.directory import CONFIG_FILE, load_run_config
from bissl_zoo.runs.metadata import arguments_of, read_facts, read_json
from bissl_zoo.zoo import PublishedEntry, Zoo, publish_entry

RESULTS_FILE, RECEIPT_FILE = "results.json", "zoo_entry.json"


def published(folder: Path) -> PublishedEntry | None:
    """What the run has been published as last, None where it has not, or where its receipt cannot be read."""
    try:
        receipt = read_json(folder / RECEIPT_FILE)
        texts = all(isinstance(value, str) for value in receipt.values())
        return PublishedEntry(**receipt) if receipt and texts else None
    except (CheckpointError, TypeError):
        return None


def check_entry_name(cfg: DictConfig, source: str) -> None:
    """Raise where the entry that a run will end in is named after another network than the config's backbone.

    Entries are named as timm's are, the architecture before the first dot.

    Raises:
        ConfigError: with the name that would be right.
    """
    name, architecture = cfg.train.publish.name, cfg.backbone.get("name")
    if not isinstance(name, str) or not isinstance(architecture, str) or list(cfg.train.stages) == ["finetune"]:
        return
    said, dot, rest = name.partition(".")
    own = architecture.partition(".")[0]
    # of an unknown backbone its builder tells, with the nearest name
    if said != own and timm.is_model(said) and architecture in BACKBONES:
        raise ConfigError(
            f"{source}: train.publish.name is '{name}', and the backbone is no {said} but {architecture}. Set "
            f"train.publish.name={own}{dot}{rest}, another name, or null to publish nothing."
        )


def read_results(folder: Path) -> dict[str, dict[str, float]]:
    """The figures that a run left, by what they were measured from; empty where there are none.

    Raises:
        CheckpointError: the file is damaged, or was never one of figures.
    """
    results = read_json(folder / RESULTS_FILE)
    if not all(isinstance(figures, dict) and all(map(_is_number, figures.values())) for figures in results.values()):
        raise CheckpointError(f"{folder / RESULTS_FILE} holds other things than numbers. Restore the file from a copy.")
    return results


def publish_run(folder: Path, name: str | None = None, zoo: Zoo | None = None, once: bool = False) -> PublishedEntry:
    """Publish the backbone that the pretext stages of a run left: the lower level's of BiSSL, or that of pretraining.

    Its pretext head completes the backbone and, with the task's head, goes along.

    Args:
        folder: the run directory.
        name: of the entry; None for `train.publish.name` of the run's config.
        zoo: None for `train.publish.zoo`, or the first of `train.zoo`.
        once: see `publish_entry`.
    Raises:
        CheckpointError: there is no run, no finished pretext stage in it, or a file of it is damaged.
        ZooError: the zoo refused.
    """
    if not (folder / CONFIG_FILE).is_file():
        raise CheckpointError(f"There is no run in {folder} (no {CONFIG_FILE}). Give the directory of a run.")
    cfg = load_run_config(folder)
    name = name or cfg.train.publish.name
    if not name:
        raise CheckpointError(f"The run in {folder} names no entry (train.publish.name). Give one, as in --name mine.")
    stage, weights = _finished(folder)
    tail = {key[len("tail.") :]: value for key, value in weights.pretext.items() if key.startswith("tail.")}
    metadata = {
        **read_facts(folder),
        "pretext": cfg.pretext.name,
        "task": cfg.task.name if stage == "bissl" else None,
        "solver": cfg.solver.name if stage == "bissl" else None,
        "shared_stage": cfg.bilevel.shared_stage,
        "metrics": {
            f"{metric} ({start})": value
            for start, figures in read_results(folder).items()
            for metric, value in figures.items()
            if "/" not in metric
        },
        "seeds": [cfg.train.seed],
        "licence": cfg.train.publish.licence,
    }
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


def _is_number(value: object) -> bool:
    return isinstance(value, float) or (type(value) is int and abs(value) < 1 << 1000)


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
