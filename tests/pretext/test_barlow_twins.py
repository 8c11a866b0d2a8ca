import numpy as np
import pytest
import torch
from pretext_methods import build_method, draw

from bissl_zoo.pretext.barlow_twins import cross_correlation_losses

#: rows and columns: more of the first take the one way to the sum of squares, more of the second the other
SHAPES = [(9, 4), (4, 9)]


@pytest.mark.parametrize("shape", SHAPES)
def test_terms_are_the_papers_formula(shape):
    first, second = draw(*shape).numpy(), draw(*shape, seed=1).numpy()
    # the epsilon is that of the batch norm in the authors' code
    a, b = ((z - z.mean(axis=0)) / np.sqrt(z.var(axis=0) + 1e-5) for z in (first, second))
    correlation = a.T @ b / shape[0]
    off = ~np.eye(shape[1], dtype=bool)
    invariance, redundancy = cross_correlation_losses(torch.from_numpy(first), torch.from_numpy(second))
    assert invariance.item() == pytest.approx(np.sum((1 - np.diag(correlation)) ** 2), rel=1e-10)
    assert redundancy.item() == pytest.approx(np.sum(correlation[off] ** 2), rel=1e-10)


def test_losses_are_those_of_the_two_views_projections():
    trunk, method = build_method("barlow_twins", projector=[16, 8], redundancy=0.1)
    views = torch.randn(2, 4, 3, 32, 32)
    z = [method.projector(method.tail(trunk(view)["c3"])) for view in views]
    invariance, redundancy = cross_correlation_losses(*z)
    losses = method.losses(trunk, tuple(views))
    torch.testing.assert_close(losses, {"invariance": invariance, "redundancy": 0.1 * redundancy})
