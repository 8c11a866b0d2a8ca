"""The backbones of a run before and after its BiSSL stage, each to be measured as it is."""

from pathlib import Path

from omegaconf import DictConfig

from bissl_zoo.backbones import merge_split_states
from bissl_zoo.config import instantiate
from bissl_zoo.engine.build import Weights, build_split_backbone
from bissl_zoo.engine.features import FrozenBackbone, load_frozen, pretext_pixels
from bissl_zoo.engine.init import load_init, pinned_init, resplit, weights_of
from bissl_zoo.engine.resume import seed_everything
from bissl_zoo.engine.trainer import load_state
from bissl_zoo.errors import CheckpointError
from bissl_zoo.runs.checkpoint import Checkpointer, load_checkpoint
from bissl_zoo.runs.directory import CONFIG_FILE, load_run_config


def load_stages(source: str, architecture: str | None = None) -> list[tuple[str, FrozenBackbone]]:
    """The backbones that a source names, with a name for each.

    Of a run with a BiSSL stage these are two, the one that entered the stage and the lower one that left it. Of
    anything else it is one, see :func:`bissl_zoo.engine.features.load_frozen`. The first may draw random weights.

    Raises:
        CheckpointError: weights that do not fit, an unfinished stage, or a run without a whole backbone.
        ZooError: there is no such entry or file.
    """
    folder = Path(source)
    if (folder / CONFIG_FILE).is_file():
        cfg = load_run_config(folder)
        if "bissl" in cfg.train.stages:
            return [_entering(folder, cfg), _leaving(folder, cfg)]
    backbone = load_frozen(source, architecture)
    return [(backbone.source, backbone)]


def _leaving(folder: Path, cfg: DictConfig) -> tuple[str, FrozenBackbone]:
    name = folder.absolute().name
    return f"{name}: BiSSL", _frozen(_of_stage(folder, cfg, "bissl"), cfg, f"{name} (bissl)")


def _entering(folder: Path, cfg: DictConfig) -> tuple[str, FrozenBackbone]:
    if "pretrain" in cfg.train.stages:
        weights, name = _of_stage(folder, cfg, "pretrain"), "pretrained"
    elif cfg.train.init is not None:
        init = pinned_init(cfg.train.init, folder)
        weights, name = load_init(init, cfg)[0], f"from {Path(init).name}"
    else:  # as the stage's networks are built
        seed_everything(cfg.train.seed)
        trunk, tail = build_split_backbone(cfg)
        weights, name = Weights(trunk.state_dict(), tail=tail.state_dict()), "random weights"
    run = folder.absolute().name
    return f"{run}: {name}", _frozen(weights, cfg, f"{run} ({name})")


def _of_stage(folder: Path, cfg: DictConfig, stage: str) -> Weights:
    newest = Checkpointer(folder / "checkpoints").newest(stage)
    if newest is None:
        raise CheckpointError(f"{folder} has no checkpoint of its stage {stage}; go on with the run by --resume.")
    info, state = load_checkpoint(newest)
    if not info.done:
        raise CheckpointError(
            f"{newest} is of an unfinished stage (step {info.step} of {info.total_steps}); --resume it first."
        )
    return resplit(weights_of(stage, state), *build_split_backbone(cfg))


def _frozen(weights: Weights, cfg: DictConfig, source: str) -> FrozenBackbone:
    if weights.tail is None:
        raise CheckpointError(
            f"{source}: there is the backbone up to {cfg.bilevel.shared_stage} only, without the rest of it that an "
            "embedding takes. Give the run or file that this one started from."
        )
    backbone = instantiate(cfg.backbone)
    load_state(backbone, merge_split_states(weights.backbone, weights.tail), f"backbone of '{source}'")
    return FrozenBackbone(backbone.model.eval().requires_grad_(False), backbone.name, source, pretext_pixels(cfg))
