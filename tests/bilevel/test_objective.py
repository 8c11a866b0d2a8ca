"""The hypergradient against finite differences of the bilevel objective itself, lower problem solved to convergence."""

import functools
import itertools

import pytest
import torch
from fvcore.common.param_scheduler import ConstantParamScheduler
from torch import nn
from torch.optim import SGD

from bissl_zoo.bilevel import BiLevel
from bissl_zoo.bilevel.level import Level
from bissl_zoo.distributed import flatten, unflatten_like
from bissl_zoo.hypergradient import ConjugateGradient, Exact, MinRes, Neumann, Nystrom
from bissl_zoo.optim import LRMultiplier
from bissl_zoo.pretext.simclr import nt_xent

pytestmark = pytest.mark.slow

LAM = 5.0  # strong enough for the lower problem to have one optimum
SIZE = 23  # parameters of the backbone


def backbone():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2), nn.Tanh()).double()


class Contrast(nn.Linear):
    def losses(self, backbone, batch):
        return {"nt_xent": nt_xent(torch.cat([self(backbone(view)) for view in batch]), 0.5)}


class Classify(nn.Linear):
    def losses(self, backbone, batch):
        return {"cross_entropy": nn.functional.cross_entropy(self(backbone(batch[0])), batch[1])}


def draw(*shape, seed):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


VIEWS = draw(2, 5, 4, seed=1)
BATCH = draw(6, 4, seed=2), torch.tensor([0, 1, 2, 0, 1, 2])


def problem(solver, gamma):
    torch.manual_seed(1)
    levels = []
    for name, head, batch in (("lower", Contrast(2, 3), VIEWS), ("upper", Classify(2, 3), BATCH)):
        net = backbone()
        optimizer = SGD([*net.parameters(), *head.double().parameters()], lr=0.1)
        multiplier = LRMultiplier(ConstantParamScheduler(1.0))
        levels.append(Level(name, net, head, optimizer, itertools.repeat(batch), multiplier, 9))
    with torch.no_grad():
        for parameter in levels[1].backbone.parameters():
            parameter.add_(0.3 * draw(*parameter.shape, seed=3))
    return BiLevel(*levels, solver=solver, lam=LAM, gamma=gamma)


def set_flat(module, vector):
    with torch.no_grad():
        for parameter, value in zip(
            module.parameters(), unflatten_like(vector, list(module.parameters())), strict=True
        ):
            parameter.copy_(value)


def solve_lower(bilevel):
    """`theta_P*(theta_D)` at fixed `phi_P`, by Newton's method until the gradient is zero to rounding."""
    lower, theta_d = bilevel.lower, flatten(p.detach() for p in bilevel.upper.backbone.parameters())
    parameters = list(lower.backbone.parameters())
    for _ in range(30):
        theta = flatten(parameters)
        objective = lower.loss(lower.backbone, VIEWS)[0] + LAM / 2 * (theta - theta_d).square().sum()
        gradients = torch.autograd.grad(objective, parameters, create_graph=True)
        gradient = flatten(gradients)
        if gradient.norm() < 1e-13:
            return
        rows = [flatten(torch.autograd.grad(g, parameters, retain_graph=True)) for g in gradient]
        set_flat(lower.backbone, theta.detach() - torch.linalg.solve(torch.stack(rows), gradient.detach()))
    raise AssertionError(f"Newton's method left a gradient of {gradient.norm():.1e}")


def objective(bilevel, theta_d):
    set_flat(bilevel.upper.backbone, theta_d)
    solve_lower(bilevel)
    return sum(
        weight * bilevel.upper.loss(net, BATCH)[0].item()
        for weight, net in ((1.0, bilevel.lower.backbone), (bilevel.gamma, bilevel.upper.backbone))
    )


@functools.cache
def finite_differences(gamma, step=1e-4):
    bilevel = problem(Exact(damping=0.0), gamma)
    theta_d = flatten(p.detach() for p in bilevel.upper.backbone.parameters())
    slopes = []
    for unit in torch.eye(len(theta_d), dtype=torch.float64):
        # central differences of fourth order: an error of about 1e-12
        values = {n: objective(bilevel, theta_d + n * step * unit) for n in (-2, -1, 1, 2)}
        slopes.append((8 * (values[1] - values[-1]) - (values[2] - values[-2])) / (12 * step))
    return torch.tensor(slopes, dtype=torch.float64)


@pytest.mark.parametrize("gamma", [0.0, 1.0])
def test_exact_is_the_derivative_of_the_objective(gamma):
    bilevel = problem(Exact(damping=0.0), gamma)
    expected = finite_differences(gamma)
    assert len(expected) == SIZE
    solve_lower(bilevel)
    found = bilevel.upper_gradients(BATCH, bilevel.curvature(VIEWS).prepare())
    torch.testing.assert_close(found.backbone, expected, rtol=1e-7, atol=1e-9)
    # the curvature matters here: joint training would follow another direction
    v, _, _ = bilevel._downstream_gradients(bilevel.lower.backbone, BATCH)
    assert (found.solution.x - v).norm() > 0.05 * v.norm()


@pytest.mark.parametrize(
    "solver",
    [
        ConjugateGradient(iterations=60, tolerance=1e-12, damping=0.0),
        MinRes(iterations=60, tolerance=1e-12, damping=0.0),
        MinRes(iterations=60, tolerance=1e-12, damping=0.0, recycle=0),
        Neumann(iterations=400, tolerance=1e-12, damping=0.0),
        Nystrom(rank=SIZE, tolerance=1e-9, damping=0.0),
    ],
    ids=lambda solver: type(solver).__name__,
)
def test_every_solver_agrees_with_finite_differences(solver):
    bilevel = problem(solver, gamma=1.0)
    solve_lower(bilevel)
    found = bilevel.upper_gradients(BATCH, bilevel.curvature(VIEWS).prepare())
    assert found.solution.status == "converged"
    torch.testing.assert_close(found.backbone, finite_differences(1.0), rtol=1e-7, atol=1e-9)
