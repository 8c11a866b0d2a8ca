"""The solver of the guide, on a matrix and in a run."""

import json
import sys
from pathlib import Path

import pytest
import torch
from command_line import temporary_registrations

from bissl_zoo.hypergradient import DenseOperator
from bissl_zoo.registry import SOLVERS

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIG = "examples/my_solver/digit_scenes.py"


@pytest.fixture
def solver(monkeypatch):
    """Return the class of the example, registered for one test only."""
    monkeypatch.syspath_prepend(str(REPOSITORY / "examples" / "my_solver"))
    import minimal_residual

    yield minimal_residual.MinimalResidual
    del SOLVERS._obj_map["minimal_residual"], sys.modules["minimal_residual"]


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_residual_is_the_true_one_and_never_above_one(solver, sign):
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(30, 30, generator=generator, dtype=torch.float64)
    operator = DenseOperator(sign * root @ root.T / 30, shift=0.5)
    v = torch.randn(30, generator=generator, dtype=torch.float64)
    solution = solver(iterations=10, tolerance=1e-3)(operator, v)
    a = torch.eye(30, dtype=torch.float64) + operator.hessian / 0.5
    assert solution.residual == pytest.approx(float((v - a @ solution.x).norm() / v.norm()), rel=1e-9)
    assert solution.residual <= 1.0 and solution.products == operator.products


@pytest.mark.slow
def test_a_run_uses_it(train_net, tiny, tmp_path):
    settings = [*tiny(), "train.stages=[bissl]", f"train.output_dir={tmp_path / 'run'}"]
    with temporary_registrations():
        outcome = train_net(*settings, config=CONFIG)
    assert outcome.status == 0, outcome.err
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    residuals = [line["solver/residual"] for line in lines if "solver/residual" in line]
    assert residuals and all(0 < residual <= 1 for residual in residuals)
