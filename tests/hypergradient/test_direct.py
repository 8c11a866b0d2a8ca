import numpy as np
import pytest
import torch
from systems import system

from bissl_zoo.hypergradient import DenseOperator, Exact, Identity


def test_exact_equals_numpys_solve():
    torch.manual_seed(0)
    matrix = torch.randn(15, 15, dtype=torch.float64)  # indefinite and not symmetric: every column matters
    v = torch.randn(15, dtype=torch.float64)
    operator = system(matrix)
    solution = Exact()(operator, v)
    np.testing.assert_allclose(solution.x.numpy(), np.linalg.solve(matrix.numpy(), v.numpy()), rtol=1e-9)
    assert solution.status == "converged" and solution.residual < 1e-12
    assert solution.products == operator.products == 16


@pytest.mark.parametrize("rotated", [False, True])
def test_exact_returns_v_for_a_singular_matrix(rotated):
    matrix = torch.diag(torch.tensor([1.0, 2.0, 0.0], dtype=torch.float64))
    if rotated:  # singular up to rounding, which elimination does not detect
        q, _ = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2)))
        matrix = q @ matrix @ q.T
    v = torch.ones(3, dtype=torch.float64)
    solution = Exact()(system(matrix), v)
    assert solution.status == "singular" and torch.equal(solution.x, v)
    assert solution.residual == pytest.approx(float((v - matrix @ v).norm() / v.norm()))


def test_identity_returns_v_without_a_product():
    v, operator = torch.randn(5), DenseOperator(torch.ones(5, 5))
    solution = Identity()(operator, v)
    assert torch.equal(solution.x, v)
    assert solution.residual is None and solution.products == operator.products == 0
    assert solution.status == "not_solved"
