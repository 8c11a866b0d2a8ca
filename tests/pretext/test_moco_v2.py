import functools
import math

import pytest
import torch
from pretext_methods import build_method, draw
from torch.nn.functional import normalize

from bissl_zoo.hypergradient import CurvatureOperator
from bissl_zoo.pretext.moco_v2 import info_nce

build = functools.partial(build_method, "moco_v2", projector=[16, 8], queue_length=10)


def unit(*shape, seed=0):
    return normalize(draw(*shape, seed=seed), dim=1)


def views(size=4, seed=0):
    return tuple(torch.randn(2, size, 3, 32, 32, generator=torch.Generator().manual_seed(seed)))


def keys_of(moco, images):
    """What the teacher makes of images, by itself."""
    t = moco.teacher
    with torch.no_grad():
        return normalize(t["projector"](t["tail"](t["backbone"](images)["c3"])), dim=1)


def step(moco, trunk, seed, size=4):
    """A loss and what follows it; returns the keys that belong to it."""
    batch = views(size, seed)
    keys = keys_of(moco, batch[1])
    moco.losses(trunk, batch)
    moco.after_step(trunk)
    return keys


def test_loss_is_the_papers_formula():
    query, key, queue = (unit(n, 4, seed=seed) for seed, n in enumerate((3, 3, 5)))
    total = 0.0
    for q, k in zip(query.tolist(), key.tolist(), strict=True):
        similar = [math.exp(sum(a * b for a, b in zip(q, other, strict=True)) / 0.3) for other in [k, *queue.tolist()]]
        total -= math.log(similar[0] / sum(similar))
    assert info_nce(query, key, queue, 0.3).item() == pytest.approx(total / 3, rel=1e-12)


def test_queries_of_the_first_view_look_for_keys_of_the_second():
    trunk, moco = build(temperature=0.3)
    first, second = views()
    query = normalize(moco.projector(moco.tail(trunk(first)["c3"])), dim=1)
    expected = info_nce(query, keys_of(moco, second), moco.queue, 0.3)
    torch.testing.assert_close(moco.losses(trunk, (first, second))["info_nce"], expected)


def test_the_oldest_keys_make_room_and_the_queue_wraps():
    trunk, moco = build()
    start = moco.queue.clone()
    batches = [step(moco, trunk, seed) for seed in range(3)]  # 12 keys into 10 places
    for places, keys in (
        ([4, 5, 6, 7], batches[1]),
        ([8, 9, 0, 1], batches[2]),
        ([2, 3], batches[0][2:]),
    ):
        torch.testing.assert_close(moco.queue[places], keys)
    assert moco.position == 2 and not torch.isclose(moco.queue, start).all(dim=1).any()


def test_of_a_batch_longer_than_the_queue_the_newest_keys_stay():
    trunk, moco = build(queue_length=3)
    keys = step(moco, trunk, 0, size=8)
    torch.testing.assert_close(moco.queue[[(5 + n) % 3 for n in range(3)]], keys[-3:])
    assert moco.position == 8 % 3


def test_keys_of_a_solve_never_enter_the_queue():
    trunk, moco = build()
    kept = moco.queue.clone()
    parameters = list(trunk.parameters())
    operator = CurvatureOperator(lambda: moco.losses(trunk, views(seed=7))["info_nce"], parameters, 1.0, (trunk, moco))
    operator.prepare()(torch.ones(sum(p.numel() for p in parameters)))
    operator.release()
    assert torch.equal(moco.queue, kept)
    keys = step(moco, trunk, 1)
    torch.testing.assert_close(moco.queue[:4], keys)
    assert torch.equal(moco.queue[4:], kept[4:]) and moco.position == 4
    moco.after_step(trunk)  # without a loss before it there are no keys
    assert moco.position == 4
