"""Batches of any nesting: tensors in lists, tuples and dicts."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def map_tensors(function: Callable[[Tensor], Any], batch: Any) -> Any:
    """`batch` with `function` applied to each tensor in it; what is no tensor stays."""
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, dict):
        return {key: map_tensors(function, value) for key, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        return type(batch)(map_tensors(function, value) for value in batch)
    return batch


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch with its tensors on `device`."""
    return map_tensors(lambda tensor: tensor.to(device, non_blocking=True), batch)


def split_samples(batch: Any, parts: int) -> list[Any]:
    """A batch whose tensors are `(B, ...)` as `parts` batches of B / parts samples, in order; as it is for one part."""
    if parts == 1:
        return [batch]

    def part(number: int) -> Any:
        return map_tensors(lambda tensor: tensor.tensor_split(parts)[number], batch)

    return [part(number) for number in range(parts)]


def first_samples(batch: Any, count: int) -> Any:
    """The first `count` samples of a batch whose tensors are `(B, ...)`, such as the views of a pretext method."""
    return map_tensors(lambda tensor: tensor[:count], batch)
