"""The config of a command line: loaded, overridden, and the user's own parts imported."""

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig

from bissl_zoo.config import LazyConfig, load_config, with_defaults
from bissl_zoo.engine.init import ZOO_PREFIX
from bissl_zoo.errors import ConfigError
from bissl_zoo.zoo import get_config


def open_config(name: str, overrides: Sequence[str] = ()) -> DictConfig:
    """The config that `--config-file` names, with overrides, after `train.imports` has registered the user's own parts.

    Args:
        name: a path, a shipped config, or `zoo:NAME` for that of a zoo entry. Code that the latter names is not run.
    Raises:
        ConfigError: from loading, overriding and importing.
        ZooError: an entry that is unknown or damaged.
    """
    entry = name.removeprefix(ZOO_PREFIX)
    if entry == name:
        cfg = LazyConfig.apply_overrides(with_defaults(load_config(name)), overrides, source=name)
    else:
        cfg = with_defaults(get_config(entry))
        foreign = list(cfg.train.imports or [])
        cfg.train.imports = None
        cfg = LazyConfig.apply_overrides(cfg, overrides, source=name)
        if foreign and not cfg.train.imports:
            raise ConfigError(
                f"The entry '{entry}' was made with code of its own ({', '.join(foreign)}), which a zoo does not bring "
                "and which is not run unasked. Get that code, look at it, and name it: train.imports=[FILE]."
            )
    for module in cfg.train.imports or []:
        _import(str(module))
    return cfg


def _import(name: str) -> None:
    """Import a module by its name, or a `.py` file by its path from the working directory."""
    file = Path(name).absolute()
    if name.endswith(".py"):
        if not file.is_file():
            raise ConfigError(f"train.imports: there is no file {file}.")
        if str(file.parent) not in sys.path:
            sys.path.insert(0, str(file.parent))  # so that loader workers that are spawned find it as well
    module = file.stem if name.endswith(".py") else name
    try:
        loaded = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if not f"{module}.".startswith(f"{error.name}."):
            raise  # of what the module itself imports
        raise ConfigError(
            f"train.imports: there is no module '{name}'. Install it, or give the path of its file."
        ) from error
    if name.endswith(".py") and Path(loaded.__file__ or "").resolve() != file.resolve():
        raise ConfigError(
            f"train.imports: {file} has the name of another module, {loaded.__file__ or module}. Rename the file."
        )
