"""The bilevel core on 1, 2 and 4 processes over gloo.

Each world cuts the same batches into as many parts as it has ranks and must compute what one process does.
"""

import hashlib
import itertools
from functools import partial

import pytest
import torch
import torch.distributed as dist
from fvcore.common.param_scheduler import ConstantParamScheduler
from pretext_methods import MASKED, tiny_method, tiny_trunk
from ranks import on_ranks
from torch import nn
from torch.optim import SGD

from bissl_zoo.bilevel import BiLevel
from bissl_zoo.bilevel.level import Level
from bissl_zoo.data.samples import map_tensors
from bissl_zoo.distributed import all_reduce_mean, average_gradients, flatten, gather_with_gradient
from bissl_zoo.errors import BadHypergradient, NonFiniteLoss
from bissl_zoo.hypergradient import ConjugateGradient, MFac
from bissl_zoo.optim import LRMultiplier
from bissl_zoo.pretext import simclr
from bissl_zoo.registry import PRETEXT_METHODS, SOLVERS, build_solver, build_task

pytestmark = pytest.mark.slow

WORLDS = (2, 4)
METHODS = PRETEXT_METHODS.list()
#: four ranks differ from two only in the offsets of gathered rows and in the turn of the queue
CASES = [(2, method) for method in METHODS] + [(4, "simclr"), (4, "moco_v2")]
CURVATURES = ("hessian", "gauss_newton")
SOLVER_NAMES = SOLVERS.list()
BATCH = 8
CONSTANT = LRMultiplier(ConstantParamScheduler(1.0))


def shards(seed, rank, world, make):
    """This rank's part of an endless stream of batches `make(generator)` that is the same in every world."""
    generator, share = torch.Generator().manual_seed(seed), BATCH // world
    while True:
        yield map_tensors(lambda tensor: tensor[rank * share : (rank + 1) * share], make(generator))


def views(method, generator):
    images = tuple(torch.randn(2, BATCH, 3, 8, 8, dtype=torch.float64, generator=generator))
    if method == "dino":
        return *images, torch.randn(BATCH, 3, 4, 4, dtype=torch.float64, generator=generator)
    if method in MASKED:  # two of four cells are hidden
        return images[0], (torch.rand(BATCH, 4, generator=generator).argsort(dim=1) < 2).view(BATCH, 2, 2)
    return images


def labelled(generator):
    images = torch.randn(BATCH, 3, 8, 8, dtype=torch.float64, generator=generator)
    return images, torch.randint(0, 3, (BATCH,), generator=generator)


