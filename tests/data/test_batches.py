"""Batches of any nesting."""

import torch

from bissl_zoo.data.batches import first_samples, to_device


def test_to_device_keeps_the_nesting():
    batch = ([torch.zeros(1)], ({"boxes": torch.ones(2), "image_id": 3},))
    moved = to_device(batch, torch.device("meta"))
    assert moved[0][0].is_meta and moved[1][0]["boxes"].is_meta and moved[1][0]["image_id"] == 3
    assert isinstance(moved, tuple) and isinstance(moved[0], list)


def test_first_samples_cuts_every_tensor():
    cut = first_samples({"a": [torch.arange(5)], "b": (torch.arange(5), torch.arange(5))}, 2)
    assert cut["a"][0].tolist() == [0, 1] and [t.tolist() for t in cut["b"]] == [[0, 1]] * 2
