"""Symmetry, spectrum and convergence curves against NumPy on matrices that are known."""

import numpy as np
import pytest
import torch

from bissl_zoo.analysis.solver_diagnosis import (
    Remembering,
    automatic_shift,
    budget_key,
    budgets_up_to,
    convergence,
    refuses,
    spectrum,
    symmetry_error,
)
from bissl_zoo.hypergradient import ConjugateGradient, DenseOperator, Exact, Identity, MinRes, choose_shift
from bissl_zoo.registry import SOLVERS

SIZE = 40


def draw(*shape, seed):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def symmetric(values, seed=0):
    q, _ = torch.linalg.qr(draw(len(values), len(values), seed=seed))
    return q @ torch.diag(torch.as_tensor(values, dtype=torch.float64)) @ q.T


def test_a_symmetric_matrix_has_no_symmetry_error():
    operator = DenseOperator(symmetric(torch.linspace(-3, 20, SIZE)))
    assert symmetry_error(operator, draw(SIZE, seed=1), draw(SIZE, seed=2)) < 1e-14


@pytest.mark.parametrize("share", [1.0, 0.1])
def test_an_asymmetric_matrix_is_told_from_rounding(share):
    matrix = symmetric(torch.linspace(-3, 20, SIZE)) + share * draw(SIZE, SIZE, seed=3)
    u, w = draw(SIZE, seed=1), draw(SIZE, seed=2)
    error = symmetry_error(DenseOperator(matrix), u, w)
    expected = abs(u @ matrix @ w - w @ matrix @ u) / (u.norm() * (matrix @ w).norm())
    assert error == pytest.approx(float(expected), rel=1e-12)
    assert error > 1e-2 / SIZE**0.5  # what the tool allows


def test_lanczos_finds_the_ends_of_the_spectrum_within_its_bounds():
    matrix = symmetric(np.concatenate([[-7.0], np.linspace(0, 5, SIZE - 2), [50.0]]))
    expected = np.linalg.eigvalsh(matrix.numpy())
    found = spectrum(DenseOperator(matrix), draw(SIZE, seed=1), steps=10)
    assert found.values[0] == pytest.approx(expected[0], abs=1e-6)
    assert found.values[-1] == pytest.approx(expected[-1], abs=1e-6)
    for value, bound in zip(found.values, found.bounds, strict=True):
        assert np.abs(expected - float(value)).min() <= float(bound) + 1e-9


def test_the_spectrum_is_seen_where_the_right_hand_side_lacks_its_ends():
    values = torch.linspace(1, 2, SIZE, dtype=torch.float64)
    values[0] = -30.0
    v = torch.ones(SIZE, dtype=torch.float64)
    v[0] = 0.0  # an exact eigenvector is missing from v
    found = spectrum(DenseOperator(torch.diag(values)), v, steps=10)
    assert found.values[0] == pytest.approx(-30.0, abs=1e-6)


def test_a_small_space_is_explored_whole():
    matrix = symmetric([-1.0, 2.0, 3.0])
    found = spectrum(DenseOperator(matrix), draw(3, seed=1), steps=10)
    np.testing.assert_allclose(found.values, [-1.0, 2.0, 3.0], atol=1e-10)
    assert found.bounds.max() < 1e-6


def test_a_right_hand_side_of_zero_is_refused():
    with pytest.raises(ValueError, match="zero"):
        spectrum(DenseOperator(torch.eye(3)), torch.zeros(3), steps=2)


def test_products_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="not finite"):
        spectrum(DenseOperator(torch.full((3, 3), torch.nan)), torch.ones(3), steps=2)


@pytest.mark.parametrize(("shift", "state"), [(6.9, "indefinite"), (7.1, "definite")])
def test_definiteness_changes_where_the_least_eigenvalue_of_a_does(shift, state):
    matrix = symmetric(np.concatenate([[-7.0], np.linspace(0, 5, SIZE - 1)]))
    found = spectrum(DenseOperator(matrix), draw(SIZE, seed=1), steps=15)
    assert found.definiteness(shift) == state
    assert found.least(shift) == pytest.approx(1 - 7.0 / shift, abs=1e-6)


