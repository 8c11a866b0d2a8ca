from pathlib import Path

import numpy as np
import torch
from pretext_methods import build_method, shake

from bissl_zoo.pretext.byol import regression_loss

GOLDEN = Path(__file__).resolve().parents[1] / "golden"  # computed with the BiSSL authors' published code, float64


def test_regression_term_and_gradient_equal_the_authors():
    golden = np.load(GOLDEN / "byol_pair.npz")
    prediction = torch.from_numpy(golden["pred"]).requires_grad_()
    loss = regression_loss(prediction, torch.from_numpy(golden["target"]))
    loss.mean().backward()
    np.testing.assert_allclose(loss.detach().numpy(), golden["loss_per_sample"], rtol=1e-12)
    np.testing.assert_allclose(prediction.grad.numpy(), golden["grad_pred"], rtol=1e-10, atol=1e-15)


def test_loss_is_both_directions_against_the_teacher():
    trunk, byol = build_method("byol", projector=[16, 8], predictor=[12, 8])
    shake(byol.teacher)
    views = tuple(torch.randn(2, 4, 3, 32, 32))

    def student(view):
        return byol.predictor(byol.projector(byol.tail(trunk(view)["c3"])))

    def teacher(view):
        t = byol.teacher
        return t["projector"](t["tail"](t["backbone"](view)["c3"]))

    def cosine(a, b):
        return ((a / a.norm(dim=1, keepdim=True)) * (b / b.norm(dim=1, keepdim=True))).sum(dim=1)

    expected = 4 - 2 * cosine(student(views[0]), teacher(views[1])) - 2 * cosine(student(views[1]), teacher(views[0]))
    torch.testing.assert_close(byol.losses(trunk, views)["regression"], expected.mean())
