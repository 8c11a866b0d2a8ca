"""The run directory: what is refused before a run starts, what describes it, and what can be started from it."""

import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import omegaconf
import timm
import torch
import torchvision
from omegaconf import DictConfig, OmegaConf
from safetensors import SafetensorError
from safetensors.torch import load_file

from bissl_zoo import __version__
from bissl_zoo.config import LazyConfig, instantiate, load_config
from bissl_zoo.engine.build import STAGE_DATA, Weights
from bissl_zoo.engine.checkpoint import Checkpointer, load_checkpoint, write_atomically
from bissl_zoo.engine.finetune import BASELINE
from bissl_zoo.engine.trainer import load_state
from bissl_zoo.errors import CheckpointError, ConfigError, ZooError, did_you_mean
from bissl_zoo.zoo import create_backbone, get_entry

#: keys a resumed run may change: where and how it runs, not what it computes
FREE_KEYS = ("train.device", "train.log_period", "train.checkpoint", "train.publish", "train.output_dir")
_OPEN_SECTIONS = ("optimizer", "lr_multiplier", "dataloader", "backbone", "pretext", "task", "solver")


def check_config(cfg: DictConfig, source: str) -> None:
    """Compare the sections and their keys with `configs/common/train.py`, which lists them all.

    Raises:
        ConfigError: a section or key that is missing or unknown, with the nearest; a stage that does not exist.
    """
    reference = load_config("common/train.py")
    for section in [*reference, *_OPEN_SECTIONS]:
        if section not in cfg:
            raise ConfigError(f"{source}: the section '{section}' is missing; start from configs/common/train.py.")
    for section in reference:
        known, found = set(_keys(reference[section])), set(_keys(cfg[section]))
        for key in sorted(found - known):
            # what may be given or left out as a whole (None) has keys of its own
            if not any(key.startswith(f"{k}.") and OmegaConf.select(reference[section], k) is None for k in known):
                hint = did_you_mean(key, known)
                raise ConfigError(f"{source}: no key '{section}.{key}'.{hint} Known: {', '.join(sorted(known))}.")
        missing = [k for k in known - found if "." not in k]
        if missing:
            raise ConfigError(f"{source}: the key '{section}.{missing[0]}' is missing; see configs/common/train.py.")
    for stage in cfg.train.stages:
        if stage not in STAGE_DATA:
            hint = did_you_mean(stage, STAGE_DATA)
            raise ConfigError(f"{source}: train.stages has '{stage}'.{hint} Stages: {', '.join(STAGE_DATA)}.")
    if not cfg.train.stages:
        raise ConfigError(f"{source}: train.stages is empty. Stages: {', '.join(STAGE_DATA)}.")


def _keys(section: Any, prefix: str = "") -> Iterator[str]:
    for key, value in section.items():
        yield f"{prefix}{key}"
        if OmegaConf.is_dict(value) and "_target_" not in value:
            yield from _keys(value, f"{prefix}{key}.")


