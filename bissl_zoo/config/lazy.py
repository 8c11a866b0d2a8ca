"""Lazy calls: `LazyCall` describes a call as data, `to_plain` reduces it to plain values, `instantiate` makes it.

A lazy call is a dictionary with the dotted name of its target under `_target_` and its keyword arguments beside it.
"""

import dataclasses
import functools
import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf, SCMode
from omegaconf.errors import OmegaConfBaseException

from bissl_zoo.errors import ConfigError, argument_problem, did_you_mean


def locate(name: str) -> Any:
    """Import the object with a dotted name such as "torch.nn.Linear".

    Raises:
        ConfigError: the module or object does not exist (with the nearest name), or its import fails.
    """
    parts = name.split(".") if isinstance(name, str) else []
    if len(parts) < 2 or not all(part.isidentifier() for part in parts):
        raise ConfigError(f"{name!r} is not a dotted name such as 'torch.nn.Linear'.")
    for k in range(len(parts) - 1, 0, -1):  # the longest module first: a function may hide the module of its name
        module = ".".join(parts[:k])
        try:
            obj = importlib.import_module(module)
            break
        except Exception as error:
            absent = isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}.")
            if not absent:  # the module exists but raises an error
                problem = f"{type(error).__name__}: {error}"
                raise ConfigError(f"Cannot import '{name}': running the module {module} failed: {problem}") from error
    else:
        raise ConfigError(f"Cannot import '{name}': no module is called '{parts[0]}'. Is its package installed?")
    for owner, part in zip(parts[k - 1 :], parts[k:], strict=False):
        if not hasattr(obj, part):
            raise ConfigError(f"Cannot import '{name}': '{owner}' has no '{part}'.{did_you_mean(part, dir(obj))}")
        obj = getattr(obj, part)
    return obj


locate.__module__ = "bissl_zoo.config"  # saved configs contain this path
# the lazy call for a class or function that is a value: norm_layer=nn.BatchNorm2d
_LOCATE = f"{locate.__module__}.locate"


def partial(function: Callable[..., Any], args: Sequence[Any] = (), keywords: Mapping[str, Any] | None = None) -> Any:
    """Return `functools.partial(function, *args, **keywords)`; a partial in a config becomes a lazy call of this."""
    return functools.partial(function, *args, **(keywords or {}))


partial.__module__ = "bissl_zoo.config"


def _dotted_name(obj: Any) -> str:
    """Return the name by which `locate` finds `obj`; raise ConfigError if there is none."""
    module, qualname = getattr(obj, "__module__", None), getattr(obj, "__qualname__", None)
    if inspect.ismethod(obj) and isinstance(obj.__self__, type):  # a classmethod, possibly inherited
        module, qualname = obj.__self__.__module__, f"{obj.__self__.__qualname__}.{obj.__name__}"
    name = f"{module}.{qualname}"
    try:
        importable = module != "__main__" and locate(name) == obj
    except ConfigError:
        importable = False
    if not importable:
        raise ConfigError(
            f"{obj!r} cannot be imported by a name. Move it to the top level of an importable module (not a config or "
            "the script that runs), or give its dotted name: L('package.module.name')(...)."
        )
    return name


class LazyCall:
    """Describe a call instead of making it: `LazyCall(nn.Linear)(in_features=8, out_features=2)` is a DictConfig.

    Arguments can be edited afterwards and may be lazy calls themselves; `instantiate` makes the call.

    Args:
        target: an importable class or function, stored as its dotted name; a dotted name; or a lazy call whose result
            will be called.
    Raises:
        ConfigError: the target is a lambda, a local object or an object of `__main__`, or an argument is positional.
    """

    def __init__(self, target: Callable[..., Any] | str | Mapping[str, Any]) -> None:
        self._target = target if isinstance(target, (str, Mapping)) else _dotted_name(target)

    def __call__(self, /, *args: Any, **kwargs: Any) -> DictConfig:
        if args:
            raise ConfigError(f"L({self._target})(...) takes keyword arguments only, as in L(f)(size=3).")
        return DictConfig({"_target_": self._target, **kwargs}, flags={"allow_objects": True})


def to_plain(value: Any, source: str, key: str = "") -> Any:
    """Convert `value` to dictionaries, lists and scalars of plain type, keeping interpolations.

    Tuples become lists; a class or function becomes a lazy call of `locate`; named tuples, data classes, partials and
    objects without attributes, such as Detectron2's `ShapeSpec(channels=3)`, become lazy calls of their class.

    Raises:
        ConfigError: it contains any other object; the message names `source` and the full dotted key.
    """
    live = type(value)
    if OmegaConf.is_config(value):
        live = OmegaConf.get_type(value)
        if not dataclasses.is_dataclass(live):
            value = OmegaConf.to_container(value, resolve=False, structured_config_mode=SCMode.DICT_CONFIG)
    if value is None or type(value) in (bool, int, float, str):
        return value
    call = _described(value, live)
    if call is not None:
        target, arguments = call
        return {"_target_": _plain_target(target, source, key), **to_plain(arguments, source, key)}
    if isinstance(value, (list, tuple)):
        return [to_plain(item, source, f"{key}.{i}".lstrip(".")) for i, item in enumerate(value)]
    if isinstance(value, dict):
        plain = {}
        for name, item in value.items():
            path = f"{key}.{name}".lstrip(".")
            if type(name) not in (str, int):
                kind = type(name).__name__
                raise ConfigError(f"{source}: in '{path}' the key {name!r} is a {kind}; quote it to make it text.")
            is_target = name == "_target_" and callable(item)
            plain[name] = _plain_target(item, source, path) if is_target else to_plain(item, source, path)
        return plain
    if isinstance(value, type) or inspect.isroutine(value):
        return {"_target_": _LOCATE, "name": _plain_target(value, source, key)}
    raise ConfigError(
        f"{source}: '{key}' is a live object of {live.__module__}.{live.__qualname__}. Describe the call that creates "
        f"it: L({live.__qualname__})(...)."
    )


