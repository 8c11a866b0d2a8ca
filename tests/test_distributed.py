"""Collectives, loaders and evaluators in two processes over gloo."""

from itertools import islice

import pytest
import torch
from ranks import on_ranks
from torch import nn

from bissl_zoo import distributed
from bissl_zoo.data.loaders import TrainingSampler, build_test_loader, build_train_loader
from bissl_zoo.distributed import (
    all_gather_objects,
    all_reduce_mean,
    any_rank,
    average_gradients,
    broadcast_module,
    broadcast_object,
    flatten,
    gather_with_gradient,
    on_main_process,
    unflatten_like,
)
from bissl_zoo.engine.resume import seed_rank
from bissl_zoo.errors import BisslZooError, ConfigError
from bissl_zoo.evaluation import DetectionEvaluator, MultilabelEvaluator, TopKEvaluator

WORLD = 2
WORKERS = (0, 2)
TEST_SETS = (7, 1)  # shards of 4 and 3 samples, and of 1 and none


def net(seed=0, widths=(5, 6, 4)):
    """A smooth network without batch statistics, so that a batch may be cut into parts."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(*widths[:2]), nn.Tanh(), nn.Linear(*widths[1:])).double()


def mixture(everything, mine, rank):
    """A smooth loss of one rank, of the gathered rows and its own."""
    weights = torch.linspace(-1, 1, everything.numel(), dtype=torch.float64).view_as(everything) + rank
    return (everything * weights).tanh().sum() * mine.square().sum()


def three_derivatives(loss, x, u):
    """The gradient, its derivative along `u`, and the derivative of that along `u` once more."""
    gradient = torch.autograd.grad(loss, x, create_graph=True)[0]
    second = torch.autograd.grad(gradient, x, u, create_graph=True)[0]
    third = torch.autograd.grad(second, x, u)[0]
    return [gradient.detach(), second.detach(), third]


def point_and_direction():
    return torch.randn(2, 2 * WORLD, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def derivatives_over_ranks(rank, world):
    x, u = (tensor.chunk(world)[rank] for tensor in point_and_direction())
    x = x.clone().requires_grad_()
    return three_derivatives(mixture(gather_with_gradient(x), x, rank), x, u)


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
    def __init__(self, size=17):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        return index, None


def image_only(image, target):
    return image


def image_and_draw(image, target):
    """The number of the sample, and a random one as an augmentation would draw it."""
    return torch.tensor([image, torch.rand((), dtype=torch.float64)])


def augmented(workers):
    """Six epochs of 17 samples in 17 steps of 6 over all ranks: what each sample is and drew."""
    seed_rank(0)  # as every stage does before it trains
    loader = build_train_loader(Numbers(), 6, image_and_draw, num_workers=workers, seed=3)
    return torch.cat(list(islice(loader, 17)))


def evaluated(size):
    """Metrics and confusion of a fixed random classifier and detector over a test set of `size` samples."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randint(0, 4, (size, 3), generator=generator) / 4  # with ties within and between samples
    labels = torch.randint(0, 3, (size,), generator=generator)
    multi = torch.randint(-1, 2, (size, 3), generator=generator)
    multi[0] = 1
    boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0], [20.0, 20.0, 30.0, 30.0]]).repeat(size, 1, 1)
    detected = boxes + 4 * torch.rand(size, 2, 4, generator=generator)
    scores = torch.randint(1, 4, (size, 2), generator=generator) / 4
    evaluators = TopKEvaluator("abc"), MultilabelEvaluator("abc"), DetectionEvaluator(["a", "b"])
    top_k, multilabel, detection = evaluators
    for batch in build_test_loader(Numbers(size), 2, image_only):
        top_k.process(logits[batch], labels[batch])
        multilabel.process(logits[batch], multi[batch])
        for image in batch.tolist():
            truth = {"boxes": boxes[image], "labels": [0, 1], "difficult": [False, False], "image_id": image}
            detection.process([{"boxes": detected[image], "scores": scores[image], "labels": [0, 1]}], [truth])
    results = {}
    for evaluator in evaluators:
        evaluator.synchronize()
        results |= evaluator.evaluate()
    return results | {"confusion": top_k.confusion().tolist()}


def work(rank, world):
    """Return the results of one rank that the tests inspect."""
    model = net(seed=rank)
    model.register_buffer("statistics", torch.full((2,), float(rank)))
    broadcast_module(model)
    gathered = gather_with_gradient(torch.full((2, 3), float(rank)))
    loader = build_train_loader(Numbers(), 6, image_only, seed=3, start_step=2)
    return {
        "rank": (distributed.get_rank(), distributed.get_world_size(), distributed.is_main_process()),
        "objects": all_gather_objects({"rank": rank}),
        "any": [any_rank(False), any_rank(rank == 1), any_rank(True)],
        "broadcast": broadcast_object(f"from {rank}"),
        "on_main": refused(lambda: f"done on {rank}"),
        "on_main_error": refused(fail),
        "on_main_crash": refused(disk_full),
        "mean": all_reduce_mean(torch.tensor([float(rank), 4.0])),
        "gradients": uneven_gradients(rank),
        "module": {name: tensor for name, tensor in model.state_dict().items()},
        "gathered": gathered,
        "derivatives": derivatives_over_ranks(rank, world),
        "stream": list(islice(TrainingSampler(17, 6, seed=3), 51)),
        "loaded": torch.stack(list(islice(loader, 3))),
        "augmented": {workers: augmented(workers) for workers in WORKERS},
        "evaluated": {size: evaluated(size) for size in TEST_SETS},
    }


