import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from fvcore.common.param_scheduler import ConstantParamScheduler
from timm.optim import Lars
from torch import nn
from torch.optim import SGD

from bissl_zoo.backbones import FeatureInfo
from bissl_zoo.bilevel import BiLevel
from bissl_zoo.bilevel.level import Level
from bissl_zoo.errors import ConfigError
from bissl_zoo.hypergradient import ConjugateGradient, Exact, Identity, Solution
from bissl_zoo.optim import LRMultiplier
from bissl_zoo.registry import build_pretext, build_task

# whole steps of the BiSSL authors' published code, float64; see golden/README.md
GOLDEN = Path(__file__).resolve().parents[1] / "golden"
UPPER = np.load(GOLDEN / "upper_steps.npz")
LOWER = np.load(GOLDEN / "lower_step_simclr.npz")
CONSTANT = LRMultiplier(ConstantParamScheduler(1.0))


class TinyBackbone(nn.Module):
    """The network of the golden values: 3x10x10 images -> a map of 6 channels."""

    out_features = ("out",)
    feature_info = {"out": FeatureInfo(6, 4, "bn2")}

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 6, 3, padding=1, stride=2, bias=False)
        self.bn2 = nn.BatchNorm2d(6)

    def forward(self, images):
        x = nn.functional.max_pool2d(self.bn1(self.conv1(images)).relu(), 2)
        return {"out": self.bn2(self.conv2(x)).relu()}


class Pool(nn.Module):
    num_features = 6

    def forward(self, features):
        return features.mean(dim=(2, 3))


def tensors(arrays, prefix):
    """The arrays whose names begin with `prefix`, without it, as tensors."""
    return {name[len(prefix) :]: torch.from_numpy(arrays[name]) for name in arrays if name.startswith(prefix)}


def golden_levels(arrays, lower_prefix, upper_prefix, method="simclr", lower_optimizer=None, batches=((), ())):
    lower_backbone, upper_backbone = TinyBackbone().double(), TinyBackbone().double()
    heads = {"projector": [7, 5]} if method == "simclr" else {"projector": [7, 5], "predictor": [9, 5]}
    pretext = build_pretext(name=method, backbone=lower_backbone, tail=Pool(), **heads).double()
    task = build_task(name="classification", backbone=upper_backbone, classes=["a", "b", "c"]).double()
    lower_backbone.load_state_dict(tensors(arrays, f"{lower_prefix}backbone."))
    upper_backbone.load_state_dict(tensors(arrays, f"{upper_prefix}backbone."))
    head = tensors(arrays, f"{lower_prefix}head.")
    for part in ("backbone", "projector"):
        target = tensors(arrays, f"{lower_prefix}{part}_target.")
        head.update({f"teacher.{part}.{name}": value for name, value in target.items()})
    pretext.load_state_dict(head)
    task.linear.load_state_dict(tensors(arrays, f"{upper_prefix}head."))
    make_lower = lower_optimizer or (lambda parameters: SGD(parameters, lr=0.1))
    lower_parameters = [p for m in (lower_backbone, pretext) for p in m.parameters() if p.requires_grad]
    upper_parameters = [*upper_backbone.parameters(), *task.parameters()]
    upper_optimizer = SGD(upper_parameters, lr=0.05, momentum=0.9, weight_decay=1e-3)
    return (
        Level("lower", lower_backbone, pretext, make_lower(lower_parameters), iter(batches[0]), CONSTANT, 100),
        Level("upper", upper_backbone, task, upper_optimizer, iter(batches[1]), CONSTANT, 100),
    )


def golden_problem(entry, solver, **options):
    """The bilevel problem of a golden upper step, its pretext and its downstream batch."""
    method = entry.split("_")[0]
    given = {name[len(method) + 1 :]: UPPER[name] for name in UPPER if name.startswith(f"{method}/")}
    pretext_batch = tuple(torch.from_numpy(given[f"lower_view{i}"]) for i in (1, 2))
    batch = torch.from_numpy(given["upper_x"]), torch.from_numpy(given["upper_y"])
    levels = golden_levels(given, "lower_state__", "upper_state__", method, batches=([pretext_batch], [batch]))
    return BiLevel(*levels, solver=solver, lam=0.001, curvature="hessian", **options), pretext_batch, batch


