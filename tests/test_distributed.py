"""Two real processes over gloo; this file is also their program (`python test_distributed.py RANK WORLD FOLDER`)."""

import datetime
import os
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.optim import SGD

from bissl_zoo import distributed
from bissl_zoo.data.loaders import TrainingSampler, build_train_loader
from bissl_zoo.distributed import (
    all_gather_objects,
    all_reduce_mean,
    average_gradients,
    broadcast_module,
    broadcast_object,
    flatten,
    gather_with_gradient,
    on_main_process,
    unflatten_like,
)
from bissl_zoo.errors import BisslZooError, ConfigError

WORLD = 2


def net(seed=0, widths=(5, 6, 4)):
    """A smooth network without batch statistics, so that a batch may be cut into parts."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(*widths[:2]), nn.Tanh(), nn.Linear(*widths[1:])).double()


def whole_batch():
    generator = torch.Generator().manual_seed(1)
    views = torch.randn(2, 6, 5, dtype=torch.float64, generator=generator)
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    return tuple(views), labels


def part(tensor, rank, world):
    share = len(tensor) // world
    return tensor[rank * share : (rank + 1) * share]


def contrastive(rank, world):
    """NT-Xent, its gradient and a Hessian product, with this rank's part of the batch."""
    from bissl_zoo.hypergradient import CurvatureOperator
    from bissl_zoo.pretext.simclr import nt_xent

    model, (views, _) = net(), whole_batch()

    def loss():
        return nt_xent(torch.cat([model(part(view, rank, world)) for view in views]), 0.5)

    value = all_reduce_mean(loss().detach().view(1))
    loss().backward()
    average_gradients(model.parameters())
    operator = CurvatureOperator(loss, list(model.parameters()), 1.0, (model,), all_reduce_mean).prepare()
    u = torch.randn(
        sum(p.numel() for p in model.parameters()), dtype=torch.float64, generator=torch.Generator().manual_seed(2)
    )
    return {
        "loss": value,
        "gradient": flatten(p.grad for p in model.parameters()),
        "product": operator.hessian_product(u),
    }


def alternation(rank, world):
    """One whole alternation of the algorithm; returns all parameters and the metrics."""
    from fvcore.common.param_scheduler import ConstantParamScheduler

    from bissl_zoo.bilevel import BiLevel, Level
    from bissl_zoo.hypergradient import ConjugateGradient
    from bissl_zoo.optim import LRMultiplier
    from bissl_zoo.pretext.simclr import nt_xent

    class Contrast(nn.Linear):
        def losses(self, backbone, views):
            return {"nt_xent": nt_xent(torch.cat([self(backbone(view)) for view in views]), 0.5)}

        def after_step(self, backbone):
            pass

    class Classify(nn.Linear):
        def losses(self, backbone, batch):
            return {"cross_entropy": nn.functional.cross_entropy(self(backbone(batch[0])), batch[1])}

    def level(name, seed, head_type, out, batch):
        backbone = net(seed)
        torch.manual_seed(seed + 10)
        head = head_type(4, out).double()
        optimizer = SGD([*backbone.parameters(), *head.parameters()], lr=0.1, momentum=0.9)
        return Level(name, backbone, head, optimizer, iter([batch] * 9), LRMultiplier(ConstantParamScheduler(1.0)), 9)

    views, labels = whole_batch()
    views = tuple(part(view, rank, world) for view in views)
    batch = views[0], part(labels, rank, world)
    problem = BiLevel(
        level("lower", 3, Contrast, 3, views),
        level("upper", 4, Classify, 3, batch),
        solver=ConjugateGradient(iterations=5, damping=1.0),
        lam=0.5,
        lower_steps=3,
        upper_steps=2,
    )
    metrics = problem.alternate(0)
    result = {
        f"{one.name} {i}": p.detach() for one in (problem.lower, problem.upper) for i, p in enumerate(one.parameters)
    }
    return {**result, "residual": torch.tensor(metrics["solver/residual"])}


