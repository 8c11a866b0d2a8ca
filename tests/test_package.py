"""The installed package: modules, configs, templates, and a fast import."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow  # builds a wheel, starts processes

REPOSITORY = Path(__file__).resolve().parents[1]
SOURCES = ("bissl_zoo", "configs", "setup.py", "pyproject.toml", "README.md", "LICENSE")
needs_build_tools = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("pip", "setuptools")),
    reason="building a wheel without network needs pip and setuptools in this environment",
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Build a wheel from a copy of the checkout, which itself is left unchanged."""
    copy, out = tmp_path_factory.mktemp("checkout"), tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        source = REPOSITORY / name
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        elif source.exists():
            shutil.copy(source, copy / name)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", out, copy]
    built = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    return next(out.glob("bissl_zoo-*.whl"))


@needs_build_tools
def test_the_wheel_contains_every_module_config_and_template(wheel):
    inside = set(zipfile.ZipFile(wheel).namelist())
    for folder, prefix in (("bissl_zoo", "bissl_zoo"), ("configs", "bissl_zoo/configs")):
        for path in (REPOSITORY / folder).rglob("*.py"):
            assert f"{prefix}/{path.relative_to(REPOSITORY / folder).as_posix()}" in inside
    for path in (REPOSITORY / "bissl_zoo" / "report" / "templates").iterdir():
        assert f"bissl_zoo/report/templates/{path.name}" in inside
    assert not [name for name in inside if name.startswith(("tests", "tools", "model_zoo"))]


@needs_build_tools
def test_an_installed_package_finds_its_configs(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    program = (
        "import bissl_zoo, json; cfg = bissl_zoo.load_config('bissl/voc_det.py');"
        "print(json.dumps([bissl_zoo.__file__, cfg.bilevel.alternations, cfg.backbone.name]))"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout) == [str(tmp_path / "site" / "bissl_zoo" / "__init__.py"), 500, "resnet50"]


def test_importing_the_package_imports_nothing_heavy_and_every_public_name_is_there():
    program = (
        "import sys, bissl_zoo; before = set(sys.modules)\n"
        "heavy = {'torch', 'torchvision', 'timm', 'omegaconf', 'numpy', 'PIL'} & before\n"
        "names = [getattr(bissl_zoo, name) for name in bissl_zoo.__all__]\n"
        "print(sorted(heavy), set(bissl_zoo.__all__) <= set(dir(bissl_zoo)), hasattr(bissl_zoo, 'create_backbones'))"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=REPOSITORY)
    assert (ran.stdout, ran.stderr) == ("[] True False\n", "")
