"""Symmetry, spectrum, convergence and advice on known matrices, against NumPy."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bissl_zoo.analysis.solver_diagnosis import (
    CachedOperator,
    advise,
    automatic_shift,
    budget_key,
    budgets_up_to,
    convergence,
    spectrum,
    symmetry_error,
)
from bissl_zoo.hypergradient import (
    ConjugateGradient,
    DenseOperator,
    Exact,
    Identity,
    MinRes,
    Neumann,
    Nystrom,
    choose_shift,
)
from bissl_zoo.registry import SOLVERS

SIZE, LAM = 40, 0.01


def draw(*shape, seed):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def symmetric(values, seed=0):
    q, _ = torch.linalg.qr(draw(len(values), len(values), seed=seed))
    return q @ torch.diag(torch.as_tensor(values, dtype=torch.float64)) @ q.T


def test_a_symmetric_matrix_has_no_symmetry_error():
    operator = DenseOperator(symmetric(torch.linspace(-3, 20, SIZE)))
    assert symmetry_error(operator, draw(SIZE, seed=1), draw(SIZE, seed=2)) < 1e-14


@pytest.mark.parametrize("share", [1.0, 0.1])
def test_an_asymmetric_matrix_has_the_error_of_its_definition(share):
    matrix = symmetric(torch.linspace(-3, 20, SIZE)) + share * draw(SIZE, SIZE, seed=3)
    u, w = draw(SIZE, seed=1), draw(SIZE, seed=2)
    error = symmetry_error(DenseOperator(matrix), u, w)
    expected = abs(u @ matrix @ w - w @ matrix @ u) / (u.norm() * (matrix @ w).norm())
    assert error == pytest.approx(float(expected), rel=1e-12)
    assert error > 1e-2 / SIZE**0.5  # what the tool allows


def test_lanczos_finds_the_ends_of_the_spectrum_within_its_bounds():
    matrix = symmetric(np.concatenate([[-7.0], np.linspace(0, 5, SIZE - 2), [50.0]]))
    expected = np.linalg.eigvalsh(matrix.numpy())
    ritz = spectrum(DenseOperator(matrix), draw(SIZE, seed=1), steps=10)
    assert ritz.values[0] == pytest.approx(expected[0], abs=1e-6)
    assert ritz.values[-1] == pytest.approx(expected[-1], abs=1e-6)
    for value, bound in zip(ritz.values, ritz.bounds, strict=True):
        assert np.abs(expected - float(value)).min() <= float(bound) + 1e-9


def test_an_eigenvalue_that_the_right_hand_side_is_orthogonal_to_is_found():
    values = torch.linspace(1, 2, SIZE, dtype=torch.float64)
    values[0] = -30.0
    v = torch.ones(SIZE, dtype=torch.float64)
    v[0] = 0.0  # an exact eigenvector is missing from v
    ritz = spectrum(DenseOperator(torch.diag(values)), v, steps=10)
    assert ritz.values[0] == pytest.approx(-30.0, abs=1e-6)


def test_a_small_space_is_explored_whole():
    matrix = symmetric([-1.0, 2.0, 3.0])
    ritz = spectrum(DenseOperator(matrix), draw(3, seed=1), steps=10)
    np.testing.assert_allclose(ritz.values, [-1.0, 2.0, 3.0], atol=1e-10)
    assert ritz.bounds.max() < 1e-6


@pytest.mark.parametrize(("entry", "v", "message"), [(1.0, 0.0, "zero"), (torch.nan, 1.0, "not finite")])
def test_a_system_without_a_spectrum_is_refused(entry, v, message):
    with pytest.raises(ValueError, match=message):
        spectrum(DenseOperator(torch.full((3, 3), entry)), torch.full((3,), v), steps=2)


@pytest.mark.parametrize(("shift", "state"), [(6.9, "indefinite"), (7.1, "definite")])
def test_definiteness_changes_where_the_least_eigenvalue_of_a_does(shift, state):
    matrix = symmetric(np.concatenate([[-7.0], np.linspace(0, 5, SIZE - 1)]))
    ritz = spectrum(DenseOperator(matrix), draw(SIZE, seed=1), steps=15)
    assert ritz.definiteness(shift) == state
    assert ritz.smallest(shift) == pytest.approx(1 - 7.0 / shift, abs=1e-6)


def test_definiteness_is_undecided_where_the_bounds_reach_below_zero():
    matrix = symmetric(torch.linspace(-5, 100, SIZE))
    ritz = spectrum(DenseOperator(matrix), draw(SIZE, seed=1), steps=2)
    shift = -float(ritz.values[0]) + 1e-3 if ritz.values[0] < 0 else 1e-3
    assert ritz.definiteness(shift) == "undecided"


def test_the_automatic_shift_is_the_solvers_own_and_leaves_no_subspace():
    matrix, v, solver = symmetric(torch.linspace(-3, 20, SIZE)), draw(SIZE, seed=1), MinRes(4, 0.03)
    operator = DenseOperator(matrix, shift=None)
    expected, _ = choose_shift(DenseOperator(matrix), v, 4, 0.03, 0.01)
    assert automatic_shift(operator, v, solver, 0.01) == pytest.approx(expected, rel=1e-12)
    assert operator.subspace.explored == 0


@pytest.mark.parametrize(("limit", "expected"), [(1, [1]), (2, [1, 2]), (12, [1, 2, 3, 5, 8, 12])])
def test_budgets_grow_and_end_at_the_limit(limit, expected):
    assert budgets_up_to(limit) == expected


def test_a_product_is_computed_once():
    operator = DenseOperator(symmetric(torch.linspace(-3, 20, SIZE)))
    seen = {}
    u = draw(SIZE, seed=1)
    first, second = (CachedOperator(operator, shift, seen)(u) for shift in (2.0, 4.0))
    assert operator.products == 1
    torch.testing.assert_close(first, u + operator.hessian @ u / 2.0, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(second, u + operator.hessian @ u / 4.0, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("name", SOLVERS.list())
def test_curves_hold_the_true_residuals_from_a_cold_start(name):
    matrix, v, shift = symmetric(torch.linspace(-1, 20, SIZE)), draw(SIZE, seed=1), 5.0
    operator = DenseOperator(matrix)
    points, x = convergence(CachedOperator(operator, shift), v, SOLVERS.build(name), [1, 2, 3, 5, 8])
    a = np.eye(SIZE) + matrix.numpy() / shift
    residual = np.linalg.norm(v.numpy() - a @ x.numpy()) / np.linalg.norm(v.numpy())
    assert points[-1].residual == pytest.approx(residual, rel=1e-9, abs=1e-14)
    assert [p.budget for p in points] == ([1, 2, 3, 5, 8] if budget_key(SOLVERS.build(name)) else [None])
    assert len({p.products for p in points}) == len(points)  # nothing is left from one budget to the next


def test_budgets_share_cached_products():
    operator = DenseOperator(symmetric(torch.linspace(-1, 20, SIZE)))
    convergence(CachedOperator(operator, 5.0), draw(SIZE, seed=1), ConjugateGradient(), [1, 2, 3, 5, 8])
    assert operator.products <= 8 + 2 * 5  # the longest run, and two residuals of each


# ------------------------------------------------------------------------------------------------ advice


def linear(low, high, seed=0):
    return symmetric(torch.linspace(low, high, SIZE), seed)


def advice_on(matrix, name, solver, damping, max_products=12):
    v = torch.randn(SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    operator = DenseOperator(matrix, shift=None)
    rivals = {other: entry() for other, entry in SOLVERS if other != name}
    ritz = spectrum(operator, v, 12)
    return v, advise(operator, v, name, solver, LAM + damping, LAM, ritz, rivals, max_products)


def residual_after(matrix, v, solver, damping):
    operator = DenseOperator(matrix, shift=LAM + damping)
    x = solver(operator, v).x
    return float((v - x - matrix @ x / (LAM + damping)).norm() / v.norm())


def test_a_definite_system_that_is_solved_needs_no_change():
    _, advice = advice_on(linear(0, 5), "cg", ConjugateGradient(), 10.0)
    assert advice.converges and advice.changes == []
    assert "At damping 10 the system is positive definite" in advice.sentence
    assert "cg converges" in advice.sentence


def test_an_indefinite_system_is_reported_with_a_sufficient_damping():
    _, advice = advice_on(linear(-50, 50), "cg", ConjugateGradient(), 10.0)
    assert not advice.converges
    assert "At damping 10 the system is indefinite (smallest Ritz value -3.9" in advice.sentence  # 1 - 50 / 10.01
    assert "cg does not converge" in advice.sentence and "negative_curvature" in advice.sentence
    damping = next(change["damping"] for change in advice.changes if "damping" in change)
    assert damping > 50 and f"damping={damping:g}" in advice.sentence


def test_a_larger_limit_is_advised_if_it_suffices():
    _, advice = advice_on(linear(0, 60), "minres", MinRes(iterations=2, tolerance=0.05), 10.0)
    assert any("iterations" in change for change in advice.changes)


def test_a_solved_indefinite_system_is_reported_with_a_definite_damping():
    matrix = linear(-20, 1)
    _, advice = advice_on(matrix, "minres", MinRes(iterations=SIZE, tolerance=0.01), 10.0)
    assert advice.converges and "indefinite" in advice.sentence
    damping = float(advice.sentence.split("damping=")[1].split(" ")[0])
    assert torch.linalg.eigvalsh(torch.eye(SIZE) + matrix / (LAM + damping)).min() > 0


def test_a_solver_that_does_not_accept_the_size_is_reported():
    _, advice = advice_on(linear(0, 5), "exact", Exact(max_size=10), 10.0)
    assert not advice.converges and "exact does not accept 40 parameters (max_size=10)" in advice.sentence
    assert {"name": "cg"} in advice.changes


def test_the_identity_solves_a_system_with_little_curvature_only():
    _, advice = advice_on(linear(0, 0.1), "identity", Identity(), 10.0)
    assert advice.converges
    _, advice = advice_on(linear(0, 20), "identity", Identity(), 10.0)
    assert not advice.converges and {"name": "minres"} in advice.changes


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
@settings(max_examples=4, deadline=None)
def test_every_advised_change_makes_the_system_converge(name, solver, low, width, damping, seed):
    matrix = linear(low, low + width, seed)
    v, advice = advice_on(matrix, name, solver, damping)
    if advice.converges:
        assert residual_after(matrix, v, solver, damping) <= solver.tolerance
        return
    assert any("damping" in change for change in advice.changes)  # a large one always suffices
    for change in advice.changes:
        changed, at = solver, change.get("damping", damping)
        if "name" in change:
            other = SOLVERS.build(change["name"])
            limit = getattr(solver, budget_key(solver))
            changed = dataclasses.replace(other, **{budget_key(other): limit, "tolerance": solver.tolerance})
        elif "damping" not in change:
            changed = dataclasses.replace(solver, **change)
        # the margin covers another order of rounding
        assert residual_after(matrix, v, changed, at) <= solver.tolerance * (1 + 1e-9), (change, advice.sentence)
