"""A small smooth bilevel problem whose hypergradient is checked against finite differences and a direct solve."""

import contextlib
import inspect
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from fvcore.common.param_scheduler import ConstantParamScheduler
from omegaconf import DictConfig, ListConfig
from PIL import Image
from timm.layers import PatchEmbed
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from bissl_zoo.backbones import FeatureInfo
from bissl_zoo.bilevel import BiLevel
from bissl_zoo.bilevel.level import Level
from bissl_zoo.distributed import all_reduce_mean, flatten, get_rank, unflatten_like
from bissl_zoo.downstream.classification import Classification
from bissl_zoo.engine.build import build_part
from bissl_zoo.errors import BisslZooError
from bissl_zoo.hypergradient import Exact, GraphOperator
from bissl_zoo.optim import LRMultiplier
from bissl_zoo.pretext import PretextMethod
from bissl_zoo.registry import PRETEXT_METHODS

SIZE, SAMPLES, CLASSES, WIDTH = 4, 8, 3, 16
#: allowed relative error: fourth-order differences in float64 leave about 1e-10, a wrong term 1e-3 and more
LIMIT = 1e-6
#: activations that are not differentiable everywhere, as finite differences require
KINKED = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid)


class SmoothTokens(nn.Module):
    """Patch embedding, a linear layer and tanh: (B, 3, 4, 4) -> (B, 4, 2), with the names of timm's transformers."""

    num_prefix_tokens = 0

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(SIZE, patch_size=2, embed_dim=3)
        self.patch_drop = nn.Identity()
        self.second = nn.Linear(3, 2)

    def forward_features(self, images: Tensor) -> Tensor:
        """Return the features of all patches that `patch_drop` leaves."""
        return torch.tanh(self.second(torch.tanh(self.patch_drop(self.patch_embed(images)))))


