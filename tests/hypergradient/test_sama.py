import copy

import pytest
import torch
from systems import randn
from timm.optim import Lamb, Lars
from torch.optim import SGD, Adam, AdamW

from bissl_zoo.hypergradient import DenseOperator, Sama

OPTIMIZERS = {
    "SGD": lambda params: SGD(params, lr=0.1, momentum=0.9, weight_decay=0.1),
    "Adam": lambda params: Adam(params, lr=0.1, weight_decay=0.1),
    "AdamW": lambda params: AdamW(params, lr=0.1, betas=(0.5, 0.8), weight_decay=0.1),
    "Lars": lambda params: Lars(params, lr=0.1, weight_decay=0.1, momentum=0.9, trust_coeff=1.0),
    "Lars without decay": lambda params: Lars(params, lr=0.1, trust_coeff=1.0, always_adapt=True),
}
SHAPES = ((2, 3), (4,))


def step(start, build, state, gradients):
    """The change of the weights in a step of a new optimizer in the given state."""
    weights = [weight.clone().requires_grad_() for weight in start]
    optimizer = build(weights)
    optimizer.load_state_dict(copy.deepcopy(state))
    for weight, gradient in zip(weights, gradients, strict=True):
        weight.grad = gradient.clone()
    optimizer.step()
    return torch.cat([(before - after.detach()).flatten() for before, after in zip(start, weights, strict=True)])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_is_the_transposed_derivative_of_the_last_step(name):
    build = OPTIMIZERS[name]
    weights = [randn(*shape, seed=n).requires_grad_() for n, shape in enumerate(SHAPES)]
    optimizer, solver = build(weights), Sama()
    operator, v = DenseOperator(torch.eye(10)), randn(10, seed=5)
    solver.attach(optimizer, weights)
    assert torch.equal(solver(operator, v).x, v)  # no step yet
    for number in range(3):
        start = [weight.detach().clone() for weight in weights]
        state = copy.deepcopy(optimizer.state_dict())
        for weight in weights:
            weight.grad = randn(*weight.shape, seed=10 * number + weight.ndim)
        gradients = [weight.grad.clone() for weight in weights]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    columns = []
    for unit in 1e-5 * torch.eye(10, dtype=torch.float64):
        units = [u.view(shape) for u, shape in zip(unit.split([6, 4]), SHAPES, strict=True)]
        more, less = ([g + s * u for g, u in zip(gradients, units, strict=True)] for s in (1, -1))
        columns.append((step(start, build, state, more) - step(start, build, state, less)) / 2e-5)
    expected = torch.stack(columns, dim=1).T @ v
    x = solver(operator, v).x
    torch.testing.assert_close(x, expected * v.norm() / expected.norm(), rtol=1e-6, atol=1e-8)
    assert (torch.allclose(x, v), operator.products) == (name == "SGD", 0)


def test_an_optimizer_without_derivative_is_refused():
    weights = [torch.zeros(2, requires_grad=True)]
    for optimizer, name in ((Lamb(weights), "Lamb"), (Adam(weights, amsgrad=True), "Adam with amsgrad")):
        with pytest.raises(ValueError, match=f"{name}; it knows SGD"):
            Sama().attach(optimizer, weights)
