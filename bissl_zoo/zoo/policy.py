"""Check the config of a zoo entry: it is untrusted data, so only listed keys and arguments are accepted.

The calls of a config and their arguments are listed in `bissl_zoo.config.arguments`. Files, addresses, caches and
modules never come from an entry.
"""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from bissl_zoo.config.arguments import USER_ARGS, arguments_of
from bissl_zoo.errors import RegistryError, ZooError, did_you_mean

#: keys that only the user decides: where a run reads and writes, what it imports and which hooks it runs
USER_KEYS = (
    *("train.output_dir", "train.init", "train.zoo", "train.publish", "train.imports", "train.writers"),
    *("train.hooks", "train.device", "train.lock"),
)
#: sections that hold described calls; the others hold plain values under the keys of configs/common/train.py
CALL_SECTIONS = ("optimizer", "lr_multiplier", "dataloader", "backbone", "pretext", "task", "solver")

#: most values in a config, nesting, characters of a text, and magnitude of a whole number
MAX_VALUES, MAX_DEPTH, MAX_TEXT, MAX_INT = 20_000, 12, 200, 10_000_000
#: texts: names of models, metrics, splits and choices; no path, no address, no interpolation
_TEXT = re.compile(r"[\w][\w .,+@=()-]*", re.ASCII)
#: a reference to another value of the config
_REFERENCE = re.compile(r"\$\{([\w.]+)\}", re.ASCII)
#: items of `classes`: anything printable
_CLASSES = "classes"


def restrict(plain: Mapping[str, Any], reference: Mapping[str, Any], source: str) -> tuple[dict[str, Any], list[str]]:
    """Return what may be taken of the config of a zoo entry, and the keys that are left to the user.

    Args:
        plain: plain dictionaries, lists and scalars.
        reference: the plain sections with their defaults, `configs/common/train.py`.
        source: of the config, for messages.
    Returns:
        The config with `USER_KEYS` at their defaults, without `USER_ARGS` and without sections that a run
        does not read; and the dotted keys of what was left out.
    Raises:
        ZooError: for any other call, argument or value that is not listed here, with key and reason.
    """
    _check_size(plain, source)
    plain = _dereferenced(plain, plain, "", source)
    left: list[str] = []
    taken: dict[str, Any] = {}
    for section, value in plain.items():
        if section in reference and isinstance(value, Mapping):
            taken[section] = _plain_section(value, reference[section], str(section), left, source)
        elif section in CALL_SECTIONS:
            taken[section] = _calls(value, str(section), left, source)
        else:
            left.append(str(section))
    return taken, left


def _plain_section(
    section: Mapping[Any, Any], reference: Mapping[str, Any], path: str, left: list[str], source: str
) -> dict[str, Any]:
    taken = {}
    for name, value in section.items():
        key = f"{path}.{name}"
        default = reference.get(name)
        if key in USER_KEYS:
            if value != default:
                left.append(key)
            taken[name] = default
        elif isinstance(value, Mapping) and "_target_" in value:
            _refuse(source, key, "is a call, and this section holds values only")
        elif isinstance(value, Mapping) and (default is None or isinstance(default, Mapping)):
            taken[name] = _plain_section(value, default or {}, key, left, source)
        else:
            taken[name] = _value(value, key, source)
    return taken


def _calls(node: Any, key: str, left: list[str], source: str) -> Any:
    """Check a described call, or a mapping of roles to described calls."""
    if not isinstance(node, Mapping):
        return _value(node, key, source)
    if "_target_" not in node:
        if key not in CALL_SECTIONS:
            _refuse(source, key, "is a mapping without a call")
        return {name: _calls(value, f"{key}.{name}", left, source) for name, value in node.items()}
    allowed, only_user = _arguments(node, key, source)
    taken: dict[str, Any] = {"_target_": node["_target_"]}
    for name, value in node.items():
        where = f"{key}.{name}"
        if name in only_user:
            left.append(where)
        elif name == "_target_":
            continue
        elif name not in allowed:
            _refuse(source, where, f"is not an argument that an entry may set.{did_you_mean(str(name), allowed)}")
        elif isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
            taken[name] = [
                _calls(v, where, left, source) if isinstance(v, Mapping) else _value(v, where, source) for v in value
            ]
        else:
            taken[name] = _calls(value, where, left, source)
    return taken


