"""Automatic damping of an indefinite Hessian, with absolute Ritz values, against dense matrices in float64."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from systems import Breaking, krylov_basis, randn, residual, rotated

from bissl_zoo.hypergradient import ConjugateGradient, DenseOperator, MinRes, Neumann, Nystrom, choose_shift

SEEDS = st.integers(0, 10_000)
LAMBDA = 1e-3


def indefinite(seed, size=50):
    """A Hessian with a spectrum between -50 and 130, and a right-hand side."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(size, generator=generator, dtype=torch.float64) * 180 - 50
    return rotated(values, seed), randn(size, seed=seed + 1)


def automatic(hessian, v, iterations, tolerance=0.05):
    """An operator whose damping was chosen for `v`."""
    operator = DenseOperator(hessian, None)
    operator.shift, products = choose_shift(operator, v, iterations, tolerance, LAMBDA)
    assert products == operator.products <= iterations
    return operator


def absolute(hessian):
    values, vectors = np.linalg.eigh(hessian.numpy())
    return vectors @ np.diag(np.abs(values)) @ vectors.T


def reflected(hessian, v, steps):
    """`H + 2 sum |t| y y^T` over the negative Ritz pairs of the Krylov space, dense, and a basis of the space."""
    q, h = krylov_basis(hessian, v, steps), hessian.numpy()
    values, vectors = np.linalg.eigh(q.T @ h @ q)
    negative = (q @ vectors)[:, values < 0]
    return h - 2 * negative @ np.diag(values[values < 0]) @ negative.T, q


def galerkin_residual(hessian, v, steps, shift):
    """That of conjugate gradient with the reflected matrix after `steps` products."""
    matrix, q = reflected(hessian, v, steps)
    applied, right = q + matrix @ q / shift, v.numpy()
    return np.linalg.norm(right - applied @ np.linalg.solve(q.T @ applied, q.T @ right)) / np.linalg.norm(right)


@pytest.mark.parametrize("solver", [MinRes(20, 1e-8), ConjugateGradient(20, 1e-8), Nystrom(20, 1e-8)], ids=repr)
@pytest.mark.parametrize("seed", range(3))
def test_a_space_that_is_explored_completely_gives_the_absolute_matrix(solver, seed):
    hessian, v = indefinite(seed, size=20)
    operator = automatic(hessian, v, 20)
    operator.shift = 7.0
    x = solver(operator, v).x
    expected = np.linalg.solve(np.eye(20) + absolute(hessian) / 7.0, v.numpy())
    np.testing.assert_allclose(x.numpy(), expected, rtol=0, atol=1e-8)
    u = randn(20, seed=seed + 9)
    operator = automatic(hessian, v, 20)
    operator.shift = 7.0
    np.testing.assert_allclose(operator(u).numpy(), u.numpy() + absolute(hessian) @ u.numpy() / 7.0, atol=1e-9)


@given(SEEDS, st.integers(2, 15), st.sampled_from([0.01, 0.05, 0.3]))
@settings(max_examples=15, deadline=None)
def test_the_shift_is_the_smallest_with_which_the_solve_reaches_its_tolerance(seed, iterations, tolerance):
    hessian, v = indefinite(seed)
    shift = automatic(hessian, v, iterations, tolerance).shift
    assert galerkin_residual(hessian, v, iterations, shift) <= tolerance + 1e-9
    assert shift == LAMBDA or galerkin_residual(hessian, v, iterations, 0.98 * shift) > tolerance  # found to a per cent


@given(SEEDS, st.integers(3, 12))
@settings(max_examples=10, deadline=None)
def test_joint_solves_reuse_the_products_of_the_choice_and_never_lengthen_v(seed, iterations):
    hessian, v = indefinite(seed)
    for solver in (MinRes(iterations, 0.05), ConjugateGradient(iterations, 0.05)):
        operator = automatic(hessian, v, iterations)
        solution = solver(operator, v)
        matrix = torch.from_numpy(np.eye(50) + reflected(hessian, v, iterations)[0] / operator.shift)
        assert (solution.status, solution.products, operator.products) == ("converged", 0, iterations)
        assert solution.residual == pytest.approx(residual(matrix, solution.x, v), rel=1e-6)
        assert solution.x.norm() <= v.norm()
        for number in range(3):  # later right-hand sides of the alternation
            other = v + 0.3 * randn(50, seed=seed + number + 2)
            solution = solver(operator, other)
            assert solution.status == "converged" and solution.products <= iterations
            assert solution.x.norm() <= other.norm() * (1 + 1e-12)


@pytest.mark.parametrize("solver", [Neumann(300, 0.05), Nystrom(30, 0.5)], ids=repr)
def test_other_solvers_report_the_residual_of_the_same_matrix(solver):
    hessian, v = rotated(torch.cat([torch.linspace(-8.0, 20.0, 8), torch.zeros(32)]), 0), randn(40, seed=3)
    operator = automatic(hessian, v, 12)
    operator.shift = 7.0
    matrix = torch.from_numpy(np.eye(40) + absolute(hessian) / 7.0)  # nine steps explore a matrix of rank eight
    solution = solver(operator, v)
    assert solution.status == "converged" and solution.x.norm() <= v.norm()
    assert solution.residual == pytest.approx(residual(matrix, solution.x, v), rel=1e-6, abs=1e-9)


@given(SEEDS, st.sampled_from([0.5, 5.0]))
@settings(max_examples=10, deadline=None)
def test_a_system_that_converges_gets_the_smallest_shift(seed, at_least):
    hessian = rotated(torch.linspace(0.1, 1.0, 30), seed)
    assert choose_shift(DenseOperator(hessian, None), randn(30, seed=seed), 10, 0.05, at_least)[0] == at_least


def test_the_shift_of_one_step_is_that_of_its_closed_form():
    # the residual of one step of conjugate gradient with A = diag(1, t) and v = (1, 1) is (t - 1) / (t + 1)
    t = (1.0 + 0.05) / (1.0 - 0.05)
    operator = DenseOperator(torch.diag(torch.tensor([0.0, 1.0], dtype=torch.float64)), None)
    shift, products = choose_shift(operator, torch.ones(2, dtype=torch.float64), 1, 0.05, LAMBDA)
    assert products == 1
    assert 1.0 / (t - 1.0) <= shift * (1 + 1e-9) <= 1.011 / (t - 1.0)  # found to a per cent, from above


@pytest.mark.parametrize("tolerance", [0.0, -1.0, float("nan")])
def test_a_tolerance_that_no_damping_reaches_is_refused(tolerance):
    with pytest.raises(ValueError, match="positive tolerance"):
        choose_shift(DenseOperator(torch.eye(2), None), torch.ones(2), 5, tolerance, LAMBDA)


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_without_a_right_hand_side_or_a_finite_product_there_is_no_damping(value):
    operator = DenseOperator(-torch.eye(3), None)
    assert choose_shift(operator, torch.full((3,), value), 5, 0.05, LAMBDA) == (LAMBDA, 0)
    assert operator.products == 0
    if value:
        operator = DenseOperator(torch.full((3, 3), value), None)
        assert choose_shift(operator, torch.ones(3), 5, 0.05, LAMBDA) == (LAMBDA, 1)


def test_finite_products_before_one_that_is_not_are_used():
    hessian, v = indefinite(0)
    expected = automatic(hessian, v, 3).shift
    assert choose_shift(Breaking(hessian, after=3, shift=None), v, 10, 0.05, LAMBDA) == (pytest.approx(expected), 4)
