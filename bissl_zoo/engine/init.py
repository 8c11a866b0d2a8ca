"""The weights that a run starts from, as `train.init` names them, split at the run's own shared stage."""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor

from bissl_zoo.backbones import Backbone, Tail, merge_split_states
from bissl_zoo.config import instantiate
from bissl_zoo.data.views import IMAGENET_MEAN, IMAGENET_STD
from bissl_zoo.engine.build import Weights, build_split_backbone
from bissl_zoo.engine.trainer import take
from bissl_zoo.errors import CheckpointError, ZooError, did_you_mean
from bissl_zoo.registry import STAGES
from bissl_zoo.runs.checkpoint import Checkpointer, CheckpointInfo, load_checkpoint
from bissl_zoo.runs.directory import CONFIG_FILE, arguments_of, load_run_config, read_metadata
from bissl_zoo.weights.files import StoredBackbone
from bissl_zoo.weights.load import read_weights
from bissl_zoo.zoo import Zoo, default_zoo
from bissl_zoo.zoo.index import ZOO_PREFIX, split_version

logger = logging.getLogger(__name__)

PRETEXT_FILE = "pretext_head.safetensors"
HUB_CONFIG = "config.json"  # of a folder with timm's or transformers' files


def load_init(init: str | None, cfg: DictConfig, evaluate: bool = False) -> tuple[Weights, list[dict[str, str]]]:
    """Return the weights that `train.init` names, and their lineage: name, sha256 and licence, back to the root.

    Args:
        init: None for random weights; otherwise a source of :func:`bissl_zoo.weights.load.read_weights`. A zoo entry
            brings its pretext head if it has the config's pretext method, a run also its heads.
        evaluate: load the fine-tuned model of a run directory rather than the backbone to start from.
    Raises:
        CheckpointError: a run is damaged, or has another architecture.
        ZooError: the weights are not found, damaged, or do not fit; the message has the number of matching tensors.
    """
    if init is None:
        return Weights(), []
    if Path(init).is_dir() and not (Path(init) / HUB_CONFIG).is_file():
        try:
            return _from_run(Path(init), cfg, evaluate)
        except (OmegaConfBaseException, AttributeError, TypeError) as error:
            cause = str(error).splitlines()[0]
            raise CheckpointError(f"{Path(init) / CONFIG_FILE} is not the config of a run: {cause}.") from error
    zoo, pretext, backbone = zoo_of(cfg), None, instantiate(cfg.backbone)
    if not init.startswith(ZOO_PREFIX) and ":" not in init and not Path(init).exists():
        hint = did_you_mean(f"{ZOO_PREFIX}{init}", [f"{ZOO_PREFIX}{name}" for name in zoo.entries()])
        raise CheckpointError(
            f"train.init='{init}' is neither a file nor a run directory. Other sources are zoo:NAME, timm:NAME.TAG and "
            f"hf-hub:USER/REPO.{hint}"
        )
    try:
        stored = read_weights(init, backbone.name, lambda _: getattr(backbone, "model", backbone), zoo)
    except ZooError as error:
        raise ZooError(f"train.init={init}: {error}") from error
    if init.startswith(ZOO_PREFIX):
        entry = zoo.find(init.removeprefix(ZOO_PREFIX))
        if PRETEXT_FILE in entry.record["files"] and entry.record.get("pretext") == cfg.pretext.name:
            pretext = entry.weights(PRETEXT_FILE)
    if stored.format == cfg.pretext.name == "mae":  # the decoder of the official checkpoints has our names
        pretext = {key: value for key, value in stored.head.items() if key != "decoder_pos_embed"}
    weights = resplit(Weights(dict(stored.state), pretext=pretext), *build_split_backbone(cfg))
    return replace(weights, pixels=stored.pixels), stored.lineage


