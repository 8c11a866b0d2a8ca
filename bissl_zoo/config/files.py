"""The two formats of a config file: Python, run with a private `__import__`, and a strict YAML without tags."""

import builtins
import difflib
import os
import re
import traceback
import types
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig

from bissl_zoo.errors import ConfigError, did_you_mean
from bissl_zoo.files import follow
from bissl_zoo.limits import limit, stated

#: maximum nesting of sections and lists, far above that of real configs; omegaconf takes minutes for a few hundred
DEPTH_LIMIT = 64
#: a config file anywhere imports the shipped ones from here
_SHIPPED = "bissl_zoo.configs"


def short_path(path: Path) -> str:
    """Return `path` for messages, relative to the working directory if it is below it."""
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)


def read(path: Path) -> bytes:
    """Return the bytes of a config file, or raise ConfigError."""
    try:
        with open(path, "rb", opener=follow) as file:  # not path.read_bytes(), which waits for a pipe
            content = file.read(limit("CONFIG_BYTES") + 1)
    except OSError as error:
        raise ConfigError(f"{short_path(path)}: cannot read this config file: {error.strerror or error}.") from error
    if len(content) > limit("CONFIG_BYTES"):
        raise ConfigError(f"{short_path(path)}: the config file is too large; {stated('CONFIG_BYTES')} bytes.")
    return content


def config_root() -> Path:
    """Return the folder of the shipped configs: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    return package / "configs" if (package / "configs").is_dir() else package.parent / "configs"


def no_config(name: str) -> ConfigError:
    """Return the error of a config that is not shipped, with the nearest names."""
    root = config_root()
    shipped = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py"))
    if not name.startswith("common/"):
        shipped = [path for path in shipped if not path.startswith("common/")]
    near = difflib.get_close_matches(name, shipped, n=4, cutoff=0.5)
    near += [path for path in shipped if Path(path).stem == Path(name).stem and path not in near]
    nearest = f" Nearest: {', '.join(near)}." if near else ""
    return ConfigError(f"There is no config '{name}'.{nearest} The {len(shipped)} shipped configs are in {root}.")


class _LocatedError(ConfigError):
    """A ConfigError whose message already names file and line."""


def run_python(path: Path, importers: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Run a config file with private builtins, whose `__import__` finds relative imports on disk.

    `from bissl_zoo.configs.quickstart.digit_scenes_det import *` imports a shipped config. Each import runs the
    imported file again, so edits of one config never reach another. The interpreter's `builtins` are unchanged.

    Args:
        path: absolute path of the file.
        importers: files whose imports led here, outermost first.
    Returns:
        The top-level names of the file, with public dictionaries as DictConfig.
    Raises:
        ConfigError: the file raises an error; the message names file and line.
    """
    code = read(path)

    def run(file: Path) -> dict[str, Any]:
        chain = (*importers, path)
        if file in chain:
            raise ConfigError("circular import of configs: " + " -> ".join(map(short_path, (*chain, file))))
        if not file.is_file() and file.is_relative_to(config_root()):
            raise no_config(file.relative_to(config_root()).as_posix())
        if not file.is_file():
            near = did_you_mean(file.name, os.listdir(file.parent) if file.parent.is_dir() else ())
            if "configs" in file.parts:
                near += f" The shipped configs are imported from {_SHIPPED}."
            raise ConfigError(f"relative import of a file that does not exist: {short_path(file)}.{near}")
        return run_python(file, chain)

    def import_(name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0) -> Any:
        if level == 0 and fromlist and f"{name}.".startswith(f"{_SHIPPED}."):
            base = config_root().joinpath(*name.split(".")[2:])
        elif level == 0:
            return builtins.__import__(name, globals, locals, fromlist, level)
        else:
            base = path.parents[level - 1].joinpath(*filter(None, name.split(".")))
        module = types.ModuleType(base.name)
        file = base.with_name(f"{base.name}.py")
        if name and (file.is_file() or not base.is_dir()):
            vars(module).update(run(file))
        else:  # a folder: import the named files
            for wanted in fromlist:
                setattr(module, wanted, types.ModuleType(wanted))
                vars(getattr(module, wanted)).update(run(base / f"{wanted}.py"))
        for wanted in fromlist:
            if wanted != "*" and not hasattr(module, wanted):
                raise ConfigError(f"{short_path(file)} has no '{wanted}'.{did_you_mean(wanted, vars(module))}")
        return module

    scope = {
        "__file__": str(path),
        "__name__": f"config:{path}",
        "__builtins__": {**vars(builtins), "__import__": import_},
    }
    try:
        exec(compile(code, str(path), "exec", dont_inherit=True), scope)
        for name, value in scope.items():
            if type(value) is dict and not name.startswith("_"):
                scope[name] = DictConfig(value, flags={"allow_objects": True})
        return {name: value for name, value in scope.items() if not name.startswith("__")}
    except _LocatedError:
        raise
    except Exception as error:
        steps = traceback.walk_tb(error.__traceback__)
        lines = [line for frame, line in steps if frame.f_code.co_filename == str(path)]
        message = str(error) if isinstance(error, ConfigError) else f"{type(error).__name__}: {error}"
        if isinstance(error, SyntaxError) and error.filename == str(path):
            lines, message = [error.lineno], f"{error.msg}: {(error.text or '').strip()}"
        raise _LocatedError(":".join([short_path(path), *map(str, lines[-1:])]) + f": {message}") from error


