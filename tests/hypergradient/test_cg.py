import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from systems import residual, system

from bissl_zoo.hypergradient import ConjugateGradient, DenseOperator

GOLDEN = Path(__file__).resolve().parents[1] / "golden"  # iterates of the BiSSL authors' published code, float64


def spd(size, seed, largest=20.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=dtype))
    return q @ torch.diag(torch.linspace(1.0, largest, size, dtype=dtype)) @ q.T


def golden(name):
    data = np.load(GOLDEN / f"{name}.npz")
    hessian, shift = torch.from_numpy(data["H"]), float(data["c"])
    return data, DenseOperator(hessian, shift, data["block_sizes"].tolist()), torch.from_numpy(data["b"])


@given(st.integers(1, 25), st.integers(0, 10_000), st.floats(1.0, 1e3))
@settings(max_examples=60, deadline=None)
def test_joint_cg_agrees_with_a_direct_solve(size, seed, largest):
    matrix = spd(size, seed, largest)
    operator = system(matrix)
    v = torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
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


def test_joint_cg_stops_at_negative_curvature_where_the_authors_go_on():
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


@pytest.mark.parametrize("blockwise", [False, True])
@pytest.mark.parametrize("iterations", [1, 3, 50])
def test_the_residual_is_that_of_the_answer(blockwise, iterations):
    matrix = spd(12, 0)
    operator = system(matrix, [5, 4, 3])
    v = torch.randn(12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    solution = ConjugateGradient(iterations=iterations, tolerance=1e-9, blockwise=blockwise)(operator, v)
    assert solution.residual == pytest.approx(residual(matrix, solution.x, v), rel=1e-9, abs=1e-15)
    assert solution.products == operator.products <= iterations + 1


def test_tolerance_ends_the_solve_early():
    operator = system(spd(30, 0))
    v = torch.ones(30, dtype=torch.float64)
    loose, tight = (ConjugateGradient(iterations=100, tolerance=t)(operator, v) for t in (1e-1, 1e-8))
    assert loose.status == tight.status == "converged"
    assert loose.products < tight.products < 40
    assert loose.residual <= 1e-1 and tight.residual <= 1.1e-8


def test_a_solve_cut_short_says_so():
    operator = system(spd(30, 0, largest=100.0))
    solution = ConjugateGradient(iterations=3, tolerance=1e-8)(operator, torch.ones(30, dtype=torch.float64))
    assert solution.status == "max_iterations" and solution.products == 4
    assert 1e-8 < solution.residual < 1.0


def test_one_block_makes_blockwise_and_joint_the_same():
    operator = system(spd(10, 3))
    v = torch.randn(10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    joint, blockwise = (ConjugateGradient(4, 0.0, blockwise=flag)(operator, v).x for flag in (False, True))
    torch.testing.assert_close(joint, blockwise, rtol=1e-12, atol=0)


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


def test_negative_curvature_at_once_answers_v():
    v = torch.randn(6, dtype=torch.float64)
    operator = system(-torch.eye(6, dtype=torch.float64))
    solution = ConjugateGradient()(operator, v)
    assert solution.status == "negative_curvature" and torch.equal(solution.x, v)
    assert solution.residual == pytest.approx(2.0)


def test_negative_curvature_later_answers_the_best_iterate():
    matrix = torch.diag(torch.tensor([1.0, 2.0, -0.5], dtype=torch.float64))
    v = torch.tensor([1.0, 1.0, 0.3], dtype=torch.float64)
    operator = system(matrix)
    solution = ConjugateGradient(iterations=10)(operator, v)
    assert solution.status == "negative_curvature"
    assert solution.residual < min(1.0, residual(matrix, v, v))


def test_an_iterate_that_is_worse_than_v_is_not_the_answer():
    matrix = torch.diag(torch.tensor([1.0, 1.2, -0.9], dtype=torch.float64))
    v = torch.tensor([1.0, 1.0, 1.4], dtype=torch.float64)  # p^T A p is small, so the first step is long
    operator = system(matrix)
    solution = ConjugateGradient(iterations=10)(operator, v)
    assert solution.status == "negative_curvature" and torch.equal(solution.x, v)


def test_blockwise_tells_of_negative_curvature():
    operator = system(-torch.eye(6, dtype=torch.float64), [2, 4])
    assert ConjugateGradient(blockwise=True)(operator, torch.ones(6, dtype=torch.float64)).status == "converged"
    operator = system(torch.diag(torch.tensor([1.0, 3.0, -0.5, -4.0], dtype=torch.float64)), [2, 2])
    solution = ConjugateGradient(blockwise=True, iterations=1)(operator, torch.ones(4, dtype=torch.float64))
    assert solution.status == "negative_curvature" and torch.isfinite(solution.x).all()


def test_blockwise_tells_of_divergence():
    size = 20
    matrix = torch.full((size, size), 3.0, dtype=torch.float64) + torch.eye(size, dtype=torch.float64)
    operator = system(matrix, [1] * size)  # definite, but all of the curvature is between the blocks
    v = torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 1.0
    solution = ConjugateGradient(blockwise=True, iterations=5)(operator, v)
    assert solution.status == "diverged" and solution.residual > 1.0
    assert ConjugateGradient(iterations=5)(operator, v).status == "converged"


def test_a_residual_that_grows_ends_the_joint_solve():
    # nearly singular and indefinite: the first step length is huge
    matrix = torch.diag(torch.tensor([1.0, -1.0 + 1e-3], dtype=torch.float64))
    operator = system(matrix)
    solution = ConjugateGradient(iterations=10)(operator, torch.ones(2, dtype=torch.float64))
    assert solution.status == "diverged"
    assert torch.equal(solution.x, torch.ones(2, dtype=torch.float64))


@pytest.mark.parametrize("iterations", [1, 2, 3, 5])
@pytest.mark.parametrize("seed", range(5))
def test_blockwise_on_a_block_diagonal_system_is_joint_on_each_block(seed, iterations):
    sizes = [6, 5, 7]
    blocks = [spd(size, seed + i, largest=5.0 * (i + 1)) for i, size in enumerate(sizes)]
    v = torch.randn(sum(sizes), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    solution = ConjugateGradient(iterations, 0.0, blockwise=True)(system(torch.block_diag(*blocks), sizes), v)
    joint = ConjugateGradient(iterations, 0.0)
    expected = torch.cat([joint(system(a), b).x for a, b in zip(blocks, v.split(sizes), strict=True)])
    torch.testing.assert_close(solution.x, expected, rtol=1e-9, atol=1e-12)


@given(st.lists(st.integers(1, 8), min_size=1, max_size=4), st.integers(0, 10_000))
@settings(max_examples=40, deadline=None)
def test_blockwise_solves_a_block_diagonal_system(sizes, seed):
    matrix = torch.block_diag(*[spd(size, seed + i) for i, size in enumerate(sizes)])
    v = torch.randn(sum(sizes), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    # some more iterations than the largest block, as rounding wears the conjugacy off
    solution = ConjugateGradient(iterations=16, tolerance=1e-8, blockwise=True)(system(matrix, sizes), v)
    assert solution.status == "converged"
    np.testing.assert_allclose(solution.x.numpy(), np.linalg.solve(matrix.numpy(), v.numpy()), atol=1e-7)


@pytest.mark.parametrize("blockwise", [False, True])
def test_an_unchecked_solve_is_the_same_for_one_product_less(blockwise):
    matrix, v = spd(12, 0), torch.ones(12, dtype=torch.float64)
    checked, quick = (ConjugateGradient(3, blockwise=blockwise, check=flag) for flag in (True, False))
    operator = system(matrix, [5, 7])
    expected, solution = checked(operator, v), quick(operator, v)
    assert torch.equal(solution.x, expected.x) and solution.residual is None and solution.status == "max_iterations"
    assert (expected.products, solution.products, operator.products) == (4, 3, 7)


@pytest.mark.parametrize("check", [False, True])
@pytest.mark.parametrize("blockwise", [False, True])
def test_an_answer_that_does_not_fit_its_type_is_not_given(blockwise, check):
    operator, v = DenseOperator(-0.6 * torch.eye(3)), torch.full((3,), 3e38)  # x is 2.5 v
    solution = ConjugateGradient(blockwise=blockwise, check=check)(operator, v)
    assert torch.equal(solution.x, v) and solution.status == "non_finite"
    assert solution.products == operator.products


@pytest.mark.parametrize("blockwise", [False, True])
def test_zero_is_answered_by_zero_without_a_product(blockwise):
    operator = system(spd(4, 0))
    solution = ConjugateGradient(blockwise=blockwise)(operator, torch.zeros(4, dtype=torch.float64))
    assert not solution.x.any() and solution.residual == 0.0 and solution.status == "converged"
    assert solution.products == operator.products == 0


@pytest.mark.parametrize("blockwise", [False, True])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_v_that_is_not_finite_is_answered_by_zero(blockwise, bad):
    v = torch.ones(4)
    v[2] = bad
    solution = ConjugateGradient(blockwise=blockwise)(system(torch.eye(4)), v)
    assert not solution.x.any() and solution.status == "non_finite"


@pytest.mark.parametrize("blockwise", [False, True])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_product_that_is_not_finite_ends_the_solve(blockwise, bad, after):
    matrix, v = spd(5, 0), torch.ones(5, dtype=torch.float64)

    class Breaks(DenseOperator):
        def hessian_product(self, u):
            product = super().hessian_product(u)
            return product if self.products <= after else product * bad

    operator = Breaks(matrix, block_sizes=[3, 2])
    solution = ConjugateGradient(iterations=5, tolerance=0.0, blockwise=blockwise)(operator, v)
    assert solution.status == "non_finite"
    assert torch.equal(solution.x, v)  # the residual of a better iterate cannot be known either


@given(
    st.lists(st.floats(width=32), min_size=3, max_size=3),
    st.lists(st.floats(width=32), min_size=3, max_size=3),
    st.booleans(),
)
@settings(max_examples=300, deadline=None)
def test_the_answer_is_finite_whatever_comes_in(diagonal, v, blockwise):
    operator = system(torch.diag(torch.tensor(diagonal)), [2, 1])
    solution = ConjugateGradient(blockwise=blockwise)(operator, torch.tensor(v))
    assert torch.isfinite(solution.x).all()
    assert not math.isnan(solution.residual)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
@pytest.mark.parametrize("blockwise", [False, True])
def test_the_scale_of_v_does_not_matter(scale, blockwise):
    operator = system(spd(6, 0, dtype=torch.float32), [4, 2])
    v = torch.randn(6, generator=torch.Generator().manual_seed(0))
    solve = ConjugateGradient(iterations=4, tolerance=1e-6, blockwise=blockwise)
    reference, scaled = solve(operator, v), solve(operator, v * scale)
    assert scaled.status == reference.status
    torch.testing.assert_close(scaled.x / scale, reference.x, rtol=1e-4, atol=1e-5)
    assert scaled.residual == pytest.approx(reference.residual, rel=1e-2)
