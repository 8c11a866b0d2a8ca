import numpy as np
import pytest
import torch
from pretext_methods import build_method, draw
from torch import nn

from bissl_zoo.pretext.simsiam import negative_cosine


def test_loss_is_the_papers_formula():
    prediction, target = draw(6, 4).numpy(), draw(6, 4, seed=1).numpy()
    unit = [z / np.linalg.norm(z, axis=1, keepdims=True) for z in (prediction, target)]
    expected = -np.mean(np.sum(unit[0] * unit[1], axis=1))
    found = negative_cosine(torch.from_numpy(prediction), torch.from_numpy(target))
    assert found.item() == pytest.approx(expected, rel=1e-12)


def test_losses_are_both_directions_and_a_view_is_predicted_from_the_other():
    trunk, simsiam = build_method("simsiam", projector=[16, 8], predictor=[4, 8])
    views = torch.randn(2, 4, 3, 32, 32)
    z = [simsiam.projector(simsiam.tail(trunk(view)["c3"])) for view in views]
    p = [simsiam.predictor(each) for each in z]
    cosines = [nn.functional.cosine_similarity(p[i], z[1 - i].detach(), dim=1) for i in (0, 1)]
    expected = -torch.stack(cosines).mean()
    found = simsiam.losses(trunk, tuple(views))["negative_cosine"]
    torch.testing.assert_close(found, expected)
    parameters = [*trunk.parameters(), *simsiam.parameters()]
    for one, other in zip(*(torch.autograd.grad(loss, parameters) for loss in (found, expected)), strict=True):
        torch.testing.assert_close(one, other)
