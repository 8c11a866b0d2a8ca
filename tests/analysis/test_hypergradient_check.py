"""Symmetry, spectrum, convergence and advice of the check on known matrices, against NumPy."""

import numpy as np
import pytest
import torch

from bissl_zoo.analysis.hypergradient_check import (
    CachedOperator,
    advise,
    automatic_shift,
    budget_key,
    compare_solvers,
    convergence,
    spectrum,
    symmetry_error,
)
from bissl_zoo.hypergradient import ConjugateGradient, DenseOperator, Exact, MinRes, choose_shift
from bissl_zoo.registry import SOLVERS

SIZE, LAM = 40, 0.01


def draw(*shape, seed):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def symmetric(values, seed=0):
    q, _ = torch.linalg.qr(draw(len(values), len(values), seed=seed))
    return q @ torch.diag(torch.as_tensor(values, dtype=torch.float64)) @ q.T


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


@pytest.mark.parametrize(("entry", "v", "message"), [(1.0, 0.0, "zero"), (torch.nan, 1.0, "not finite")])
def test_a_system_without_a_spectrum_is_refused(entry, v, message):
    with pytest.raises(ValueError, match=message):
        spectrum(DenseOperator(torch.full((3, 3), entry)), torch.full((3,), v), steps=2)


@pytest.mark.parametrize(("shift", "state"), [(6.9, "indefinite"), (7.1, "definite")])
def test_definiteness_changes_where_the_least_eigenvalue_of_a_does(shift, state):
    matrix = symmetric(np.concatenate([[-7.0], np.linspace(0, 5, SIZE - 1)]))
    ritz = spectrum(DenseOperator(matrix), draw(SIZE, seed=1), steps=15)
    assert ritz.definiteness(shift) == state


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
    assert points[-1]["residual"] == pytest.approx(residual, rel=1e-9, abs=1e-14)
    assert [p["budget"] for p in points] == ([1, 2, 3, 5, 8] if budget_key(SOLVERS.build(name)) else [None])
    assert len({p["products"] for p in points}) == len(points)  # nothing is left from one budget to the next


# ------------------------------------------------------------------------------------------------ advice


def advice_on(matrix, name, solver, dampings):
    """Return the advice at the first damping, with all of them in the table."""
    v, operator = draw(SIZE, seed=1), DenseOperator(matrix, shift=None)
    shifts = [LAM + damping for damping in dampings]
    candidates = {name: solver} | {other: SOLVERS.build(other) for other in ("cg", "minres") if other != name}
    rows, _ = compare_solvers(candidates, operator, v, LAM, shifts, 12)
    return advise(operator, v, name, solver, shifts[0], LAM, spectrum(operator, v, 12), rows)


def test_a_definite_system_that_is_solved_is_reported():
    advice = advice_on(symmetric(torch.linspace(0, 5, SIZE)), "cg", ConjugateGradient(), [10.0])
    assert advice["converges"] and "system is positive definite, and cg converges" in advice["sentence"]


def test_for_an_indefinite_system_the_solvers_of_the_table_that_converge_are_named():
    matrix, solver = symmetric(torch.linspace(-50, 50, SIZE)), ConjugateGradient(tolerance=0.05)
    advice = advice_on(matrix, "cg", solver, [10.0, 200.0])
    assert not advice["converges"] and "negative_curvature" in advice["sentence"]
    assert "At damping 10 the system is indefinite" in advice["sentence"]
    assert "cg at damping 200 with a budget of" in advice["sentence"]
    (option,) = [o for o in advice["options"] if o["solver"] == "cg"]
    operator = DenseOperator(matrix, shift=LAM + option["damping"])
    v = draw(SIZE, seed=1)
    x = ConjugateGradient(iterations=option["budget"], tolerance=1e-12)(operator, v).x
    assert (v - x - matrix @ x / operator.shift).norm() <= solver.tolerance * v.norm()


def test_a_solver_that_does_not_accept_the_size_is_reported():
    advice = advice_on(symmetric(torch.linspace(0, 5, SIZE)), "exact", Exact(max_size=10), [10.0])
    assert not advice["converges"] and "exact does not accept 40 parameters (max_size=10)" in advice["sentence"]
    assert {"cg", "minres"} <= {option["solver"] for option in advice["options"]}
