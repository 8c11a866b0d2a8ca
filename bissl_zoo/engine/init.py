"""Where a run starts: the weights that `train.init` names, cut at the run's own shared stage."""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from bissl_zoo.backbones import Backbone, Tail, merge_split_states
from bissl_zoo.config import instantiate
from bissl_zoo.engine.build import Weights, build_split_backbone
from bissl_zoo.engine.trainer import load_state
from bissl_zoo.errors import CheckpointError, did_you_mean
from bissl_zoo.runs.checkpoint import Checkpointer, load_checkpoint, sha256_of
from bissl_zoo.runs.directory import load_run_config
from bissl_zoo.runs.metadata import read_facts
from bissl_zoo.zoo import Zoo, default_zoo
from bissl_zoo.zoo.hub import WEIGHTS_FILE
from bissl_zoo.zoo.names import pin, split_version

PRETEXT_FILE = "pretext_head.safetensors"
ZOO_PREFIX = "zoo:"


def load_init(init: str | None, cfg: DictConfig, evaluate: bool = False) -> tuple[Weights, list[dict[str, str]]]:
    """The weights that `train.init` names, and their ancestors: name and sha256, from their own file to the root.

    Args:
        init: None for random weights; a `.safetensors` file of a backbone under timm's names; a run directory;
            `zoo:NAME` for a zoo entry, whose pretext head comes along where it is of the config's pretext method.
        evaluate: take the fine-tuned model of a run directory rather than the backbone to start from.
    Raises:
        CheckpointError: nothing of that name, damaged, or of another architecture.
        ZooError: an entry that is damaged.
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
        ancestors = [origin, *entry.ancestors()]
    elif path.is_dir():
        return _from_run(path, cfg, evaluate)
    elif path.is_file():
        try:
            state = load_file(path)
        except SafetensorError as error:
            raise CheckpointError(f"train.init: {path} is not a safetensors file ({error}).") from error
        ancestors = [{"name": path.name, "sha256": sha256_of(path)}]
    else:
        names = [f"{ZOO_PREFIX}{name}" for name in zoo_of(cfg).entries()]
        hint = did_you_mean(f"{ZOO_PREFIX}{init}", names)
        raise CheckpointError(
            f"train.init='{init}' is no file and no run directory. An entry of the zoo is written zoo:NAME.{hint}"
        )
    load_state(instantiate(cfg.backbone), state, f"backbone of '{init}'")
    return resplit(Weights(state, pretext=pretext), *build_split_backbone(cfg)), ancestors


def as_begun(init: str | None, folder: Path) -> str | None:
    """What the run in `folder` started from: of `zoo:NAME` the version that it took, and not one that came later."""
    ancestors = read_facts(folder).get("ancestors")
    if not init or not init.startswith(ZOO_PREFIX) or not ancestors:
        return init
    name = ancestors[0]["name"]
    return f"{ZOO_PREFIX}{name}" if split_version(name)[0] == init.removeprefix(ZOO_PREFIX) else init


def zoo_of(cfg: DictConfig) -> Zoo:
    """The zoo that a config reads from and publishes to; `train.zoo` is one location or a list of them."""
    told = cfg.train.zoo
    locations = [told] if isinstance(told, str) else told
    return Zoo(*locations) if locations else default_zoo()


def _from_run(folder: Path, cfg: DictConfig, evaluate: bool) -> tuple[Weights, list[dict[str, str]]]:
    checkpoints = Checkpointer(folder / "checkpoints")
    stages = ("finetune",) if evaluate else ("bissl", "pretrain", "finetune")
    for stage in stages:
        newest = checkpoints.newest(stage)
        if newest is None:
            continue
        info, state = load_checkpoint(newest)
        if info.architecture != cfg.backbone.name:
            raise CheckpointError(
                f"{newest} holds a '{info.architecture}', the configuration a '{cfg.backbone.name}'. "
                f"Set backbone.name={info.architecture}, or start from another run."
            )
        if not info.done:
            raise CheckpointError(
                f"{newest} is of an unfinished stage (step {info.step} of {info.total_steps}); --resume it first."
            )
        weights = weights_of(stage, state)
        origin = {"name": f"{folder.name} ({stage})", "sha256": info.sha256}
        ancestors = [origin, *read_facts(folder).get("ancestors", [])]
        if evaluate:
            return weights, ancestors
        weights = resplit(weights, *build_split_backbone(cfg))
        if load_run_config(folder).pretext.name != cfg.pretext.name:
            weights.pretext = None  # of another method; the backbone's tail in it is in weights.tail now
        return weights, ancestors
    raise CheckpointError(f"The run directory {folder} holds no checkpoint of {' or '.join(stages)}.")


def weights_of(stage: str, state: dict[str, Any]) -> Weights:
    """The weights that a finished stage's checkpoint hands on.

    Raises:
        CheckpointError: they are not in it.
    """
    try:
        levels = state["levels"]
        if stage == "bissl":
            parts = {"backbone": levels["lower"]["backbone"], "pretext": levels["lower"]["head"]}
            parts["task"] = levels["upper"]["head"]
        else:
            source = levels["level"]
            if "best" in state:
                source = state["best"]["weights"]
            if "average" in state:
                source = {part: _take(dict(state["average"]), f"{part}.") for part in ("backbone", "head")}
            parts = {"backbone": source["backbone"], "pretext" if stage == "pretrain" else "task": source["head"]}
        if not all(isinstance(value, Tensor) for part in parts.values() for value in part.values()):
            raise TypeError("weights that are no tensors")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"The checkpoint holds no weights of the stage {stage} ({type(error).__name__}: {error})."
        ) from error
    return Weights(**parts)


def resplit(weights: Weights, trunk: Backbone, tail: Tail) -> Weights:
    """The same weights, cut where `trunk` and `tail` are, wherever they were cut before or if they are still whole.

    The tail of a backbone is in its pretext head's state, and so are copies of trunk and tail that the method keeps, as
    pairs of modules named `backbone` and `tail` (BYOL's teacher). Without a tail weights stay as they are.
    """
    shared, rest = trunk.state_dict().keys(), tail.state_dict().keys()
    pretext = dict(weights.pretext or {})
    whole = merge_split_states(weights.backbone, _take(pretext, "tail."))
    if whole.keys() != shared | rest:
        return weights
    copies = {key.split(".tail.")[0] for key in pretext if ".tail." in key}
    copies |= {key.split(".backbone.")[0] for key in pretext if ".backbone." in key}
    for copy in copies:
        copied = merge_split_states(_take(pretext, f"{copy}.backbone."), _take(pretext, f"{copy}.tail."))
        pretext |= {f"{copy}.{'backbone' if key in shared else 'tail'}.{key}": v for key, v in copied.items()}
    tail_state = {key: whole[key] for key in rest}
    pretext |= {f"tail.{key}": value for key, value in tail_state.items()}
    return Weights(
        {key: whole[key] for key in shared},
        tail=tail_state,
        pretext=None if weights.pretext is None else pretext,
        task=weights.task,
    )


def _take(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key[len(prefix) :]: state.pop(key) for key in list(state) if key.startswith(prefix)}
