"""What a zoo entry says of a run beyond its config: kept in the run directory, as it may be published elsewhere."""

import json
import platform
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch.utils.data import Dataset

from bissl_zoo.data.datasets.catalog import sample_digest
from bissl_zoo.distributed import get_world_size
from bissl_zoo.errors import CheckpointError
from bissl_zoo.runs.checkpoint import write_atomically
from bissl_zoo.zoo.names import is_sha256

FACTS_FILE = "facts.json"

#: bytes of a JSON file of a run directory, far above what a run leaves
_LIMIT = 16 << 20


def write_facts(folder: Path, cfg: DictConfig, data: dict[str, Dataset], ancestors: list[dict[str, str]]) -> None:
    """Write `facts.json`: data sets with their samples, ancestors, hardware, and the time the run has taken so far.

    Args:
        ancestors: the weights that the run started from, see `EntryMetadata`.
    """
    facts = {
        "datasets": {role: _dataset_facts(cfg.dataloader[role].dataset, dataset) for role, dataset in data.items()},
        "ancestors": ancestors,
        "hardware": _hardware(),
        "wall_time_s": read_facts(folder).get("wall_time_s", 0.0),
    }
    write_atomically(folder / FACTS_FILE, json.dumps(facts, indent=2) + "\n")


def read_facts(folder: Path) -> dict[str, Any]:
    """What `write_facts` kept; empty for a run that has not begun.

    Raises:
        CheckpointError: the file is damaged, or was never one of facts.
    """
    facts = read_json(folder / FACTS_FILE)
    problem = _facts_problem(facts) if facts else ""
    if problem:
        raise CheckpointError(f"{folder / FACTS_FILE} {problem}. Restore the file from a copy.")
    return facts


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file of a run directory; empty where there is no such file.

    Raises:
        CheckpointError: the file cannot be read, is larger than any run leaves it, or holds something else.
    """
    try:
        if not path.exists():
            return {}
        if not path.is_file():
            raise ValueError("it is no file")
        with open(path, "rb") as file:
            content = file.read(_LIMIT + 1)
        if len(content) > _LIMIT:
            raise ValueError(f"it has more than {_LIMIT:,} bytes")
        loaded = json.loads(content)
        json.dumps(loaded, ensure_ascii=False).encode()  # half a surrogate pair can be escaped, but not written again
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}. Restore the file from a copy.") from error
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{path} holds {type(loaded).__name__}, not a JSON object. Restore the file from a copy.")
    return loaded


def add_wall_time(folder: Path, seconds: float) -> None:
    """Count the time of one process that ran the run, or went on with it."""
    facts = read_facts(folder)
    facts["wall_time_s"] = round(facts.get("wall_time_s", 0.0) + seconds, 1)
    write_atomically(folder / FACTS_FILE, json.dumps(facts, indent=2) + "\n")


def _dataset_facts(described: DictConfig, dataset: Dataset) -> dict[str, Any]:
    digest = sample_digest(dataset)
    return {**arguments_of(described), "samples": len(dataset)} | ({"sample_list_sha256": digest} if digest else {})


def _facts_problem(facts: dict[str, Any]) -> str:
    """Why these are not facts that an entry of the zoo can state, or an empty string."""
    datasets, ancestors = facts.get("datasets", {}), facts.get("ancestors", [])
    if not isinstance(datasets, dict) or not all(isinstance(one, dict) for one in datasets.values()):
        return "has 'datasets' that are not an object of objects"
    if not isinstance(ancestors, list) or not all(map(_is_ancestor, ancestors)):
        return "has 'ancestors' that are not a list of objects with a name and a sha256"
    if not isinstance(facts.get("hardware", ""), str):
        return "has a 'hardware' that is not text"
    seconds = facts.get("wall_time_s", 0.0)
    if type(seconds) not in (int, float) or not 0 <= seconds < 1e12:
        return "has a 'wall_time_s' that is not a number of seconds"
    return ""


def _is_ancestor(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("name"), str) and is_sha256(value.get("sha256"))


def _hardware() -> str:
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    kinds = [f"{gpus.count(kind)} x {kind}" for kind in dict.fromkeys(gpus)]
    where = ", ".join(kinds) or f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    return f"{where}, {get_world_size()} processes" if get_world_size() > 1 else where


def arguments_of(call: DictConfig, *leave_out: str) -> dict[str, Any]:
    """The arguments of a described call."""
    arguments = OmegaConf.to_container(call, resolve=True)
    return {key: value for key, value in arguments.items() if key not in ("_target_", *leave_out)}