def adopt_pixels(cfg: DictConfig, pixels: Mapping[str, Any] | None, begun: Path | None = None) -> None:
    """Set `mean` and `std` of the pretext views and of the task to those of the initial weights, unless they are given.

    Args:
        pixels: of the initial weights; None if they are unknown.
        begun: the folder of a run that is resumed; its values are set again.
    """
    resumed = load_run_config(begun) if begun and (begun / CONFIG_FILE).is_file() else None
    for path in ("pretext.augmentation", "task"):
        section = OmegaConf.select(cfg, path)
        for key, default in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD)):
            wanted = (pixels or {}).get(key) if resumed is None else OmegaConf.select(resumed, f"{path}.{key}")
            if section is None or wanted is None:
                continue
            wanted, given = [float(value) for value in wanted], section.get(key)
            if given is None and not _close(wanted, default):
                OmegaConf.update(section, key, wanted, force_add=True)
                logger.info(f"{path}.{key} = {wanted}, with which the initial weights were trained")
            elif given is not None and not _close(wanted, given):
                logger.warning(f"{path}.{key} is {list(given)}; the initial weights were trained with {wanted}.")


def _close(first: Sequence[float], second: Sequence[float]) -> bool:
    return all(math.isclose(a, b, abs_tol=1e-3) for a, b in zip(first, second, strict=True))


def read_run(folder: str, zoo: Any = None) -> StoredBackbone:
    """Read the backbone of the last stage of a run that leaves a whole one.

    Raises:
        CheckpointError: there is none.
    """
    cfg = load_run_config(Path(folder))
    weights, lineage = load_init(folder, cfg)
    if weights.tail is None:
        raise CheckpointError(
            f"{folder} holds the backbone up to {cfg.bilevel.shared_stage} only, since it has no pretext stage. Give "
            "the weights it started from, or a run with a pretext stage."
        )
    return StoredBackbone(
        merge_split_states(weights.backbone, weights.tail),
        cfg.backbone.name,
        arguments_of(cfg.backbone, "name", "out_features"),
        pretext_pixels(cfg),
        lineage[0]["name"],
        cfg.train.publish.licence,
        lineage[0]["sha256"],
        lineage[1:],
    )


def pretext_pixels(cfg: DictConfig) -> dict[str, Any]:
    """Return `mean` and `std` of a config's pretext images, and their `input_size`, as a zoo entry stores them."""
    augmentation = cfg["pretext"].get("augmentation") or {}
    size = augmentation.get("size", 96)
    return {
        "input_size": [3, size, size],
        "mean": list(augmentation.get("mean", IMAGENET_MEAN)),
        "std": list(augmentation.get("std", IMAGENET_STD)),
    }


def pinned_init(init: str | None, folder: Path) -> str | None:
    """Return `train.init` of the run in `folder`; of `zoo:NAME` with the version that the run started from."""
    lineage = read_metadata(folder).get("ancestors")
    if not init or not init.startswith(ZOO_PREFIX) or not lineage:
        return init
    name = lineage[0]["name"]
    return f"{ZOO_PREFIX}{name}" if split_version(name)[0] == init.removeprefix(ZOO_PREFIX) else init


def zoo_of(cfg: DictConfig) -> Zoo:
    """Return the zoo that a config reads from and publishes to: `train.zoo`, one location or a list of them."""
    locations = [cfg.train.zoo] if isinstance(cfg.train.zoo, str) else cfg.train.zoo
    return Zoo(*locations) if locations else default_zoo()


def newest_weights(folder: Path, cfg: DictConfig, evaluated: bool = False) -> tuple[str, CheckpointInfo, Weights]:
    """Return stage, manifest and weights of the last finished stage of the run in `folder`.

    Args:
        cfg: the config of that run.
        evaluated: of the last stage that fine-tunes, rather than of the last one that leaves a backbone.
    Raises:
        CheckpointError: there is no such checkpoint, or its stage has not finished.
    """
    checkpoints = Checkpointer(folder / "checkpoints")
    stages = [STAGES.build(name) for name in reversed(cfg.train.stages)]
    stages = [stage for stage in stages if (stage.evaluates if evaluated else "backbone" in stage.provides)]
    for stage in stages:
        newest = checkpoints.newest(stage.name)
        if newest is None:
            continue
        info, state = load_checkpoint(newest)
        if not info.done:
            raise CheckpointError(
                f"{newest} belongs to an unfinished stage (step {info.step} of {info.total_steps}); --resume it first."
            )
        return stage.name, info, weights_of(stage.name, state)
    kind = "a stage that fine-tunes, such as finetune" if evaluated else "a stage that leaves a backbone"
    raise CheckpointError(
        f"The run directory {folder} holds no checkpoint of {' or '.join(stage.name for stage in stages) or kind}."
    )


