import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from systems import randn, rotated

from bissl_zoo.hypergradient import DenseOperator, Nystrom, choose_shift

SEEDS = st.integers(0, 10_000)


def residual(operator, x, v):
    return float((v - x - operator.hessian @ x / operator.shift).norm() / v.norm())


def with_approximation(hessian, directions, shift):
    """`I + H D (D^T H D)^+ D^T H / shift`, dense."""
    h, d = hessian.numpy(), directions.numpy()
    sketch = h @ d
    return np.eye(len(h)) + sketch @ np.linalg.pinv(d.T @ sketch) @ sketch.T / shift


@given(SEEDS, st.integers(1, 10), st.sampled_from([0.5, 10.0]))
@settings(max_examples=20, deadline=None)
def test_it_inverts_the_approximation_by_its_gaussian_sketch(seed, rank, shift):
    hessian, v = rotated(20.0 / torch.arange(1, 26) ** 2, seed), randn(25, seed=seed + 100)
    operator = DenseOperator(hessian, shift)
    solution = Nystrom(rank=rank, seed=seed)(operator, v)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.stack([torch.randn(25, generator=generator, dtype=torch.float64) for _ in range(rank)], dim=1)
    expected = np.linalg.solve(with_approximation(hessian, drawn, shift), v.numpy())
    if solution.status != "diverged":  # that one may be answered by v
        # the core of the sketch is as ill conditioned as the spectrum falls, 1e-2 here, squared by the draw
        np.testing.assert_allclose(solution.x.numpy(), expected, atol=1e-8)
    assert solution.residual == pytest.approx(residual(operator, solution.x, v), rel=1e-8)
    assert rank + 1 <= solution.products == operator.products <= rank + 2


@given(SEEDS, st.integers(1, 8))
@settings(max_examples=15, deadline=None)
def test_curvature_of_low_rank_is_met_exactly(seed, curved):
    values = torch.cat([torch.linspace(1.0, 100.0, curved), torch.zeros(30 - curved)])
    operator, v = DenseOperator(rotated(values, seed), shift=2.0), randn(30, seed=seed + 100)
    solution = Nystrom(rank=8)(operator, v)
    assert solution.status == "converged" and solution.residual < 1e-6
    matrix = np.eye(30) + operator.hessian.numpy() / 2.0
    np.testing.assert_allclose(solution.x.numpy(), np.linalg.solve(matrix, v.numpy()), atol=1e-6)


@pytest.mark.parametrize("size", [1, 6, 9])
def test_as_many_directions_as_parameters_solve_an_indefinite_system_too(size):
    values = torch.linspace(-7.0, 20.0, size)
    operator, v = DenseOperator(rotated(values, 0), shift=2.0), randn(size, seed=100)
    solution = Nystrom(rank=12)(operator, v)
    assert solution.status == "converged" and solution.residual < 1e-9
    assert solution.products == operator.products == size + 1  # a space that is known in full takes no more


def test_further_solves_spend_only_the_product_of_the_check():
    operator = DenseOperator(rotated(20.0 * 0.3 ** torch.arange(40), 0), shift=1.0)
    solve, unchecked = Nystrom(rank=6), Nystrom(rank=6, check=False)
    first = solve(operator, randn(40, seed=100))
    size = len(operator.subspace.basis)
    assert first.products == 7 and size <= 12
    for seed in range(1, 6):
        v = randn(40, seed=100 + seed)
        checked, quick = solve(operator, v), unchecked(operator, v)
        assert (checked.products, checked.status) == (1, "converged")
        assert (quick.products, quick.status, quick.residual) == (0, "not_solved", None)
        torch.testing.assert_close(checked.x, quick.x, rtol=0, atol=0)
        assert len(operator.subspace.basis) == size  # right-hand sides do not pile up
    assert operator.products == 7 + 5


@pytest.mark.parametrize(("steps", "drawn"), [(3, 5), (8, 0), (12, 0)])
def test_products_left_by_automatic_damping_are_used_first(steps, drawn):
    hessian, v = rotated(torch.linspace(-5.0, 20.0, 40), 0), randn(40, seed=100)
    operator = DenseOperator(hessian, shift=None)
    operator.shift, spent = choose_shift(operator, v, steps, 0.05, 1e-3)
    basis = torch.stack(list(operator.subspace.basis))
    solution = Nystrom(rank=8)(operator, v)
    assert spent == steps and operator.products == spent + solution.products
    assert solution.products in (drawn + 1, drawn + 2)
    assert torch.equal(torch.stack(list(operator.subspace.basis))[: len(basis)], basis)


def test_negative_curvature_returns_the_better_of_v_and_x():
    seen, rank = set(), 4
    for seed in range(20):
        operator, v = DenseOperator(rotated(torch.linspace(-8.0, 20.0, 15), seed)), randn(15, seed=seed + 100)
        solution = Nystrom(rank=rank, tolerance=1e-6)(operator, v)
        assert solution.products == operator.products
        assert solution.residual == pytest.approx(residual(operator, solution.x, v), rel=1e-9)
        if solution.status == "negative_curvature":
            assert solution.products == rank + 2
            assert solution.residual <= residual(operator, v, v) * (1 + 1e-12)
            seen.add("v" if torch.equal(solution.x, v) else "x")
            unchecked = Nystrom(rank=rank, check=False)(DenseOperator(operator.hessian), v)
            assert (unchecked.status, unchecked.residual) == ("negative_curvature", None)
            assert torch.equal(unchecked.x, v)
    assert seen == {"v", "x"}
