import math
from pathlib import Path

import numpy as np
import pytest
import torch
from pretext_methods import build_method

from bissl_zoo.pretext.simclr import nt_xent, similarity_logits

GOLDEN = Path(__file__).resolve().parents[1] / "golden"  # computed with the BiSSL authors' published code, float64


@pytest.mark.parametrize("name", ["ntxent_tau0.5_n4", "ntxent_tau0.5_n16"])
def test_loss_and_gradient_equal_the_authors(name):
    golden = np.load(GOLDEN / f"{name}.npz")
    z = torch.from_numpy(golden["z"]).requires_grad_()
    loss = nt_xent(z, 0.5)
    loss.backward()
    # rounding in another order of summation
    np.testing.assert_allclose(loss.item(), golden["loss"], rtol=1e-13)
    np.testing.assert_allclose(z.grad.numpy(), golden["grad_z"], rtol=1e-10, atol=1e-14)


def test_loss_is_the_papers_formula():
    z = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    unit = (z / z.norm(dim=1, keepdim=True)).tolist()
    total = 0.0
    for i in range(6):
        similar = [math.exp(sum(a * b for a, b in zip(unit[i], unit[k], strict=True)) / 0.3) for k in range(6)]
        total -= math.log(similar[(i + 3) % 6] / (sum(similar) - similar[i]))
    assert nt_xent(z, 0.3).item() == pytest.approx(total / 6, rel=1e-12)


def test_views_belong_together_by_position():
    trunk, simclr = build_method("simclr", projector=[16, 8], temperature=0.2)
    first, second = torch.randn(2, 4, 3, 32, 32)
    z = torch.cat([simclr.projector(simclr.embed(trunk, view)) for view in (first, second)])
    torch.testing.assert_close(simclr.losses(trunk, (first, second))["nt_xent"], nt_xent(z, 0.2))
    assert z.shape == (8, 8)
    swapped = simclr.losses(trunk, (first, second.roll(1, 0)))["nt_xent"]
    assert not torch.isclose(swapped, nt_xent(z, 0.2))


def test_the_logits_are_float32_under_autocast():
    z = torch.randn(8, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, loss = similarity_logits(z, 0.5), nt_xent(z, 0.5)
    assert logits.dtype == loss.dtype == torch.float32
    assert loss.item() == pytest.approx(nt_xent(z.double(), 0.5).item(), rel=1e-6)
