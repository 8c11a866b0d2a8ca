import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from systems import krylov_basis, randn, residual, rotated, system

from bissl_zoo.hypergradient import DenseOperator, MinRes, choose_shift

SEEDS = st.integers(0, 10_000)


def krylov_residual(matrix, v, steps):
    """Return the smallest relative residual over a Krylov space, by dense least squares."""
    applied = matrix.numpy() @ krylov_basis(matrix, v, steps)
    y = np.linalg.lstsq(applied, v.numpy(), rcond=None)[0]
    return np.linalg.norm(v.numpy() - applied @ y) / np.linalg.norm(v.numpy())


@given(st.integers(1, 20), SEEDS, st.floats(1.0, 100.0), st.sampled_from([0, 1000]), st.booleans())
@settings(max_examples=25, deadline=None)
def test_a_definite_or_indefinite_system_is_solved(size, seed, largest, recycle, definite):
    values = torch.linspace(1.0, largest, size)
    values = values if definite else values * torch.where(torch.arange(size) % 3 == 0, -1.0, 1.0)
    matrix, v = rotated(values, seed), randn(size, seed=seed)
    operator = system(matrix)
    solution = MinRes(iterations=size + 2, tolerance=1e-10, recycle=recycle)(operator, v)
    assert solution.status == "converged" and solution.residual <= 1e-10
    assert solution.products == operator.products <= size
    np.testing.assert_allclose(solution.x.numpy(), np.linalg.solve(matrix.numpy(), v.numpy()), atol=1e-8)


@pytest.mark.parametrize("iterations", range(1, 7))
@pytest.mark.parametrize("lowest", [0.5, -4.0])
@pytest.mark.parametrize("seed", range(3))
def test_a_first_solve_has_the_minimal_residual_of_its_krylov_space(iterations, lowest, seed):
    matrix, v = rotated(torch.linspace(lowest, 10.0, 30), seed), randn(30, seed=seed)
    operator = system(matrix)
    solution = MinRes(iterations, tolerance=0.0)(operator, v)
    assert solution.status == "max_iterations" and solution.products == operator.products == iterations
    # the basis of the one and of the other differ by rounding alone
    assert solution.residual == pytest.approx(krylov_residual(matrix, v, iterations), rel=1e-9)
    assert solution.residual == pytest.approx(residual(matrix, solution.x, v), rel=1e-9)


def right_hand_sides(size, count, seed, dtype=torch.float64):
    """As upper steps give them: alike, and not the same."""
    common = randn(size, seed=seed, dtype=dtype)
    return [common + 0.3 * randn(size, seed=seed + 1 + i, dtype=dtype) for i in range(count)]


@given(SEEDS, st.sampled_from([-2.0, 0.5]), st.sampled_from([8, 30]))
@settings(max_examples=5, deadline=None)
def test_recycling_saves_products_and_reports_the_true_residual(seed, lowest, recycle):
    matrix = rotated(torch.cat([torch.linspace(lowest, 40.0, 10), torch.linspace(0.9, 1.1, 50)]), seed)
    recycled, cold = (system(matrix) for _ in range(2))
    for v in right_hand_sides(60, 5, seed):
        solution = MinRes(iterations=60, tolerance=0.02, recycle=recycle)(recycled, v)
        assert solution.status == "converged" and solution.residual <= 0.02
        assert solution.residual == pytest.approx(residual(matrix, solution.x, v), abs=1e-8)
        assert len(recycled.subspace.basis) <= recycle
        MinRes(iterations=60, tolerance=0.02, recycle=0)(cold, v)
        assert not len(cold.subspace.basis)
    assert recycled.products < cold.products


def test_a_right_hand_side_solved_before_costs_no_product():
    matrix, v = rotated(torch.linspace(-1.0, 10.0, 40), 0), randn(40, seed=0)
    operator, solve = system(matrix), MinRes(iterations=40, tolerance=1e-6, recycle=100)
    first = solve(operator, v)
    known = operator.products
    second = solve(operator, -3.0 * v)
    assert second.status == "converged" and second.products == 0 and operator.products == known
    torch.testing.assert_close(second.x, -3.0 * first.x, rtol=1e-6, atol=1e-6)


def automatic(hessian, v, solver):
    """An operator whose damping was chosen for `v`, its first right-hand side."""
    operator = DenseOperator(hessian, shift=None)
    operator.shift, _ = choose_shift(operator, v, solver.iterations, solver.tolerance, at_least=0.5)
    assert solver(operator, v).status == "converged"
    return operator


@given(SEEDS, st.sampled_from([0, 3, 8]), st.integers(1, 3))
@settings(max_examples=12, deadline=None)
def test_automatic_damping_rises_for_a_right_hand_side_that_few_products_do_not_solve(seed, recycle, recycled):
    hessian = rotated(torch.cat([torch.linspace(5.0, 60.0, 40), torch.linspace(0.0, 0.2, 20)]), seed)
    solver = MinRes(iterations=6, tolerance=0.05, recycle=recycle, recycled_iterations=recycled)
    operator = automatic(hessian, randn(60, seed=seed), solver)
    for v in right_hand_sides(60, 6, seed + 1):
        before, known, explored = operator.shift, operator.products, operator.subspace.explored
        solution = solver(operator, v)
        assert operator.products - known == solution.products <= (recycled if explored else 6)
        assert operator.shift >= before
        assert solution.status == "converged" and solution.residual <= 0.05
        matrix = torch.eye(60, dtype=torch.float64) + hessian / operator.shift
        assert solution.residual == pytest.approx(residual(matrix, solution.x, v), abs=1e-8)


def test_automatic_damping_rises_no_further_than_it_must():
    # one direction of curvature is left to the second right-hand side, after one product: |v|^2 = 2, the residual of
    # the best multiple of v for A = diag(1 + 9/s, 1 - 9/s) is 9/s |v|; 0.1 of |v| it is at s = 90
    hessian = torch.diag(torch.tensor([0.0, 9.0, -9.0], dtype=torch.float64))
    first, second = torch.eye(3, dtype=torch.float64)[0], torch.tensor([0.0, 1.0, 1.0], dtype=torch.float64)
    solver = MinRes(iterations=1, tolerance=0.1, recycled_iterations=1)
    operator = automatic(hessian, first, solver)
    assert operator.shift == 0.5  # nothing that the first right-hand side sees needs damping
    assert solver(operator, second).residual <= 0.1
    assert operator.shift == pytest.approx(90.0, rel=0.02)


def test_a_fixed_damping_does_not_rise():
    hessian = rotated(torch.linspace(-5.0, 60.0, 40), 0)
    operator = DenseOperator(hessian, shift=6.0)
    solver = MinRes(iterations=3, tolerance=1e-3, recycled_iterations=1)
    for v in right_hand_sides(40, 3, 0):
        solution = solver(operator, v)
        assert solution.status == "max_iterations" and solution.products == 3 and operator.shift == 6.0


def test_an_invariant_space_that_leaves_a_residual_is_singular():
    matrix = torch.diag(torch.tensor([1.0, 2.0, 0.0], dtype=torch.float64))
    v = torch.ones(3, dtype=torch.float64)
    operator = system(matrix)
    solution = MinRes(iterations=10, tolerance=1e-3)(operator, v)
    assert solution.status == "singular" and solution.products == operator.products == 3
    torch.testing.assert_close(solution.x[:2], torch.tensor([1.0, 0.5], dtype=torch.float64))
    assert solution.residual == pytest.approx(3**-0.5)  # the third component cannot be reached
