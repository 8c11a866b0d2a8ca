"""The bilevel problem made so small and smooth that its hypergradient can be compared with finite differences."""

import contextlib
import inspect
import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from fvcore.common.param_scheduler import ConstantParamScheduler
from omegaconf import DictConfig, ListConfig
from PIL import Image
from timm.layers import PatchEmbed
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from bissl_zoo.backbones import FeatureInfo
from bissl_zoo.bilevel import BiLevel
from bissl_zoo.bilevel.level import Level
from bissl_zoo.distributed import all_reduce_mean, flatten, get_rank, unflatten_like
from bissl_zoo.downstream.classification import Classification
from bissl_zoo.engine.build import build_part
from bissl_zoo.errors import BisslZooError
from bissl_zoo.hypergradient import CurvatureOperator, Exact
from bissl_zoo.optim import LRMultiplier
from bissl_zoo.pretext import PretextMethod
from bissl_zoo.registry import PRETEXT_METHODS

SIZE, SAMPLES, CLASSES, WIDTH = 4, 8, 3, 16
#: activations with a kink, where finite differences mean nothing
KINKED = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid)


class SmoothTrunk(nn.Module):
    """Two convolutions and tanh: `(B, 3, 4, 4)` -> `{"c1": (B, 2, 2, 2)}`, 47 parameters.

    The first convolution, of patches side by side, is where timm's vision transformers have theirs.
    """

    out_features = ("c1",)
    stages = ["c1"]
    feature_info = {"c1": FeatureInfo(2, 2, "second")}

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.patch_embed = PatchEmbed(SIZE, patch_size=2, embed_dim=3, output_fmt="NHWC")
        self.second = nn.Conv2d(3, 2, 1)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Map images to the one stage there is."""
        patches = self.model.patch_embed(images).permute(0, 3, 1, 2)
        return {"c1": torch.tanh(self.second(torch.tanh(patches)))}


class SmoothTail(nn.Module):
    """Feature map `(B, 2, 2, 2)` -> embedding `(B, 4)`."""

    num_features = 4

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 4)

    def forward(self, features: Tensor) -> Tensor:
        """Embed the map."""
        return torch.tanh(self.linear(features.flatten(1)))


class HeldTargets(TorchFunctionMode):
    """What a method detaches is, from the second pass on, what it was in the first.

    The Hessian takes such a target for a constant, and so must the finite differences: SimSiam's are projections by
    the parameters that are moved.
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
    """The configured pretext method and a linear classifier on a smooth backbone of 47 parameters, float64.

    What differs from the configured method is in `changes`. `lambda` is twice the norm of `H`, doubled until the lower
    problem is solved, so that the curvature matters and the solution is unique nearby; `theta_P` is that solution, and
    targets without a gradient are held where it has them. The views are others on each rank, the rest is the same.

    Raises:
        BisslZooError: the method does not run on this backbone, or its lower problem has no solution.
    """

    def __init__(self, cfg: DictConfig, seed: int = 0) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            try:
                self._build(cfg)
                norm = float(torch.linalg.eigvalsh(self.hessian()).abs().max())
            except (RuntimeError, TypeError, ValueError, AttributeError, KeyError, IndexError) as error:
                raise BisslZooError(
                    f"The pretext method '{cfg.pretext.name}' does not run on the reduced backbone, whose one map is "
                    f"(2, 2, 2) and which is no timm model ({type(error).__name__}: {error})."
                ) from error
            for doublings in range(1, 20):
                self.problem.lam = norm * 2.0**doublings
                if norm > 0 and self.solve_lower():
                    self.holding = HeldTargets()
                    self.gradient()
                    return
        raise BisslZooError(f"The reduced lower problem was not solved; its curvature has the norm {norm:.3g}.")

    def _build(self, cfg: DictConfig) -> None:
        trunks = [SmoothTrunk().double(), SmoothTrunk().double()]
        trunks[1].load_state_dict(trunks[0].state_dict())
        task = Classification(trunks[1], [str(n) for n in range(CLASSES)]).double()
        self.batch = torch.randn(SAMPLES, 3, SIZE, SIZE).double(), torch.arange(SAMPLES) % CLASSES
        pretext, self.changes = _reduced_method(cfg.pretext, trunks[0])
        shown = pretext.views()(Image.fromarray(np.zeros((64, 64, 3), dtype=np.uint8)))
        torch.manual_seed(1 + get_rank())
        self.views = _random_views([view.dtype == torch.bool for view in shown])
        lower, upper = _level("lower", trunks[0], pretext), _level("upper", trunks[1], task)
        self.problem = BiLevel(lower, upper, Exact(damping=0.0), gamma=cfg.bilevel.gamma, curvature="hessian")
        self.parameters = lower.backbone_parameters
        self.holding: contextlib.AbstractContextManager = contextlib.nullcontext()

    def gradient(self, create_graph: bool = False) -> Tensor:
        """Of the pretext loss in `theta_P`, by plain autograd; the method's random draws are the same each time.

        With a graph it is this rank's part.
        """
        torch.manual_seed(0)
        lower = self.problem.lower
        with self.holding:
            loss, _ = lower.loss(lower.backbone, self.views, amp=False)
        gradient = flatten(torch.autograd.grad(loss, self.parameters, create_graph=create_graph))
        return gradient if create_graph else all_reduce_mean(gradient)

    def hessian(self) -> Tensor:
        """`H (P, P)` by plain autograd, row by row."""
        rows = [torch.autograd.grad(g, self.parameters, retain_graph=True) for g in self.gradient(create_graph=True)]
        hessian = all_reduce_mean(torch.stack([flatten(row) for row in rows]))
        return (hessian + hessian.T) / 2

    def solve_lower(self, hessian: Tensor | None = None) -> bool:
        """`theta_P*(theta_D)` by Newton's method until the gradient is zero to rounding.

        Args:
            hessian: of a point nearby, which will do for a few steps.
        Returns:
            Whether it came to that; where not, `theta_P` is `theta_D`.
        """
        theta_d, lam = flatten(p.detach() for p in self.problem.upper.backbone_parameters), self.problem.lam
        for step in range(30):
            theta = flatten(p.detach() for p in self.parameters)
            slope = self.gradient() + lam * (theta - theta_d)
            if slope.norm() <= 1e-13 * lam * theta.norm():
                return True
            system = (self.hessian() if hessian is None or step > 8 else hessian) + lam * torch.eye(len(theta)).double()
            place(self.parameters, theta - torch.linalg.solve(system, slope))
        place(self.parameters, theta_d)
        return False

    def objective(self, theta_d: Tensor, hessian: Tensor) -> float:
        """The bilevel objective at `theta_D`, its lower problem solved."""
        lower, upper, gamma = self.problem.lower, self.problem.upper, self.problem.gamma
        place(upper.backbone_parameters, theta_d)
        if not self.solve_lower(hessian):
            raise BisslZooError("The reduced lower problem is not solved near its solution; another seed may do.")
        parts = (1.0, lower.backbone), (gamma, upper.backbone)
        return sum(weight * upper.loss(backbone, self.batch)[1]["cross_entropy"] for weight, backbone in parts)

    def operator(self, solver: Any) -> CurvatureOperator:
        """The curvature as the BiSSL stage builds it for this solver."""
        self.problem.solver, self.problem.shift = solver, None
        torch.manual_seed(0)
        return self.problem.curvature(self.views).prepare()


