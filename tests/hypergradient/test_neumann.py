import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from systems import krylov_basis, randn, residual, rotated, system

from bissl_zoo.hypergradient import Neumann
from bissl_zoo.hypergradient.damping import lanczos
from bissl_zoo.hypergradient.neumann import STEPS

SEEDS = st.integers(0, 10_000)


def largest_eigenvalue(matrix, start, steps):
    """Return the largest Ritz value plus its bound after `steps` Lanczos steps, dense."""
    q = krylov_basis(matrix, start, steps)
    values, vectors = np.linalg.eigh(q.T @ matrix.numpy() @ q)
    vectors = q @ vectors
    return (values + np.linalg.norm(matrix.numpy() @ vectors - vectors * values, axis=0)).max()


@given(st.integers(1, 20), SEEDS, st.floats(1.0, 20.0))
@settings(max_examples=20, deadline=None)
def test_a_definite_system_is_solved(size, seed, largest):
    matrix, v = rotated(torch.linspace(1.0, largest, size), seed), randn(size, seed=seed)
    operator = system(matrix)
    solution = Neumann(iterations=1500, tolerance=1e-9)(operator, v)
    assert solution.status == "converged" and solution.products == operator.products
    np.testing.assert_allclose(solution.x.numpy(), np.linalg.solve(matrix.numpy(), v.numpy()), atol=1e-8)


@pytest.mark.parametrize("terms", [1, 2, 3, 7])
@pytest.mark.parametrize("seed", range(3))
def test_it_is_the_truncated_series(terms, seed):
    matrix, v = rotated(torch.linspace(0.5, 9.0, 20), seed), randn(20, seed=seed)
    operator = system(matrix)
    known = lanczos(operator, operator.subspace.coordinates(v), 5)
    solution = Neumann(iterations=terms, tolerance=0.0)(operator, v)
    eta = 1.0 / largest_eigenvalue(matrix, v, 5)
    step = np.eye(20) - eta * matrix.numpy()
    expected = eta * sum(np.linalg.matrix_power(step, k) @ v.numpy() for k in range(terms))
    np.testing.assert_allclose(solution.x.numpy(), expected, rtol=1e-8)
    assert solution.status == "max_iterations" and solution.products == operator.products - known == terms
    assert solution.residual == pytest.approx(residual(matrix, solution.x, v), rel=1e-9)


def test_the_step_is_estimated_once():
    matrix = rotated(torch.linspace(1.0, 9.0, 20), 0)
    operator, solve = system(matrix), Neumann(iterations=30, tolerance=0.0)
    products = [solve(operator, randn(20, seed=seed)).products for seed in range(3)]
    assert products == [STEPS + 30, 30, 30]
    assert len(operator.subspace.basis) == STEPS + 1  # right-hand sides do not pile up


@given(SEEDS, st.integers(1, 30))
@settings(max_examples=20, deadline=None)
def test_negative_curvature_is_reported_with_the_best_iterate(seed, iterations):
    matrix, v = rotated(torch.linspace(-3.0, 9.0, 20), seed), randn(20, seed=seed)
    operator = system(matrix)
    lanczos(operator, operator.subspace.coordinates(v), 10)
    solution = Neumann(iterations=iterations, tolerance=1e-6)(operator, v)
    assert solution.status == "negative_curvature" and torch.isfinite(solution.x).all()
    assert solution.residual == pytest.approx(residual(matrix, solution.x, v), rel=1e-8)
    assert solution.residual <= residual(matrix, v, v) * (1 + 1e-9)


def test_unexplored_negative_curvature_is_a_growing_residual():
    matrix = torch.diag(torch.tensor([1.0, 1.2, 1.4, -2.0], dtype=torch.float64))
    operator, blind = system(matrix), torch.tensor([1.0, 1.0, 1.0, 0.0], dtype=torch.float64)
    solve = Neumann(iterations=50, tolerance=1e-9)
    assert solve(operator, blind).status == "converged"
    v = torch.tensor([1.0, 1.0, 1.0, 0.1], dtype=torch.float64)
    solution = solve(operator, v)
    assert solution.status == "diverged" and solution.products < 10
    assert solution.residual == pytest.approx(residual(matrix, solution.x, v)) and solution.residual < 0.3
