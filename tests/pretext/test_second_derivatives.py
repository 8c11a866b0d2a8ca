"""Second derivatives of all losses against finite differences: the Hessian-vector products of BiSSL need them."""

import pytest
import torch
from pretext_methods import MASK, VIT, build_method, draw, shake
from torch.nn.functional import normalize

from bissl_zoo.hypergradient import CurvatureOperator
from bissl_zoo.pretext.barlow_twins import cross_correlation_losses
from bissl_zoo.pretext.byol import regression_loss
from bissl_zoo.pretext.moco_v2 import info_nce
from bissl_zoo.pretext.moco_v3 import info_nce_in_batch
from bissl_zoo.pretext.simclr import nt_xent
from bissl_zoo.pretext.simmim import masked_l1
from bissl_zoo.pretext.simsiam import negative_cosine
from bissl_zoo.pretext.vicreg import vicreg_losses


def weighted(losses, *weights):
    return sum(weight * loss for weight, loss in zip(weights, losses, strict=True))


TARGET, QUEUE = draw(5, 3, seed=1), normalize(draw(6, 3, seed=2), dim=1)
#: targets far from the values of tanh, away from the kink of the absolute value
PIXELS = 2 * draw(2, 3, 4, 4, seed=1).sign()
LOSSES = {
    "simclr": (lambda z: nt_xent(z, 0.5), [(6, 3)]),
    "byol": (lambda p: regression_loss(p, TARGET).mean(), [(5, 3)]),
    "simsiam": (lambda p: negative_cosine(p, TARGET), [(5, 3)]),
    "moco_v2": (lambda q: info_nce(normalize(q, dim=1), normalize(TARGET, dim=1), QUEUE, 0.2), [(5, 3)]),
    "moco_v3": (lambda q: info_nce_in_batch(q, TARGET, 0.3), [(5, 3)]),
    "barlow_twins, long": (lambda a, b: weighted(cross_correlation_losses(a, b), 1.0, 0.1), [(5, 3), (5, 3)]),
    "barlow_twins, wide": (lambda a, b: weighted(cross_correlation_losses(a, b), 1.0, 0.1), [(3, 5), (3, 5)]),
    "vicreg, long": (lambda a, b: weighted(vicreg_losses(a, b), 25.0, 25.0, 1.0), [(5, 3), (5, 3)]),
    "vicreg, wide": (lambda a, b: weighted(vicreg_losses(a, b), 25.0, 25.0, 1.0), [(3, 5), (3, 5)]),
    "simmim": (lambda x: masked_l1(x.tanh(), PIXELS, MASK), [(2, 3, 4, 4)]),
}


@pytest.mark.parametrize("name", LOSSES)
def test_second_derivatives_of_losses_equal_finite_differences(name):
    loss, shapes = LOSSES[name]
    inputs = [draw(*shape, seed=10 + i).requires_grad_() for i, shape in enumerate(shapes)]
    assert torch.autograd.gradgradcheck(loss, inputs)


@pytest.mark.parametrize("loss", [negative_cosine, lambda q, k: info_nce_in_batch(q, k, 0.3)])
def test_no_gradient_reaches_the_target(loss):
    target = draw(6, 4, seed=1).requires_grad_()
    loss(draw(6, 4).requires_grad_(), target).backward()
    assert target.grad is None


@pytest.mark.parametrize("method", ["dino", "mae", "simmim"])
def test_products_of_a_vit_equal_finite_differences_of_the_gradient(method):
    trunk, pretext = build_method(method, VIT, **({"projector": [16, 8, 32]} if method == "dino" else {}))
    trunk.double(), pretext.double()
    images = draw(3, 2, 3, 32, 32)
    mask = MASK[:1].expand(2, 2, 2) if method == "mae" else MASK  # as many patches in each image
    views = tuple(images) if method == "dino" else (images[0] + 3 * images[0].sign(), mask)
    if method == "dino":  # away from the initial weights, which are so small that differences vanish
        shake(pretext.projector)
    parameters = list(trunk.parameters())
    operator = CurvatureOperator(
        lambda: sum(pretext.losses(trunk, views).values()), parameters, 1.0, (trunk, pretext)
    ).prepare()
    u = torch.randn(sum(operator.block_sizes), dtype=torch.float64)

    def gradient(step):
        with torch.no_grad():
            for p, direction in zip(parameters, u.split(operator.block_sizes), strict=True):
                p.add_(direction.view_as(p), alpha=step)
        loss = sum(pretext.losses(trunk, views).values())
        return torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, parameters)])

    step = 1e-6  # the norm of u is about 550
    product, ahead, behind = operator.hessian_product(u), gradient(step), gradient(-2 * step)
    difference = (ahead - behind) / (2 * step)
    assert (product - difference).norm() < 1e-6 * difference.norm()
