"""Imports within the package go down the layers of the architecture only, and never in a circle.

`python tests/test_layers.py` lists the violations.
"""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

PACKAGE = Path(__file__).resolve().parents[1] / "bissl_zoo"

#: from the bottom up; a file imports from its own layer and from those below
LAYERS = [
    {"config", "registry", "distributed", "optim", "files", "limits", "errors"},
    {"weights", "backbones", "data", "evaluation", "hypergradient"},
    {"zoo", "pretext", "downstream", "bilevel"},
    {"runs", "progress", "model"},
    {"engine"},
    {"analysis", "doctor"},
    {"studies", "report"},
    {"cli", "__main__", "api", "__init__"},
]
LAYER_OF = {unit: number for number, units in enumerate(LAYERS, start=1) for unit in units}
#: the solvers are usable without the rest of the package
ALLOWED_IN_HYPERGRADIENT = {"errors", "registry"}
#: units that may take a whole run config as an argument; all others take named arguments (zoo: to check entries)
SEES_CFG = {"config", "zoo", "runs", "engine", "analysis", "doctor", "studies", "report", "api", "cli"}
#: libraries that open connections, which loading a config never does
NETWORK = {"boto3", "fsspec", "http", "huggingface_hub", "requests", "socket", "urllib"}
#: (file, imported module) -> reason why this import goes up or closes a circle
EXCEPTIONS = {
    ("engine/trainer.py", "engine.build"): "a context counts the steps of its stages from the loaders of the config",
    ("zoo/stores/__init__.py", "zoo.stores.folder"): "a store is imported when a URL with its scheme is opened",
    ("zoo/stores/__init__.py", "zoo.stores.fsspec"): "a store is imported when a URL with its scheme is opened",
    ("report/__init__.py", "report.run"): "matplotlib is imported only when a report is written",
}


class Import(NamedTuple):
    """One imported module, as its path below the package, or with its full name if it is from elsewhere."""

    line: int
    module: str
    is_ours: bool


def unit_of(module: str) -> str:
    """Return the file or folder directly below the package that a dotted module path belongs to."""
    return module.split(".")[0]


def module_of(file: Path, root: Path) -> str:
    """Return the dotted path of a file below the package; a folder's `__init__.py` has the folder's path."""
    parts = file.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def imports_of(file: Path, root: Path) -> Iterator[Import]:
    """Yield the imports of a file, those within functions included."""
    folder = file.relative_to(root).parent.parts
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for_types = {id(node) for block in ast.walk(tree) if _is_type_checking(block) for node in ast.walk(block)}
    for node in ast.walk(tree):
        if id(node) in for_types:
            continue
        if isinstance(node, ast.Import):
            paths = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module.split(".") if node.module else []
            if node.level:
                base = [PACKAGE.name, *folder[: len(folder) - node.level + 1], *base]
            paths = [[*base, alias.name] for alias in node.names]
        else:
            continue
        for first, *rest in paths:
            if first != PACKAGE.name:
                yield Import(node.lineno, ".".join([first, *rest]), False)
            elif rest != ["__version__"]:
                path = root.joinpath(*rest)
                if len(rest) > 1 and not (path.is_dir() or path.with_suffix(".py").is_file()):
                    rest = rest[:-1]  # the last part is a name in the module
                yield Import(node.lineno, ".".join(rest) if rest and rest[0] in LAYER_OF else "__init__", True)


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def violations(root: Path) -> list[str]:
    """Return one line for each import of the package below `root` that breaks a rule of this file."""
    found = []
    edges: dict[str, set[str]] = {}
    for file in sorted(root.rglob("*.py")):
        module, where = module_of(file, root), file.relative_to(root).as_posix()
        unit = unit_of(module)
        if unit not in LAYER_OF:
            found.append(f"{where}: '{unit}' is in no layer")
            continue
        for line, target, is_ours in imports_of(file, root):
            if not is_ours:
                if unit == "config" and unit_of(target) in NETWORK:
                    found.append(f"{where}:{line}: config imports {target}, which opens connections")
                continue
            other = unit_of(target)
            if (where, target) in EXCEPTIONS:
                continue
            if target != module:
                edges.setdefault(module, set()).add(target)
            if other == unit:
                continue
            if LAYER_OF.get(other, len(LAYERS)) > LAYER_OF[unit]:
                found.append(f"{where}:{line}: {unit} (layer {LAYER_OF[unit]}) imports {target} of a higher layer")
            elif unit == "hypergradient" and other not in ALLOWED_IN_HYPERGRADIENT:
                found.append(f"{where}:{line}: hypergradient imports {target}")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.arg) and node.arg == "cfg" and unit not in SEES_CFG:
                found.append(f"{where}:{node.lineno}: {unit} takes cfg")
    units: dict[str, set[str]] = {}
    for module, targets in edges.items():
        others = {unit_of(target) for target in targets} - {unit_of(module)}
        units.setdefault(unit_of(module), set()).update(others)
    found += [f"circle of folders: {' -> '.join(circle)}" for circle in circles(units)]
    found += [f"circle of files: {' -> '.join(circle)}" for circle in circles(edges)]
    return list(dict.fromkeys(found))


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """Return the circles that a depth-first search of a directed graph meets, each with its start repeated."""
    found, done = [], set()

    def visit(node: str, path: list[str]) -> None:
        if node in path:
            found.append([*path[path.index(node) :], node])
        elif node not in done:
            for other in sorted(edges.get(node, ())):
                visit(other, [*path, node])
            done.add(node)

    for node in sorted(edges):
        visit(node, [])
    return found


def test_imports_go_down_the_layers_and_not_in_circles():
    assert violations(PACKAGE) == []


def test_each_exception_is_an_import_that_exists():
    present = {
        (file.relative_to(PACKAGE).as_posix(), target)
        for file in PACKAGE.rglob("*.py")
        for _, target, is_ours in imports_of(file, PACKAGE)
        if is_ours
    }
    assert set(EXCEPTIONS) <= present


def test_violations_are_reported(tmp_path):
    for where, text in {
        "optim.py": "from bissl_zoo.bilevel import Level\n",
        "hypergradient/a.py": "from bissl_zoo.optim import x\n",
        "pretext/a.py": "from ..runs import lock\nf = lambda cfg: cfg\n",
        "zoo/a.py": "from bissl_zoo import __version__, errors\nfrom bissl_zoo.zoo import b\n",
        "zoo/b.py": "def f():\n    from bissl_zoo.zoo.a import x\n",
        "config/a.py": "import urllib.request\n",
        "utils.py": "",
    }.items():
        (tmp_path / where).parent.mkdir(exist_ok=True)
        (tmp_path / where).write_text(text)
    assert [line.split(" (")[0] for line in violations(tmp_path)] == [
        "config/a.py:1: config imports urllib.request, which opens connections",
        "hypergradient/a.py:1: hypergradient imports optim",
        "optim.py:1: optim",
        "pretext/a.py:1: pretext",
        "pretext/a.py:2: pretext takes cfg",
        "utils.py: 'utils' is in no layer",
        "circle of files: zoo.a -> zoo.b -> zoo.a",
    ]


if __name__ == "__main__":
    print(*violations(PACKAGE), sep="\n")
