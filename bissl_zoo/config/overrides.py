"""Command-line overrides: `a.b=c` changes a key, `+a.b=c` adds one, `~a.b` removes one."""

import difflib
import re
from collections.abc import Iterator
from typing import Any

from bissl_zoo.config.files import parse_yaml
from bissl_zoo.config.lazy import to_plain
from bissl_zoo.errors import ConfigError

_FORMS = "Write key.sub=value to change, +key.sub=value to add, ~key.sub to remove."


def apply_override(plain: dict[Any, Any], override: str, source: str) -> None:
    """Apply one override to plain containers, in place; see :meth:`LazyConfig.apply_overrides` for the rules.

    Raises:
        ConfigError: the message names `source`, the override and the nearest key.
    """
    sign = override[:1] if override.startswith(("+", "~")) else ""
    key, equals, text = override[len(sign) :].partition("=")
    parts = [part.strip() for part in key.split(".")]
    key, section, last = ".".join(parts), ".".join(parts[:-1]), parts[-1]

    def refusal(problem: str, advice: str) -> ConfigError:
        return ConfigError(f"{source}: {problem} (override '{override}'). {advice}".rstrip())

    if not all(parts) or bool(equals) == (sign == "~"):
        raise refusal("the key or '=' is incomplete or misplaced", _FORMS)
    parent, place = plain, _place(plain, parts[0])
    for part in parts[1:]:
        parent = None if place is None else parent[place]
        place = _place(parent, part)
    if sign == "+":
        if place is not None:
            raise refusal(f"the key '{key}' already exists", f"Use {override[1:]} to change it.")
        if isinstance(parent, list) and last != str(len(parent)):
            raise refusal(f"the list '{section}' has {len(parent)} entries", f"Number {len(parent)} appends.")
        if not isinstance(parent, (dict, list)):
            raise refusal(
                f"no section '{section}' to add to", f"{_nearest(plain, section)}Use +{section}={{...}} to add it."
            )
    elif place is None:
        advice = f"Use +{override} to add it." if isinstance(parent, dict) and not sign else ""
        raise refusal(f"no key '{key}'", _nearest(plain, key) + advice)
    if sign == "~":
        del parent[place]
        return
    label = f"{source}: override '{override}'"
    value = to_plain(parse_yaml(text, label), source, key)
    if sign == "+" and isinstance(parent, list):
        parent.append(value)
        return
    old = None if sign == "+" else parent[place]
    interpolated = isinstance(value, str) and "${" in value
    if isinstance(old, dict) and old and not (isinstance(value, dict) or interpolated):
        keys = ", ".join(map(str, old))
        raise refusal(f"'{key}' is a section, not a value", f"Set one of {keys}, or use ~{key} and then +{key}=...")
    if isinstance(old, list) and not (isinstance(value, list) or value is None or interpolated):
        raise refusal(f"'{key}' is a list", f"Use {key}=[{text}] or {key}.0={text}.")
    parent[last if sign == "+" else place] = value


def _place(node: Any, part: str) -> Any:
    """Return the key or index of `node` that `part` names, or None."""
    number = int(part) if re.fullmatch(r"[0-9]{1,18}", part) else None
    if isinstance(node, list):
        return number if number is not None and number < len(node) else None
    if isinstance(node, dict):
        return part if part in node else number if number in node else None
    return None


def _nearest(plain: dict[Any, Any], key: str) -> str:
    paths = dict(_paths(plain))
    above = key
    while above:  # an interpolation has no keys: the key belongs to the section that it refers to
        if isinstance(paths.get(above), str) and "${" in paths[above]:
            return f"'{above}' is {paths[above]}; override the key it refers to. "
        above = above.rpartition(".")[0]
    close = difflib.get_close_matches(key, paths, n=1) or [path for path in paths if path.endswith(f".{key}")][:3]
    return f"Nearest: {', '.join(close)}. " if close else ""


def _paths(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for name, item in items:
        yield f"{prefix}{name}", item
        yield from _paths(item, f"{prefix}{name}.")