class _Loader(yaml.SafeLoader):
    """YAML without tags, anchors and duplicate keys; 1e-3 is a float, and dates, 007 and 12:30 are text."""

    depth = 0
    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in known if tag.endswith((":bool", ":null"))]
        for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
            problem = "anchors and aliases are refused; refer to a value by ${key}"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)
        if event.tag is not None:
            raise yaml.MarkedYAMLError(problem=f"the tag {event.tag} is refused", problem_mark=event.start_mark)
        if self.depth > DEPTH_LIMIT:
            raise yaml.MarkedYAMLError(problem=f"nested more than {DEPTH_LIMIT} levels", problem_mark=event.start_mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node) if isinstance(key_node, yaml.ScalarNode) else key_node
            if key in keys:
                raise yaml.MarkedYAMLError(problem=f"the key {key!r} is given twice", problem_mark=key_node.start_mark)
            keys.add(key)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Writes values that `_Loader` reads back equal; quotes text that it or YAML 1.1 would read as another type."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_str(self, data: str) -> yaml.ScalarNode:
        # PyYAML's other styles fold line breaks such as U+0085 into spaces; double quotes escape them.
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=None if data.isprintable() else '"')


_Dumper.add_representer(str, _Dumper.represent_str)

_FLOAT = re.compile(
    r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?$|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+$"
    r"|[-+]?\.(?:inf|Inf|INF)$|\.(?:nan|NaN|NAN)$"
)
_INT = re.compile(r"[-+]?(?:0|[1-9][0-9_]*)$|[-+]?0x[0-9a-fA-F]+$")
for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", _INT, list("-+0123456789"))


def parse_yaml(text: str | bytes, source: str) -> Any:
    """Parse a file (bytes; errors name the line) or the value of an override (str).

    Raises:
        ConfigError: it is not valid, or nested more than :data:`DEPTH_LIMIT` levels.
    """
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        if mark is not None and isinstance(text, bytes):
            source = f"{source}:{mark.line + 1}"
        raise ConfigError(f"{source}: not valid YAML: {getattr(error, 'problem', None) or error}.") from error


def dump_yaml(plain: Any) -> str:
    """Return plain containers and scalars as YAML, which `parse_yaml` reads back equal."""
    return yaml.dump(plain, Dumper=_Dumper, default_flow_style=None, sort_keys=False, allow_unicode=True, width=10**6)