def close(ours, theirs, rtol):
    scale = np.abs(theirs).max()
    np.testing.assert_allclose(ours.detach().numpy(), theirs, rtol=0, atol=rtol * scale)


ENTRIES = [
    ("simclr_lam0.001_damp2000.0_global_it5", 2000.0, False),
    ("simclr_lam0.001_damp2000.0_layerwise_it5", 2000.0, True),
    ("simclr_lam0.001_damp10.0_layerwise_it5", 10.0, True),
    ("byol_lam0.001_damp2000.0_global_it5", 2000.0, False),
]


def authors_cg(operator, v, blockwise):
    """Five iterations of the authors' solver, with the 1e-12 in its denominators that ours does without."""
    sizes = torch.tensor(operator.block_sizes if blockwise else [len(v)])

    def dots(a, b):
        sums = torch.stack([x @ y for x, y in zip(a.split(sizes.tolist()), b.split(sizes.tolist()), strict=True)])
        return sums.repeat_interleave(sizes)

    x, r, p = torch.zeros_like(v), v, v
    for _ in range(5):
        product = operator(p)
        alpha = dots(r, r) / (dots(p, product) + 1e-12)
        x, r, previous = x + alpha * p, r - alpha * product, r
        p = r + dots(r, r) / (dots(previous, previous) + 1e-12) * p
    return Solution(x, None, 5, "max_iterations")


@pytest.mark.parametrize(("entry", "damping", "blockwise"), ENTRIES, ids=[entry[0] for entry in ENTRIES])
def test_upper_gradients_equal_the_authors(entry, damping, blockwise):
    problem, pretext_batch, batch = golden_problem(entry, ConjugateGradient(damping=damping))
    rtol = float(UPPER[f"{entry}/rtol"])
    operator = problem.curvature(pretext_batch).prepare()
    seen = {}

    def solver(operator, v):
        seen["v"] = v
        return authors_cg(operator, v, blockwise)

    problem.solver = solver
    gradients = problem.upper_gradients(batch, operator)
    close(seen["v"], UPPER[f"{entry}/v"], 1e-11)
    close(operator.hessian_product(seen["v"]), UPPER[f"{entry}/Hv"], 1e-11)
    close(gradients.solution.x, UPPER[f"{entry}/ij"], rtol)
    close(gradients.backbone - gradients.solution.x, UPPER[f"{entry}/classic"], 1e-11)
    close(gradients.backbone, UPPER[f"{entry}/total"], rtol)
    close(gradients.head, UPPER[f"{entry}/total_head"], 1e-11)
    metrics = gradients.metrics
    assert metrics["upper/cross_entropy"] == pytest.approx(float(UPPER[f"{entry}/upper_loss_lowerbackbone"]), rel=1e-12)
    assert metrics["upper/plain_cross_entropy"] == pytest.approx(float(UPPER[f"{entry}/upper_loss_classic"]), rel=1e-12)
    lower_loss = problem.lower.loss(problem.lower.backbone, pretext_batch)[0]
    assert lower_loss.item() == pytest.approx(float(UPPER[f"{entry}/lower_loss"]), rel=1e-12)


@pytest.mark.parametrize(("entry", "damping", "blockwise"), ENTRIES, ids=[entry[0] for entry in ENTRIES])
def test_the_solver_differs_from_the_authors_by_the_epsilon_in_their_denominators(entry, damping, blockwise):
    solver = ConjugateGradient(iterations=5, tolerance=0.0, damping=damping, blockwise=blockwise)
    problem, pretext_batch, batch = golden_problem(entry, solver)
    x = problem.upper_gradients(batch, problem.curvature(pretext_batch).prepare()).solution.x
    # r^T r has fallen to the order of the 1e-12 that they add to it
    close(x, UPPER[f"{entry}/ij"], 1e-5)
    if not blockwise:
        exact = UPPER[f"{entry}/exact_ij_backbone_flat"]
        errors = [np.linalg.norm(result - exact) for result in (x.numpy(), UPPER[f"{entry}/ij"])]
        assert errors[0] < errors[1] < 1e-5 * np.linalg.norm(exact)


