"""From a finished run to an entry of the zoo."""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import yaml
from omegaconf import DictConfig

from bissl_zoo.backbones import merge_split_states
from bissl_zoo.bilevel.level import Level
from bissl_zoo.bilevel.summary import HypergradientSummary
from bissl_zoo.engine.evaluate import Details, write_details
from bissl_zoo.engine.init import newest_weights, pretext_pixels, zoo_of
from bissl_zoo.engine.resume import is_done
from bissl_zoo.engine.stages import Bissl
from bissl_zoo.engine.trainer import Context, Stage
from bissl_zoo.errors import CheckpointError, ConfigError, ZooError
from bissl_zoo.files import write_atomically, write_error
from bissl_zoo.model import ENTRY_JSON, ENTRY_WEIGHTS, MODEL_FOLDER, Model, describe_model, load_model
from bissl_zoo.registry import BACKBONES, STAGES
from bissl_zoo.runs.checkpoint import Checkpointer, read_state
from bissl_zoo.runs.directory import (
    CONFIG_FILE,
    RECEIPT_FILE,
    RESULTS_FILE,
    add_wall_time,
    arguments_of,
    load_run_config,
    read_json,
    read_metadata,
    read_results,
)
from bissl_zoo.zoo import PublishedEntry, Zoo, publish_entry


def publishes(cfg: DictConfig) -> bool:
    """Return True if a run of this config ends in a zoo entry."""
    return bool(cfg.train.publish.name) and any("backbone" in STAGES.get(s).provides for s in cfg.train.stages)


def published(folder: Path) -> PublishedEntry | None:
    """Return the last entry that the run was published as; None if there is none or its receipt is damaged."""
    try:
        receipt = read_json(folder / RECEIPT_FILE)
        texts = all(isinstance(value, str) for value in receipt.values())
        return PublishedEntry(**receipt) if receipt and texts else None
    except (CheckpointError, TypeError):
        return None


def save_model(context: Context, stage: Stage, level: Level, metrics: dict[str, float]) -> None:
    """Write a fine-tuned model to `model/` of the run, and that of the baseline to `model_pretrained/`.

    Raises:
        CheckpointError: it cannot be written.
    """
    cfg = context.cfg
    metadata = describe_model(
        level.head,
        backbone_name=cfg.backbone.name,
        backbone_arguments=arguments_of(cfg.backbone, "name"),
        shared_stage=cfg.bilevel.shared_stage,
        task_name=cfg.task.name,
        task_arguments=arguments_of(cfg.task, "name"),
        metrics=metrics,
        start=stage.start,
        licence=cfg.train.publish.licence,
        parents=read_metadata(context.folder).get("ancestors", []),
        imports=list(cfg.train.imports or []),
    )
    folder = context.folder / (f"{MODEL_FOLDER}_{stage.start}" if getattr(stage, "baseline", False) else MODEL_FOLDER)
    size = sum(tensor.nbytes for part in (level.backbone, level.head) for tensor in part.state_dict().values())
    try:
        Model(level.backbone, level.head, metadata).save(folder)
    except OSError as error:
        advice = "Free space or fix the disk, then continue with --resume."
        raise write_error(f"The model could not be written to {folder}", error, folder, size, advice) from error


def finish_run(
    context: Context, results: dict[str, dict[str, float]], details: dict[str, Details]
) -> PublishedEntry | None:
    """Write the results of a run, and publish it if its config names an entry and it was not published before.

    Raises:
        ZooError: the zoo refused.
    """
    folder = context.folder
    write_details(folder, details)
    write_atomically(folder / RESULTS_FILE, json.dumps(results, indent=2) + "\n")
    add_wall_time(folder, time.monotonic() - context.begin)
    if not publishes(context.cfg):
        return None
    try:
        return published(folder) or publish_run(folder, once=True)
    except ZooError as error:
        raise ZooError(
            f"{error} The training is complete, and its results are in {folder / RESULTS_FILE}; --resume publishes "
            "again."
        ) from error


def _hypergradients(folder: Path) -> str:
    """Return the sentence about the hypergradients of the run's BiSSL stage, for the card; empty if it has none."""
    newest, summary = Checkpointer(folder / "checkpoints").newest(Bissl.name), HypergradientSummary()
    state = read_state(newest).get("hypergradients") if newest else None
    if state:
        summary.load_state_dict(state)
    return summary.sentence()


def finished_outcome(context: Context, stages: Sequence[Stage]) -> dict[str, Any] | None:
    """Return results and entry of a run that has come to its end; None if it has not."""
    folder, publishing = context.folder, publishes(context.cfg)
    entry = published(folder) if publishing else None
    models = (folder / MODEL_FOLDER).is_dir() or not any(stage.evaluates for stage in stages)
    written = (folder / RESULTS_FILE).exists() and models
    if not written or (publishing and entry is None) or not all(is_done(stage, context) for stage in stages):
        return None
    return {"results": read_results(folder), "entry": entry}