def prepare_run_dir(cfg: DictConfig, resume: bool) -> Path:
    """Make `train.output_dir` this run's, or refuse.

    Raises:
        ConfigError: it holds another run; with `resume`, it holds none, or one of another configuration.
    """
    folder = Path(cfg.train.output_dir)
    config = folder / "config.yaml"
    if resume:
        if not config.is_file():
            raise ConfigError(
                f"There is no run to resume in {folder} (no config.yaml). Leave out --resume to start one."
            )
        changed = _differences(LazyConfig.load(config), cfg)
        if changed:
            raise ConfigError(
                f"The run in {folder} was started with another configuration: {'; '.join(changed[:5])}. "
                "Resume it with the same one, or start a new run in another train.output_dir."
            )
    elif folder.exists() and any(folder.iterdir()):
        raise ConfigError(
            f"train.output_dir '{folder}' is not empty: it may hold another run. Go on with that one by --resume, or "
            "give another folder, as in train.output_dir=runs/another."
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        LazyConfig.save(cfg, config)
        write_atomically(folder / "environment.txt", describe_environment())
    except OSError as error:
        raise ConfigError(f"train.output_dir '{folder}' cannot be written: {error.strerror}.") from error
    return folder


def _differences(old: DictConfig, new: DictConfig) -> list[str]:
    def leaves(cfg: DictConfig) -> dict[str, Any]:
        found: dict[str, Any] = {}

        def walk(node: Any, key: str) -> None:
            items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else None
            if items is None:
                found[key] = node
            for name, item in items or ():
                walk(item, f"{key}.{name}".lstrip("."))

        walk(OmegaConf.to_container(cfg, resolve=True), "")
        return found

    before, after = leaves(old), leaves(new)
    absent = object()
    return [
        f"{key} was {before.get(key, 'absent')}, is {after.get(key, 'absent')}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key, absent) != after.get(key, absent)
        and not key.startswith(FREE_KEYS)
        and not key.endswith("num_workers")
    ]


def describe_environment() -> str:
    """Versions, hardware, git revision and command line, for `environment.txt`."""
    git = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"], capture_output=True, text=True
    )
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    facts = {
        "command": " ".join(sys.argv),
        "bissl_zoo": f"{__version__} ({git.stdout.strip() or 'no git revision'})",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "timm": timm.__version__,
        "omegaconf": omegaconf.__version__,
        "platform": platform.platform(),
        "cpu threads": torch.get_num_threads(),
        "gpus": ", ".join(gpus) or "none",
    }
    return "".join(f"{key}: {value}\n" for key, value in facts.items())


def load_init(init: str | None, cfg: DictConfig, evaluate: bool = False) -> tuple[Weights, str | None]:
    """The weights that `train.init` names, and the sha256 of the file they came from.

    Args:
        init: None for random weights; a `.safetensors` file of a backbone under timm's names; a run directory; the name
            of a zoo entry.
        evaluate: take the fine-tuned model of a run directory rather than the backbone to start from.
    Raises:
        CheckpointError: nothing of that name, or of another architecture.
    """
    if init is None:
        return Weights(), None
    path = Path(init)
    if path.is_dir():
        return _from_run(path, cfg, evaluate)
    whole = instantiate(cfg.backbone)
    if path.is_file():
        try:
            state = load_file(path)
        except SafetensorError as error:
            raise CheckpointError(f"train.init: {path} is not a safetensors file ({error}).") from error
        digest = None
    else:
        try:
            entry = get_entry(init)
            state = create_backbone(init).state_dict()
        except ZooError as error:
            raise CheckpointError(
                f"train.init='{init}' is no file, no run directory and no zoo entry. {error}"
            ) from error
        digest = entry["files"]["model.safetensors"]["sha256"]
    load_state(whole, state, "backbone")
    trunk, tail = whole.split(cfg.bilevel.shared_stage or whole.stages[-1])
    return Weights(backbone=trunk.state_dict(), tail=tail.state_dict()), digest


def _from_run(folder: Path, cfg: DictConfig, evaluate: bool) -> tuple[Weights, str | None]:
    checkpoints = Checkpointer(folder / "checkpoints")
    stages = ("finetune", BASELINE) if evaluate else ("bissl", "pretrain", "finetune")
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
        return weights_of(stage, state), info.sha256
    raise CheckpointError(f"The run directory {folder} holds no checkpoint of {' or '.join(stages)}.")


def weights_of(stage: str, state: dict[str, Any]) -> Weights:
    """The weights that a finished stage's checkpoint hands on."""
    levels = state["levels"]
    if stage == "bissl":
        return Weights(levels["lower"]["backbone"], pretext=levels["lower"]["head"], task=levels["upper"]["head"])
    head = {"pretext" if stage == "pretrain" else "task": levels["level"]["head"]}
    return Weights(levels["level"]["backbone"], **head)