@pytest.mark.slow
@pytest.mark.parametrize("entry", ["simclr_lam0.001_damp2000.0_global_it5", "byol_lam0.001_damp2000.0_global_it5"])
def test_the_dense_solve_equals_the_authors(entry):
    problem, pretext_batch, batch = golden_problem(entry, Exact(damping=2000.0))
    operator = problem.curvature(pretext_batch).prepare()
    close(problem.upper_gradients(batch, operator).solution.x, UPPER[f"{entry}/exact_ij_backbone_flat"], 1e-9)


@pytest.mark.slow
def test_the_curvature_is_the_authors_dense_hessian():
    problem, pretext_batch, _ = golden_problem("simclr_", Identity())
    triangle = np.load(GOLDEN / "lower_hessian_simclr.npz")["upper_triangle"]
    expected = np.zeros((344, 344))
    expected[np.triu_indices(344)] = triangle
    expected = expected + np.triu(expected, 1).T
    operator = problem.curvature(pretext_batch).prepare()
    dense = torch.stack([operator.hessian_product(e) for e in torch.eye(344, dtype=torch.float64)])
    close(dense, expected, 1e-11)
    assert operator.shift == 0.001


def test_an_upper_step_equals_the_authors():
    entry = "simclr_lam0.001_damp2000.0_global_it5"
    problem, pretext_batch, _ = golden_problem(entry, ConjugateGradient(5, 0.0, damping=2000.0))
    lower_before = {k: v.clone() for k, v in problem.lower.backbone.state_dict().items() if "running" not in k}
    metrics = problem.upper_step(problem.curvature(pretext_batch).prepare())
    upper = problem.upper
    state = {f"backbone.{k}": v for k, v in upper.backbone.state_dict().items()}
    state.update({f"head.{k}": v for k, v in upper.head.linear.state_dict().items()})
    expected = tensors(UPPER, f"{entry}/upper_state_after_step__")
    assert set(state) == set(expected)
    for name in expected:
        # as far as the two solvers agree, times the learning rate
        torch.testing.assert_close(state[name], expected[name], rtol=0, atol=0.05 * 1e-6)
    assert metrics["upper/lr"] == 0.05 and upper.step == 1
    after = problem.lower.backbone.state_dict()
    assert all(torch.equal(after[k], v) for k, v in lower_before.items() if "num_batches" not in k)


@pytest.mark.parametrize("move", [True, False])
def test_downstream_images_update_the_lower_statistics_only_with_update_bn_stats(move):
    problem, pretext_batch, batch = golden_problem("byol_", Identity(), update_bn_stats=move)
    before = copy.deepcopy(problem.lower.backbone.state_dict())
    teacher = copy.deepcopy(problem.lower.head.state_dict())
    gradients = problem.upper_gradients(batch, problem.curvature(pretext_batch).prepare())
    after = problem.lower.backbone.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == ({name for name in before if "running" in name or "num_batches" in name} if move else set())
    assert all(torch.equal(value, teacher[key]) for key, value in problem.lower.head.state_dict().items())
    close(gradients.solution.x, UPPER["byol_lam0.001_damp2000.0_global_it5/v"], 1e-9)


class AuthorsLars(torch.optim.Optimizer):
    """LARS as the authors have it: the trust ratio is eta |w| / |g + wd w|."""

    def __init__(self, params):
        super().__init__(params, dict(lr=0.3, momentum=0.9, weight_decay=1e-4, eta=0.001))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                update = p.grad + group["weight_decay"] * p
                if p.norm() > 0 and update.norm() > 0:
                    update = update * (group["eta"] * p.norm() / update.norm())
                buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                p.sub_(buffer.mul_(group["momentum"]).add_(update), alpha=group["lr"])


def timm_lars(params):
    return Lars(params, lr=0.3, momentum=0.9, weight_decay=1e-4, trust_coeff=0.001)


