from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from systems import randn, residual, rotated, system

from bissl_zoo.hypergradient import ConjugateGradient, DenseOperator

GOLDEN = Path(__file__).resolve().parents[1] / "golden"  # iterates of the BiSSL authors' published code, float64


def spd(size, seed, largest=20.0):
    return rotated(torch.linspace(1.0, largest, size), seed)


def golden(name):
    data = np.load(GOLDEN / f"{name}.npz")
    hessian, shift = torch.from_numpy(data["H"]), float(data["c"])
    return data, DenseOperator(hessian, shift, data["block_sizes"].tolist()), torch.from_numpy(data["b"])


@given(st.integers(1, 25), st.integers(0, 10_000), st.floats(1.0, 1e3))
@settings(max_examples=30, deadline=None)
def test_joint_cg_agrees_with_a_direct_solve(size, seed, largest):
    matrix = spd(size, seed, largest)
    operator = system(matrix)
    v = randn(size, seed=seed)
    # on its way down the residual may grow by the square root of the condition, as the A-norm of the error falls
    solution = ConjugateGradient(iterations=6 * size, tolerance=1e-12, growth=1e3**0.5)(operator, v)
    expected = np.linalg.solve(matrix.numpy(), v.numpy())
    assert solution.status == "converged"
    assert solution.residual <= 1e-11  # recomputed, so a little above what the recurrence believes
    np.testing.assert_allclose(solution.x.numpy(), expected, rtol=0, atol=1e-8 * np.abs(expected).max())
    assert solution.products == operator.products


@pytest.mark.parametrize("iterations", [1, 2, 5, 10, 20])
@pytest.mark.parametrize("mode", ["layerwise", "global"])
def test_iterates_equal_the_authors_on_a_definite_system(mode, iterations):
    data, operator, b = golden("cg_spd")
    solve = ConjugateGradient(iterations=iterations, tolerance=0.0, blockwise=mode == "layerwise")
    x = solve(operator, b).x.numpy()
    expected, exact = data[f"x_{mode}_it{iterations}"], data["exact"]
    # the authors add 1e-12 to the denominators: it holds them back once the joint solve has come within 1e-6
    late = mode == "global" and iterations >= 10
    np.testing.assert_allclose(x, expected, rtol=0, atol=(1e-7 if late else 1e-9) * np.abs(expected).max())
    if late:
        assert np.abs(x - exact).max() < 1.01 * np.abs(expected - exact).max()


@pytest.mark.parametrize("iterations", [1, 2, 5, 10, 20])
def test_blockwise_iterates_equal_the_authors_on_an_indefinite_system_too(iterations):
    data, operator, b = golden("cg_indef")
    solution = ConjugateGradient(iterations=iterations, tolerance=0.0, blockwise=True)(operator, b)
    expected = data[f"x_layerwise_it{iterations}"]
    np.testing.assert_allclose(solution.x.numpy(), expected, rtol=0, atol=1e-7 * np.abs(expected).max())


def test_joint_cg_stops_at_negative_curvature_while_the_authors_continue():
    data, operator, b = golden("cg_indef")
    matrix = torch.eye(len(b), dtype=b.dtype) + operator.hessian / operator.shift
    assert np.linalg.eigvalsh(matrix.numpy()).min() < 0
    solution = ConjugateGradient(iterations=20, tolerance=0.0)(operator, b)
    assert solution.status == "negative_curvature"
    assert solution.products == 3  # the second product has p^T A p < 0; the third measures the residual
    assert torch.equal(solution.x, b)  # the first iterate, 6 b, leaves a residual of 6.8
    assert solution.residual == pytest.approx(residual(matrix, b, b))
    assert ConjugateGradient(iterations=1)(operator, b).status == "diverged"
    for iterations in (1, 2, 5, 10, 20):
        assert torch.equal(ConjugateGradient(iterations=iterations)(operator, b).x, b)
        assert np.abs(data[f"x_global_it{iterations}"] - b.numpy()).max() > 0.5


