"""The installed package: modules, configs, the command, extras and floors."""

import ast
import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version
from PIL import Image

from bissl_zoo.errors import EXTRAS

REPOSITORY = Path(__file__).resolve().parents[1]
SOURCES = ("bissl_zoo", "configs", "setup.py", "pyproject.toml", "README.md", "LICENSE")
#: modules that have another name than their distribution
MODULES = {"scikit-learn": "sklearn"}
slow = pytest.mark.slow  # starts processes
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


@slow
@needs_build_tools
def test_the_wheel_contains_every_module_config_and_template(wheel):
    inside = set(zipfile.ZipFile(wheel).namelist())
    for folder, prefix in (("bissl_zoo", "bissl_zoo"), ("configs", "bissl_zoo/configs")):
        for path in (REPOSITORY / folder).rglob("*.py"):
            assert f"{prefix}/{path.relative_to(REPOSITORY / folder).as_posix()}" in inside
    for path in (REPOSITORY / "bissl_zoo" / "report" / "templates").iterdir():
        assert f"bissl_zoo/report/templates/{path.name}" in inside
    assert not [name for name in inside if name.startswith(("tests", "tools", "model_zoo"))]


@pytest.fixture(scope="module")
def bissl(wheel, tmp_path_factory):
    """Call the command of the wheel, installed in a new environment with the libraries of this one."""
    folder = tmp_path_factory.mktemp("installed") / "env"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    site = next(folder.glob("lib/python*/site-packages"))
    (site / "libraries.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    pip = [sys.executable, "-m", "pip", "--python", folder / "bin" / "python", "install", "--no-deps", "--no-index"]
    subprocess.run([*map(str, pip), str(wheel)], check=True, capture_output=True)
    files = {path for path in site.rglob("*") if path.suffix != ".pyc" and path.name != "__pycache__"}
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "BISSL_ZOO")}

    def call(where, *arguments):
        command = [str(folder / "bin" / "bissl"), *map(str, arguments)]
        done = subprocess.run(command, cwd=where, env=environment, capture_output=True, text=True)
        left = {path for path in site.rglob("*") if path.suffix != ".pyc" and path.name != "__pycache__"} - files
        assert not left, "written into the package"
        return done

    return call


@slow
@needs_build_tools
def test_the_command_of_a_wheel_works_in_an_empty_folder(bissl, tmp_path):
    for name in ("pets/cat", "pets/dog"):
        (tmp_path / name).mkdir(parents=True)
        for number in range(6):
            Image.effect_noise((64, 64), 80).convert("RGB").save(tmp_path / name / f"{number}.png")
    done = bissl(tmp_path, "new", "--data", "pets", "--backbone", "test_resnet")
    assert done.returncode == 0, done.stderr
    done = bissl(tmp_path, "train", "--config-file", "pets.py", "--dry-run")
    assert done.returncode == 0 and "image_folder" in done.stdout, done.stderr
    done = bissl(tmp_path, "train", "--config-file", "configs/quickstart/digit_scene_det.py", "--dry-run")
    assert done.returncode == 1 and "Nearest: quickstart/digit_scenes_det.py" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pets", "pets.py"]


@slow
def test_importing_the_package_imports_nothing_heavy_and_every_public_name_is_there():
    program = (
        "import sys, bissl_zoo; before = set(sys.modules)\n"
        "heavy = {'torch', 'torchvision', 'timm', 'omegaconf', 'numpy', 'PIL'} & before\n"
        "names = [getattr(bissl_zoo, name) for name in bissl_zoo.__all__]\n"
        "print(sorted(heavy), set(bissl_zoo.__all__) <= set(dir(bissl_zoo)), hasattr(bissl_zoo, 'create_backbones'))"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=REPOSITORY)
    assert (ran.stdout, ran.stderr) == ("[] True False\n", "")


@slow
def test_an_entry_loads_without_the_libraries_of_the_extras(tmp_path):
    tiny_entries = f"import sys; sys.path.insert(0, {str(REPOSITORY / 'tests' / 'support')!r})\n"
    program = tiny_entries + (
        f"absent = {sorted({*sum(EXTRAS.values(), ()), 'optuna', 'onnx', 'lightly'})}\n"
        "sys.modules.update(dict.fromkeys(absent))\n"
        "import bissl_zoo, bissl_zoo.model\n"
        "from tiny_entries import publish_tiny\n"
        f"publish_tiny({str(tmp_path)!r}, name='tiny')\n"
        f"print(bissl_zoo.create_backbone('tiny', zoo={str(tmp_path)!r}).name)\n"
        "from bissl_zoo.cli import main\n"
        "sys.exit(main(['train', '--config-file', 'quickstart/digit_scenes_det.py', '--dry-run']))"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=REPOSITORY)
    assert (ran.returncode, ran.stdout) == (1, "test_resnet\n"), ran.stderr
    assert ran.stderr.startswith("error: Not installed: pycocotools, scipy,") and '"bissl_zoo[train]"' in ran.stderr


@pytest.fixture(scope="module")
def requirements():
    """Return the lists of requirements in setup.py by their name; importing setuptools here would break distutils."""
    tree = ast.parse((REPOSITORY / "setup.py").read_text())
    lists = {n.targets[0].id: n.value for n in tree.body if isinstance(n, ast.Assign) and isinstance(n.value, ast.List)}
    lists |= {n.arg: n.value for n in ast.walk(tree) if isinstance(n, ast.keyword) and n.arg == "install_requires"}
    return {name: ast.literal_eval(value) for name, value in lists.items()}


def test_the_floors_of_setup_py_are_those_that_the_tests_run_with(requirements):
    lines = (REPOSITORY / "requirements" / "floors.txt").read_text().splitlines()
    floors = dict(line.split("==") for line in lines if not line.startswith("#"))
    texts = sum((requirements[name] for name in ("install_requires", "TRAIN", "REPORT", "HUB")), [])
    for requirement in map(Requirement, texts):
        (floor,) = (part.version for part in requirement.specifier if part.operator == ">=")
        assert Version(floor) == Version(floors[requirement.name]), requirement
    assert {Requirement(text).name for text in texts} == floors.keys()


def test_the_modules_that_commands_ask_for_are_those_of_the_extras(requirements):
    for extra, modules in EXTRAS.items():
        names = [Requirement(text).name for text in requirements[extra.upper()]]
        assert sorted(MODULES.get(name, name) for name in names) == sorted(modules)
