"""What a comparison's folder belongs to, so that figures of different configurations are never put side by side."""

import json
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from tabulate import tabulate
from torch.utils.data import Dataset

from bissl_zoo.config import LazyConfig
from bissl_zoo.data.datasets.catalog import sample_digest
from bissl_zoo.errors import ConfigError
from bissl_zoo.runs.directory import FREE_KEYS, LOADER_KEYS
from bissl_zoo.studies.compare_arms import ARMS, Settings

RECORD_FILE = "comparison.yaml"


def record_of(
    base: DictConfig,
    search: DictConfig | None,
    settings: Settings,
    origin: list[dict[str, str]],
    samples: dict[str, dict[str, str]],
) -> dict[str, Any]:
    """All that decides what a comparison's runs compute.

    Args:
        base: the config that all arms derive from.
        search: the section, where there are searches.
        origin: name and sha256 of what `train.init` names; empty where it names nothing.
        samples: see :func:`samples_of`.
    """
    return {
        "config": OmegaConf.to_container(base),
        "arms": {name: ARMS[name].overrides(base) for name in settings.arms},
        "vary": settings.vary,
        "search_trials": settings.search_trials,
        "search": OmegaConf.to_container(search, resolve=True) if search is not None else None,
        "init": origin,
        "samples": samples,
        "seeds": list(settings.seeds),
    }


def samples_of(cfg: DictConfig, data: dict[str, Dataset], prefix: str = "") -> dict[str, dict[str, str]]:
    """Name and digest of the samples of the data sets that know them, by their roles, with `prefix` before each."""
    digests = {role: sample_digest(dataset) for role, dataset in data.items()}
    return {
        f"{prefix}{role}": {"name": cfg.dataloader[role].dataset.name, "sample_list_sha256": digest}
        for role, digest in digests.items()
        if digest
    }


def take_folder(folder: Path, record: dict[str, Any]) -> None:
    """Make `folder` that of this comparison, or see that it is; seeds and arms may have been added.

    Raises:
        ConfigError: it is another comparison's, with the keys that differ, or one of other images; it holds something
            else; it cannot be written.
    """
    file = folder / RECORD_FILE
    if file.is_file():
        before = OmegaConf.to_container(LazyConfig.load(file))
        _refuse_fewer_seeds(folder, before["seeds"], record["seeds"])
        _refuse_another(folder, before, record)
        _refuse_other_samples(folder, before.get("samples", {}), record["samples"])
        record = {**record, "arms": {**before["arms"], **record["arms"]}}
    elif folder.is_dir() and any(folder.iterdir()):
        raise ConfigError(
            f"'{folder}' is not empty, and no comparison. Give another folder, as in train.output_dir=runs/another."
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"The folder '{folder}' cannot be made: {error.strerror}.") from error
    LazyConfig.save(OmegaConf.create(record), file)


def see_folder(folder: Path, record: dict[str, Any]) -> None:
    """See that `folder` is that of this comparison, whatever its seeds, and leave it as it is.

    Raises:
        ConfigError: it is none, or another one.
    """
    file = folder / RECORD_FILE
    if not file.is_file():
        raise ConfigError(f"There is no comparison in '{folder}' (no {RECORD_FILE}). Leave out --report to begin one.")
    before = OmegaConf.to_container(LazyConfig.load(file))
    # of an entry of the zoo the record has the version, and the weights themselves are not looked at here
    _refuse_another(folder, before, record, ("init", "config.train.init"))


def _refuse_fewer_seeds(folder: Path, before: list[int], now: list[int]) -> None:
    gone = sorted(set(before) - set(now))
    if gone:
        raise ConfigError(
            f"{folder} compares the seeds {', '.join(map(str, before))}. Seeds may be added, and not left "
            f"out, since that would be a choice among results; missing are {', '.join(map(str, gone))}. --report tells "
            "what there is by now."
        )


def _refuse_another(folder: Path, before: dict[str, Any], now: dict[str, Any], but: tuple[str, ...] = ()) -> None:
    both = before["arms"].keys() & now["arms"].keys()
    old, new = (
        leaves({**record, "seeds": None, "samples": None, "arms": {name: record["arms"][name] for name in both}})
        for record in (before, now)
    )
    rows = [
        (key, json.dumps(old.get(key)), json.dumps(new.get(key)))
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not _is_free(key) and not key.startswith(but)
    ]
    if rows:
        raise ConfigError(
            f"{folder} holds a comparison with another configuration:\n"
            f"{tabulate(rows, headers=['key', 'was', 'is'], disable_numparse=True)}\n"
            "Go on with the same one, or give another folder, as in train.output_dir=runs/another."
        )


def _refuse_other_samples(folder: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuse data sets that have other samples; folders from before there were digests say nothing of them."""
    changed = [role for role in before.keys() & now.keys() if before[role] != now[role]]
    if changed:
        named = " and ".join(f"{role} ('{now[role]['name']}')" for role in sorted(changed))
        raise ConfigError(
            f"{folder} holds figures of other images: the data set of {named} has not the samples that it had when the "
            "comparison began. Put its files back as they were, or give another folder, as in "
            "train.output_dir=runs/another."
        )


def leaves(value: Any, key: str = "") -> dict[str, Any]:
    """The values of nested mappings and lists under dotted keys."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if items is None:
        return {key: value}
    found: dict[str, Any] = {}
    for name, item in items:
        found |= leaves(item, f"{key}.{name}".lstrip("."))
    return found


def _is_free(key: str) -> bool:
    section, _, name = key.partition(".")
    return section == "config" and (name.startswith(FREE_KEYS) or name.endswith(LOADER_KEYS))