def non_finite(rank, world):
    """Only rank 1 sees a NaN; every rank must stop."""
    from bissl_zoo.bilevel import Level

    class Bad(nn.Linear):
        def losses(self, backbone, batch):
            return {"loss": self(backbone(batch)).sum() * (float("nan") if rank == 1 else 1.0)}

    backbone, head = net(), Bad(4, 1).double()
    one = Level("lower", backbone, head, SGD(backbone.parameters(), lr=0.1), iter([]), None, 1)
    try:
        one.loss(backbone, torch.zeros(2, 5, dtype=torch.float64))
    except BisslZooError as error:
        return str(error)


def refused(action):
    try:
        return on_main_process(action)
    except (BisslZooError, OSError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"


def disk_full():
    raise OSError(28, "No space left on device")


def fail():
    raise ConfigError("no such key")


def uneven_gradients(rank):
    first, second = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2, 2))
    (first.sum() * (rank + 1)).backward()
    if rank == 1:
        second.square().sum().backward()
    average_gradients([first, second])
    return [first.grad, second.grad]


class Numbers(torch.utils.data.Dataset):
    def __len__(self):
        return 17

    def __getitem__(self, index):
        return index, None


def image_only(image, target):
    return image


def work(rank, world):
    """Everything the tests look at, as one rank sees it."""
    model = net(seed=rank)
    model.register_buffer("statistics", torch.full((2,), float(rank)))
    broadcast_module(model)
    gathered = gather_with_gradient(torch.full((2, 3), float(rank)))
    loader = build_train_loader(Numbers(), 6, image_only, seed=3, start_step=2)
    return {
        "rank": (distributed.get_rank(), distributed.get_world_size(), distributed.is_main_process()),
        "objects": all_gather_objects({"rank": rank}),
        "broadcast": broadcast_object(f"from {rank}"),
        "on_main": refused(lambda: f"done on {rank}"),
        "on_main_error": refused(fail),
        "on_main_crash": refused(disk_full),
        "mean": all_reduce_mean(torch.tensor([float(rank), 4.0])),
        "gradients": uneven_gradients(rank),
        "module": {name: tensor for name, tensor in model.state_dict().items()},
        "gathered": gathered,
        "contrastive": contrastive(rank, world),
        "alternation": alternation(rank, world),
        "non_finite": non_finite(rank, world),
        "stream": list(islice(TrainingSampler(17, 6, seed=3), 51)),
        "loaded": torch.stack(list(islice(loader, 3))),
    }


