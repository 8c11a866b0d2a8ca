"""The config of a run: how it differs from its base config, and its parts."""

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from bissl_zoo.config import config_root, load_config, with_defaults
from bissl_zoo.errors import ConfigError

#: sections with defaults in common/train.py
PLAIN = ("train", "pretrain", "bilevel", "finetune", "clip_grad")
#: maximum bytes of a text file that are read
_LIMIT = 4 << 20


@dataclass(frozen=True)
class Difference:
    """A key with its value in the base and in the run; None if it is missing."""

    key: str
    base: Any
    value: Any


@dataclass(frozen=True)
class Differences:
    """The keys in which a run differs from its base config."""

    base: str
    changed: list[Difference]


def leaves(cfg: Any) -> dict[str, Any]:
    """Return the values of a config by dotted key; lists are values."""
    plain = OmegaConf.to_container(cfg, resolve=False) if OmegaConf.is_config(cfg) else cfg
    values: dict[str, Any] = {}

    def visit(node: Any, key: str) -> None:
        if isinstance(node, dict) and node:
            for name, value in node.items():
                visit(value, f"{key}.{name}" if key else str(name))
        else:
            values[key] = node

    visit(plain, "")
    return values


def differences(cfg: DictConfig, environment: str) -> Differences:
    """Return how `cfg` differs from the shipped config on its command line or, without one, from the defaults.

    No other config is opened: configs are programs, and the run may come from a stranger.

    Args:
        environment: text of the run's `environment.txt`.
    """
    name = shipped_config(environment)
    if name:
        base, run = leaves(with_defaults(load_config(config_root() / name))), leaves(cfg)
        return Differences(f"configs/{name}", _changed(base, run, list(dict.fromkeys([*base, *run]))))
    base, run = leaves(load_config("common/train.py")), leaves(cfg)
    return Differences("configs/common/train.py", _changed(base, run, [k for k in run if k.split(".")[0] in PLAIN]))


def _changed(base: dict[str, Any], run: dict[str, Any], keys: Sequence[str]) -> list[Difference]:
    pairs = [Difference(key, base.get(key), run.get(key)) for key in keys if key != "train.output_dir"]
    return [pair for pair in pairs if pair.base != pair.value]


def shipped_config(environment: str) -> str | None:
    """Return the config in `configs/` that the command of a run names, or None."""
    match = re.search(r"^command: (.*)$", environment, re.MULTILINE)
    try:
        words = shlex.split(match[1]) if match else []
    except ValueError:  # unbalanced quotes
        return None
    place = words.index("--config-file") + 1 if "--config-file" in words else len(words)
    name = words[place].removeprefix("configs/") if place < len(words) else ""
    shipped = {path.relative_to(config_root()).as_posix() for path in config_root().rglob("*.py")}
    return name if name in shipped else None


def differing(configs: Sequence[DictConfig]) -> list[tuple[str, list[Any]]]:
    """Return the keys in which several configs differ, except for the output directory, with the value of each."""
    flat = [leaves(cfg) for cfg in configs]
    keys = dict.fromkeys(key for values in flat for key in values)
    rows = [(key, [values.get(key) for values in flat]) for key in keys if key != "train.output_dir"]
    return [(key, values) for key, values in rows if any(value != values[0] for value in values)]


def read_text(path: Path) -> str:
    """Return the first 4 MiB of a text file of a run directory; empty if there is no file.

    Raises:
        ConfigError: the file cannot be read.
    """
    if not path.is_file():
        return ""
    try:
        with open(path, "rb") as file:
            return file.read(_LIMIT).decode(errors="replace")
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from error