def make_smooth(module: nn.Module) -> list[str]:
    """Exchange activations with a kink for softplus and switch dropout off, in place; says what was done."""
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
def place(parameters: list[Tensor], vector: Tensor) -> None:
    """Set parameters from a flat vector."""
    for parameter, value in zip(parameters, unflatten_like(vector, parameters), strict=True):
        parameter.copy_(value)


def narrow_widths(section: Mapping[str, Any]) -> dict[str, list[int]]:
    """The widths of the heads of a configured pretext method that are above 16, cut to that."""
    parameters = inspect.signature(PRETEXT_METHODS.get(section["name"])).parameters.values()
    given = {p.name: p.default for p in parameters if isinstance(p.default, (list, tuple))} | dict(section)
    lists = {key: list(value) for key, value in given.items() if isinstance(value, (list, tuple, ListConfig))}
    widths = {key: value for key, value in lists.items() if any(isinstance(w, int) and w > WIDTH for w in value)}
    return {key: [min(w, WIDTH) for w in value] for key, value in widths.items()}


def _reduced_method(section: DictConfig, trunk: SmoothTrunk) -> tuple[PretextMethod, list[str]]:
    """The method on a reduced backbone, and what was changed in it."""
    narrow = narrow_widths(section)
    pretext = build_part(section, backbone=trunk, tail=SmoothTail(), **narrow).double()
    return pretext, make_smooth(pretext) + [f"{key} at most {WIDTH} wide" for key in narrow]


def _random_views(masks: list[bool]) -> tuple[Tensor, ...]:
    """Images, and masks of 2 x 2 cells where a method takes them.

    A loss of hidden pixels may have a kink at their values, across which finite differences mean nothing: beside a
    mask, images are far from what a network in its beginnings predicts.
    """
    images = torch.randn(len(masks), SAMPLES, 3, SIZE, SIZE).double()
    if any(masks):
        images = images + 3.0 * images.sign()
    mask = torch.tensor([[True, False], [True, True]]).expand(SAMPLES, 2, 2)
    return tuple(mask if is_mask else view for view, is_mask in zip(images, masks, strict=True))


def _level(name: str, backbone: nn.Module, head: nn.Module) -> Level:
    optimizer = torch.optim.SGD([*backbone.parameters(), *head.parameters()], lr=0.1)
    return Level(name, backbone, head, optimizer, itertools.repeat(None), LRMultiplier(ConstantParamScheduler(1.0)), 1)