def main(rank, world, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=60),
    )
    torch.save(work(rank, world), Path(folder) / f"{rank}.pt")
    distributed.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of two processes saw."""
    folder = tmp_path_factory.mktemp("ranks")
    paths = [str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, __file__]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(WORLD), str(folder)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for rank in range(WORLD)
    ]
    try:
        outputs = [process.communicate(timeout=120)[0].decode() for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * WORLD, "\n".join(outputs)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]


def test_every_process_knows_its_rank(ranks):
    assert [seen["rank"] for seen in ranks] == [(0, 2, True), (1, 2, False)]


def test_objects_reach_every_rank_in_order(ranks):
    assert all(seen["objects"] == [{"rank": 0}, {"rank": 1}] for seen in ranks)
    assert all(seen["broadcast"] == "from 0" for seen in ranks)


def test_what_the_main_process_returns_or_raises_reaches_every_rank(ranks):
    assert all(seen["on_main"] == "done on 0" for seen in ranks)
    assert all(seen["on_main_error"] == "ConfigError: no such key" for seen in ranks)


def test_the_other_ranks_do_not_wait_for_a_main_process_that_failed(ranks):
    assert ranks[0]["on_main_crash"] == "OSError: [Errno 28] No space left on device"
    assert ranks[1]["on_main_crash"] == "RuntimeError: rank 0: OSError: [Errno 28] No space left on device"


def test_mean_over_ranks(ranks):
    assert all(seen["mean"].tolist() == [0.5, 4.0] for seen in ranks)


def test_gradients_are_averaged_with_zero_where_a_rank_has_none(ranks):
    for seen in ranks:
        assert seen["gradients"][0].tolist() == [1.5] * 3
        assert seen["gradients"][1].tolist() == [[1.0, 1.0], [1.0, 1.0]]


def test_modules_start_as_rank_0_has_them(ranks):
    expected = net(seed=0).state_dict()
    for seen in ranks:
        assert all(torch.equal(seen["module"][name], value) for name, value in expected.items())
        assert seen["module"]["statistics"].tolist() == [0.0, 0.0]


def test_rows_are_gathered_in_rank_order(ranks):
    expected = torch.tensor([0.0, 0.0, 1.0, 1.0]).unsqueeze(1).expand(4, 3)
    assert all(torch.equal(seen["gathered"], expected) for seen in ranks)


@pytest.mark.parametrize("what", ["loss", "gradient", "product"])
def test_a_contrastive_loss_over_ranks_equals_the_whole_batch_in_one_process(ranks, what):
    alone = contrastive(0, 1)[what]
    for seen in ranks:
        # other orders of summation in float64
        torch.testing.assert_close(seen["contrastive"][what], alone, rtol=1e-6, atol=1e-12)
    assert torch.equal(ranks[0]["contrastive"][what], ranks[1]["contrastive"][what])


def test_an_alternation_over_ranks_equals_the_whole_batch_in_one_process(ranks):
    alone = alternation(0, 1)
    for name, expected in alone.items():
        for seen in ranks:
            torch.testing.assert_close(seen["alternation"][name], expected, rtol=1e-6, atol=1e-10)
        assert torch.equal(ranks[0]["alternation"][name], ranks[1]["alternation"][name])


def test_a_loss_that_is_not_finite_on_one_rank_stops_all(ranks):
    assert all("lower level, step 0, rank 1: the loss is not finite (loss=nan)" in seen["non_finite"] for seen in ranks)


def test_the_ranks_share_the_stream_of_a_single_process(ranks):
    alone = torch.tensor(list(islice(TrainingSampler(17, 6, seed=3), 102))).view(17, 6)
    together = torch.cat([torch.tensor(seen["stream"]).view(17, 3) for seen in ranks], dim=1)
    assert torch.equal(together, alone)
    epochs = together.flatten().view(6, 17)  # 17 global batches of 6 are 6 epochs of 17
    assert all(sorted(epoch.tolist()) == list(range(17)) for epoch in epochs)


def test_a_loader_that_starts_at_a_step_continues_the_stream(ranks):
    alone = torch.tensor(list(islice(TrainingSampler(17, 6, seed=3), 30))).view(5, 6)
    assert torch.equal(torch.cat([seen["loaded"] for seen in ranks], dim=1), alone[2:])


def test_a_single_process_needs_no_process_group():
    x = torch.randn(3, 2, requires_grad=True)
    assert gather_with_gradient(x) is x and all_reduce_mean(x) is x
    assert (distributed.get_rank(), distributed.get_world_size(), distributed.is_main_process()) == (0, 1, True)
    assert all_gather_objects("a") == ["a"] and broadcast_object("a") == "a" and on_main_process(lambda: 3) == 3
    distributed.barrier()
    broadcast_module(nn.Linear(1, 1))
    with pytest.raises(ConfigError, match="no such key"):
        on_main_process(fail)


def test_flat_vectors_and_back():
    tensors = [torch.arange(6.0).view(2, 3), torch.tensor(7.0), torch.arange(4.0).view(2, 2).T]
    vector = flatten(tensors)
    assert vector.tolist() == [0, 1, 2, 3, 4, 5, 7, 0, 2, 1, 3]
    assert all(torch.equal(a, b) for a, b in zip(unflatten_like(vector, tensors), tensors, strict=True))
    with pytest.raises(RuntimeError):
        unflatten_like(vector[:-1], tensors)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
