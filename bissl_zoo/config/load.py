"""LazyConfig in Detectron2's dialect: load Python or YAML files, save, override and print configs.

A loaded config contains only None, bool, int, float, str, lists and dictionaries, so it can be saved as YAML and loaded
again, equal. Lazy calls are defined in `lazy.py`; config files import from `bissl_zoo.config`.
"""

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from bissl_zoo.config.files import config_root, dump_yaml, no_config, parse_yaml, read, run_python, short_path
from bissl_zoo.config.lazy import resolved, to_code, to_plain
from bissl_zoo.config.overrides import apply_override
from bissl_zoo.errors import ConfigError
from bissl_zoo.files import write_atomically
from bissl_zoo.limits import limit, stated

#: what may be a key in the text of an interpolation
_WORD = re.compile(r"[\w.]+")


class LazyConfig:
    """Load, save, override and print configs; no method changes its input."""

    @staticmethod
    def load(path: str | os.PathLike[str]) -> DictConfig:
        """Load a `.py` or `.yaml` config file.

        The public dictionaries and lists of a Python file (plain, or from LazyCall) are the sections of the config;
        other variables are helpers. Relative imports between config files follow the folders on disk and give copies.

        Raises:
            ConfigError: the file does not parse or run (names file and line), or a section contains a live object
                instead of a lazy call (names file and key).
        """
        file = Path(os.path.abspath(path))
        source = short_path(file)
        if file.suffix == ".py":
            containers = (dict, list, DictConfig, ListConfig)
            variables = run_python(file).items()
            sections = {name: v for name, v in variables if isinstance(v, containers) and not name.startswith("_")}
        elif file.suffix in (".yaml", ".yml"):
            sections = parse_yaml(read(file), source)
        else:
            raise ConfigError(f"{source}: a config file ends in .py, .yaml or .yml.")
        if not isinstance(sections, dict):
            raise ConfigError(f"{source}: a config is a mapping of sections, not {type(sections).__name__}.")
        return _to_config(to_plain(sections, source), source)

    @staticmethod
    def save(cfg: DictConfig, path: str | os.PathLike[str]) -> None:
        """Write `cfg` atomically as YAML, with its interpolations; `load` reads it back, equal.

        Raises:
            ConfigError: the config contains a live object, or the file cannot be written.
        """
        file = Path(os.path.abspath(path))
        if file.suffix not in (".yaml", ".yml"):
            raise ConfigError(f"{short_path(file)}: configs are saved as YAML; use a name that ends in .yaml.")
        try:
            write_atomically(file, dump_yaml(to_plain(cfg, short_path(file))))
        except OSError as error:
            raise ConfigError(f"{short_path(file)}: cannot write the config: {error.strerror}.") from error

    @staticmethod
    def apply_overrides(cfg: DictConfig, overrides: Iterable[str], source: str = "config") -> DictConfig:
        """Return a new config with `overrides` applied in order: `a.b=c` changes, `+a.b=c` adds, `~a.b` removes.

        Values are YAML. A key to change or remove must exist; a key to add must not, but its section must. Numbers
        index lists: `a.0=x`; `+a.N=x` with N the length appends. A value replaces the old one completely. A section
        with keys can only be replaced by a mapping, and a list by a list or null, unless it is removed first. An
        interpolation `${...}` can replace anything.

        Raises:
            ConfigError: the message names `source`, the override and the nearest key.
        """
        plain = to_plain(cfg, source)
        for override in overrides:
            apply_override(plain, override, source)
        return _to_config(plain, source)

    @staticmethod
    def to_py(cfg: DictConfig) -> str:
        """Return the config as code-like text with resolved interpolations, one line per value or lazy call."""
        return "\n".join(to_code(to_plain(resolved(cfg), "config")))


def load_config(name: str | os.PathLike[str]) -> DictConfig:
    """Load a config by path, or a shipped one by its name below `config_root()`, such as "bissl/voc_det.py".

    Raises:
        ConfigError: there is no such config (names the nearest ones), or as :meth:`LazyConfig.load`.
    """
    shipped = Path(name).as_posix().removeprefix("configs/")
    for path in (Path(name), config_root() / shipped):
        if path.is_file():
            return LazyConfig.load(path)
    raise no_config(shipped)


