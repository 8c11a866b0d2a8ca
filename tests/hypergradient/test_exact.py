import numpy as np
import pytest
import torch
from systems import system

from bissl_zoo.hypergradient import Exact


def test_it_is_the_direct_solve():
    torch.manual_seed(0)
    matrix = torch.randn(15, 15, dtype=torch.float64)  # indefinite, and not even symmetric: every column counts
    v = torch.randn(15, dtype=torch.float64)
    operator = system(matrix)
    solution = Exact()(operator, v)
    np.testing.assert_allclose(solution.x.numpy(), np.linalg.solve(matrix.numpy(), v.numpy()), rtol=1e-9)
    assert solution.status == "converged" and solution.residual < 1e-12
    assert solution.products == operator.products == 16


@pytest.mark.parametrize("rotated", [False, True])
def test_a_singular_matrix_answers_v(rotated):
    matrix = torch.diag(torch.tensor([1.0, 2.0, 0.0], dtype=torch.float64))
    if rotated:  # singular up to rounding, which elimination alone does not see
        q, _ = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2)))
        matrix = q @ matrix @ q.T
    v = torch.ones(3, dtype=torch.float64)
    solution = Exact()(system(matrix), v)
    assert solution.status == "singular" and torch.equal(solution.x, v)
    assert solution.residual == pytest.approx(float((v - matrix @ v).norm() / v.norm()))


def test_a_matrix_or_vector_that_is_not_finite_has_a_finite_answer():
    v, nan = torch.ones(3), float("nan")
    solution = Exact()(system(torch.full((3, 3), nan)), v)
    assert solution.status == "non_finite" and torch.equal(solution.x, v)
    solution = Exact()(system(torch.eye(3)), v * nan)
    assert solution.status == "non_finite" and not solution.x.any()


def test_zero_is_answered_by_zero():
    operator = system(torch.eye(3))
    solution = Exact()(operator, torch.zeros(3))
    assert not solution.x.any() and solution.residual == 0.0
    assert solution.products == operator.products == 0


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_the_scale_of_v_does_not_matter(scale):
    generator = torch.Generator().manual_seed(0)
    matrix, v = torch.randn(8, 8, generator=generator), torch.randn(8, generator=generator)
    operator = system(matrix)
    reference, scaled = Exact()(system(matrix), v), Exact()(operator, v * scale)
    assert scaled.status == reference.status == "converged"
    assert 0.0 < scaled.residual < 1e-4 and scaled.products == operator.products == 9
    torch.testing.assert_close(scaled.x / scale, reference.x, rtol=1e-4, atol=1e-5)  # float32


def test_a_problem_too_large_is_refused_with_its_size():
    with pytest.raises(ValueError, match="11 x 11 matrix; its limit is max_size=10"):
        Exact(max_size=10)(system(torch.eye(11)), torch.ones(11))