def check_publishing(cfg: DictConfig, source: str) -> None:
    """Check that the entry is not named after another architecture, which is the part before the first dot.

    Raises:
        ConfigError: with the correct name; or no stage makes the model of `train.publish.model`.
    """
    if cfg.train.publish.model and not any(STAGES.get(stage).evaluates for stage in cfg.train.stages):
        raise ConfigError(f"{source}: train.publish.model=True needs the stage finetune in train.stages.")
    name, architecture = cfg.train.publish.name, cfg.backbone.get("name")
    if not isinstance(name, str) or not isinstance(architecture, str) or not publishes(cfg):
        return
    prefix, dot, rest = name.partition(".")
    expected = architecture.partition(".")[0]
    # an unknown backbone is reported when it is built
    if prefix != expected and timm.is_model(prefix) and architecture in BACKBONES:
        raise ConfigError(
            f"{source}: train.publish.name is '{name}', and the backbone is no {prefix} but {architecture}. Set "
            f"train.publish.name={expected}{dot}{rest}, another name, or null to publish nothing."
        )


def without_local_folders(config: str) -> str:
    """Return the YAML of a config with absolute paths reduced to their last part: no folders of the user."""

    def reduced(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: reduced(each) for key, each in value.items()}
        if isinstance(value, list):
            return [reduced(each) for each in value]
        return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value

    plain = yaml.safe_load(config)
    return config if (shown := reduced(plain)) == plain else yaml.safe_dump(shown, sort_keys=False, allow_unicode=True)


def publish_run(
    folder: Path,
    name: str | None = None,
    zoo: Zoo | None = None,
    once: bool = False,
    half: bool = False,
    model: bool | None = None,
    pretext_head: bool = True,
    **metadata: Any,
) -> PublishedEntry:
    """Publish the backbone of the last pretext stage of a run, with its pretext head and the task's head.

    With `train.publish.model` the fine-tuned model takes the place of the latter, and the metrics are those of it.

    Args:
        folder: the run directory.
        name: of the entry; None for `train.publish.name` of the run's config.
        zoo: None for `train.publish.zoo`, or the first of `train.zoo`.
        once, half: see `publish_entry`.
        model: publish the fine-tuned model, too; None for `train.publish.model`.
        pretext_head: publish the pretext head, too, with which another BiSSL stage can start.
        metadata: fields of `EntryMetadata` in place of those of the run, such as metrics over several seeds.
    Raises:
        CheckpointError: there is no run, no finished pretext stage in it, or a file is damaged.
        ZooError: the zoo refused.
    """
    if not (folder / CONFIG_FILE).is_file():
        raise CheckpointError(f"There is no run in {folder} (no {CONFIG_FILE}). Give the directory of a run.")
    cfg = load_run_config(folder)
    name = name or cfg.train.publish.name
    if not name:
        raise CheckpointError(f"The run in {folder} names no entry (train.publish.name). Give one, as in --name mine.")
    _, _, weights = newest_weights(folder, cfg)
    tail = {k[len("tail.") :]: value for k, value in (weights.pretext or {}).items() if k.startswith("tail.")}
    aligned = weights.task is not None
    tuned = None
    if cfg.train.publish.model if model is None else model:
        tuned = load_model(folder / MODEL_FOLDER, device="cpu")
    metadata = {
        **{key: value for key, value in read_metadata(folder).items() if key not in ("stages", "peak_memory_mib")},
        "pretext": cfg.pretext.name,
        "task": cfg.task.name if aligned else None,
        "solver": cfg.solver.name if aligned else None,
        "notes": _hypergradients(folder),
        "shared_stage": cfg.bilevel.shared_stage,
        "metrics": {
            f"{metric} ({start})": value
            for start, metrics in read_results(folder).items()
            if tuned is None or start == tuned.metadata["start"]  # metrics belong to the model in the entry
            for metric, value in metrics.items()
            if "/" not in metric
        },
        "seeds": [cfg.train.seed],
        "licence": cfg.train.publish.licence,
        **metadata,
    }
    entry = publish_entry(
        name=name,
        backbone_state=merge_split_states(weights.backbone, tail),
        architecture=cfg.backbone.name,
        model_args=arguments_of(cfg.backbone, "name", "out_features"),
        pretrained_cfg=pretext_pixels(cfg),
        metadata=metadata,
        train_config_text=without_local_folders((folder / CONFIG_FILE).read_text()),
        pretext_head_state=weights.pretext if pretext_head else None,
        task_head_state=weights.task if tuned is None else None,
        task_model=tuned and {ENTRY_JSON: tuned.metadata, ENTRY_WEIGHTS: tuned.state_dict()},
        zoo=zoo or cfg.train.publish.zoo or zoo_of(cfg),
        once=once,
        half=half,
    )
    receipt = {"name": entry.name, "location": entry.location, "sha256": entry.sha256}
    write_atomically(folder / RECEIPT_FILE, json.dumps(receipt, indent=2) + "\n")
    return entry