@pytest.fixture(scope="module", params=[pytest.param(WORLD, marks=pytest.mark.slow)])
def ranks(tmp_path_factory):
    """Return the results of each of two processes."""
    return on_ranks(work, [WORLD], tmp_path_factory.mktemp("ranks"))[WORLD]


def test_collectives_reach_every_rank(ranks):
    assert [seen["rank"] for seen in ranks] == [(0, 2, True), (1, 2, False)]
    expected, rows = net(seed=0).state_dict(), torch.tensor([0.0, 0.0, 1.0, 1.0]).unsqueeze(1).expand(4, 3)
    for seen in ranks:
        assert seen["objects"] == [{"rank": 0}, {"rank": 1}] and seen["broadcast"] == "from 0"
        assert seen["on_main"] == "done on 0" and seen["on_main_error"] == "ConfigError: no such key"
        assert seen["any"] == [False, True, True] and seen["mean"].tolist() == [0.5, 4.0]
        # a missing gradient counts as zero in the average
        assert [grad.tolist() for grad in seen["gradients"]] == [[1.5] * 3, [[1.0, 1.0], [1.0, 1.0]]]
        assert all(torch.equal(seen["module"][name], value) for name, value in expected.items())
        assert seen["module"]["statistics"].tolist() == [0.0, 0.0]
        assert torch.equal(seen["gathered"], rows)


def test_the_other_ranks_do_not_wait_for_a_main_process_that_failed(ranks):
    assert ranks[0]["on_main_crash"] == "OSError: [Errno 28] No space left on device"
    assert ranks[1]["on_main_crash"] == "RuntimeError: rank 0: OSError: [Errno 28] No space left on device"


def test_the_gather_has_three_derivatives(ranks):
    whole, u = point_and_direction()
    whole.requires_grad_()
    # what each rank's loss sends to a row adds up, so in one process it is the gradient of the sum of the losses
    total = sum(mixture(whole, mine, rank) for rank, mine in enumerate(whole.chunk(WORLD)))
    for order, expected in enumerate(three_derivatives(total, whole, u)):
        together = torch.cat([seen["derivatives"][order] for seen in ranks])
        # other orders of summation in float64
        torch.testing.assert_close(together, expected, rtol=1e-10, atol=1e-12)


def test_the_ranks_share_the_stream_of_a_single_process(ranks):
    alone = torch.tensor(list(islice(TrainingSampler(17, 6, seed=3), 102))).view(17, 6)
    together = torch.cat([torch.tensor(seen["stream"]).view(17, 3) for seen in ranks], dim=1)
    assert torch.equal(together, alone)
    epochs = together.flatten().view(6, 17)  # 17 global batches of 6 are 6 epochs of 17
    assert all(sorted(epoch.tolist()) == list(range(17)) for epoch in epochs)


def test_a_loader_that_starts_at_a_step_continues_the_stream(ranks):
    alone = torch.tensor(list(islice(TrainingSampler(17, 6, seed=3), 30))).view(5, 6)
    assert torch.equal(torch.cat([seen["loaded"] for seen in ranks], dim=1), alone[2:])


@pytest.mark.parametrize("workers", WORKERS)
def test_every_rank_has_another_random_stream_for_augmentation(ranks, workers):
    numbers, draws = torch.stack([seen["augmented"][workers] for seen in ranks]).unbind(dim=2)  # each (ranks, 51)
    in_order = numbers.view(WORLD, 17, 3).transpose(0, 1).flatten()
    assert all(sorted(epoch.tolist()) == list(range(17)) for epoch in in_order.view(6, 17))
    assert len(draws.unique()) == draws.numel() == 102


@pytest.mark.parametrize("size", TEST_SETS)
def test_metrics_and_rankings_over_ranks_equal_those_of_one_process(ranks, size):
    alone = evaluated(size)
    assert {"top1", "mean_per_class", "mAP11", "AP", "voc_AP50"} <= alone.keys()
    assert all(seen["evaluated"][size] == alone for seen in ranks)


def test_a_single_process_needs_no_process_group():
    x = torch.randn(3, 2, requires_grad=True)
    assert gather_with_gradient(x) is x and all_reduce_mean(x) is x
    assert (distributed.get_rank(), distributed.get_world_size(), distributed.is_main_process()) == (0, 1, True)
    assert all_gather_objects("a") == ["a"] and broadcast_object("a") == "a" and on_main_process(lambda: 3) == 3
    assert any_rank(True) is True and any_rank(False) is False
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