class SmoothTrunk(nn.Module):
    """The tokens as a map: (B, 3, 4, 4) -> {"c1": (B, 2, 2, 2)}, 47 parameters."""

    out_features = ("c1",)
    stages = ["c1"]
    feature_info = {"c1": FeatureInfo(2, 2, "second")}

    def __init__(self) -> None:
        super().__init__()
        self.model = SmoothTokens()

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return the feature map by its name."""
        return {"c1": self.model.forward_features(images).mT.unflatten(2, (2, 2))}


class SmoothTail(nn.Module):
    """Feature map (B, 2, 2, 2) -> embedding (B, 4)."""

    num_features = 4

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 4)

    def forward(self, features: Tensor) -> Tensor:
        """Return the embedding."""
        return torch.tanh(self.linear(features.flatten(1)))


class HeldTargets(TorchFunctionMode):
    """Replace detached tensors by their values in the first pass.

    The Hessian treats detached targets as constants, so finite differences must do the same; SimSiam's targets, for
    example, depend on the parameters that are moved.
    """

    def __init__(self) -> None:
        super().__init__()
        self.targets: list[Tensor] = []

    def __enter__(self) -> "HeldTargets":
        self.held = iter(self.targets) if self.targets else None
        return super().__enter__()

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is not Tensor.detach:
            return result
        if self.held is not None:
            return next(self.held)
        self.targets.append(result)
        return result


class ReducedProblem:
    """The configured pretext method and a linear classifier on a smooth backbone with 47 parameters, in float64.

    `changes` lists the differences from the configured method. `lambda` is twice the norm of `H`, doubled until the
    lower problem is solved, so that the curvature matters and the solution is locally unique; `theta_P` is that
    solution. Detached targets keep their values at the solution. Only the views differ between ranks.

    Raises:
        BisslZooError: the method does not run on this backbone, or the lower problem is not solved.
    """

    def __init__(self, cfg: DictConfig, seed: int = 0) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            try:
                self._build(cfg)
                norm = float(torch.linalg.eigvalsh(self.hessian()).abs().max())
            except (RuntimeError, TypeError, ValueError, AttributeError, KeyError, IndexError) as error:
                raise BisslZooError(
                    f"The pretext method '{cfg.pretext.name}' does not run on the reduced backbone, which has a single "
                    f"feature map (2, 2, 2) and is no timm model ({type(error).__name__}: {error})."
                ) from error
            for doublings in range(1, 20):
                self.problem.lam = norm * 2.0**doublings
                if norm > 0 and self.solve_lower():
                    self.holding = HeldTargets()
                    self.gradient()
                    return
        raise BisslZooError(f"The reduced lower problem was not solved; the norm of its Hessian is {norm:.3g}.")

    def _build(self, cfg: DictConfig) -> None:
        trunks = [SmoothTrunk().double(), SmoothTrunk().double()]
        trunks[1].load_state_dict(trunks[0].state_dict())
        task = Classification(trunks[1], [str(n) for n in range(CLASSES)]).double()
        self.batch = torch.randn(SAMPLES, 3, SIZE, SIZE).double(), torch.arange(SAMPLES) % CLASSES
        pretext, self.changes = _reduced_method(cfg.pretext, trunks[0])
        example = pretext.views()(Image.fromarray(np.zeros((64, 64, 3), dtype=np.uint8)))
        torch.manual_seed(1 + get_rank())
        self.views = _random_views([view.dtype == torch.bool for view in example])
        lower, upper = _level("lower", trunks[0], pretext), _level("upper", trunks[1], task)
        self.problem = BiLevel(lower, upper, Exact(damping=0.0), gamma=cfg.bilevel.gamma, curvature="hessian")
        self.gauss_newton = cfg.bilevel.curvature == "gauss_newton" and hasattr(pretext, "outer")
        self.parameters = lower.backbone_parameters
        self.holding: contextlib.AbstractContextManager = contextlib.nullcontext()

    def gradient(self, create_graph: bool = False) -> Tensor:
        """Return the gradient (P,) of the pretext loss in `theta_P` by plain autograd, with the same random numbers.

        With `create_graph` it is the gradient of this rank.
        """
        torch.manual_seed(0)
        lower = self.problem.lower
        with self.holding, sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
            loss, _ = lower.loss(lower.backbone, self.views, amp=False)
        gradient = flatten(torch.autograd.grad(loss, self.parameters, create_graph=create_graph))
        return gradient if create_graph else all_reduce_mean(gradient)

    def hessian(self) -> Tensor:
        """Return `H` (P, P) by plain autograd, row by row."""
        rows = [torch.autograd.grad(g, self.parameters, retain_graph=True) for g in self.gradient(create_graph=True)]
        hessian = all_reduce_mean(torch.stack([flatten(row) for row in rows]))
        return (hessian + hessian.T) / 2

    def solve_lower(self, hessian: Tensor | None = None) -> bool:
        """Set `theta_P` to `theta_P*(theta_D)` by Newton's method, until the gradient is zero up to rounding.

        Args:
            hessian: Hessian at a point nearby, which saves computing it in the first steps.
        Returns:
            True on success; otherwise `theta_P` is `theta_D`.
        """
        theta_d, lam = flatten(p.detach() for p in self.problem.upper.backbone_parameters), self.problem.lam
        for step in range(30):
            theta = flatten(p.detach() for p in self.parameters)
            slope = self.gradient() + lam * (theta - theta_d)
            if slope.norm() <= 1e-13 * lam * theta.norm():
                return True
            system = (self.hessian() if hessian is None or step > 8 else hessian) + lam * torch.eye(len(theta)).double()
            set_parameters(self.parameters, theta - torch.linalg.solve(system, slope))
        set_parameters(self.parameters, theta_d)
        return False

    def objective(self, theta_d: Tensor, hessian: Tensor) -> float:
        """Return the bilevel objective at `theta_D` with the lower problem solved."""
        lower, upper, gamma = self.problem.lower, self.problem.upper, self.problem.gamma
        set_parameters(upper.backbone_parameters, theta_d)
        if not self.solve_lower(hessian):
            raise BisslZooError("The reduced lower problem was not solved near its solution.")
        parts = (1.0, lower.backbone), (gamma, upper.backbone)
        return sum(weight * float(upper.loss(backbone, self.batch)[1]["cross_entropy"]) for weight, backbone in parts)

    def operator(self, solver: Any, curvature: str = "hessian") -> GraphOperator:
        """Return the curvature operator as the BiSSL stage builds it for this solver."""
        self.problem.solver, self.problem.shift, self.problem.curvature_matrix = solver, None, curvature
        torch.manual_seed(0)
        return self.problem.curvature(self.views).prepare()


def make_smooth(module: nn.Module) -> list[str]:
    """Replace non-smooth activations by softplus and disable dropout, in place; return the changes."""
    changes = []
    for name, child in list(module.named_modules(remove_duplicate=False)):
        if isinstance(child, KINKED):
            module.set_submodule(name, nn.Softplus())
            changes.append(f"{type(child).__name__} -> Softplus")
        elif isinstance(child, nn.modules.dropout._DropoutNd):
            child.eval()
            changes.append("no dropout")
    return list(dict.fromkeys(changes))


@torch.no_grad()
def set_parameters(parameters: list[Tensor], vector: Tensor) -> None:
    """Set parameters from a flat vector."""
    for parameter, value in zip(parameters, unflatten_like(vector, parameters), strict=True):
        parameter.copy_(value)


def narrow_widths(section: Mapping[str, Any]) -> dict[str, Any]:
    """Return the layer widths of a configured pretext method that exceed 16, reduced to 16, by argument.

    They are lists, and numbers whose name ends with `_dim`.
    """
    parameters = inspect.signature(PRETEXT_METHODS.get(section["name"])).parameters.values()
    given = {p.name: p.default for p in parameters if isinstance(p.default, (list, tuple, int))} | dict(section)
    lists = {key: list(value) for key, value in given.items() if isinstance(value, (list, tuple, ListConfig))}
    widths = {key: value for key, value in lists.items() if any(isinstance(w, int) and w > WIDTH for w in value)}
    numbers = {key: WIDTH for key, value in given.items() if key.endswith("_dim") and value > WIDTH}
    return {key: [min(w, WIDTH) for w in value] for key, value in widths.items()} | numbers


def _reduced_method(section: DictConfig, trunk: SmoothTrunk) -> tuple[PretextMethod, list[str]]:
    """Return the method on a reduced backbone and the changes in it."""
    narrow = narrow_widths(section)
    pretext = build_part(section, backbone=trunk, tail=SmoothTail(), **narrow).double()
    return pretext, make_smooth(pretext) + [f"{key} at most {WIDTH}" for key in narrow]


def _random_views(masks: list[bool]) -> tuple[Tensor, ...]:
    """Return random images, and masks of 2 x 2 cells for methods that take them.

    A loss of hidden pixels may not be differentiable at their values. With a mask, the images are therefore far from
    the predictions of an untrained network.
    """
    images = torch.randn(len(masks), SAMPLES, 3, SIZE, SIZE).double()
    if any(masks):
        images = images + 3.0 * images.sign()
    mask = torch.tensor([[True, False], [True, True]]).expand(SAMPLES, 2, 2)
    return tuple(mask if is_mask else view for view, is_mask in zip(images, masks, strict=True))


def _level(name: str, backbone: nn.Module, head: nn.Module) -> Level:
    optimizer = torch.optim.SGD([*backbone.parameters(), *head.parameters()], lr=0.1)
    return Level(name, backbone, head, optimizer, itertools.repeat(None), LRMultiplier(ConstantParamScheduler(1.0)), 1)


# ------------------------------------------------------------------------------------------------ checks


@dataclass(frozen=True)
class Check:
    """The error of a value on the reduced problem against a reference; it passes up to `limit`."""

    name: str
    error: float
    limit: float
    detail: str

    @property
    def passed(self) -> bool:
        """True if the error is within the limit, False also for NaN."""
        return self.error <= self.limit


def check_reduced(reduced: ReducedProblem, name: str, solver: Any) -> list[Check]:
    """Check product, hypergradient and configured solver against finite differences and a direct solve."""
    with torch.random.fork_rng():
        checks = [_product(reduced), _objective(reduced)]
        if reduced.gauss_newton:
            checks.append(_gauss_newton_product(reduced))
        return checks + check_solver(reduced, name, solver)


def _product(reduced: ReducedProblem) -> Check:
    operator = reduced.operator(Exact(damping=0.0))
    theta = flatten(p.detach() for p in reduced.parameters)
    directions = _random_directions(len(theta), 3)
    products = [operator.hessian_product(u) for u in directions]  # before the parameters move under their graph

    def gradient(at: Tensor) -> Tensor:
        set_parameters(reduced.parameters, at)
        return reduced.gradient()

    worst = (0.0, 1.0)
    for u, product in zip(directions, products, strict=True):
        expected = differences(gradient, theta, u)
        error = float((product - expected).norm() / expected.norm())
        worst = max(worst, (error, float(product @ expected / expected.square().sum())))
    set_parameters(reduced.parameters, theta)
    detail = f"on average {worst[1]:.4g} times the expected value" if worst[0] > LIMIT else "3 random directions"
    return Check("Hessian-vector product against finite differences of the gradient", worst[0], LIMIT, detail)


def _gauss_newton_product(reduced: ReducedProblem) -> Check:
    """Check `J^T C J u` with `J u` by finite differences of the outputs, and the loss against `outer(outputs)`."""
    head, operator = reduced.problem.lower.head, reduced.operator(Exact(damping=0.0), "gauss_newton")
    theta = flatten(p.detach() for p in reduced.parameters)
    directions = _random_directions(len(theta), 3)
    products = [operator.hessian_product(u) for u in directions]  # before the parameters move under their graph
    holding = HeldTargets()

    def outputs(at: Tensor) -> tuple[Tensor, ...]:
        set_parameters(reduced.parameters, at)
        torch.manual_seed(0)
        with holding:
            return head.outputs(reduced.problem.lower.backbone, reduced.views)

    def moving(at: Tensor) -> Tensor:
        flat = flatten(output.detach() for output in outputs(at) if output.requires_grad)
        return flat.masked_fill(flat.isinf(), 0.0)  # entries that a method masks are constants

    outputs(theta)  # keeps the targets
    tangents = [differences(moving, theta, u) for u in directions]
    fixed = outputs(theta)
    point = [output for output in fixed if output.requires_grad]

    def outer(flat: Tensor) -> Tensor:
        parts = iter(unflatten_like(flat, point))
        losses = head.outer(tuple(next(parts) if output.requires_grad else output for output in fixed))
        return torch.stack(list(losses.values())).sum()

    def pull_back(flat: Tensor) -> Tensor:
        gradients = torch.autograd.grad(
            point, reduced.parameters, unflatten_like(flat, point), retain_graph=True, materialize_grads=True
        )
        return all_reduce_mean(flatten(gradients))

    at = flatten(point).detach()
    pairs = [(pull_back(torch.autograd.functional.vjp(outer, at)[1]), reduced.gradient())]
    for product, tangent in zip(products, tangents, strict=True):
        pairs.append((product, pull_back(torch.autograd.functional.hvp(outer, at, tangent)[1])))
    errors = [float((value - expected).norm() / expected.norm()) for value, expected in pairs]
    detail = f"gradient of outer(outputs) {errors[0]:.1e}, products {max(errors[1:]):.1e}"
    return Check(
        "Gauss-Newton product against finite differences of the outputs",
        float(torch.tensor(errors).max()),
        LIMIT,
        detail,
    )


def _objective(reduced: ReducedProblem) -> Check:
    problem = reduced.problem
    v = right_hand_side(problem, reduced.batch)
    gradients = problem.upper_gradients(reduced.batch, reduced.operator(Exact(damping=0.0)))
    theta_d = flatten(p.detach() for p in problem.upper.backbone_parameters)
    hessian = reduced.hessian()
    directions = _random_directions(len(theta_d), 8)
    slopes = [
        differences(lambda at: torch.tensor(reduced.objective(at, hessian), dtype=at.dtype), theta_d, direction)
        for direction in directions
    ]
    reduced.objective(theta_d, hessian)
    expected = torch.stack(slopes)
    error = float((directions @ gradients.backbone - expected).norm() / expected.norm())
    moved = float((gradients.solution.x - v).norm() / v.norm())
    detail = f"the curvature changes it by {moved:.0%}"
    return Check("exact hypergradient against finite differences of the objective", error, LIMIT, detail)


def check_solver(reduced: ReducedProblem, name: str, solver: Any) -> list[Check]:
    """Check the solution of a solver, and the residual that it reports, against a direct solve."""
    problem, operator = reduced.problem, reduced.operator(solver)
    v = right_hand_side(problem, reduced.batch)
    if operator.automatic:
        problem._choose_damping(operator, v)
        operator.automatic = False  # lambda is so large that A is definite
    solution = problem.upper_gradients(reduced.batch, operator).solution
    columns = [operator(unit) for unit in torch.eye(len(v), dtype=v.dtype)]
    matrix = torch.stack(columns, dim=1)
    expected = torch.linalg.solve(matrix, v)
    residual = float((v - matrix @ solution.x).norm() / v.norm())
    smallest = float(torch.linalg.svdvals(matrix)[-1])
    error = float((solution.x - expected).norm() / expected.norm())
    # ||x - A^-1 v|| <= ||v - A x|| / smallest singular value, and rounding
    limit = residual * float(v.norm() / expected.norm()) / smallest * (1 + LIMIT) + 1e-12
    detail = f"residual {residual:.2g}, {solution.status}; limit: residual / smallest singular value {smallest:.3g}"
    checks = [Check(f"{name} at damping {operator.shift - problem.lam:.4g} against exact", error, limit, detail)]
    if solution.residual is not None:
        difference = abs(solution.residual - residual) / max(residual, 1e-9)
        checks.append(Check(f"residual that {name} reports", difference, LIMIT, f"{solution.residual:.2g}"))
    return checks


def right_hand_side(problem: BiLevel, batch: Any) -> Tensor:
    """Return `v` (P,), the gradient of the downstream loss in the lower backbone with the upper head."""
    lower, upper = problem.lower, problem.upper
    total, _ = upper.loss(lower.backbone, batch)
    return all_reduce_mean(flatten(torch.autograd.grad(total, lower.backbone_parameters, materialize_grads=True)))


def differences(function: Callable[[Tensor], Tensor], point: Tensor, direction: Tensor, step: float = 2e-4) -> Tensor:
    """Return the derivative of `function` along `direction` by central differences of fourth order."""
    near, far = (function(point + n * step * direction) - function(point - n * step * direction) for n in (1, 2))
    return (8 * near - far) / (12 * step)


def _random_directions(size: int, count: int) -> Tensor:
    """Return unit vectors (count, size) in float64, the same at each call."""
    generator = torch.Generator().manual_seed(0)
    return nn.functional.normalize(torch.randn(count, size, generator=generator, dtype=torch.float64))
