"""LazyConfig in Detectron2's dialect: config files in Python or YAML, strict overrides, and saving.

A loaded config holds nothing but None, bool, int, float, str, lists and dictionaries, so that it can be saved as YAML
and loads again, equal. Described calls are the subject of `lazy.py`; what a config file needs is importable from here.
"""

import difflib
import os
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from bissl_zoo.config.files import dump_yaml, parse_yaml, read, run_python, shown
from bissl_zoo.config.lazy import LazyCall, instantiate, locate, to_code, to_plain
from bissl_zoo.errors import ConfigError

__all__ = ["LazyCall", "LazyConfig", "config_root", "instantiate", "load_config", "locate", "with_defaults"]

#: bytes of a YAML config, a hundred times what the largest has; parsing takes three hundred times as many
_YAML_LIMIT = 1 << 20
#: levels of sections and lists, far more than any config has; omegaconf needs minutes for a few hundred
_DEPTH_LIMIT = 64


class LazyConfig:
    """Load, save, override and print configs; every method takes a config and leaves it as it was."""

    @staticmethod
    def load(path: str | os.PathLike[str]) -> DictConfig:
        """Load a `.py` or `.yaml` config file.

        Of a Python file, its public dictionaries and lists (plain, or from LazyCall) are the config's sections; other
        variables are helpers. Relative imports between config files follow the folders on disk, and give copies.

        Raises:
            ConfigError: with file and line where the file does not parse or run, with file and key where a value is a
                live object instead of a described call.
        """
        file = Path(os.path.abspath(path))
        source = shown(file)
        if file.suffix == ".py":
            variables = {name: value for name, value in run_python(file).items() if not name.startswith("_")}
            sections = {name: value for name, value in variables.items() if _is_section(value)}
        elif file.suffix in (".yaml", ".yml"):
            if file.is_file() and file.stat().st_size > _YAML_LIMIT:
                raise ConfigError(f"{source}: this config file has more than {_YAML_LIMIT:,} bytes, so it is not read.")
            sections = _shallow(parse_yaml(read(file), source), source)
        else:
            raise ConfigError(f"{source}: a config file ends in .py, .yaml or .yml.")
        if not isinstance(sections, dict):
            raise ConfigError(f"{source}: a config is a mapping of sections, not {type(sections).__name__}.")
        return _to_config(to_plain(sections, source), source)

    @staticmethod
    def save(cfg: DictConfig, path: str | os.PathLike[str]) -> None:
        """Write `cfg` as YAML that `load` reads back, equal; interpolations stay interpolations. Atomic.

        Raises:
            ConfigError: when the config holds a live object, or the file cannot be written.
        """
        file = Path(os.path.abspath(path))
        if file.suffix not in (".yaml", ".yml"):
            raise ConfigError(f"{shown(file)}: configs are saved as YAML; let the name end in .yaml.")
        text = dump_yaml(to_plain(cfg, shown(file)))
        temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
        try:
            with open(temporary, "w", encoding="utf-8", newline="\n") as stream:
                stream.write(text)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, file)
        except OSError as error:
            raise ConfigError(f"{shown(file)}: cannot write the config: {error.strerror}.") from error
        finally:
            temporary.unlink(missing_ok=True)

    @staticmethod
    def apply_overrides(cfg: DictConfig, overrides: Iterable[str], source: str = "config") -> DictConfig:
        """A new config with `overrides` applied in order: `a.b=c` changes, `+a.b=c` adds, `~a.b` removes.

        Values are YAML. A key to change or remove must exist, one to add must not (its section must). Numbers index
        lists: `a.0=x`; `+a.N=x` with N the length appends. A value replaces the old one whole; a section that holds
        keys is replaced by a mapping only and a list by a list or null, unless removed first. An interpolation
        `${...}` may replace anything.

        Raises:
            ConfigError: with `source`, the override and the nearest key.
        """
        plain = to_plain(cfg, source)
        for override in overrides:
            _override(plain, override, source)
        return _to_config(plain, source)

    @staticmethod
    def to_py(cfg: DictConfig) -> str:
        """A code-like form for people, interpolations resolved: one `key = value` line per value or described call."""
        try:
            return "\n".join(to_code(to_plain(OmegaConf.to_container(cfg, resolve=True), "config")))
        except OmegaConfBaseException as error:
            raise ConfigError(f"'{error.full_key}': {str(error).splitlines()[0]}") from error


