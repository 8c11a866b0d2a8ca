import itertools
import resource
from pathlib import Path

import pytest
import torch
from fvcore.common.param_scheduler import ConstantParamScheduler, CosineParamScheduler
from timm.optim import Lars
from torch import nn
from torch.optim import SGD
from torch.overrides import TorchFunctionMode

from bissl_zoo.bilevel import Adaptation, BiLevel
from bissl_zoo.bilevel.level import Level
from bissl_zoo.distributed import flatten
from bissl_zoo.errors import BadHypergradient, ConfigError, NonFiniteLoss
from bissl_zoo.hypergradient import ConjugateGradient, Exact, Identity, MFac, MinRes, Solution
from bissl_zoo.optim import LRMultiplier

CONSTANT = LRMultiplier(ConstantParamScheduler(1.0))


class Vector(nn.Module):
    """A backbone that is its parameters."""

    def __init__(self, values):
        super().__init__()
        self.theta = nn.Parameter(torch.as_tensor(values, dtype=torch.float64).clone())
        self.register_buffer("seen", torch.zeros((), dtype=torch.float64))

    def forward(self):
        return self.theta


class Loss(nn.Module):
    """A head whose loss is a function of the backbone's vector, its own and the batch."""

    def __init__(self, function, phi=(0.0,)):
        super().__init__()
        self.function = function
        self.phi = nn.Parameter(torch.as_tensor(phi, dtype=torch.float64).clone())
        self.after = []

    def losses(self, backbone, batch):
        return {"first": self.function(backbone(), self.phi, batch), "second": 0.0 * self.phi.sum()}

    def after_step(self, backbone):
        self.after.append(backbone.theta.detach().clone())


def level(name, backbone, head, lr=0.1, clip_norm=None, batches=None):
    optimizer = SGD([*backbone.parameters(), *head.parameters()], lr=lr)
    batches = itertools.count() if batches is None else iter(batches)
    return Level(name, backbone, head, optimizer, batches, CONSTANT, 1000, clip_norm)


def quadratic(lam=0.5, gamma=0.0, solver=None, theta_d=(0.3, -1.0, 2.0), **options):
    """Lower loss (theta-a)'H(theta-a)/2 and upper loss |M theta - phi|^2/2, with theta_P at its optimum."""
    generator = torch.Generator().manual_seed(0)
    q, _ = torch.linalg.qr(torch.randn(3, 3, generator=generator, dtype=torch.float64))
    hessian = q @ torch.diag(torch.tensor([0.2, 1.0, 4.0], dtype=torch.float64)) @ q.T
    a = torch.randn(3, generator=generator, dtype=torch.float64)
    m = torch.randn(2, 3, generator=generator, dtype=torch.float64)
    eye = torch.eye(3, dtype=torch.float64)
    theta_d = torch.as_tensor(theta_d, dtype=torch.float64)

    def response(theta_d):
        return torch.linalg.solve(hessian + lam * eye, hessian @ a + lam * theta_d)

    lower = Loss(lambda theta, phi, _: (theta - a) @ hessian @ (theta - a) / 2)
    upper = Loss(lambda theta, phi, _: (m @ theta - phi).square().sum() / 2, phi=(1.0, -2.0))
    problem = BiLevel(
        level("lower", Vector(response(theta_d)), lower),
        level("upper", Vector(theta_d), upper),
        solver=solver or Exact(damping=0.0),
        lam=lam,
        gamma=gamma,
        **options,
    )
    return problem, response, upper.function


