import numpy as np
import pytest
import torch
from pretext_methods import build_method, draw, shake

from bissl_zoo.pretext.moco_v3 import info_nce_in_batch


def test_loss_and_gradient_are_the_papers_formula():
    query, key = draw(6, 4).requires_grad_(), draw(6, 4, seed=1)
    loss = info_nce_in_batch(query, key, 0.3)
    loss.backward()
    q, k = query.detach().numpy(), key.numpy()
    length = np.linalg.norm(q, axis=1, keepdims=True)
    q, k = q / length, k / np.linalg.norm(k, axis=1, keepdims=True)
    similar = np.exp(q @ k.T / 0.3)
    softmax = similar / similar.sum(axis=1, keepdims=True)
    assert loss.item() == pytest.approx(-2 * 0.3 * np.mean(np.log(np.diag(softmax))), rel=1e-12)
    slope = 2 / 6 * (softmax - np.eye(6)) @ k  # in the unit vectors; of a vector it is what is across it, by its length
    expected = (slope - (slope * q).sum(axis=1, keepdims=True) * q) / length
    np.testing.assert_allclose(query.grad.numpy(), expected, rtol=1e-10, atol=1e-14)


def test_losses_are_both_directions_against_the_teacher():
    trunk, moco = build_method("moco_v3", projector=[16, 16, 8], predictor=[12, 8], temperature=0.5)
    shake(moco.teacher)
    views = torch.randn(2, 4, 3, 32, 32)
    t = moco.teacher
    queries = [moco.predictor(moco.projector(moco.tail(trunk(view)["c3"]))) for view in views]
    keys = [t["projector"](t["tail"](t["backbone"](view)["c3"])) for view in views]
    expected = info_nce_in_batch(queries[0], keys[1], 0.5) + info_nce_in_batch(queries[1], keys[0], 0.5)
    torch.testing.assert_close(moco.losses(trunk, tuple(views))["info_nce"], expected)
