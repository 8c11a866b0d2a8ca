"""What was run: how a run's config differs from the one it came from, and what its parts are."""

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from bissl_zoo.config import config_root, load_config, with_defaults
from bissl_zoo.errors import ConfigError

#: sections that common/train.py has defaults of
PLAIN = ("train", "pretrain", "bilevel", "finetune", "clip_grad")
#: sections that describe one call, and those that describe several
PARTS, GROUPS = ("backbone", "pretext", "task", "solver"), ("dataloader", "optimizer", "lr_multiplier")
#: bytes of a text file that are read
_LIMIT = 4 << 20


@dataclass(frozen=True)
class Difference:
    """A key with its value in the base and in the run; None where there is none."""

    key: str
    base: Any
    value: Any


@dataclass(frozen=True)
class Differences:
    """Against which config, and in which keys, a run differs."""

    base: str
    changed: list[Difference]


def leaves(cfg: Any) -> dict[str, Any]:
    """The values of a config by dotted key, lists whole."""
    plain = OmegaConf.to_container(cfg, resolve=False) if OmegaConf.is_config(cfg) else cfg
    found: dict[str, Any] = {}

    def walk(node: Any, key: str) -> None:
        if isinstance(node, dict) and node:
            for name, value in node.items():
                walk(value, f"{key}.{name}" if key else str(name))
        else:
            found[key] = node

    walk(plain, "")
    return found


def differences(cfg: DictConfig, environment: str) -> Differences:
    """How `cfg` differs from the shipped config that its command line names, or else from the defaults.

    A config of anybody else's is not opened: it is a program, and the run is perhaps a stranger's.

    Args:
        environment: the text of the run's `environment.txt`.
    """
    name = shipped_config(environment)
    if name:
        base, there = with_defaults(load_config(config_root() / name)), leaves(cfg)
        known = leaves(base)
        keys = [*known, *(key for key in there if key not in known)]
        return Differences(f"configs/{name}", _changed(known, there, keys))
    known = leaves(load_config("common/train.py"))
    there = leaves(cfg)
    keys = [key for key in there if key.split(".")[0] in PLAIN]
    return Differences("configs/common/train.py", _changed(known, there, keys))


def _changed(known: dict[str, Any], there: dict[str, Any], keys: Sequence[str]) -> list[Difference]:
    """Where the run lies is no difference."""
    pairs = [(key, known.get(key), there.get(key)) for key in keys if key != "train.output_dir"]
    return [Difference(*pair) for pair in pairs if pair[1] != pair[2]]


def shipped_config(environment: str) -> str | None:
    """The config in `configs/` that the command of a run names, if it does and the config is there."""
    found = re.search(r"^command: (.*)$", environment, re.MULTILINE)
    try:
        words = shlex.split(found[1]) if found else []
    except ValueError:  # a quote that is not closed
        return None
    place = words.index("--config-file") + 1 if "--config-file" in words else len(words)
    name = words[place].removeprefix("configs/") if place < len(words) else ""
    shipped = {path.relative_to(config_root()).as_posix() for path in config_root().rglob("*.py")}
    return name if name in shipped else None


def parts_of(cfg: DictConfig) -> list[tuple[str, str]]:
    """The described calls of a config, a line each."""
    plain = OmegaConf.to_container(cfg, resolve=False)
    calls = [(name, plain.get(name)) for name in PARTS]
    for group in GROUPS:
        section = plain.get(group)
        calls += [(f"{group}.{name}", call) for name, call in section.items()] if isinstance(section, dict) else []
    return [(name, _call(call)) for name, call in calls if isinstance(call, dict)]


def _call(value: Any) -> str:
    if isinstance(value, dict) and "_target_" in value:
        arguments = [f"{key}={_call(item)}" for key, item in value.items() if key != "_target_"]
        return f"{str(value['_target_']).rpartition('.')[2]}({', '.join(arguments)})"
    return value if isinstance(value, str) else f"{value}"


def differing(configs: Sequence[DictConfig]) -> list[tuple[str, list[Any]]]:
    """The keys in which several configs differ, but for where they were written, with the value of each."""
    found = [leaves(cfg) for cfg in configs]
    keys = dict.fromkeys(key for one in found for key in one)
    rows = [(key, [one.get(key) for one in found]) for key in keys if key != "train.output_dir"]
    return [(key, values) for key, values in rows if any(value != values[0] for value in values)]


def read_text(path: Path) -> str:
    """The beginning of a text file of a run directory; empty where there is none.

    Raises:
        ConfigError: it cannot be read.
    """
    if not path.is_file():
        return ""
    try:
        with open(path, "rb") as file:
            return file.read(_LIMIT).decode(errors="replace")
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from error
