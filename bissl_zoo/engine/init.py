"""The weights that a run starts from, as `train.init` names them, split at the run's own shared stage."""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from bissl_zoo.backbones import Backbone, Tail, merge_split_states
from bissl_zoo.config import instantiate
from bissl_zoo.engine.build import Weights, build_split_backbone
from bissl_zoo.engine.trainer import load_state, take
from bissl_zoo.errors import CheckpointError, did_you_mean
from bissl_zoo.files import sha256_of
from bissl_zoo.registry import STAGES
from bissl_zoo.runs.checkpoint import Checkpointer, CheckpointInfo, load_checkpoint
from bissl_zoo.runs.directory import CONFIG_FILE, load_run_config, read_metadata
from bissl_zoo.zoo import Zoo, default_zoo
from bissl_zoo.zoo.hub import WEIGHTS_FILE
from bissl_zoo.zoo.index import pin, split_version

PRETEXT_FILE = "pretext_head.safetensors"
ZOO_PREFIX = "zoo:"


def load_init(init: str | None, cfg: DictConfig, evaluate: bool = False) -> tuple[Weights, list[dict[str, str]]]:
    """Return the weights that `train.init` names, and their lineage: name and sha256, from themselves to the root.

    Args:
        init: None for random weights; a `.safetensors` file of a backbone under timm's names; a run directory;
            `zoo:NAME` for a zoo entry, with its pretext head if it has the config's pretext method.
        evaluate: load the fine-tuned model of a run directory rather than the backbone to start from.
    Raises:
        CheckpointError: it does not exist, is damaged, or has another architecture.
        ZooError: the entry is damaged.
    """
    if init is None:
        return Weights(), []
    path, pretext = Path(init), None
    if init.startswith(ZOO_PREFIX):
        entry = zoo_of(cfg).find(init.removeprefix(ZOO_PREFIX))
        state = entry.weights()
        if PRETEXT_FILE in entry.record["files"] and entry.record.get("pretext") == cfg.pretext.name:
            pretext = entry.weights(PRETEXT_FILE)
        origin = {"name": pin(entry.name), "sha256": entry.record["files"][WEIGHTS_FILE]["sha256"]}
        lineage = [origin, *entry.parents()]
    elif path.is_dir():
        return _from_run(path, cfg, evaluate)
    elif path.is_file():
        try:
            state = load_file(path)
        except SafetensorError as error:
            raise CheckpointError(f"train.init: {path} is not a safetensors file ({error}).") from error
        lineage = [{"name": path.name, "sha256": sha256_of(path)}]
    else:
        names = [f"{ZOO_PREFIX}{name}" for name in zoo_of(cfg).entries()]
        hint = did_you_mean(f"{ZOO_PREFIX}{init}", names)
        raise CheckpointError(
            f"train.init='{init}' is neither a file nor a run directory. An entry of the zoo is written zoo:NAME.{hint}"
        )
    load_state(instantiate(cfg.backbone), state, f"backbone of '{init}'")
    return resplit(Weights(state, pretext=pretext), *build_split_backbone(cfg)), lineage


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
    lineage = [{"name": f"{folder.name} ({stage})", "sha256": info.sha256}, *read_metadata(folder).get("ancestors", [])]
    if evaluate:
        return weights, lineage
    weights = resplit(weights, *build_split_backbone(cfg))
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
