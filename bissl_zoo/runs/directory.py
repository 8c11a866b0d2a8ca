"""The run directory: names of its files, checks before a run starts, and the metadata of the run."""

import json
import logging
import platform
import resource
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import omegaconf
from omegaconf import DictConfig, OmegaConf
from tabulate import tabulate

from bissl_zoo import __version__, files
from bissl_zoo.config import LazyConfig, with_defaults
from bissl_zoo.errors import CheckpointError, ConfigError
from bissl_zoo.runs.lock import LOCK_FILE

if TYPE_CHECKING:  # torch is imported in the functions that need it, so that runs are listed without it
    from torch.utils.data import Dataset

logger = logging.getLogger(__name__)

CONFIG_FILE, METADATA_FILE, METRICS_FILE = "config.yaml", "metadata.json", "metrics.jsonl"
RESULTS_FILE, RECEIPT_FILE, LOG_FILE = "results.json", "zoo_entry.json", "log.txt"
#: name of METADATA_FILE in runs of bissl_zoo 0.1
OLD_METADATA_FILE = "facts.json"
_JSON_LIMIT = 16 << 20

#: keys that a resumed run may change: where and how it runs, not what it computes
FREE_KEYS = (
    "train.device",
    "train.log_period",
    "train.writers",
    "train.report",
    "train.checkpoint",
    "train.imports",
    "train.lock",
    "train.zoo",
    "train.probe",
    "train.publish",
    "train.output_dir",
    "train.on_nonfinite",
    "train.max_skipped",
    "bilevel.hvp_mode",
    "bilevel.on_bad_hypergradient",
)
#: and of every data loader
LOADER_KEYS = (".num_workers", ".on_bad", ".timeout")
#: keys that a resumed run may raise if no later stage has begun
LENGTHS = ("pretrain.steps", "pretrain.epochs", "bilevel.alternations", "finetune.steps", "finetune.epochs")


def load_run_config(folder: Path) -> DictConfig:
    """Load the config of the run in `folder`; keys that are newer than the run have their defaults.

    Raises:
        ConfigError: it cannot be read.
    """
    return with_defaults(LazyConfig.load(folder / CONFIG_FILE))


def has_begun(cfg: DictConfig) -> bool:
    """Return True if there is a run in `train.output_dir`."""
    return (Path(cfg.train.output_dir) / CONFIG_FILE).is_file()


