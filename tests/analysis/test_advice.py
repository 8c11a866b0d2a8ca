"""Advice: what it says, and that each change it names makes the system converge."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bissl_zoo.analysis.advice import advise
from bissl_zoo.analysis.solver_diagnosis import budget_key, spectrum
from bissl_zoo.hypergradient import ConjugateGradient, DenseOperator, Exact, Identity, MinRes, Neumann, Nystrom
from bissl_zoo.registry import SOLVERS

LAM, SIZE = 0.01, 30


def matrix_of(low, high, seed=0):
    generator = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(SIZE, SIZE, dtype=torch.float64, generator=generator))
    return q @ torch.diag(torch.linspace(low, high, SIZE, dtype=torch.float64)) @ q.T


def advice_on(matrix, name, solver, damping, most=12, **options):
    v = torch.randn(SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    operator = DenseOperator(matrix, shift=None)
    rivals = {other: entry() for other, entry in SOLVERS if other != name}
    found = spectrum(operator, v, 12)
    return v, advise(operator, v, name, solver, LAM + damping, LAM, found, rivals, most, **options)


def residual_after(matrix, v, solver, damping):
    operator = DenseOperator(matrix, shift=LAM + damping)
    x = solver(operator, v).x
    return float((v - x - matrix @ x / (LAM + damping)).norm() / v.norm())


def test_a_definite_system_that_is_solved_needs_no_change():
    _, advice = advice_on(matrix_of(0, 5), "cg", ConjugateGradient(), 10.0)
    assert advice.converges and advice.remedies == []
    assert "At damping 10 the system is positive definite" in advice.sentence
    assert "cg converges" in advice.sentence and "Nothing to change" in advice.sentence


def test_an_indefinite_system_is_said_to_be_one():
    _, advice = advice_on(matrix_of(-50, 50), "cg", ConjugateGradient(), 10.0)
    assert not advice.converges
    assert "At damping 10 the system is indefinite (least Ritz value -3.9" in advice.sentence  # 1 - 50 / 10.01
    assert "cg does not converge" in advice.sentence and "negative_curvature" in advice.sentence
    damping = next(remedy["damping"] for remedy in advice.remedies if "damping" in remedy)
    assert damping > 50 and f"damping={damping:g}" in advice.sentence


def test_a_larger_limit_is_advised_where_it_is_enough():
    _, advice = advice_on(matrix_of(0, 60), "minres", MinRes(iterations=2, tolerance=0.05), 10.0)
    assert any("iterations" in remedy for remedy in advice.remedies)


def test_a_solved_system_that_is_indefinite_is_not_called_good():
    matrix = matrix_of(-20, 1)
    _, advice = advice_on(matrix, "minres", MinRes(iterations=SIZE, tolerance=0.01), 10.0)
    assert advice.converges and "indefinite" in advice.sentence and "Nothing to change" not in advice.sentence
    damping = float(advice.sentence.split("damping=")[1].split(" ")[0])
    assert torch.linalg.eigvalsh(torch.eye(SIZE) + matrix / (LAM + damping)).min() > 0


def test_what_is_tried_is_told():
    lines = []
    _, advice = advice_on(matrix_of(-50, 50), "cg", ConjugateGradient(), 10.0, tell=lines.append)
    assert any(line.startswith("damping=") for line in lines) and any(line.startswith("name=minres") for line in lines)


def test_a_solver_that_refuses_the_size_is_said_to():
    _, advice = advice_on(matrix_of(0, 5), "exact", Exact(max_size=10), 10.0)
    assert not advice.converges and "exact refuses 30 parameters (max_size=10)" in advice.sentence
    assert {"name": "cg"} in advice.remedies


def test_no_curvature_is_enough_where_there_is_hardly_any():
    _, advice = advice_on(matrix_of(0, 0.1), "identity", Identity(), 10.0)
    assert advice.converges
    _, advice = advice_on(matrix_of(0, 20), "identity", Identity(), 10.0)
    assert not advice.converges and {"name": "minres"} in advice.remedies


@pytest.mark.parametrize(
    ("name", "solver"),
    [
        ("cg", ConjugateGradient(iterations=3, tolerance=1e-2)),
        ("cg", ConjugateGradient(iterations=5, tolerance=1e-3, blockwise=True)),
        ("minres", MinRes(iterations=3, tolerance=0.01)),
        ("neumann", Neumann(iterations=5)),
        ("nystrom", Nystrom(rank=5)),
    ],
    ids=["cg", "blockwise", "minres", "neumann", "nystrom"],
)
@given(st.floats(-100, 5), st.floats(1, 200), st.floats(0.1, 50), st.integers(0, 1000))
@settings(max_examples=12, deadline=None)
def test_every_change_named_makes_the_system_converge(name, solver, low, width, damping, seed):
    matrix = matrix_of(low, low + width, seed)
    v, advice = advice_on(matrix, name, solver, damping)
    if advice.converges:
        assert residual_after(matrix, v, solver, damping) <= solver.tolerance
        return
    assert any("damping" in remedy for remedy in advice.remedies)  # enough of it always does
    for remedy in advice.remedies:
        changed, at = solver, remedy.get("damping", damping)
        if "name" in remedy:
            other = SOLVERS.build(remedy["name"])
            limit = getattr(solver, budget_key(solver))
            changed = dataclasses.replace(other, **{budget_key(other): limit, "tolerance": solver.tolerance})
        elif "damping" not in remedy:
            changed = dataclasses.replace(solver, **remedy)
        # the margin is that of another order of rounding
        assert residual_after(matrix, v, changed, at) <= solver.tolerance * (1 + 1e-9), (remedy, advice.sentence)
