"""The reduced problem: it passes for every pretext method and detects wrong products."""

import contextlib

import pytest
import torch
from torch import nn

from bissl_zoo.analysis.reduced_problem import (
    ReducedProblem,
    check_reduced,
    check_solver,
    differences,
    make_smooth,
    right_hand_side,
    set_parameters,
)
from bissl_zoo.config import LazyCall as L
from bissl_zoo.config import load_config
from bissl_zoo.distributed import flatten
from bissl_zoo.errors import BisslZooError
from bissl_zoo.hypergradient import CurvatureOperator, MinRes
from bissl_zoo.pretext import PretextMethod
from bissl_zoo.registry import PRETEXT_METHODS, SOLVERS, build_pretext

PRODUCT, OBJECTIVE = 0, 1


def config(method="simclr"):
    cfg = load_config("quickstart/digit_scenes_det.py")
    if cfg.pretext.name != method:
        cfg.pretext = L(build_pretext)(name=method, **({"queue_length": 64} if method == "moco_v2" else {}))
    return cfg


@pytest.fixture(scope="module")
def reduced():
    return ReducedProblem(config())


@pytest.mark.slow
@pytest.mark.parametrize("method", PRETEXT_METHODS.list())
def test_every_pretext_method_passes(method):
    checks = check_reduced(ReducedProblem(config(method)), "minres", MinRes())
    assert len(checks) == 5
    for check in checks:
        assert check.passed, check


@pytest.mark.slow
@pytest.mark.parametrize("name", SOLVERS.list())
def test_every_solver_passes(reduced, name):
    for check in check_solver(reduced, name, SOLVERS.get(name)()):
        assert check.passed, check


@pytest.mark.slow
def test_the_lower_problem_is_solved_and_the_curvature_matters(reduced):
    theta_d = flatten(p.detach() for p in reduced.problem.upper.backbone_parameters)
    theta_p = flatten(p.detach() for p in reduced.parameters)
    slope = reduced.gradient() + reduced.problem.lam * (theta_p - theta_d)
    assert slope.norm() < 1e-10 * reduced.gradient().norm()
    v = right_hand_side(reduced.problem, reduced.batch)
    x = torch.linalg.solve(torch.eye(len(v)) + reduced.hessian() / reduced.problem.lam, v)
    assert (x - v).norm() > 0.02 * v.norm()


@pytest.mark.slow
def test_detached_targets_are_held():
    torch.manual_seed(0)
    simsiam = ReducedProblem(config("simsiam"))
    u = torch.nn.functional.normalize(torch.randn(47, dtype=torch.float64), dim=0)
    theta = flatten(p.detach() for p in simsiam.parameters)

    def gradient(at):
        set_parameters(simsiam.parameters, at)
        return simsiam.gradient()

    expected = simsiam.hessian() @ u
    held = differences(gradient, theta, u)
    simsiam.holding = contextlib.nullcontext()
    moving = differences(gradient, theta, u)
    assert (held - expected).norm() < 1e-6 * expected.norm() < 1e-3 * (moving - expected).norm()


@pytest.mark.slow
def test_the_check_leaves_the_random_state_and_the_parameters_as_they_were(reduced):
    before, state = flatten(p.detach() for p in reduced.parameters), torch.get_rng_state()
    check_reduced(reduced, "minres", MinRes())
    assert torch.equal(torch.get_rng_state(), state)
    # the lower problem is solved again, up to rounding
    torch.testing.assert_close(flatten(p.detach() for p in reduced.parameters), before, rtol=1e-10, atol=1e-10)


@pytest.mark.slow
def test_a_product_of_half_the_size_is_detected(reduced, monkeypatch):
    right = CurvatureOperator.hessian_product
    monkeypatch.setattr(CurvatureOperator, "hessian_product", lambda self, u: 0.5 * right(self, u))
    checks = check_reduced(reduced, "minres", MinRes())
    assert [check.passed for check in checks[:2]] == [False, False]
    assert checks[PRODUCT].error == pytest.approx(0.5, rel=1e-6)
    assert "0.5 times the expected value" in checks[PRODUCT].detail


@pytest.mark.slow
def test_a_product_that_loses_a_block_is_detected(reduced, monkeypatch):
    right = CurvatureOperator.hessian_product

    def without_first_bias(self, u):
        product = right(self, u).clone()
        product[36:39] = 0.0
        return product

    monkeypatch.setattr(CurvatureOperator, "hessian_product", without_first_bias)
    checks = check_reduced(reduced, "minres", MinRes())
    assert not checks[PRODUCT].passed and not checks[OBJECTIVE].passed


@pytest.mark.slow
def test_a_solver_that_reports_a_wrong_residual_is_detected(reduced):
    class WrongResidual(MinRes):
        def __call__(self, operator, v):
            solution = super().__call__(operator, v)
            return type(solution)(solution.x, solution.residual / 10, solution.products, "converged")

    *_, reported = check_solver(reduced, "wrong", WrongResidual(damping=0.0, tolerance=0.01))
    assert not reported.passed


@pytest.mark.slow
def test_a_method_that_does_not_run_on_the_reduced_backbone_is_named(monkeypatch):
    class NeedsBlocks(PretextMethod):
        def losses(self, backbone, views):
            return {"loss": backbone.model.blocks(views[0]).mean()}

    monkeypatch.setitem(PRETEXT_METHODS._obj_map, "needs_blocks", NeedsBlocks)
    with pytest.raises(BisslZooError, match="'needs_blocks' does not run on the reduced backbone.*AttributeError"):
        ReducedProblem(config("needs_blocks"))


@pytest.mark.slow
def test_a_loss_without_curvature_is_refused(monkeypatch):
    class Flat(PretextMethod):
        def losses(self, backbone, views):
            return {"loss": sum(p.sum() * 0 + (p * 0).square().sum() for p in backbone.parameters())}

    monkeypatch.setitem(PRETEXT_METHODS._obj_map, "flat", Flat)
    with pytest.raises(BisslZooError, match="norm of its Hessian is 0"):
        ReducedProblem(config("flat"))


def test_non_smooth_activations_are_replaced_everywhere():
    relu = nn.ReLU(inplace=True)
    module = nn.Sequential(nn.Linear(2, 2), relu, nn.Sequential(nn.LeakyReLU(), relu), nn.GELU(), nn.Dropout(0.5))
    changes = make_smooth(module)
    kinds = [type(child).__name__ for child in module.modules() if not list(child.children())]
    assert kinds == ["Linear", "Softplus", "Softplus", "Softplus", "GELU", "Dropout"]
    assert not module[-1].training
    assert changes == ["ReLU -> Softplus", "LeakyReLU -> Softplus", "no dropout"]


def test_differences_are_exact_for_a_quartic():
    point, direction = torch.tensor([0.3], dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    found = differences(lambda t: t**4 - t**3, point, direction, step=1e-2)
    torch.testing.assert_close(found, 4 * point**3 - 3 * point**2, rtol=1e-11, atol=1e-12)
