import copy

import numpy as np
import pytest
import torch
from systems import randn

from bissl_zoo.hypergradient import DenseOperator, MFac, mfac

SHAPES = {"stem.weight": (3, 2), "blocks.0.norm.weight": (4,), "blocks.0.fc.weight": (2, 3), "blocks.1.fc.bias": (5,)}
#: lengths of consecutive blocks of the flat vector
SIZES = {"tensor": [6, 4, 6, 5], "layer": [6, 10, 5], "all": [21]}


def gradients(seed, dtype=torch.float64):
    flat = iter(randn(21, seed=seed, dtype=dtype).split(SIZES["tensor"]))
    return {name: next(flat).view(shape) for name, shape in SHAPES.items()}


def observed(solver, numbers, lower_steps=20):
    solver.start_alternation(lower_steps)
    for number in numbers:
        solver.observe_lower_gradient(gradients(number))
    return solver


def dense(numbers, v, lam, sizes):
    """`(I + F / lambda)^-1 v` with the explicit Fisher matrix of these gradients."""
    rows = np.stack([np.concatenate([g.numpy().ravel() for g in gradients(n).values()]) for n in numbers])
    fisher = rows.T @ rows / len(rows)
    block = np.repeat(np.arange(len(sizes)), sizes)
    return np.linalg.solve(np.eye(21) + fisher * (block[:, None] == block) / lam, v.numpy())


@pytest.mark.parametrize("part", [2**18, 3])  # long vectors are summed in parts
@pytest.mark.parametrize("lam", [0.001, 3.0])
@pytest.mark.parametrize("blocks", SIZES)
def test_it_equals_the_dense_formula(blocks, lam, part, monkeypatch):
    monkeypatch.setattr(mfac, "_PART", part)
    solver, v = MFac(gradients=5, blocks=blocks), randn(21, seed=100)
    operator = DenseOperator(torch.eye(21), shift=lam)
    observed(solver, range(3))(DenseOperator(torch.eye(21), shift=2 * lam), v)  # nothing of another shift remains
    for first in (0, 5):  # fewer gradients than it holds, then a new alternation
        observed(solver, range(first, first + 4), lower_steps=20)
        x = solver(operator, v).x.numpy()
        np.testing.assert_allclose(x, dense(range(first, first + 4), v, lam, SIZES[blocks]), rtol=1e-9, atol=1e-12)
    assert operator.products == 0


def test_short_alternations_keep_older_gradients_and_a_copy_continues_from_its_state():
    solver, v, operator = MFac(gradients=5, store="cpu"), randn(21, seed=100), DenseOperator(torch.eye(21), shift=0.1)
    for first in (0, 3, 6):
        observed(solver, range(first, first + 3), lower_steps=3)
    np.testing.assert_allclose(solver(operator, v).x, dense(range(4, 9), v, 0.1, SIZES["layer"]), rtol=1e-9)
    state = copy.deepcopy(solver.state_dict())
    assert state["gradients"].shape == (2, 21)  # those that three further steps leave
    resumed = MFac(gradients=5)
    resumed.load_state_dict(state)
    given, expected = (observed(one, range(9, 12), lower_steps=3)(operator, v).x for one in (resumed, solver))
    assert torch.equal(given, expected)
    assert observed(solver, range(5), lower_steps=5).state_dict()["gradients"] is None


def test_gradients_that_are_not_finite_are_removed(caplog):
    solver, v, operator = MFac(gradients=5), randn(21, seed=100), DenseOperator(torch.eye(21), shift=0.1)
    assert torch.equal(solver(operator, v).x, v)  # no gradient yet
    observed(solver, range(3))
    solver.observe_lower_gradient({name: g * torch.inf for name, g in gradients(3).items()})
    np.testing.assert_allclose(solver(operator, v).x, dense(range(3), v, 0.1, SIZES["layer"]), rtol=1e-9)
    assert "1 of 4" in caplog.text
    assert solver(operator, v * torch.nan).status == "non_finite"


@pytest.mark.parametrize("arguments", [{"gradients": 0}, {"blocks": "layers"}, {"store": "disk"}])
def test_invalid_arguments_are_refused(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        MFac(**arguments)
