import torch

from bissl_zoo.hypergradient import DenseOperator, Identity


def test_v_comes_back_without_a_product():
    v, operator = torch.randn(5), DenseOperator(torch.ones(5, 5))
    solution = Identity()(operator, v)
    assert torch.equal(solution.x, v)
    assert solution.residual is None and solution.products == operator.products == 0
    assert solution.status == "not_solved"


def test_a_v_that_is_not_finite_is_answered_by_zero():
    operator = DenseOperator(torch.ones(2, 2))
    solution = Identity()(operator, torch.tensor([1.0, float("nan")]))
    assert not solution.x.any() and solution.status == "non_finite" and operator.products == 0