def level(name, backbone, head, batches):
    optimizer = SGD([p for m in (backbone, head) for p in m.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    return Level(name, backbone, head, optimizer, batches, CONSTANT, 100)


def problem(method, rank, world, curvature="gauss_newton", solver=None):
    """A pretext method below, classification above, in float64; batch norm uses its running statistics."""
    torch.manual_seed(0)
    trunk, pretext = tiny_method(method)
    upper, _ = tiny_trunk(method)
    task = build_task(name="classification", backbone=upper, classes=["a", "b", "c"])
    for module in (trunk, pretext, upper, task):
        module.double().eval()
    return BiLevel(
        level("lower", trunk, pretext, shards(1, rank, world, partial(views, method))),
        level("upper", upper, task, shards(2, rank, world, labelled)),
        solver=solver or ConjugateGradient(iterations=4, tolerance=1e-6, damping=1.0),
        lam=0.1,
        lower_steps=2,
        upper_steps=2,
        alternations=3,
        curvature=curvature,
    )


def modules(bilevel):
    return nn.ModuleList([bilevel.lower.backbone, bilevel.lower.head, bilevel.upper.backbone, bilevel.upper.head])


def digest(bilevel):
    """Of the bits of both levels, teachers and queues among them; batch-norm statistics are each rank's own."""
    sha256 = hashlib.sha256()
    for name, tensor in modules(bilevel).state_dict().items():
        if not name.endswith(("running_mean", "running_var", "num_batches_tracked")):
            sha256.update(tensor.numpy().tobytes())
    return sha256.hexdigest()


def with_digest(step, bilevel, digests):
    def call(*arguments):
        metrics = step(*arguments)
        digests.append(digest(bilevel))
        return metrics

    return call


def keep_digests(bilevel):
    """A list that grows by the digest after each lower and each upper step."""
    digests = []
    bilevel.lower_step = with_digest(bilevel.lower_step, bilevel, digests)
    bilevel.upper_step = with_digest(bilevel.upper_step, bilevel, digests)
    return digests


def derivatives(method, rank, world, curvature):
    """Return the results of one batch, from the loss to the hypergradient."""
    bilevel = problem(method, rank, world, curvature)
    lower, batch = bilevel.lower, next(bilevel.lower.data_iterator)
    operator = bilevel.curvature(batch).prepare()
    generator = torch.Generator().manual_seed(3)
    u = torch.randn(sum(operator.block_sizes), dtype=torch.float64, generator=generator)
    total, _ = lower.loss(lower.backbone, batch)
    total.backward()
    average_gradients(lower.parameters)
    gradients = bilevel.upper_gradients(next(bilevel.upper.data_iterator), operator)
    return {
        "loss": all_reduce_mean(total.detach().view(1)),
        "gradient": flatten(p.grad for p in lower.parameters),
        "product": operator.hessian_product(u),
        "solution": gradients.solution.x,
        "upper backbone": gradients.backbone,
        "upper head": gradients.head,
    }


def alternations(method, rank, world, solver=None):
    """How far three alternations move everything, the norms of x, and the digest after each step."""
    bilevel = problem(method, rank, world, solver=solver)
    start = {name: tensor.clone() for name, tensor in modules(bilevel).state_dict().items()}
    digests = keep_digests(bilevel)
    norms = torch.tensor([bilevel.alternate(number)["solver/x_norm"] for number in range(3)])
    moved = {name: tensor - start[name] for name, tensor in modules(bilevel).state_dict().items()}
    return {"moved": moved, "norms": norms, "digests": digests}


def batch_statistics(method, rank, world):
    """The digests of an alternation with batch norm as it is trained: over each rank's own part of the batch."""
    bilevel = problem(method, rank, world)
    modules(bilevel).train()
    digests = keep_digests(bilevel)
    bilevel.alternate(0)
    return {"digests": digests, "buffers": list(bilevel.lower.backbone.buffers())}


class InPlaceAllReduce(torch.autograd.Function):
    """The gather of much published code: its backward is right, and invisible to a second differentiation."""

    @staticmethod
    def forward(ctx, x):
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad):
        total = grad.clone()
        dist.all_reduce(total.detach())
        return total.chunk(dist.get_world_size())[dist.get_rank()]


def with_faulty_gather(rank, world):
    simclr.gather_with_gradient = InPlaceAllReduce.apply
    try:
        return derivatives("simclr", rank, world, "hessian")
    finally:
        simclr.gather_with_gradient = gather_with_gradient


class Head(nn.Linear):
    """Regression to zero and a term of the backbone's weight that may be spoilt."""

    def __init__(self, term):
        super().__init__(4, 1, dtype=torch.float64)
        self.term = term

    def losses(self, backbone, batch):
        return {"square": self(backbone(batch)).square().mean(), "term": self.term(backbone.weight)}

    def after_step(self, backbone):
        pass


#: terms of a weight; each leaves everything finite up to its own order of differentiation
TERMS = {
    "nothing": lambda w: 0.0 * w.sum(),
    "loss": lambda w: float("nan") * w.sum(),
    "gradient": lambda w: (w - w.detach()).abs().sqrt().sum(),
    "product": lambda w: (w - w.detach()).abs().pow(1.5).sum(),
}
#: level and what is not finite there on the last rank alone -> what every rank must say
SPOILT = {
    "lower loss": "lower level, step 0, rank 1: the loss is not finite (square=",
    "upper loss": "upper level, step 0, rank 1: the loss is not finite (square=",
    "lower gradient": "lower level, step 0: the loss is finite but the norm of its gradient is nan",
    "upper gradient": "upper level, step 0: the loss is finite but the norm of its gradient is nan",
    "lower product": "upper level, step 0: ConjugateGradient returned no usable hypergradient: status non_finite",
}


def small_problem(rank, terms, solver, gamma):
    """Regression above and below, on batches that differ from rank to rank; `terms` of the lower and upper level."""
    levels = []
    for seed, (name, term) in enumerate(zip(("lower", "upper"), terms, strict=True)):
        torch.manual_seed(seed)
        backbone, head = nn.Linear(5, 4, dtype=torch.float64), Head(TERMS[term])
        torch.manual_seed(2 + rank)
        levels.append(level(name, backbone, head, itertools.repeat(torch.randn(3, 5, dtype=torch.float64))))
    return BiLevel(*levels, solver=solver, lam=0.5, gamma=gamma, lower_steps=1, upper_steps=2)


def spoilt(case, rank, world):
    """An alternation in which only the last rank has a number that is not finite: what it says, and the digests."""
    terms = [case.removeprefix(f"{name} ") if case.startswith(name) else "nothing" for name in ("lower", "upper")]
    terms = terms if rank == world - 1 else ["nothing"] * 2
    bilevel = small_problem(rank, terms, ConjugateGradient(damping=1.0), gamma=0.0)
    digests = keep_digests(bilevel)
    try:
        outcome = bilevel.alternate(0)["solver/status"]
    except (BadHypergradient, NonFiniteLoss) as error:
        outcome = str(error)
    return {"outcome": outcome, "digests": [*digests, digest(bilevel)]}


def solved(name, rank):
    """What a solver made of its defaults says and leaves; each rank has a random state of its own, as in training."""
    bilevel = small_problem(rank, ["nothing"] * 2, build_solver(name=name), gamma=1.0)
    digests = keep_digests(bilevel)
    metrics = bilevel.alternate(0)
    return {"outcome": [metrics["solver/status"], metrics["solver/products"]], "digests": digests}


def work(rank, world):
    """Return the results of one rank that the tests inspect."""
    seen = {"derivatives": {}, "alternations": {}, "batch statistics": {}}
    for method in [method for size, method in CASES if size == max(world, 2)]:
        for curvature in CURVATURES:
            seen["derivatives"][method, curvature] = derivatives(method, rank, world, curvature)
        seen["alternations"][method] = alternations(method, rank, world)
        if world == 2:
            seen["batch statistics"][method] = batch_statistics(method, rank, world)
    # more gradients than an alternation has lower steps, so that the second one keeps some of the first
    seen["alternations"]["simclr, mfac"] = alternations("simclr", rank, world, MFac(gradients=3))
    if world > 1:
        seen["faulty"] = with_faulty_gather(rank, world)
    if world == 2:
        seen["solved"] = {name: solved(name, rank) for name in SOLVER_NAMES}
        seen["spoilt"] = {case: spoilt(case, rank, world) for case in SPOILT}
    return seen


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    """Return the results of each rank of each world: `worlds[4][0]` is rank 0 of 4."""
    return on_ranks(work, (1, *WORLDS), tmp_path_factory.mktemp("worlds"))


def distance(actual, expected):
    """Relative to the norm of `expected`, except below rounding: a bias before batch norm has no gradient."""
    return float((actual - expected).double().norm()) / max(float(expected.double().norm()), 1e-8)


@pytest.mark.parametrize(("world", "method"), CASES)
@pytest.mark.parametrize("curvature", CURVATURES)
def test_ranks_compute_what_one_process_does_with_the_whole_batch(worlds, world, method, curvature):
    alone, first = (worlds[n][0]["derivatives"][method, curvature] for n in (1, world))
    for quantity, expected in alone.items():
        assert expected.any(), quantity
        for seen in worlds[world]:
            computed = seen["derivatives"][method, curvature][quantity]
            assert distance(computed, expected) < 1e-6, quantity  # other orders of summation in float64
            assert torch.equal(computed, first[quantity]), quantity


@pytest.mark.parametrize(("world", "method"), [*CASES, (2, "simclr, mfac"), (4, "simclr, mfac")])
def test_three_alternations_over_ranks_end_where_one_process_does(worlds, world, method):
    [alone] = worlds[1]
    expected = alone["alternations"][method]
    assert sum(bool(moved.any()) for moved in expected["moved"].values()) > len(expected["moved"]) / 2
    for seen in worlds[world]:
        for name, moved in expected["moved"].items():
            assert distance(seen["alternations"][method]["moved"][name], moved) < 1e-6, name
        assert distance(seen["alternations"][method]["norms"], expected["norms"]) < 1e-6
    first = worlds[world][0]["alternations"][method]["digests"]
    assert len(first) == len(set(first)) == 12  # three alternations of two steps and two
    assert all(seen["alternations"][method]["digests"] == first for seen in worlds[world])


@pytest.mark.parametrize("method", METHODS)
def test_all_ranks_are_bit_equal_with_batch_statistics_per_rank(worlds, method):
    ranks = [seen["batch statistics"][method] for seen in worlds[2]]
    assert len(set(ranks[0]["digests"])) == 4
    assert all(seen["digests"] == ranks[0]["digests"] for seen in ranks)
    assert method in MASKED or not torch.equal(ranks[0]["buffers"][0], ranks[1]["buffers"][0])


def test_a_gather_that_can_be_differentiated_only_once_is_detected(worlds):
    expected, missing = worlds[1][0]["derivatives"]["simclr", "hessian"], []
    for world in WORLDS:
        faulty = worlds[world][0]["faulty"]
        assert distance(faulty["loss"], expected["loss"]) < 1e-6
        assert distance(faulty["gradient"], expected["gradient"]) < 1e-6
        assert distance(faulty["product"], expected["product"]) > 0.1
        missing.append((expected["product"] - faulty["product"]) / (1 - 1 / world))
    # what runs through the gathered rows is about divided by the number of ranks; which pairs of rows share a rank
    # depends on how the batch is cut, hence "about"
    assert distance(*missing) < 0.05


@pytest.mark.parametrize("name", SOLVER_NAMES)
def test_all_ranks_are_bit_equal_with_every_solver(worlds, name):
    outcomes = [seen["solved"][name] for seen in worlds[2]]
    assert len(set(outcomes[0]["digests"])) == 3
    assert all(outcome == outcomes[0] for outcome in outcomes)


@pytest.mark.parametrize("case", SPOILT)
def test_a_number_that_is_not_finite_on_one_rank_is_the_same_error_on_all(worlds, case):
    outcomes = [seen["spoilt"][case] for seen in worlds[2]]
    assert SPOILT[case] in outcomes[0]["outcome"]
    assert all(outcome == outcomes[0] for outcome in outcomes)