def with_defaults(cfg: DictConfig) -> DictConfig:
    """Return `cfg` with missing keys of its plain sections set to the defaults in `configs/common/train.py`.

    Configs saved by earlier versions can therefore be resumed: the default of a new key keeps the old behaviour, and
    renamed keys are read under their new names. Missing sections are not added.
    """
    plain = OmegaConf.to_container(cfg)
    _rename_old_keys(plain)
    if isinstance(plain.get("bilevel"), dict):
        plain["bilevel"].setdefault("curvature", "hessian")  # before the key existed
    for name, section in OmegaConf.to_container(load_config("common/train.py")).items():
        if isinstance(plain.get(name), dict):
            _fill(plain[name], section)
    return OmegaConf.create(plain)


#: keys of earlier versions -> the current key, and the values that were renamed
_RENAMED = {
    "bilevel.products": ("hvp_mode", {"graph": "retain_graph", "rebuild": "recompute"}),
    "bilevel.move_statistics": ("update_bn_stats", {}),
    "finetune.frozen_stage": ("freeze_at", {}),
    "dataloader.pretext.views_on": ("augment_on", {}),
}


def _rename_old_keys(plain: dict[str, Any]) -> None:
    pretrain = plain.get("pretrain")
    if isinstance(pretrain, dict) and pretrain.get("ema", "") is None:  # an option of earlier versions, switched off
        del pretrain["ema"]
    train = plain.get("train")
    if isinstance(pretrain, dict) and isinstance(train, dict) and "channels_last" in pretrain:
        train.setdefault("channels_last", pretrain.pop("channels_last"))
    if isinstance(train, dict) and isinstance(train.get("checkpoint"), dict):
        train["checkpoint"].pop("best", None)  # an option of earlier versions: which checkpoints are kept
    for path, (name, values) in _RENAMED.items():
        *parents, old = path.split(".")
        section: Any = plain
        for parent in parents:
            section = section.get(parent) if isinstance(section, dict) else None
        if isinstance(section, dict) and old in section:
            value = section.pop(old)
            section.setdefault(name, values.get(value, value) if isinstance(value, str) else value)


def _fill(section: dict[str, Any], reference: dict[str, Any]) -> None:
    for key, default in reference.items():
        value = section.setdefault(key, default)
        if isinstance(value, dict) and isinstance(default, dict):
            _fill(value, default)


def _to_config(plain: dict[Any, Any], source: str) -> DictConfig:
    _check_expansion(plain, source)
    try:
        return OmegaConf.create(plain)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{source}: '{error.full_key}': {str(error).splitlines()[0]}") from error


def _check_expansion(root: Any, source: str) -> None:
    """Raise ConfigError for interpolations that multiply: `[${a}, ${a}]` thirty times over is a billion values."""
    sizes: dict[str, int] = {}

    def size_of(node: Any, key: str) -> int:
        """Return the number of values of a node, or of texts that are joined, after every interpolation."""
        if key not in sizes:
            sizes[key] = 1  # of a circular reference, which omegaconf reports
            if isinstance(node, (dict, list)):
                items = node.items() if isinstance(node, dict) else enumerate(node)
                sizes[key] = 1 + sum(size_of(item, f"{key}.{name}".lstrip(".")) for name, item in items)
            elif isinstance(node, str) and "${" in node:
                if re.search(r"\$\{[^}]*\$\{", node):
                    raise ConfigError(
                        f"{source}: '{key}' is {node!r:.100}: write the key out instead of ${{...${{...}}}}."
                    )
                sizes[key] = 1 + sum(
                    size_of(*place) for name in _WORD.findall(node) for place in _find(root, key, name)
                )
            if sizes[key] > limit("CONFIG_VALUES"):
                problem = f"{source}: '{key}' has {sizes[key]:,} values after its interpolations"
                raise ConfigError(f"{problem}; {stated('CONFIG_VALUES')}.")
        return sizes[key]

    size_of(root, "")


def _find(root: Any, key: str, name: str) -> list[tuple[Any, str]]:
    """Return node and key of what `name` (also `.sibling`, `..cousin`) refers to in the value of `key`, if any."""
    up = len(name) - len(name.lstrip("."))
    parts = [*(key.split(".")[:-up] if up else ()), *filter(None, name.split("."))]
    node = root
    for part in parts:
        if isinstance(node, list) and part.isascii() and part.isdigit() and int(part[:9]) < len(node):
            node = node[int(part)]
        elif isinstance(node, dict) and part in node:
            node = node[part]
        else:
            return []
    return [(node, ".".join(parts))]