def _arguments(call: Mapping[Any, Any], key: str, source: str) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return the domains of the arguments that an entry may set, and the arguments that are left to the user."""
    target = call["_target_"]
    try:
        domains = arguments_of(call)
    except RegistryError as error:
        raise ZooError(f"{source}: {key}.name: {error} Import the module that registers it: train.imports.") from error
    if domains is None:
        _refuse(source, f"{key}._target_", f"{target!r:.100} is not a part of bissl_zoo, and a zoo is data, not code")
    return domains, USER_ARGS.get(target, ())


def _value(value: Any, key: str, source: str) -> Any:
    """Check a scalar or a list of scalars and return it."""
    if isinstance(value, (list, tuple)):
        if key.rpartition(".")[2] == _CLASSES and all(isinstance(name, str) for name in value):
            if not all(name.isprintable() and len(name) <= MAX_TEXT for name in value):
                _refuse(source, key, "has class names that are not printable text")
            return list(value)
        return [_value(item, key, source) for item in value]
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        if abs(value) > MAX_INT:
            _refuse(source, key, f"is beyond {MAX_INT:,}, the largest that an entry may have")
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            _refuse(source, key, f"is {value}")
        return value
    if isinstance(value, str):
        if len(value) > MAX_TEXT or not _TEXT.fullmatch(value) or ".." in value:
            _refuse(source, key, f"is {value!r:.100}, which is not a plain name (a path, an address or an expression)")
        return value
    _refuse(source, key, f"is a {type(value).__name__}")


def _check_size(plain: Mapping[Any, Any], source: str) -> None:
    count = 0
    for depth, value in _nodes(plain):
        count += 1
        if count > MAX_VALUES:
            raise ZooError(f"{source}: the config has more than {MAX_VALUES:,} values; an entry may have as many.")
        if depth > MAX_DEPTH:
            raise ZooError(f"{source}: the config is nested deeper than {MAX_DEPTH} levels.")
        if isinstance(value, Mapping) and not all(isinstance(name, str) for name in value):
            raise ZooError(f"{source}: the config has keys that are not text.")


def _dereferenced(node: Any, root: Mapping[str, Any], key: str, source: str) -> Any:
    """Replace texts that are one reference to a number or text, such as `${optimizer.upper.lr}`, by its value."""
    if isinstance(node, Mapping):
        return {name: _dereferenced(value, root, f"{key}.{name}".lstrip("."), source) for name, value in node.items()}
    if isinstance(node, (list, tuple)):
        return [_dereferenced(value, root, key, source) for value in node]
    if not isinstance(node, str) or not (reference := _REFERENCE.fullmatch(node)):
        return node
    value: Any = root
    for part in reference[1].split("."):
        value = value[part] if isinstance(value, Mapping) and part in value else node
    if isinstance(value, (Mapping, list)) or (isinstance(value, str) and "$" in value):
        _refuse(source, key, f"is {node!r:.100}, which is not a reference to a single value")
    return value


def _nodes(root: Any) -> Iterator[tuple[int, Any]]:
    stack = [(0, root)]
    while stack:
        depth, node = stack.pop()
        yield depth, node
        children = node.values() if isinstance(node, Mapping) else node if isinstance(node, (list, tuple)) else ()
        stack += [(depth + 1, child) for child in children]


def _refuse(source: str, key: str, reason: str) -> None:
    raise ZooError(
        f"{source}: the config is refused: {key[:200]!r} {reason}. A config from a zoo may only set listed arguments; "
        "`bissl zoo fetch` brings the file to look at."
    )
