"""Which packages there are, and whether they are of versions that belong together; nothing is imported."""

import os
import platform
import shutil
import sys
from collections.abc import Iterable, Iterator
from importlib import metadata

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from bissl_zoo.doctor.finding import OK, PROBLEM, WARNING, Finding

PYTHON = ">=3.10,<3.14"
#: Detectron2's own, so that both live in one environment
PINS = {"omegaconf": ">=2.3,<2.4", "iopath": ">=0.1.7,<0.1.10", "fvcore": ">=0.1.5,<0.1.6"}
#: what `pip install "bissl_zoo[NAME]"` is for, and the distributions that it brings
EXTRAS = {
    "s3": ("zoos on s3://", ["s3fs"]),
    "hub": ("zoos and weights on the Hugging Face Hub, hf://", ["huggingface_hub"]),
    "gs": ("checkpoints and zoos on gs://", ["fsspec", "gcsfs"]),
    "shards": ("shards on s3://", ["fsspec", "s3fs"]),
    "onnx": ("export to ONNX", ["onnx", "onnxscript"]),
    "wandb": ("metrics to Weights & Biases", ["wandb"]),
    "search": ("searches over hyper-parameters", ["ray"]),
    "test": ("the tests", ["pytest", "hypothesis", "ruff"]),
    "docs": ("building the documentation", ["mkdocs-material", "mkdocstrings", "latex2mathml"]),
}
_SHOWN = ("torch", "torchvision", "timm", *PINS, "numpy")
_COMPILERS = ("c++", "g++", "clang++")


def check_python() -> list[Finding]:
    """Whether this Python is one of those that are supported."""
    version = platform.python_version()
    if SpecifierSet(PYTHON).contains(version, prereleases=True):
        return [Finding(OK, "python", f"{version}, {sys.executable}")]
    return [Finding(PROBLEM, "python", f"{version}, outside {PYTHON}", "Make an environment with Python 3.10 to 3.13.")]


def check_packages() -> list[Finding]:
    """The versions that are installed against those that this package, torchvision and Detectron2 ask for."""
    findings = [_ours(), *(_shown(name) for name in _SHOWN)]
    findings += _unmet("bissl_zoo", besides=_SHOWN)
    findings += _unmet("torchvision", only=("torch",))
    findings += _unmet("detectron2", only=PINS)
    return findings


def _ours() -> Finding:
    version = _version("bissl_zoo")
    if version:
        return Finding(OK, "bissl_zoo", version)
    return Finding(WARNING, "bissl_zoo", "on the path, but not installed", "pip install -e . in its checkout.")


def _shown(name: str) -> Finding:
    """A package that the page always shows."""
    version = _version(name)
    wanted = SpecifierSet(PINS[name]) if name in PINS else _wanted("bissl_zoo").get(name, SpecifierSet())
    install = f'pip install "{name}{_plain(wanted)}"'
    if version is None:
        return Finding(PROBLEM, name, "not installed", install)
    if wanted.contains(version, prereleases=True):
        return Finding(OK, name, version)
    if name in PINS:
        found = f"{version}, outside {PINS[name]}, which Detectron2 and bissl_zoo pin"
        return Finding(WARNING, name, found, install)
    return Finding(PROBLEM, name, f"{version}, and bissl_zoo needs {_plain(wanted)}", install)


def _unmet(package: str, only: Iterable[str] = (), besides: Iterable[str] = ()) -> Iterator[Finding]:
    """What a package asks for and does not get, of the names `only` or of all but `besides`."""
    for name, wanted in _wanted(package).items():
        if name in besides or (only and name not in only):
            continue
        version = _version(name)
        if version is not None and wanted.contains(version, prereleases=True):
            continue
        found = f"{package} needs {name}{_plain(wanted)}, and there is {version or 'none'}"
        both = f'pip install --upgrade {package} "{name}{_plain(wanted)}"'
        install = both if package == "torchvision" else f'pip install "{name}{_plain(wanted)}"'
        yield Finding(WARNING if package == "detectron2" else PROBLEM, name, found, install)


def _wanted(package: str) -> dict[str, SpecifierSet]:
    """What a package asks for, extras aside; nothing where it is not installed."""
    try:
        lines = metadata.requires(package) or []
    except metadata.PackageNotFoundError:
        return {}
    requirements = [Requirement(line) for line in lines]
    return {r.name: r.specifier for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _plain(wanted: SpecifierSet) -> str:
    return ",".join(sorted(map(str, wanted), reverse=True))


def check_extras() -> list[Finding]:
    """Which optional parts are installed."""
    findings = []
    for name, (purpose, distributions) in EXTRAS.items():
        versions = {one: _version(one) for one in distributions}
        missing = [one for one, version in versions.items() if version is None]
        if missing:
            found = f'{purpose}: not installed (pip install "bissl_zoo[{name}]")'
        else:
            found = f"{purpose}: {', '.join(f'{one} {version}' for one, version in versions.items())}"
        findings.append(Finding(OK, f"extra {name}", found))
    return findings


def check_compiler() -> list[Finding]:
    """The C++ compiler that torch.compile needs."""
    named = os.environ.get("CXX")
    found = next(filter(None, map(shutil.which, [named] if named else _COMPILERS)), None)
    if found:
        return [Finding(OK, "compiler", found)]
    if named:
        remedy = "Let CXX name a C++ compiler, or unset it."
        return [Finding(WARNING, "compiler", f"CXX={named} is no program; pretrain.compile needs one", remedy)]
    return [Finding(OK, "compiler", "no C++ compiler; only pretrain.compile needs one")]