@pytest.mark.parametrize("lam", [0.01, 0.5, 10.0])
@pytest.mark.parametrize("gamma", [0.0, 0.01, 1.0])
def test_the_hypergradient_is_the_derivative_of_the_bilevel_objective(lam, gamma):
    problem, response, upper_loss = quadratic(lam, gamma)
    theta_d = problem.upper.backbone.theta.detach().clone().requires_grad_()
    phi = problem.upper.head.phi.detach().clone().requires_grad_()
    # the objective with the lower optimum written out, differentiated through the closed form
    objective = upper_loss(response(theta_d), phi, None) + gamma * upper_loss(theta_d, phi, None)
    expected = torch.autograd.grad(objective, [theta_d, phi])
    gradients = problem.upper_gradients(None, problem.curvature(None).prepare())
    torch.testing.assert_close(gradients.backbone, expected[0], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(gradients.head, expected[1], rtol=1e-9, atol=1e-12)
    assert gradients.solution.status == "converged"


def test_lower_steps_go_to_the_pulled_optimum():
    problem, response, _ = quadratic(lam=0.5, lower_steps=200)
    theta_d = problem.upper.backbone.theta.detach()
    with torch.no_grad():
        problem.lower.backbone.theta.copy_(theta_d)
    for _ in range(300):
        problem.lower_step()
    torch.testing.assert_close(problem.lower.backbone.theta.detach(), response(theta_d), rtol=1e-6, atol=1e-6)
    assert torch.equal(problem.upper.backbone.theta, theta_d) and problem.upper.backbone.theta.grad is None


@pytest.mark.slow
def test_alternating_finds_the_bilevel_optimum():
    problem, response, upper_loss = quadratic(lam=0.5, gamma=0.0, lower_steps=20, upper_steps=1, alternations=200)
    for one, lr in ((problem.lower, 0.3), (problem.upper, 1.0)):
        for group in one.optimizer.param_groups:
            group["lr"] = lr
    start = upper_loss(response(problem.upper.backbone.theta), problem.upper.head.phi, None).item()
    for alternation in range(200):
        problem.alternate(alternation)
    reached = upper_loss(response(problem.upper.backbone.theta), problem.upper.head.phi, None).item()
    assert reached < 1e-4 * start  # two equations, five unknowns: the optimum is zero


def test_an_alternation_takes_its_steps_and_one_batch_for_the_curvature():
    problem, _, _ = quadratic(lower_steps=3, upper_steps=2, alternations=5)
    seen = []
    for one in (problem.lower, problem.upper):
        losses = one.head.losses
        one.head.losses = lambda backbone, batch, losses=losses, name=one.name: (
            seen.append((name, batch)) or losses(backbone, batch)
        )
    metrics = problem.alternate(0)
    # gamma = 0: one downstream pass per upper step; the first product builds the graph of the curvature
    assert seen == [("lower", 0), ("lower", 1), ("lower", 2), ("upper", 0), ("lower", 3), ("upper", 1)]
    assert len(problem.lower.head.after) == 3  # never for the curvature batch
    assert problem.lower.step == 3 and problem.upper.step == 2
    expected = {"lower/total_loss", "lower/pull", "lower/lr", "upper/total_loss", "upper/lr", "solver/residual"}
    assert expected <= set(metrics) and metrics["solver/status"] == "converged"


class CountTransfers(TorchFunctionMode):
    """Count the calls that wait for a device and copy its numbers to the host."""

    NAMES = {"item", "tolist", "__float__", "__bool__", "__int__", "cpu", "numpy", "nonzero"}

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.count += getattr(func, "__name__", "") in self.NAMES
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("optimizer", [SGD, Lars])
def test_a_lower_step_waits_for_the_device_once(optimizer):
    problem, _, _ = quadratic()
    lower = problem.lower
    lower.optimizer = optimizer(lower.parameters, lr=0.1, momentum=0.9)
    problem.lower_step()
    for measure in (False, True):
        with CountTransfers() as transfers:
            metrics = problem.lower_step(measure)
        assert transfers.count == 1 and all(type(value) is float for value in metrics.values())


def test_the_teacher_sees_the_parameters_after_the_step():
    problem, _, _ = quadratic()
    problem.lower_step()
    assert torch.equal(problem.lower.head.after[0], problem.lower.backbone.theta)


def test_the_graph_is_freed_when_an_upper_step_fails():
    problem, _, _ = quadratic(lower_steps=1)
    operators = []

    def failing(operator, v):
        operators.append(operator)
        raise ZeroDivisionError

    failing.damping = 0.0
    problem.solver = failing
    with pytest.raises(ZeroDivisionError):
        problem.alternate(0)
    with pytest.raises(RuntimeError, match="release"):
        operators[0](torch.zeros(3, dtype=torch.float64))


def test_damping_acts_in_the_solver_alone():
    shifts, solver = [], ConjugateGradient(damping=7.0)
    problem, _, _ = quadratic(lam=0.5, solver=solver)
    shifts.append(problem.curvature(None).shift)
    assert shifts == [7.5]
    before, theta_d = problem.lower.backbone.theta.detach().clone(), problem.upper.backbone.theta.detach()
    problem.lower_step()  # at the optimum of the undamped problem, which is where it stays
    torch.testing.assert_close(problem.lower.backbone.theta.detach(), before, rtol=1e-9, atol=1e-12)
    assert not torch.allclose(before, theta_d)


def test_identity_adds_the_gradient_at_the_lower_backbone():
    problem, _, upper_loss = quadratic(gamma=1.0, solver=Identity())
    theta_p = problem.lower.backbone.theta.detach().clone().requires_grad_()
    theta_d = problem.upper.backbone.theta.detach().clone().requires_grad_()
    phi = problem.upper.head.phi.detach()
    expected = sum(torch.autograd.grad(upper_loss(t, phi, None), t)[0] for t in (theta_p, theta_d))
    gradients = problem.upper_gradients(None, problem.curvature(None).prepare())
    torch.testing.assert_close(gradients.backbone, expected, rtol=1e-12, atol=0)
    assert "solver/residual" not in gradients.metrics


def test_adaptation_runs_periodically_but_not_at_the_end():
    problem, _, _ = quadratic(lower_steps=1, upper_steps=1, alternations=6, adaptation=Adaptation(2, 0.25))
    moved = []
    for alternation in range(6):
        adapt, problem.adapt = problem.adapt, lambda alpha: moved.append((alternation, alpha))  # noqa: B023
        problem.alternate(alternation)
        problem.adapt = adapt
    assert moved == [(1, 0.25), (3, 0.25)]


def test_gradients_are_clipped_by_their_global_norm():
    problem, _, _ = quadratic()
    problem.upper.clip_norm = 1e-3
    before = [p.detach().clone() for p in problem.upper.parameters]
    metrics = problem.upper_step(problem.curvature(None).prepare())
    change = flatten(p.detach() - b for p, b in zip(problem.upper.parameters, before, strict=True))
    assert metrics["upper/grad_norm"] > 1e-2
    assert float(change.norm()) == pytest.approx(0.1 * 1e-3, rel=1e-3)


@pytest.mark.parametrize("name", ["lower", "upper"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_an_error_with_level_step_and_losses(name, bad):
    problem, _, _ = quadratic()
    one = getattr(problem, name)
    one.step = 41
    function = one.head.function
    one.head.function = lambda theta, phi, batch: function(theta, phi, batch) + bad
    with pytest.raises(NonFiniteLoss, match=rf"{name} level, step 41.*first={bad}, second=-?0\)"):
        if name == "lower":
            problem.lower_step()
        else:
            problem.upper_gradients(None, problem.curvature(None).prepare())


def test_a_gradient_that_is_not_finite_leaves_the_parameters_unchanged():
    problem, _, _ = quadratic()
    lower = problem.lower
    function = lower.head.function
    # sqrt has an infinite slope at zero, and a finite value
    lower.head.function = lambda theta, phi, batch: (
        function(theta, phi, batch) + (phi - phi.detach()).abs().sqrt().sum()
    )
    before = lower.backbone.theta.detach().clone()
    with pytest.raises(NonFiniteLoss, match="lower level, step 0.*gradient"):
        problem.lower_step()
    assert torch.equal(lower.backbone.theta, before)


def returning(answer, status="converged", residual=0.0):
    """Return a solver with a fixed result."""

    def solver(operator, v):
        return Solution(answer(v), residual, 1, status)

    solver.damping = 0.0
    return solver


BAD = {
    "NaN": returning(lambda v: v * float("nan")),
    "infinite": returning(lambda v: v / 0.0),
    "long": returning(lambda v: 1e4 * v),
    "far from a solution": returning(lambda v: -v, "diverged", 5e3),
    "residual NaN": returning(lambda v: -v, "max_iterations", float("nan")),
    "non_finite on the way": returning(lambda v: 0.5 * v, "non_finite", 0.5),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("gamma", [0.0, 1.0])
def test_a_bad_hypergradient_is_an_error_or_replaced_by_the_plain_gradient(case, gamma):
    problem, _, _ = quadratic(gamma=gamma, solver=BAD[case])
    problem.upper.step = 7
    before = [p.detach().clone() for p in problem.upper.parameters]
    with pytest.raises(BadHypergradient, match=r"upper level, step 7: .* \|x\| .*on_bad_hypergradient=plain"):
        problem.upper_step(problem.curvature(None).prepare())
    assert all(torch.equal(p, b) for p, b in zip(problem.upper.parameters, before, strict=True))
    problem, _, _ = quadratic(gamma=gamma, solver=BAD[case], on_bad_hypergradient="plain")
    plain = quadratic(gamma=gamma, solver=Identity())[0]
    given, expected = (p.upper_gradients(None, p.curvature(None).prepare()) for p in (problem, plain))
    assert torch.equal(given.backbone, expected.backbone) and torch.equal(given.head, expected.head)
    assert given.metrics["solver/fallbacks"] == problem.fallbacks == 1
    assert given.metrics["solver/status"] == BAD[case](None, torch.ones(1)).status  # the status of the solver is kept


@pytest.mark.parametrize(
    "solver",
    [
        returning(lambda v: v, "diverged", 5e3),  # a guarded solver returns v as its best
        returning(lambda v: 900 * v, "converged", 1e-3),
        returning(lambda v: 0.1 * v, "negative_curvature", 10.0),
        returning(lambda v: v, "not_solved", None),
    ],
)
def test_a_poor_but_bounded_solution_is_used(solver):
    problem, _, _ = quadratic(solver=solver)
    gradients = problem.upper_gradients(None, problem.curvature(None).prepare())
    assert torch.equal(gradients.backbone, gradients.solution.x) and problem.fallbacks == 0


def test_a_right_hand_side_that_is_not_finite_is_an_error_of_the_loss():
    problem, _, _ = quadratic(on_bad_hypergradient="plain")
    problem.upper.head.function = lambda theta, phi, batch: (theta - theta.detach()).abs().sqrt().sum()
    with pytest.raises(NonFiniteLoss, match="upper level, step 0: .*norm of its gradient is nan"):
        problem.upper_gradients(None, problem.curvature(None).prepare())


@pytest.mark.parametrize("hvp_mode", ["retain_graph", "recompute"])
@pytest.mark.parametrize("solver", [Exact(damping=0.0), ConjugateGradient(), MinRes(), MinRes(damping=1.0)])
def test_a_curvature_batch_that_is_not_finite_is_detected_and_does_not_change_the_damping(solver, hvp_mode):
    def broken(**options):
        problem, _, _ = quadratic(solver=solver, hvp_mode=hvp_mode, lower_steps=1, upper_steps=2, **options)
        function, problem.shift = problem.lower.head.function, 3.0
        # batch 1 is the one that defines the curvature of the first alternation
        problem.lower.head.function = lambda theta, phi, batch: (
            function(theta, phi, batch) * (float("nan") if batch == 1 else 1.0)
        )
        return problem

    with pytest.raises(BadHypergradient, match="losses of the pretext batch on each rank .*'first': nan"):
        broken().alternate(0)
    problem = broken(on_bad_hypergradient="plain")
    assert problem.alternate(0)["solver/fallbacks"] == 2 and problem.shift == 3.0
    assert problem.alternate(1)["solver/fallbacks"] == 2  # the next alternation solves again


@pytest.mark.parametrize("lam", [0.0, -1.0, float("nan")])
def test_lambda_must_be_positive(lam):
    problem, _, _ = quadratic()
    with pytest.raises(ConfigError, match="bilevel.lambda"):
        BiLevel(problem.lower, problem.upper, Identity(), lam=lam)


def test_automatic_damping_is_chosen_once_for_the_upper_steps_of_an_alternation():
    solver = MinRes(iterations=3, tolerance=1e-6, damping="auto")
    problem, _, _ = quadratic(lam=0.5, solver=solver, lower_steps=1, upper_steps=4)
    operators = []
    step = problem.upper_step
    problem.upper_step = lambda operator: (operators.append(operator), step(operator))[1]
    metrics = problem.alternate(0)
    assert len({id(operator) for operator in operators}) == 1
    # three Lanczos steps know all of a 3 x 3 matrix, so the least damping is that of one lower step at a rate of 0.1
    assert [record["solver/damping"] for record in problem.diagnostics] == [10.0] * 4
    assert [record["solver/products"] for record in problem.diagnostics] == [3, 0, 0, 0]
    assert all(record["solver/status"] == "converged" for record in problem.diagnostics)
    assert all(record["solver/least_ritz_value"] == pytest.approx(1 + 0.2 / 10.5) for record in problem.diagnostics)
    assert metrics["solver/damping"] == 10.0 and problem.shift == 10.5


class LeastSquares(Loss):
    """Loss `|M theta|^2 / 2`, whose Gauss-Newton matrix is `M^T M`."""

    MATRIX = torch.tensor([[1.0, 2.0, 0.0], [0.0, 1.0, -1.0]], dtype=torch.float64)

    def __init__(self):
        super().__init__(lambda theta, phi, _: (self.MATRIX @ theta).square().sum() / 2)

    def outputs(self, backbone, batch):
        return (self.MATRIX @ backbone(),)

    def outer(self, outputs):
        return {"first": outputs[0].square().sum() / 2}


@pytest.mark.parametrize("optimizer, momentum", [(SGD, 0.0), (SGD, 0.75), (torch.optim.AdamW, None)])
def test_automatic_damping_of_gauss_newton_is_the_inverse_time_of_the_lower_steps(optimizer, momentum):
    problem, _, _ = quadratic(lam=0.5)
    old, backbone, head = problem.lower, problem.lower.backbone, LeastSquares()
    made = optimizer(
        [*backbone.parameters(), *head.parameters()], lr=0.2, **({} if momentum is None else {"momentum": momentum})
    )
    schedule = LRMultiplier(CosineParamScheduler(1.0, 0.1))
    lower = Level("lower", backbone, head, made, old.data_iterator, schedule, 10)
    solver = MinRes(iterations=3, tolerance=1e-10, damping="auto")
    problem = BiLevel(lower, problem.upper, solver, lam=0.5, lower_steps=4, upper_steps=1)
    states = []
    made.register_step_pre_hook(
        lambda *_: states.append((backbone.theta.detach().clone(), backbone.theta.grad.clone()))
    )
    made.register_step_post_hook(lambda *_: states.append(backbone.theta.detach().clone()))
    metrics = problem.alternate(0)
    if momentum is None:  # the length of the last step over that of its gradient
        (before, gradient), after = states[-2:]
        rate = float((after - before).norm() / gradient.norm())
    else:
        rate = 0.2 * schedule(3, 10) / (1 - momentum)  # the scheduled rate of the last of four steps
        assert schedule(3, 10) < 0.9
    damping = 1 / (rate * 4)
    assert metrics["solver/damping"] == pytest.approx(damping, rel=1e-12)
    assert metrics["solver/damping_over_time_constant"] == pytest.approx(1.0, rel=1e-12)
    operator = problem.curvature(None).prepare()
    u = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
    expected = u + head.MATRIX.T @ head.MATRIX @ u / (0.5 + damping)
    torch.testing.assert_close(operator(u), expected, rtol=1e-12, atol=0)


def test_automatic_damping_rises_at_once_and_falls_slowly():
    problem, _, _ = quadratic(lam=0.5, solver=MinRes(iterations=1, tolerance=0.05, damping="auto"))
    problem.upper.head.function = lambda theta, phi, batch: theta[:2].sum()
    used = []
    for curvature in (0.0, -8.0, 0.0, 0.0):
        problem.lower.head.function = lambda theta, phi, _, c=curvature: c / 2 * theta[1].square()
        operator = problem.curvature(None).prepare()
        assert operator.shift is None
        problem.upper_step(operator)
        used.append(operator.shift)
    needed = 8.0 * 0.95 / 0.1  # one step with diag(1, 1 + t) leaves a residual of t / (2 + t), with t = 8 / shift
    expected = [0.5, needed, (0.5 * needed) ** 0.5, (0.5 * (0.5 * needed) ** 0.5) ** 0.5]
    assert used == pytest.approx(expected, rel=0.02)


def test_every_upper_step_has_diagnostics():
    problem, _, _ = quadratic(gamma=1.0, lower_steps=1, upper_steps=3)
    metrics = problem.alternate(0)
    assert len(problem.diagnostics) == 3
    names = "residual products status damping cos_x_plain cos_xv norm_ratio v_norm x_norm plain_norm"
    keys = {f"solver/{name}" for name in [*names.split(), "damping_over_time_constant"]}
    assert all(keys <= set(record) for record in problem.diagnostics)
    last = problem.diagnostics[-1]
    assert metrics["solver/cos_x_plain"] == last["solver/cos_x_plain"]
    assert last["solver/norm_ratio"] == pytest.approx(last["solver/x_norm"] / last["solver/v_norm"])
    losses = [record["upper/total_loss"] for record in problem.diagnostics]
    assert losses == sorted(losses, reverse=True) and losses[0] > losses[-1]


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("hvp_mode", ["retain_graph", "recompute"])
def test_thirty_alternations_need_no_more_memory_than_ten(hvp_mode):
    torch.manual_seed(0)

    class Wide(nn.Linear):
        def losses(self, backbone, batch):
            return {"loss": self(backbone(batch)).square().mean()}

        def after_step(self, backbone):
            pass

    levels = []
    for name in ("lower", "upper"):
        backbone = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Tanh(), nn.Flatten(), nn.Linear(2592, 16))
        levels.append(level(name, backbone, Wide(16, 4), lr=1e-3, batches=itertools.repeat(torch.randn(64, 3, 20, 20))))
    problem = BiLevel(*levels, MinRes(damping=1.0), lam=1.0, lower_steps=1, upper_steps=2, hvp_mode=hvp_mode)
    for alternation in range(10):
        problem.alternate(alternation)
    before = resident_bytes()
    for alternation in range(20):
        problem.alternate(alternation)
    # one graph that is not freed holds about 5 MiB of activations, twenty 100 MiB
    assert resident_bytes() - before < 30 * 2**20


def test_mfac_gets_the_gradients_without_the_pull_and_no_graph_is_built():
    problem, _, _ = quadratic(lam=0.5, gamma=1.0, solver=MFac(gradients=3, blocks="all"), lower_steps=3, upper_steps=1)
    points, lower = [], problem.lower.head.losses
    problem.lower.head.losses = lambda backbone, batch: (
        points.append(backbone.theta.detach().clone()) or lower(backbone, batch)
    )
    recorded, solver = [], problem.solver
    solve = lambda operator, v: recorded.append((v, solver(operator, v))) or recorded[-1][1]  # noqa: E731
    for name in ("damping", "start_alternation", "observe_lower_gradient"):
        setattr(solve, name, getattr(solver, name))
    problem.solver = solve
    with torch.no_grad():
        problem.lower.backbone.theta.add_(1.0)  # away from the optimum
    problem.alternate(0)
    assert len(points) == 3
    rows = []
    for point in points:
        theta = point.requires_grad_()
        rows.append(torch.autograd.grad(problem.lower.head.function(theta, None, None), theta)[0])
    fisher = sum(torch.outer(row, row) for row in rows) / 3
    v, solution = recorded[0]
    torch.testing.assert_close(solution.x, torch.linalg.solve(torch.eye(3).double() + fisher / 0.5, v))
