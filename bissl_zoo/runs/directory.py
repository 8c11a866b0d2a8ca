"""The run directory: what is refused before a run starts, and what describes it."""

import contextlib
import logging
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
from tabulate import tabulate

from bissl_zoo import __version__
from bissl_zoo.config import LazyConfig, with_defaults
from bissl_zoo.distributed import is_main_process
from bissl_zoo.errors import ConfigError
from bissl_zoo.runs.checkpoint import write_atomically
from bissl_zoo.runs.lock import LOCK_FILE

logger = logging.getLogger(__name__)

CONFIG_FILE = "config.yaml"
#: keys a resumed run may change: where and how it runs, not what it computes as long as its numbers are sound
FREE_KEYS = (
    "train.device",
    "train.log_period",
    "train.writers",
    "train.report",
    "train.checkpoint",
    "train.imports",
    "train.zoo",
    "train.probe",
    "train.publish",
    "train.output_dir",
    "train.on_nonfinite",
    "train.max_skipped",
    "bilevel.hvp_mode",
    "bilevel.on_bad_hypergradient",
)
#: and of every loader
LOADER_KEYS = (".num_workers", ".on_bad", ".timeout")
#: keys a resumed run may raise, as long as no later stage has begun
LENGTHS = ("pretrain.steps", "pretrain.epochs", "bilevel.alternations", "finetune.steps", "finetune.epochs")


def load_run_config(folder: Path) -> DictConfig:
    """The config of the run in `folder`; keys that came later than the run have their defaults.

    Raises:
        ConfigError: it cannot be read.
    """
    return with_defaults(LazyConfig.load(folder / CONFIG_FILE))


def has_begun(cfg: DictConfig) -> bool:
    """Whether there is a run in `train.output_dir`."""
    return (Path(cfg.train.output_dir) / CONFIG_FILE).is_file()


def check_run_dir(cfg: DictConfig, resume: bool) -> Path:
    """The folder `train.output_dir`, if this run may have it; nothing is written.

    Raises:
        ConfigError: it holds another run; with `resume`, it holds none, or one of another configuration.
    """
    folder = Path(cfg.train.output_dir)
    config = folder / CONFIG_FILE
    if resume:
        if not config.is_file():
            raise ConfigError(
                f"There is no run to resume in {folder} (no config.yaml). Leave out --resume to start one."
            )
        changed = _differences(load_run_config(folder), with_defaults(cfg))
        if changed:
            rows = tabulate(changed, headers=["key", "was", "is"], disable_numparse=True, missingval="null")
            raise ConfigError(
                f"The run in {folder} was started with another configuration:\n{rows}\n"
                "Resume it with the same one, or start a new run in another train.output_dir. A resumed run may change "
                f"{', '.join(FREE_KEYS)}, each loader's num_workers, on_bad and timeout, and raise "
                f"{', '.join(LENGTHS)}."
            )
    elif folder.exists() and not folder.is_dir():
        raise ConfigError(f"train.output_dir '{folder}' is a file; give the name of a folder.")
    elif folder.exists() and any(path.name != LOCK_FILE for path in folder.iterdir()):
        raise ConfigError(
            f"train.output_dir '{folder}' is not empty: it may hold another run. Go on with that one by --resume, or "
            "give another folder, as in train.output_dir=runs/another."
        )
    return folder


def prepare_run_dir(cfg: DictConfig, resume: bool) -> Path:
    """Make `train.output_dir` this run's.

    Raises:
        ConfigError: as `check_run_dir` does, or it cannot be written.
    """
    folder = check_run_dir(cfg, resume)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        LazyConfig.save(cfg, folder / CONFIG_FILE)
        write_atomically(folder / "environment.txt", describe_environment())
    except OSError as error:
        raise ConfigError(f"train.output_dir '{folder}' cannot be written: {error.strerror}.") from error
    return folder


def _differences(old: DictConfig, new: DictConfig) -> list[tuple[str, Any, Any]]:
    """Keys that change what is computed, with the old and the new value."""

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
    # absent is null: a key that came with a later version, and asks for nothing
    return [
        (key, before.get(key, "absent"), after.get(key, "absent"))
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key) and not _is_free(key, before.get(key), after.get(key))
    ]


def _is_free(key: str, before: Any, after: Any) -> bool:
    if key in LENGTHS:
        return before is not None and after is not None and after > before
    return key.startswith(FREE_KEYS) or key.endswith(LOADER_KEYS)


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


def report_command(folder: Path) -> str:
    """What writes the report of the run in `folder`."""
    return f"python tools/report.py {folder}"


@contextlib.contextmanager
def pointing_to_report(folder: Path) -> Iterator[None]:
    """Where the block ends before its time, say how to look at what there is of the run."""
    try:
        yield
    except Exception:
        if is_main_process():
            logger.info(f"look at it with {report_command(folder)}")
        raise