def _from_run(folder: Path, cfg: DictConfig, evaluate: bool) -> tuple[Weights, list[dict[str, str]]]:
    if not (folder / CONFIG_FILE).is_file():
        raise CheckpointError(f"The folder {folder} holds no checkpoint: it is not a run directory (no {CONFIG_FILE}).")
    run_cfg = load_run_config(folder)
    try:
        stage, info, weights = newest_weights(folder, run_cfg, evaluate)
    except CheckpointError:
        if evaluate or any("backbone" in STAGES.get(name).provides for name in run_cfg.train.stages):
            raise
        stage, info, weights = newest_weights(folder, run_cfg, evaluated=True)  # a run that only fine-tunes
    if info.architecture != cfg.backbone.name:
        raise CheckpointError(
            f"{folder} holds a '{info.architecture}', the configuration a '{cfg.backbone.name}'. "
            f"Set backbone.name={info.architecture}, or start from another run."
        )
    origin = {"name": f"{folder.name} ({stage})", "sha256": info.sha256, "licence": run_cfg.train.publish.licence}
    lineage = [origin, *read_metadata(folder).get("ancestors", [])]
    if evaluate:
        return replace(weights, pixels={"mean": IMAGENET_MEAN, "std": IMAGENET_STD, **run_cfg.task}), lineage
    weights = replace(resplit(weights, *build_split_backbone(cfg)), pixels=pretext_pixels(run_cfg))
    if run_cfg.pretext.name != cfg.pretext.name:
        weights.pretext = None  # of another method; weights.tail has the backbone's tail
    return weights, lineage


def weights_of(stage: str, state: dict[str, Any]) -> Weights:
    """Return the weights in a checkpoint of the finished stage.

    Raises:
        CheckpointError: they are missing.
    """
    try:
        weights = STAGES.build(stage).weights_of(state)
        parts = (weights.backbone, weights.pretext, weights.task)
        if not all(isinstance(value, Tensor) for part in parts if part is not None for value in part.values()):
            raise TypeError("weights that are not tensors")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"The checkpoint holds no weights of the stage {stage} ({type(error).__name__}: {error})."
        ) from error
    return weights


def resplit(weights: Weights, trunk: Backbone, tail: Tail) -> Weights:
    """Return the same weights, split as `trunk` and `tail` are, wherever they were split before, or whole.

    The tail of a backbone is in its pretext head's state, and so are copies of trunk and tail that the method keeps, as
    pairs of modules named `backbone` and `tail` (BYOL's teacher). Weights without a tail are returned unchanged.
    """
    shared, rest = trunk.state_dict().keys(), tail.state_dict().keys()
    pretext = dict(weights.pretext or {})
    whole = merge_split_states(weights.backbone, take(pretext, "tail."))
    if whole.keys() != shared | rest:
        return weights
    copies = {key.split(".tail.")[0] for key in pretext if ".tail." in key}
    copies |= {key.split(".backbone.")[0] for key in pretext if ".backbone." in key}
    for copy in copies:
        copied = merge_split_states(take(pretext, f"{copy}.backbone."), take(pretext, f"{copy}.tail."))
        pretext |= {f"{copy}.{'backbone' if key in shared else 'tail'}.{key}": v for key, v in copied.items()}
    tail_state = {key: whole[key] for key in rest}
    pretext |= {f"tail.{key}": value for key, value in tail_state.items()}
    return Weights(
        {key: whole[key] for key in shared},
        tail=tail_state,
        pretext=None if weights.pretext is None else pretext,
        task=weights.task,
    )