def test_a_solve_cut_short_returns_the_textbook_iterate():
    # the residual of CG need not fall at every step, its error in the A-norm does: the last iterate is the answer
    matrix = torch.diag(torch.tensor([1.0, 2.0, 300.0], dtype=torch.float64))
    v = torch.tensor([1.0, 1.0, 0.1], dtype=torch.float64)
    x, r, p = torch.zeros(3, dtype=torch.float64), v, v
    for iterations in (1, 2):
        a = r @ r / (p @ matrix @ p)
        x, previous, r = x + a * p, r, r - a * matrix @ p
        p = r + (r @ r) / (previous @ previous) * p
        solution = ConjugateGradient(iterations=iterations, tolerance=0.0)(system(matrix), v)
        if solution.status == "max_iterations":
            torch.testing.assert_close(solution.x, x, rtol=1e-12, atol=0)
    assert solution.status == "max_iterations"


def test_blockwise_reports_negative_curvature():
    operator = system(-torch.eye(6, dtype=torch.float64), [2, 4])
    assert ConjugateGradient(blockwise=True)(operator, torch.ones(6, dtype=torch.float64)).status == "converged"
    operator = system(torch.diag(torch.tensor([1.0, 3.0, -0.5, -4.0], dtype=torch.float64)), [2, 2])
    solution = ConjugateGradient(blockwise=True, iterations=1)(operator, torch.ones(4, dtype=torch.float64))
    assert solution.status == "negative_curvature" and torch.isfinite(solution.x).all()


def test_blockwise_reports_divergence():
    size = 20
    matrix = torch.full((size, size), 3.0, dtype=torch.float64) + torch.eye(size, dtype=torch.float64)
    operator = system(matrix, [1] * size)  # definite, but all of the curvature is between the blocks
    v = randn(size, seed=0) + 1.0
    solution = ConjugateGradient(blockwise=True, iterations=5)(operator, v)
    assert solution.status == "diverged" and solution.residual > 1.0
    assert ConjugateGradient(iterations=5)(operator, v).status == "converged"


@pytest.mark.parametrize("iterations", [1, 2, 3, 5])
@pytest.mark.parametrize("seed", range(5))
def test_blockwise_on_a_block_diagonal_system_is_joint_on_each_block(seed, iterations):
    sizes = [6, 5, 7]
    blocks = [spd(size, seed + i, largest=5.0 * (i + 1)) for i, size in enumerate(sizes)]
    v = randn(sum(sizes), seed=seed)
    solution = ConjugateGradient(iterations, 0.0, blockwise=True)(system(torch.block_diag(*blocks), sizes), v)
    joint = ConjugateGradient(iterations, 0.0)
    expected = torch.cat([joint(system(a), b).x for a, b in zip(blocks, v.split(sizes), strict=True)])
    torch.testing.assert_close(solution.x, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("blockwise", [False, True])
def test_an_unchecked_solve_is_the_same_for_one_product_less(blockwise):
    matrix, v = spd(12, 0), torch.ones(12, dtype=torch.float64)
    checked, quick = (ConjugateGradient(3, blockwise=blockwise, check=flag) for flag in (True, False))
    operator = system(matrix, [5, 7])
    expected, solution = checked(operator, v), quick(operator, v)
    assert torch.equal(solution.x, expected.x) and solution.residual is None and solution.status == "max_iterations"
    assert (expected.products, solution.products, operator.products) == (4, 3, 7)


@pytest.mark.parametrize(
    ("diagonal", "v", "answer"),
    [
        ([-1.0, -1.0, -1.0], [1.0, 2.0, 3.0], "v"),  # in the first step
        ([1.0, 2.0, -0.5], [1.0, 1.0, 0.3], "best iterate"),
        ([1.0, 1.2, -0.9], [1.0, 1.0, 1.4], "v"),  # p^T A p is small, so the first step is long
    ],
)
def test_negative_curvature_returns_the_best_iterate_or_v(diagonal, v, answer):
    matrix, v = torch.diag(torch.tensor(diagonal).double()), torch.tensor(v).double()
    solution = ConjugateGradient(iterations=10)(system(matrix), v)
    assert solution.status == "negative_curvature"
    assert torch.equal(solution.x, v) == (answer == "v")
    assert solution.residual == pytest.approx(residual(matrix, solution.x, v))
    assert solution.residual <= residual(matrix, v, v)
    assert answer == "v" or solution.residual < 1.0
