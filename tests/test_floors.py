import ast
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "bissl_zoo"

#: the floors, bottom up: a file imports from lower floors and from its own folder, never from a neighbour
FLOORS = [
    {"errors"},  # below the ground floor: messages
    {"console"},
    {"registry", "config", "distributed"},
    {"backbones", "data", "evaluation", "hypergradient", "optim"},
    {"pretext", "downstream"},
    {"bilevel"},
    {"zoo"},
    {"engine"},
    {"pictures", "analysis"},
    {"report", "studies"},
    {"doctor"},
    {"__main__"},
]
#: files that are parts of a module too long for one file
PARTS = {"config_files": "config", "lazy": "config", "level": "bilevel"}
#: folders that depend on none of ours
INDEPENDENT = {"hypergradient"}
#: who may know of the configuration of a run: who makes it, and who runs it
SEES_CFG = {"config", "engine", "pictures", "analysis", "report", "studies"}


def unit_of(parts):
    return PARTS.get(parts[0], parts[0])


def floor_of(unit):
    return next((number for number, units in enumerate(FLOORS) if unit in units), None)


def imports_of(tree, package):
    """(line, module path below the package, names, inside a function) of every import of ours."""
    inside = {
        id(n) for f in ast.walk(tree) if isinstance(f, (ast.FunctionDef, ast.AsyncFunctionDef)) for n in ast.walk(f)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found = [(alias.name.split("."), []) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            found = [([*base, *(node.module.split(".") if node.module else [])], [alias.name for alias in node.names])]
        else:
            continue
        for path, names in found:
            if path[0] == PACKAGE.name:
                yield node.lineno, path[1:], names, id(node) in inside


def violations(root):
    """What breaks the floors in a tree of the package, a line each."""
    found = []
    for file in sorted(root.rglob("*.py")):
        parts = file.relative_to(root).with_suffix("").parts
        if parts == ("__init__",):
            continue  # the public face, which names what there is
        unit = unit_of(parts)
        floor = floor_of(unit)
        where = file.relative_to(root).as_posix()
        if floor is None:
            found.append(f"{where}: '{unit}' is on no floor")
            continue
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for line, path, names, in_function in imports_of(tree, [PACKAGE.name, *parts[:-1]]):
            # `from bissl_zoo import x` may mean a module or something of the public face
            targets = [path] if path else [[name] for name in names] or [["__init__"]]
            for target in targets:
                other = unit_of(target)
                if other == unit:
                    continue
                if other == "__version__" and (unit in ("engine", "report") or (unit == "zoo" and in_function)):
                    continue
                reached = floor_of(other)
                if unit in INDEPENDENT or reached is None or reached >= floor:
                    found.append(f"{where}:{line}: {unit} imports {other}")
        for node in ast.walk(tree):
            if isinstance(node, ast.arg) and node.arg == "cfg" and unit not in SEES_CFG:
                found.append(f"{where}:{node.lineno}: {unit} takes cfg")
    return found


def test_imports_go_down_only():
    assert violations(PACKAGE) == []


def test_the_walk_has_seen_the_package():
    units = {unit_of(f.relative_to(PACKAGE).with_suffix("").parts) for f in PACKAGE.rglob("*.py")} - {"__init__"}
    assert units == set().union(*FLOORS)


def planted(tmp_path, where, text):
    file = tmp_path / where
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return violations(tmp_path)


def test_an_import_upwards_is_found(tmp_path):
    assert planted(tmp_path, "optim.py", "from bissl_zoo.bilevel import Level\n") == [
        "optim.py:1: optim imports bilevel"
    ]


def test_an_import_from_a_neighbour_is_found(tmp_path):
    found = planted(tmp_path, "data/views.py", "import torch\nfrom bissl_zoo.backbones import Backbone\n")
    assert found == ["data/views.py:2: data imports backbones"]


def test_an_import_within_a_function_or_a_relative_one_is_found(tmp_path):
    text = "def f():\n    import bissl_zoo.engine.run\n\n    from ..engine import run\n    from .. import zoo\n"
    found = planted(tmp_path, "pretext/mine.py", text)
    assert found == [
        "pretext/mine.py:2: pretext imports engine",
        "pretext/mine.py:4: pretext imports engine",
        "pretext/mine.py:5: pretext imports zoo",
    ]


def test_the_solvers_import_nothing_of_ours(tmp_path):
    found = planted(tmp_path, "hypergradient/mine.py", "from bissl_zoo.errors import BisslZooError\n")
    assert found == ["hypergradient/mine.py:1: hypergradient imports errors"]
    assert planted(tmp_path, "hypergradient/mine.py", "from bissl_zoo.hypergradient.solver import Solution\n") == []


def test_the_public_face_is_not_imported_from_below(tmp_path):
    assert planted(tmp_path, "zoo/mine.py", "from bissl_zoo import __version__\n") != []
    assert planted(tmp_path, "zoo/mine.py", "def f():\n    from bissl_zoo import __version__\n") == []
    assert planted(tmp_path, "zoo/mine.py", "import bissl_zoo\n") == ["zoo/mine.py:1: zoo imports __init__"]
    assert planted(tmp_path, "zoo/mine.py", "from bissl_zoo import errors\n") == []


def test_a_constructor_that_takes_the_config_is_found(tmp_path):
    found = planted(tmp_path, "pretext/mine.py", "class Mine:\n    def __init__(self, *, cfg): ...\n")
    assert found == ["pretext/mine.py:2: pretext takes cfg"]
    assert planted(tmp_path, "pretext/mine.py", "f = lambda cfg: cfg\n") == ["pretext/mine.py:1: pretext takes cfg"]


def test_a_file_on_no_floor_is_found(tmp_path):
    assert planted(tmp_path, "utils.py", "") == ["utils.py: 'utils' is on no floor"]
