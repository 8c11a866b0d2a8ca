import random
from itertools import islice

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from bissl_zoo.data import loaders
from bissl_zoo.data.loaders import TrainingSampler, build_test_loader, build_train_loader
from bissl_zoo.data.samples import first_samples, to_device
from bissl_zoo.errors import ConfigError


class Numbers(Dataset):
    """Items `(i, -i)`."""

    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        return index, -index


def first(image, target):
    return image


def pair(image, target):
    return image, target


def draw(sampler, count):
    return list(islice(sampler, count))


def as_rank(monkeypatch, rank, world):
    monkeypatch.setattr(loaders, "get_rank", lambda: rank)
    monkeypatch.setattr(loaders, "get_world_size", lambda: world)


def test_every_epoch_is_another_permutation_of_all_samples():
    drawn = draw(TrainingSampler(10, 4, seed=3), 40)
    epochs = [drawn[i : i + 10] for i in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


@pytest.mark.parametrize("world", [2, 3, 6])
def test_the_global_batches_do_not_depend_on_the_number_of_ranks(monkeypatch, world):
    steps, batch = 7, 12
    alone = torch.tensor(draw(TrainingSampler(17, batch, seed=0), steps * batch)).view(steps, batch)
    shards = []
    for rank in range(world):
        as_rank(monkeypatch, rank, world)
        shards.append(torch.tensor(draw(TrainingSampler(17, batch, seed=0), steps * batch // world)).view(steps, -1))
    assert torch.equal(torch.cat(shards, dim=1), alone)


def test_start_step_continues_the_stream(monkeypatch):
    as_rank(monkeypatch, 1, 2)
    whole = draw(TrainingSampler(17, 6, seed=0), 60)
    assert draw(TrainingSampler(17, 6, seed=0, start_step=11), 27) == whole[33:]


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_train_loader_is_endless_and_transforms(workers):
    loader = build_train_loader(Numbers(6), 4, first, num_workers=workers, seed=5)
    batches = list(islice(loader, 6))
    assert all(batch.shape == (4,) for batch in batches)
    assert torch.cat(batches).tolist() == draw(TrainingSampler(6, 4, seed=5), 24)


@pytest.mark.parametrize(("world", "batch"), [(3, 4), (1, 0)])
def test_a_batch_that_does_not_divide_among_the_ranks_is_refused(monkeypatch, world, batch):
    as_rank(monkeypatch, 0, world)
    with pytest.raises(ConfigError, match=f"batch_size={batch} is the batch over all ranks"):
        build_train_loader(Numbers(6), batch, first)


@pytest.mark.parametrize(("size", "world"), [(10, 1), (10, 3), (2, 4)])
def test_test_loader_reads_every_sample_once_over_all_ranks(monkeypatch, size, world):
    seen = []
    for rank in range(world):
        as_rank(monkeypatch, rank, world)
        for batch in build_test_loader(Numbers(size), 3, first):
            assert len(batch) <= 3
            seen += batch.tolist()
    assert sorted(seen) == list(range(size))


def noise(image, target):
    """Return draws of the three generators."""
    return image, random.random(), np.random.rand(), torch.rand(()).item()


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_random_draws_for_a_sample_depend_only_on_its_place_in_the_stream(workers):
    def batches(start, count, num_workers=workers, seed=5):
        loader = build_train_loader(Numbers(6), 4, noise, num_workers=num_workers, seed=seed, start_step=start)
        return [torch.stack([part.double() for part in batch]) for batch in islice(loader, count)]

    whole = torch.stack(batches(0, 5, num_workers=0))
    assert torch.equal(torch.stack(batches(3, 2)), whole[3:])
    assert not torch.isclose(torch.stack(batches(0, 1, seed=6))[0, 1:], whole[0, 1:]).any()
    assert len(whole[:, 1].flatten().unique()) == len(whole[:, 3].flatten().unique()) == 20  # every draw is another


def test_the_ranks_draw_what_one_process_draws(monkeypatch):
    alone = list(islice(build_train_loader(Numbers(6), 4, noise), 3))
    parts = []
    for rank in range(2):
        as_rank(monkeypatch, rank, 2)
        parts.append(list(islice(build_train_loader(Numbers(6), 4, noise), 3)))
    for whole, *halves in zip(alone, *parts, strict=True):
        assert all(torch.equal(torch.cat(pair), one) for one, *pair in zip(whole, *halves, strict=True))


def test_drawing_for_a_sample_leaves_the_random_states_alone():
    def draws():
        return random.random(), np.random.rand(), torch.rand(()).item()

    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(0)
    expected = draws()
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(0)
    next(iter(build_train_loader(Numbers(6), 4, noise)))
    assert draws() == expected


def test_to_device_keeps_the_nesting():
    batch = ([torch.zeros(1)], ({"boxes": torch.ones(2), "image_id": 3},))
    moved = to_device(batch, torch.device("meta"))
    assert moved[0][0].is_meta and moved[1][0]["boxes"].is_meta and moved[1][0]["image_id"] == 3
    assert isinstance(moved, tuple) and isinstance(moved[0], list)


def test_first_samples_cuts_every_tensor():
    cut = first_samples({"a": [torch.arange(5)], "b": (torch.arange(5), torch.arange(5))}, 2)
    assert cut["a"][0].tolist() == [0, 1] and [t.tolist() for t in cut["b"]] == [[0, 1]] * 2
