"""What a zoo entry says of a run beyond its config: kept in the run directory, as it may be published elsewhere."""

import json
import platform
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch.utils.data import Dataset

from bissl_zoo.data.catalog import sample_digest
from bissl_zoo.distributed import get_world_size
from bissl_zoo.engine.checkpoint import write_atomically

FACTS_FILE = "facts.json"


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
    """What `write_facts` kept; empty for a run that has not begun."""
    path = folder / FACTS_FILE
    return json.loads(path.read_text()) if path.exists() else {}


def add_wall_time(folder: Path, seconds: float) -> None:
    """Count the time of one process that ran the run, or went on with it."""
    facts = read_facts(folder)
    facts["wall_time_s"] = round(facts["wall_time_s"] + seconds, 1)
    write_atomically(folder / FACTS_FILE, json.dumps(facts, indent=2) + "\n")


def _dataset_facts(described: DictConfig, dataset: Dataset) -> dict[str, Any]:
    digest = sample_digest(dataset)
    return {**arguments_of(described), "samples": len(dataset)} | ({"sample_list_sha256": digest} if digest else {})


def _hardware() -> str:
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    kinds = [f"{gpus.count(kind)} x {kind}" for kind in dict.fromkeys(gpus)]
    where = ", ".join(kinds) or f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    return f"{where}, {get_world_size()} processes" if get_world_size() > 1 else where


def arguments_of(call: DictConfig, *leave_out: str) -> dict[str, Any]:
    """The arguments of a described call."""
    arguments = OmegaConf.to_container(call, resolve=True)
    return {key: value for key, value in arguments.items() if key not in ("_target_", *leave_out)}
