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
from bissl_zoo.hypergradient import CurvatureOperator, GaussNewtonOperator, MinRes
from bissl_zoo.pretext import PretextMethod
from bissl_zoo.registry import PRETEXT_METHODS, SOLVERS, build_pretext

PRODUCT = 0


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
@pytest.mark.parametrize("wrong", ["half", "without the first bias"])
def test_a_wrong_product_is_detected(reduced, monkeypatch, wrong):
    right = CurvatureOperator.hessian_product

    def product(self, u):
        result = right(self, u).clone()
        if wrong == "half":
            return 0.5 * result
        result[36:39] = 0.0
        return result

    monkeypatch.setattr(CurvatureOperator, "hessian_product", product)
    checks = check_reduced(reduced, "minres", MinRes())
    assert [check.passed for check in checks[:2]] == [False, False]
    if wrong == "half":
        assert checks[PRODUCT].error == pytest.approx(0.5, rel=1e-6)
        assert "0.5 times the expected value" in checks[PRODUCT].detail


@pytest.mark.slow
def test_a_wrong_gauss_newton_product_is_detected(reduced, monkeypatch):
    right = GaussNewtonOperator.product
    monkeypatch.setattr(GaussNewtonOperator, "product", lambda self, *a: [1.001 * part for part in right(self, *a)])
    checks = check_reduced(reduced, "minres", MinRes())
    assert [check.passed for check in checks[:3]] == [True, True, False]


@pytest.mark.slow
def test_a_solver_that_reports_a_wrong_residual_is_detected(reduced):
    class WrongResidual(MinRes):
        def __call__(self, operator, v):
            solution = super().__call__(operator, v)
            return type(solution)(solution.x, solution.residual / 10, solution.products, "converged")

    *_, reported = check_solver(reduced, "wrong", WrongResidual(damping=0.0, tolerance=0.01))
    assert not reported.passed


class NeedsBlocks(PretextMethod):
    def losses(self, backbone, views):
        return {"loss": backbone.model.blocks(views[0]).mean()}


class Flat(PretextMethod):
    def losses(self, backbone, views):
        return {"loss": sum(p.sum() * 0 + (p * 0).square().sum() for p in backbone.parameters())}


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (NeedsBlocks, "'unusual' does not run on the reduced backbone.*AttributeError"),
        (Flat, "norm of its Hessian is 0"),
    ],
)
def test_a_method_that_cannot_be_reduced_is_refused(monkeypatch, method, message):
    monkeypatch.setitem(PRETEXT_METHODS._obj_map, "unusual", method)
    with pytest.raises(BisslZooError, match=message):
        ReducedProblem(config("unusual"))


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
