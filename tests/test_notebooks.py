"""The notebooks run from top to bottom, with short schedules."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((REPOSITORY / "notebooks").glob("*.ipynb"))
#: packages that a notebook needs beyond those of this one
NEEDS = {"bilevel": "lightly"}


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(notebook, tmp_path):
    if package := NEEDS.get(notebook.stem):
        pytest.importorskip(package, reason=f"{package} is not installed")
    cells = [cell for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] for cell in cells)
    code = "\n\n".join("".join(cell["source"]) for cell in cells)
    code, shortened = re.subn(r"STEPS = \d+", "STEPS = 2", code)
    code = code.replace('model="resnet18"', 'model="test_resnet"')
    assert shortened == 1
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "BISSL_ZOO_DATASETS": str(tmp_path)}
    ran = subprocess.run(
        [sys.executable, "-"], input=code, cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert ("150 images of a folder" if notebook.stem == "one_call" else "accuracy 0.") in ran.stdout
