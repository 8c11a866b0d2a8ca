import torch

from bissl_zoo.hypergradient import Identity


def refuse(u):
    raise AssertionError("a product was asked for")


def test_v_comes_back_without_a_product():
    v = torch.randn(5)
    solution = Identity()(refuse, v)
    assert torch.equal(solution.x, v)
    assert solution.residual is None and solution.products == 0 and solution.status == "not_solved"


def test_a_v_that_is_not_finite_is_answered_by_zero():
    solution = Identity()(refuse, torch.tensor([1.0, float("nan")]))
    assert not solution.x.any() and solution.status == "non_finite"
