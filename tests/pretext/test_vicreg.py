import numpy as np
import pytest
import torch
from pretext_methods import build_method

from bissl_zoo.pretext.vicreg import covariance_loss, variance_loss, vicreg_losses

#: rows and columns: more of the first take the one way to the covariances, more of the second the other
SHAPES = [(9, 4), (4, 9)]


def draw(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    # standard deviations from 0.5 to 2: on both sides of the hinge
    return torch.randn(*shape, dtype=torch.float64, generator=generator) * torch.linspace(0.5, 2.0, shape[-1]).double()


@pytest.mark.parametrize("shape", SHAPES)
def test_terms_are_the_papers_formulas(shape):
    first, second = draw(*shape), draw(*shape, seed=1)
    invariance, variance, covariance = (term.item() for term in vicreg_losses(first, second))
    a, b = first.numpy(), second.numpy()
    assert invariance == pytest.approx(np.mean((a - b) ** 2), rel=1e-12)
    short = [np.maximum(0, 1 - np.sqrt(z.var(axis=0, ddof=1) + 1e-4)) for z in (a, b)]
    assert all(0 < np.count_nonzero(each) < len(each) for each in short)
    assert variance == pytest.approx(np.mean(short), rel=1e-12)
    off = ~np.eye(shape[1], dtype=bool)
    expected = sum(np.sum(np.cov(z, rowvar=False)[off] ** 2) / shape[1] for z in (a, b))
    assert covariance == pytest.approx(expected, rel=1e-10)


def test_a_constant_feature_has_finite_derivatives():
    z = torch.ones(6, 3, dtype=torch.float64, requires_grad=True)
    [gradient] = torch.autograd.grad(variance_loss(z) + covariance_loss(z), z, create_graph=True)
    [product] = torch.autograd.grad((gradient * draw(6, 3)).sum(), z)
    assert variance_loss(z).item() == pytest.approx(0.99) and covariance_loss(z) == 0
    assert torch.isfinite(gradient).all() and torch.isfinite(product).all()


def test_losses_are_weighted_terms_of_the_two_views_projections():
    weights = {"invariance": 3.0, "variance": 5.0, "covariance": 7.0}
    trunk, method = build_method("vicreg", projector=[16, 8], **weights)
    views = torch.randn(2, 4, 3, 32, 32)
    terms = vicreg_losses(*(method.projector(method.tail(trunk(view)["c3"])) for view in views))
    expected = {name: weight * term for (name, weight), term in zip(weights.items(), terms, strict=True)}
    torch.testing.assert_close(method.losses(trunk, tuple(views)), expected)