def check_run_dir(cfg: DictConfig, resume: bool) -> Path:
    """Check that this run may use the folder `train.output_dir`, and return it; nothing is written.

    Raises:
        ConfigError: it holds another run; with `resume`, it holds none, or one with another config.
    """
    folder = Path(cfg.train.output_dir)
    config = folder / CONFIG_FILE
    if resume:
        if not config.is_file():
            raise ConfigError(
                f"There is no run to resume in {folder} (no config.yaml). Start one without --resume, or with "
                "--auto-resume."
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
        raise ConfigError(f"train.output_dir '{folder}' is a file. Give the name of a folder.")
    elif folder.exists() and any(path.name != LOCK_FILE for path in folder.iterdir()):
        raise ConfigError(
            f"train.output_dir '{folder}' is not empty; it may hold another run. Continue that run with --resume, or "
            "give another folder, as in train.output_dir=runs/another."
        )
    return folder


def prepare_run_dir(cfg: DictConfig, resume: bool) -> Path:
    """Create `train.output_dir` with `config.yaml` and `environment.txt`.

    Raises:
        ConfigError: see `check_run_dir`; or it cannot be written.
    """
    folder = check_run_dir(cfg, resume)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        LazyConfig.save(cfg, folder / CONFIG_FILE)
        files.write_atomically(folder / "environment.txt", describe_environment())
    except OSError as error:
        raise ConfigError(f"train.output_dir '{folder}' cannot be written: {error.strerror}.") from error
    return folder


def flatten(value: Any, key: str = "") -> dict[str, Any]:
    """Return the leaves of nested dictionaries and lists under dotted keys."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if items is None:
        return {key: value}
    return {k: v for name, item in items for k, v in flatten(item, f"{key}.{name}".lstrip(".")).items()}


def is_free(key: str) -> bool:
    """Return True if a resumed run may change this key."""
    return key.startswith(FREE_KEYS) or key.endswith(LOADER_KEYS)


def _differences(old: DictConfig, new: DictConfig) -> list[tuple[str, Any, Any]]:
    """Return the keys that change what is computed, with the old and the new value."""
    before, after = (flatten(OmegaConf.to_container(cfg, resolve=True)) for cfg in (old, new))
    # an absent key equals null: it is from a later version, and null is its default
    changed = [key for key in sorted(before.keys() | after.keys()) if before.get(key) != after.get(key)]
    return [
        (key, before.get(key, "absent"), after.get(key, "absent"))
        for key in changed
        if not is_free(key) and not _is_longer(key, before.get(key), after.get(key))
    ]


def _is_longer(key: str, before: Any, after: Any) -> bool:
    return key in LENGTHS and before is not None and after is not None and after > before


def describe_environment() -> str:
    """Return versions, hardware, git revision and command line, for `environment.txt`."""
    import timm
    import torch
    import torchvision

    git = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"], capture_output=True, text=True
    )
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    environment = {
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
    return "".join(f"{key}: {value}\n" for key, value in environment.items())


def report_command(folder: Path) -> str:
    """Return the command that writes the report of the run in `folder`."""
    return f"bissl report {folder}"


def write_metadata(
    folder: Path,
    cfg: DictConfig,
    data: "Mapping[str, Dataset]",
    parents: list[dict[str, str]],
    stages: Mapping[str, int],
) -> None:
    """Write `metadata.json`: stages, data sets with their samples, parents, hardware and wall time so far.

    Args:
        data: data sets by role.
        parents: the weights that the run started from, see `EntryMetadata`.
        stages: planned steps by name of the stage, in order.
    Raises:
        CheckpointError: it cannot be written.
    """
    datasets = {role: _describe_dataset(cfg.dataloader[role].dataset, dataset) for role, dataset in data.items()}
    metadata = {
        "stages": dict(stages),
        "datasets": datasets,
        "ancestors": parents,
        "hardware": _hardware(),
        "wall_time_s": read_metadata(folder).get("wall_time_s", 0.0),
    }
    _write_json(folder / METADATA_FILE, metadata)


def read_metadata(folder: Path) -> dict[str, Any]:
    """Read what `write_metadata` wrote; empty for a run that has not begun.

    Raises:
        CheckpointError: the file is damaged or holds something else.
    """
    path = folder / METADATA_FILE
    if not path.exists() and (folder / OLD_METADATA_FILE).exists():
        path = folder / OLD_METADATA_FILE
    metadata = read_json(path)
    problem = _problem_of(metadata)
    if problem:
        raise CheckpointError(f"{path} {problem}. Restore the file from a copy.")
    return metadata


def add_wall_time(folder: Path, seconds: float) -> None:
    """Add the time of this process to the wall time of the run, and record its peak memory if it is the largest.

    Raises:
        CheckpointError: the metadata cannot be read or written.
    """
    metadata = read_metadata(folder)
    costs = {
        "wall_time_s": round(metadata.get("wall_time_s", 0.0) + seconds, 1),
        "peak_memory_mib": round(max(metadata.get("peak_memory_mib", 0.0), _peak_memory() / 2**20), 1),
    }
    _write_json(folder / METADATA_FILE, metadata | costs)


def _peak_memory() -> int:
    """Return the peak memory of this process in bytes: of the GPU if there is one, else of the process."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, other systems kilobytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def read_results(folder: Path) -> dict[str, dict[str, float]]:
    """Read the test metrics of a finished run, by what was fine-tuned; empty if there are none.

    Raises:
        CheckpointError: the file is damaged or holds something else.
    """
    results = read_json(folder / RESULTS_FILE)
    if not all(isinstance(metrics, dict) and all(map(_is_number, metrics.values())) for metrics in results.values()):
        raise CheckpointError(f"{folder / RESULTS_FILE} holds other things than numbers. Restore the file from a copy.")
    return results


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object of a run directory; empty if there is no such file.

    Raises:
        CheckpointError: the file cannot be read, is too large, or holds something else.
    """
    try:
        return files.read_json(path, _JSON_LIMIT) if path.exists() else {}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}. Restore the file from a copy.") from error


def arguments_of(call: DictConfig, *leave_out: str) -> dict[str, Any]:
    """Return the arguments of a config that describes a call."""
    arguments = OmegaConf.to_container(call, resolve=True)
    return {key: value for key, value in arguments.items() if key not in ("_target_", *leave_out)}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    text = json.dumps(content, indent=2) + "\n"
    try:
        files.write_atomically(path, text)
    except OSError as error:
        advice = "It is unchanged. Free space or fix the disk, then continue with --resume."
        raise files.write_error(f"{path} could not be written", error, path, len(text), advice) from error


def _describe_dataset(described: DictConfig, dataset: "Dataset") -> dict[str, Any]:
    from bissl_zoo.data.datasets.catalog import sample_digest

    digest = sample_digest(dataset)
    return {**arguments_of(described), "samples": len(dataset)} | ({"sample_list_sha256": digest} if digest else {})


def _problem_of(metadata: dict[str, Any]) -> str:
    """Return why an entry of the zoo cannot have this metadata, or an empty string."""
    valid = {
        "datasets": lambda v: isinstance(v, dict) and all(isinstance(dataset, dict) for dataset in v.values()),
        "ancestors": lambda v: isinstance(v, list) and all(map(_is_parent, v)),
        "stages": lambda v: isinstance(v, dict) and all(type(steps) is int for steps in v.values()),
        "hardware": lambda v: isinstance(v, str),
        "wall_time_s": _is_amount,
        "peak_memory_mib": _is_amount,
    }
    wrong = [key for key, check in valid.items() if key in metadata and not check(metadata[key])]
    return f"has an invalid '{wrong[0]}'" if wrong else ""


def _is_parent(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("name"), str) and files.is_sha256(value.get("sha256"))


def _is_amount(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < 1e12


def _is_number(value: Any) -> bool:
    return isinstance(value, float) or (type(value) is int and abs(value) < 1 << 1000)


def _hardware() -> str:
    import torch

    from bissl_zoo.distributed import get_world_size

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    kinds = ", ".join(f"{gpus.count(kind)} x {kind}" for kind in dict.fromkeys(gpus))
    hardware = kinds or f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    return f"{hardware}, {get_world_size()} processes" if get_world_size() > 1 else hardware
