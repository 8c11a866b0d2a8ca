import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from systems import randn

from bissl_zoo.hypergradient import DenseOperator, Subspace

SEEDS = st.integers(0, 10_000)


def symmetric(size, seed, dtype=torch.float64):
    matrix = randn(size, size, seed=seed, dtype=dtype)
    return (matrix + matrix.T) / 2


def explored(matrix, seed, starts=(3, 2, 2)):
    """Return a space grown from several vectors, with `starts[i]` products for vector i."""
    operator, space = DenseOperator(matrix), Subspace()
    for i, steps in enumerate(starts):
        coordinates = space.coordinates(randn(len(matrix), seed=seed + i, dtype=matrix.dtype))
        for _ in range(steps):
            direction = space.unexplored(coordinates)
            if direction is None:
                break
            assert space.explore(operator.hessian_product, direction)
            coordinates = torch.zeros(len(space.basis), dtype=torch.float64)
    return space


def dense(space):
    """Return basis, directions and products as dense columns, float64."""
    v = torch.stack(list(space.basis)).double()
    return v, v.T @ space.directions, v.T @ space.images


def assert_relation(space, matrix, tolerance=1e-10):
    if not len(space.basis):
        assert not space.explored
        return
    basis, directions, images = dense(space)
    size = matrix.double().norm()
    torch.testing.assert_close(basis @ basis.T, torch.eye(len(basis), dtype=torch.float64), rtol=0, atol=tolerance)
    gram = space.directions.T @ space.directions
    torch.testing.assert_close(gram, torch.eye(space.explored, dtype=torch.float64), rtol=0, atol=tolerance)
    assert (matrix.double() @ directions - images).norm() <= tolerance * size * max(1, space.explored) ** 0.5


@given(st.integers(1, 25), SEEDS, st.integers(0, 12))
@settings(max_examples=30, deadline=None)
def test_the_lanczos_relation_holds_also_after_truncation(size, seed, limit):
    matrix = symmetric(size, seed)
    space = explored(matrix, seed)
    assert space.explored == min(7, size)
    assert_relation(space, matrix)
    before = dense(space)
    space.truncate(limit)
    assert len(space.basis) <= max(limit, 0) and space.explored <= limit
    assert_relation(space, matrix)
    if len(space.basis):  # the first products are kept, as they were
        for kept, all_of_them in zip(dense(space)[1:], before[1:], strict=True):
            torch.testing.assert_close(kept, all_of_them[:, : space.explored], rtol=0, atol=1e-12)


def test_thousands_of_float32_parameters_keep_the_relation():
    matrix = symmetric(2000, 0, torch.float32)
    # rounding of a sum of 2000 float32 products; Gram-Schmidt twice keeps the basis orthonormal to its own rounding
    assert_relation(explored(matrix, 0, (10, 5, 5)), matrix, tolerance=1e-5)


@given(st.integers(1, 20), SEEDS)
@settings(max_examples=20, deadline=None)
def test_a_vector_is_the_combination_of_its_coordinates(size, seed):
    space = explored(symmetric(size, seed), seed)
    w = randn(size, seed=seed + 77)
    coordinates = space.coordinates(w)
    torch.testing.assert_close(space.combine(coordinates), w, rtol=0, atol=1e-12)
    count = len(space.basis)
    torch.testing.assert_close(space.coordinates(3 * w), 3 * coordinates, rtol=0, atol=1e-12)
    assert len(space.basis) == count


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_vectors_and_products_that_are_not_finite_are_not_added(bad):
    matrix = symmetric(12, 0)
    space = explored(matrix, 0, (3,))
    count = len(space.basis)
    w = randn(12, seed=1)
    w[3] = bad
    assert not torch.isfinite(space.coordinates(w)).all() and len(space.basis) == count
    assert not space.explore(lambda u: u * bad, space.unexplored(torch.zeros(count, dtype=torch.float64)))
    assert space.explored == 3 and len(space.basis) == count
    assert_relation(space, matrix)


def test_an_invariant_space_has_no_next_direction():
    matrix = torch.diag(torch.tensor([1.0, 2.0, 0.0, 0.0], dtype=torch.float64))
    operator, space = DenseOperator(matrix), Subspace()
    start = space.coordinates(torch.tensor([1.0, 1.0, 0.0, 0.0], dtype=torch.float64))
    assert space.explore(operator.hessian_product, space.unexplored(start))
    assert space.explore(operator.hessian_product, space.unexplored(torch.zeros(2, dtype=torch.float64)))
    assert len(space.basis) == 2
    assert space.unexplored(torch.zeros(2, dtype=torch.float64)) is None


@given(st.integers(2, 20), SEEDS, st.sampled_from([0.1, 1.0, 30.0]))
@settings(max_examples=20, deadline=None)
def test_the_minimal_residual_is_that_of_a_dense_least_squares_fit(size, seed, shift):
    matrix = symmetric(size, seed)
    space = explored(matrix, seed, (2, 1))
    v = randn(size, seed=seed + 77)
    x, rest = (space.combine(c) for c in space.minimal_residual(space.coordinates(v), shift))
    a = (torch.eye(size, dtype=torch.float64) + matrix / shift).numpy()
    _, directions, _ = dense(space)
    applied = a @ directions.numpy()
    y = np.linalg.lstsq(applied, v.numpy(), rcond=None)[0]
    least = np.linalg.norm(v.numpy() - applied @ y)
    np.testing.assert_allclose(rest.numpy(), v.numpy() - a @ x.numpy(), atol=1e-9 * np.linalg.norm(a))
    assert np.linalg.norm(rest.numpy()) == pytest.approx(least, rel=1e-7, abs=1e-8)


@given(st.integers(2, 20), SEEDS)
@settings(max_examples=20, deadline=None)
def test_ritz_values_are_rayleigh_quotients_with_an_eigenvalue_in_their_bounds(size, seed):
    matrix = symmetric(size, seed)
    space = explored(matrix, seed, (2, 1))
    values, bounds = space.ritz_values()
    _, directions, _ = dense(space)
    np.testing.assert_allclose(values, np.linalg.eigvalsh((directions.T @ matrix @ directions).numpy()), atol=1e-10)
    distances = np.abs(np.linalg.eigvalsh(matrix.numpy())[:, None] - values.numpy()).min(axis=0)
    assert (distances <= bounds.numpy() + 1e-9).all()


def test_the_negative_share_is_that_of_the_components_of_negative_ritz_values():
    matrix = torch.diag(torch.tensor([-2.0, 3.0, 0.5], dtype=torch.float64))
    space = Subspace()
    for vector in torch.eye(3, dtype=torch.float64)[:2]:
        assert space.explore(lambda u: matrix @ u, space.unexplored(space.coordinates(vector)))
    x = torch.tensor([2.0, 1.0, 2.0], dtype=torch.float64)
    assert space.negative_share(x) == pytest.approx(4 / 9) and space.negative_share(0 * x) == 0.0