def config_root() -> Path:
    """The folder of the shipped configs: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    return package / "configs" if (package / "configs").is_dir() else package.parent / "configs"


def load_config(name: str | os.PathLike[str]) -> DictConfig:
    """Load a config by path, or a shipped one by its name under `config_root()`, such as "bissl/voc_det.py".

    Raises:
        ConfigError: with the nearest and the available names when there is no such config; else as `LazyConfig.load`.
    """
    root = config_root()
    for path in (Path(name), root / name):
        if path.is_file():
            return LazyConfig.load(path)
    shipped = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py"))
    shipped = [path for path in shipped if not path.startswith("common/")]
    near = difflib.get_close_matches(str(name), shipped, n=4, cutoff=0.5)
    near += [path for path in shipped if Path(path).stem == Path(name).stem and path not in near]
    nearest = f" Nearest: {', '.join(near)}." if near else ""
    raise ConfigError(f"There is no config '{name}'.{nearest} The shipped ones are the {len(shipped)} files in {root}.")


def with_defaults(cfg: DictConfig) -> DictConfig:
    """`cfg` with what its plain sections lack of `configs/common/train.py`, at the defaults given there.

    So a config that was saved before there was a key goes on: a new key's default is to do as before. Sections that are
    missing whole are left to those who miss them.
    """
    plain = OmegaConf.to_container(cfg)
    _rename_old_keys(plain)
    for name, section in OmegaConf.to_container(load_config("common/train.py")).items():
        if isinstance(plain.get(name), dict):
            _fill(plain[name], section)
    return OmegaConf.create(plain)


#: keys of earlier versions -> the key of today, and the values that have another name
_RENAMED = {
    "bilevel.products": ("hvp_mode", {"graph": "retain_graph", "rebuild": "recompute"}),
    "bilevel.move_statistics": ("update_bn_stats", {}),
    "finetune.frozen_stage": ("freeze_at", {}),
    "dataloader.pretext.views_on": ("augment_on", {}),
}


def _rename_old_keys(plain: dict[str, Any]) -> None:
    for path, (name, values) in _RENAMED.items():
        *parents, old = path.split(".")
        section: Any = plain
        for parent in parents:
            section = section.get(parent) if isinstance(section, dict) else None
        if isinstance(section, dict) and old in section:
            value = section.pop(old)
            section.setdefault(name, values.get(value, value) if isinstance(value, str) else value)


def _fill(found: dict[str, Any], reference: dict[str, Any]) -> None:
    for key, default in reference.items():
        value = found.setdefault(key, default)
        if isinstance(value, dict) and isinstance(default, dict):
            _fill(value, default)


def _to_config(plain: dict[Any, Any], source: str) -> DictConfig:
    try:
        return OmegaConf.create(plain)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{source}: '{error.full_key}': {str(error).splitlines()[0]}") from error


def _shallow(value: Any, source: str) -> Any:
    """The same value; ConfigError where it is nested deeper than configs are."""
    level = [value]
    for _ in range(_DEPTH_LIMIT):
        containers = [one for one in level if isinstance(one, (dict, list))]
        level = [item for one in containers for item in (one.values() if isinstance(one, dict) else one)]
    if any(isinstance(one, (dict, list)) for one in level):
        raise ConfigError(f"{source}: sections and lists are nested more than {_DEPTH_LIMIT} levels deep.")
    return value


def _is_section(value: Any) -> bool:
    """Whether a top-level value belongs to the config; a live object of torch does, so that it is refused by name."""
    if isinstance(value, (dict, list, DictConfig, ListConfig)):
        return True
    torch = sys.modules.get("torch")  # while torch is not imported there is nothing of torch to find
    if torch is None:
        return False
    data = torch.utils.data
    return isinstance(value, (torch.nn.Module, torch.optim.Optimizer, data.Dataset, data.DataLoader))


def _override(plain: dict[Any, Any], override: str, source: str) -> None:
    """Apply one override to plain containers, in place; the rules are those of `LazyConfig.apply_overrides`."""
    sign = override[:1] if override.startswith(("+", "~")) else ""
    key, equals, text = override[len(sign) :].partition("=")
    parts = [part.strip() for part in key.split(".")]
    key, last = ".".join(parts), parts[-1]

    def refusal(problem: str, advice: str) -> ConfigError:
        return ConfigError(f"{source}: {problem} (override '{override}').{advice}")

    if not all(parts) or bool(equals) == (sign == "~"):
        forms = "key.sub=value to change, +key.sub=value to add, ~key.sub to remove"
        raise refusal("incomplete or misplaced key or '='", f" Write {forms}.")
    parent, place = plain, _place(plain, parts[0])
    for part in parts[1:]:
        parent = None if place is None else parent[place]
        place = _place(parent, part)
    if sign == "+" and place is not None:
        raise refusal(f"the key '{key}' exists already", f" Use {override[1:]} to change it.")
    if sign == "+" and isinstance(parent, list) and last != str(len(parent)):
        raise refusal(
            f"the list '{key[: -len(last) - 1]}' has {len(parent)} entries", f" Number {len(parent)} appends."
        )
    if sign == "+" and not isinstance(parent, (dict, list)):
        section = ".".join(parts[:-1])
        raise refusal(
            f"no section '{section}' to add to", f"{_nearest(plain, section)} Use +{section}={{...}} to add it."
        )
    if sign != "+" and place is None:
        advice = f" Use +{override} to add it." if isinstance(parent, dict) and not sign else ""
        raise refusal(f"no key '{key}'", _nearest(plain, key) + advice)
    if sign == "~":
        del parent[place]
        return
    described = f"{source}: override '{override}'"
    value = to_plain(_shallow(parse_yaml(text, described), described), source, key)
    if sign == "+" and isinstance(parent, list):
        parent.append(value)
    elif sign == "+":
        parent[last] = value
    else:
        old, refers = parent[place], isinstance(value, str) and "${" in value
        if isinstance(old, dict) and old and not (isinstance(value, dict) or refers):
            advice = f" Name one of its keys ({', '.join(map(str, old))}), or give ~{key} and then +{key}=..."
            raise refusal(f"'{key}' is a section, not a value", advice)
        if isinstance(old, list) and not (isinstance(value, list) or value is None or refers):
            raise refusal(f"'{key}' is a list", f" Use {key}=[{text}] or {key}.0={text}.")
        parent[place] = value


def _place(node: Any, part: str) -> Any:
    """The key or index of `node` that `part` names, or None where it names nothing."""
    number = int(part) if re.fullmatch(r"[0-9]{1,18}", part) else None
    if isinstance(node, list):
        return number if number is not None and number < len(node) else None
    if isinstance(node, dict):
        return part if part in node else number if number in node else None
    return None


def _nearest(plain: dict[Any, Any], key: str) -> str:
    paths = dict(_paths(plain))
    above = key
    while above:  # nothing lies below an interpolation: the key belongs to what it refers to
        if isinstance(paths.get(above), str) and "${" in paths[above]:
            return f" '{above}' is {paths[above]}; override what it refers to."
        above = above.rpartition(".")[0]
    close = difflib.get_close_matches(key, paths, n=1) or [path for path in paths if path.endswith(f".{key}")][:3]
    return f" Nearest: {', '.join(close)}." if close else ""


def _paths(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for name, item in items:
        yield f"{prefix}{name}", item
        yield from _paths(item, f"{prefix}{name}.")