def _described(value: Any, live: type) -> tuple[Any, dict[str, Any]] | None:
    """Return the class or function, and the keyword arguments, of the call that makes an equal object, if it is known.

    Args:
        live: type of the object; a config with the fields of a data class stands for an object of that class.
    """
    if isinstance(value, functools.partial):
        return partial, {"function": value.func, "args": list(value.args), "keywords": value.keywords}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return live, value._asdict()
    if dataclasses.is_dataclass(live) and not isinstance(value, type):
        fields = [field.name for field in dataclasses.fields(live) if field.init]
        if OmegaConf.is_config(value):
            value = OmegaConf.to_container(value, resolve=False, structured_config_mode=SCMode.DICT)
            return live, {name: value[name] for name in fields}
        return live, {name: getattr(value, name) for name in fields}
    if getattr(value, "__dict__", None) == {} and not isinstance(value, type) and not inspect.isroutine(value):
        return (live, {}) if argument_problem(live, ()) is None else None
    return None


def _plain_target(obj: Any, source: str, key: str) -> str:
    try:
        return _dotted_name(obj)
    except ConfigError as error:
        raise ConfigError(f"{source}: '{key}': {error}") from None


def to_code(plain: Any, path: str = "") -> list[str]:
    """Return a plain config as lines of code, such as `train.seed = 0` or `task.head = Linear(in_features=8)`."""
    if isinstance(plain, dict) and "_target_" not in plain and (plain or not path):
        return [line for name, item in plain.items() for line in to_code(item, f"{path}.{name}".lstrip("."))]
    return [f"{path} = {_expression(plain)}"]


def _expression(plain: Any) -> str:
    if isinstance(plain, list):
        return f"[{', '.join(map(_expression, plain))}]"
    if not isinstance(plain, dict):
        return repr(plain)
    if "_target_" not in plain:
        return "{" + ", ".join(f"{name!r}: {_expression(item)}" for name, item in plain.items()) + "}"
    if plain["_target_"] == _LOCATE:
        return str(plain.get("name")).rpartition(".")[2]
    target = (
        plain["_target_"].rpartition(".")[2] if isinstance(plain["_target_"], str) else _expression(plain["_target_"])
    )
    return f"{target}({', '.join(f'{name}={_expression(item)}' for name, item in plain.items() if name != '_target_')})"


def instantiate(cfg: Any, /, **extra: Any) -> Any:
    """Make the call that `cfg` describes, after the calls among its arguments.

    Args:
        cfg: a lazy call, or dictionaries and lists that contain some, which are returned as plain `dict` and `list`.
        extra: further arguments of the outermost call, passed by identity; they replace keys of the same name.
    Raises:
        ConfigError: a target cannot be imported or does not take its arguments, or an interpolation fails. Errors of a
            called function are passed on unchanged.
    """
    if OmegaConf.is_config(cfg):
        return _build(resolved(cfg, missing=True), cfg._get_full_key(None), extra)
    return _build(cfg, "", extra)


def resolved(cfg: Any, missing: bool = False) -> Any:
    """Return `cfg` as plain containers with resolved interpolations.

    Args:
        missing: raise an error for values that are "???".
    Raises:
        ConfigError: an interpolation fails, or a value is missing; names the key.
    """
    try:
        return OmegaConf.to_container(cfg, resolve=True, throw_on_missing=missing)
    except OmegaConfBaseException as error:
        raise ConfigError(f"'{error.full_key}': {str(error).splitlines()[0]}") from error


def _build(cfg: Any, key: str, extra: Mapping[str, Any]) -> Any:
    if OmegaConf.is_config(cfg):
        cfg = resolved(cfg, missing=True)
    called = isinstance(cfg, dict) and "_target_" in cfg
    if extra and not called:
        raise ConfigError(f"'{key}' is not a lazy call (it has no _target_), so it cannot take {', '.join(extra)}.")
    if isinstance(cfg, list):
        return [_build(item, f"{key}.{i}".lstrip("."), {}) for i, item in enumerate(cfg)]
    if not isinstance(cfg, dict):
        return cfg
    built = {name: _build(item, f"{key}.{name}".lstrip("."), {}) for name, item in cfg.items() if name not in extra}
    if not called:
        return built
    target, label = built.pop("_target_"), cfg["_target_"]
    where = f"'{key}': " if key else ""
    if isinstance(target, str):
        try:
            target = locate(target)
        except ConfigError as error:
            raise ConfigError(f"{where}{error}") from error.__cause__
    if not callable(target):
        raise ConfigError(f"{where}the _target_ {label!r} cannot be called: its type is {type(target).__name__}.")
    arguments = {**built, **extra}
    if problem := argument_problem(target, arguments):
        raise ConfigError(f"{where}{label if isinstance(label, str) else target} {problem}")
    return target(**arguments)