# timm's trust ratio is eta |w| / (|g| + wd |w|): the steps differ by up to wd |w| / |g| of their length
@pytest.mark.parametrize(("lars", "tolerance"), [(AuthorsLars, 1e-9), (timm_lars, 2e-3)], ids=["authors", "timm"])
def test_two_lower_steps_equal_the_authors(lars, tolerance):
    batch = tuple(torch.from_numpy(LOWER[f"lower_view{i}"]) for i in (1, 2))
    levels = golden_levels(
        LOWER, "lower_state_before__", "upper_state__", lower_optimizer=lars, batches=([batch, batch], [])
    )
    problem = BiLevel(*levels, solver=Identity(), lam=0.2)
    lower, seen = problem.lower, []
    lower.optimizer.register_step_pre_hook(lambda *_: seen.append([p.grad.clone() for p in lower.parameters]))
    before = tensors(LOWER, "lower_state_before__")
    names = [f"backbone.{n}" for n, _ in lower.backbone.named_parameters()]
    names += [f"head.{n}" for n, _ in lower.head.named_parameters()]
    for step in (1, 2):
        metrics = problem.lower_step()
        if step == 1:
            assert metrics["lower/nt_xent"] == pytest.approx(float(LOWER["loss_pretext"]), rel=1e-12)
            assert metrics["lower/pull"] == pytest.approx(float(LOWER["loss_reg"]), rel=1e-12)
            for name, grad in zip(names, seen[0], strict=True):
                np.testing.assert_allclose(grad.numpy(), LOWER[f"grad_clipped__{name}"], rtol=1e-9, atol=1e-12)
        state = {f"backbone.{k}": v for k, v in lower.backbone.state_dict().items()}
        state.update({f"head.{k}": v for k, v in lower.head.state_dict().items()})
        for name, expected in tensors(LOWER, f"lower_state_after{step}__").items():
            moved = (expected - before[name]).abs().max().item()
            torch.testing.assert_close(state[name], expected, rtol=0, atol=tolerance * moved)
    assert lower.step == 2 and all(p.grad is None for p in lower.parameters)


def test_adaptation_moves_parameters_and_buffers_and_keeps_the_optimizer():
    problem, _, _ = golden_problem("simclr_", Identity())
    problem.upper.backbone(torch.randn(4, 3, 10, 10, dtype=torch.float64))["out"].sum().backward()
    problem.upper.optimize()
    momentum = copy.deepcopy(problem.upper.optimizer.state_dict()["state"])
    lower, upper = (copy.deepcopy(one.backbone.state_dict()) for one in (problem.lower, problem.upper))
    problem.adapt(0.1)
    for name, value in problem.upper.backbone.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(value, 0.9 * upper[name] + 0.1 * lower[name], rtol=1e-12, atol=1e-14)
    assert all(torch.equal(v, lower[k]) for k, v in problem.lower.backbone.state_dict().items())
    kept = problem.upper.optimizer.state_dict()["state"]
    assert all(torch.equal(kept[i]["momentum_buffer"], momentum[i]["momentum_buffer"]) for i in momentum)


def test_sync_batch_norm_is_refused_in_the_lower_level():
    lower, upper = golden_problem("simclr_", Identity())[0].lower, golden_problem("simclr_", Identity())[0].upper
    BiLevel(lower, copy.deepcopy(upper), Identity())
    upper.backbone = nn.SyncBatchNorm.convert_sync_batchnorm(upper.backbone)
    BiLevel(lower, upper, Identity())  # the upper level is differentiated once only
    lower.head = nn.SyncBatchNorm.convert_sync_batchnorm(lower.head)
    with pytest.raises(ConfigError, match=r"SyncBatchNorm \('projector.1'\).*second derivative"):
        BiLevel(lower, upper, Identity())


def test_the_curvature_batch_may_be_smaller():
    problem, pretext_batch, _ = golden_problem("simclr_", Identity(), curvature_batch_size=4)
    small = tuple(view[:4] for view in pretext_batch)
    v = torch.ones(344, dtype=torch.float64)
    cut = problem.curvature(pretext_batch).prepare()(v)
    assert torch.equal(cut, problem.curvature(small).prepare()(v))
    problem.curvature_batch_size = None
    assert not torch.allclose(cut, problem.curvature(pretext_batch).prepare()(v))