def test_definiteness_is_undecided_where_the_bounds_reach_below_zero():
    matrix = symmetric(torch.linspace(-5, 100, SIZE))
    found = spectrum(DenseOperator(matrix), draw(SIZE, seed=1), steps=2)
    shift = -float(found.values[0]) + 1e-3 if found.values[0] < 0 else 1e-3
    assert found.definiteness(shift) == "undecided"


def test_the_automatic_shift_is_the_solvers_own_and_leaves_no_subspace():
    matrix, v, solver = symmetric(torch.linspace(-3, 20, SIZE)), draw(SIZE, seed=1), MinRes(4, 0.03)
    operator = DenseOperator(matrix, shift=None)
    expected, _ = choose_shift(DenseOperator(matrix), v, 4, 0.03, 0.01)
    assert automatic_shift(operator, v, solver, 0.01) == pytest.approx(expected, rel=1e-12)
    assert operator.subspace.explored == 0


@pytest.mark.parametrize(
    ("limit", "expected"), [(1, [1]), (2, [1, 2]), (4, [1, 2, 3, 4]), (8, [1, 2, 3, 5, 8]), (12, [1, 2, 3, 5, 8, 12])]
)
def test_budgets_grow_and_end_at_the_limit(limit, expected):
    assert budgets_up_to(limit) == expected


def test_a_product_is_not_computed_twice():
    operator = DenseOperator(symmetric(torch.linspace(-3, 20, SIZE)))
    seen = {}
    u = draw(SIZE, seed=1)
    first, second = (Remembering(operator, shift, seen)(u) for shift in (2.0, 4.0))
    assert operator.products == 1
    torch.testing.assert_close(first, u + operator.hessian @ u / 2.0, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(second, u + operator.hessian @ u / 4.0, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("name", SOLVERS.list())
def test_curves_hold_the_true_residuals_from_a_cold_start(name):
    matrix, v, shift = symmetric(torch.linspace(-1, 20, SIZE)), draw(SIZE, seed=1), 5.0
    operator = DenseOperator(matrix)
    points, x = convergence(Remembering(operator, shift), v, SOLVERS.build(name), [1, 2, 3, 5, 8])
    a = np.eye(SIZE) + matrix.numpy() / shift
    residual = np.linalg.norm(v.numpy() - a @ x.numpy()) / np.linalg.norm(v.numpy())
    assert points[-1].residual == pytest.approx(residual, rel=1e-9, abs=1e-14)
    assert [p.budget for p in points] == ([1, 2, 3, 5, 8] if budget_key(SOLVERS.build(name)) else [None])
    assert len({p.products for p in points}) == len(points)  # nothing is left from one budget to the next


def test_curves_of_minres_are_those_of_separate_solves():
    matrix, v = symmetric(torch.linspace(-1, 20, SIZE)), draw(SIZE, seed=1)
    points, _ = convergence(Remembering(DenseOperator(matrix), 5.0), v, MinRes(), [1, 2, 3, 5])
    for point in points:
        alone = MinRes(iterations=point.budget, tolerance=1e-12)(DenseOperator(matrix, shift=5.0), v)
        assert point.residual == pytest.approx(alone.residual, rel=1e-9)


def test_budgets_share_their_products():
    operator = DenseOperator(symmetric(torch.linspace(-1, 20, SIZE)))
    convergence(Remembering(operator, 5.0), draw(SIZE, seed=1), ConjugateGradient(), [1, 2, 3, 5, 8])
    assert operator.products <= 8 + 2 * 5  # the longest run, and two residuals of each


def test_only_a_solver_with_a_limit_of_size_refuses():
    assert refuses(Exact(max_size=10), 11) and not refuses(Exact(max_size=10), 10)
    assert not refuses(Identity(), 10**9)
