"""Parameters, FLOPs and activations of the networks of a config, stage by stage and part by part, as fvcore counts."""

import copy
import math
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from bissl_zoo.analysis.data import noise_batch
from bissl_zoo.backbones import Backbone
from bissl_zoo.config import instantiate
from bissl_zoo.engine.build import Context, Weights, build_downstream, build_pretext

with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)  # it has losses of its own scripted, which torch calls deprecated
    from fvcore.nn import ActivationCountAnalysis, FlopCountAnalysis, parameter_count
    from fvcore.nn.jit_handles import get_shape

#: images of the batch that a loss is counted on: batch norm in train mode takes two
IMAGES = 2
_NUMBERS = ("parameters", "trained", "flops", "activations")
#: what tracing foreign code is known to raise
_TRACE_ERRORS = (RuntimeError, TypeError, ValueError, AttributeError, LookupError)


@dataclass
class Count:
    """What a part of a network has and does for one image.

    Attributes:
        flops: of the forward pass, a multiplication with its addition counting as one; None where it does not trace.
        activations: numbers that convolutions and matrix products put out; likewise.
        uncounted: operators that do something fvcore has no count for, with their numbers of calls.
        problem: why it does not trace.
    """

    parameters: int
    trained: int
    flops: float | None = None
    activations: float | None = None
    uncounted: dict[str, int] = field(default_factory=dict)
    problem: str = ""


@dataclass
class StageCount:
    """A stage of the backbone: what comes after the stage before it, up to its map."""

    name: str
    part: str
    map: tuple[int, ...]
    count: Count


@dataclass
class LossCount:
    """The loss of a level on one image.

    Attributes:
        inputs: shapes that the backbone is called with for two images, once for each.
        parts: of the network, the shared trunk first; `loss itself` is what belongs to no module of the head.
    """

    inputs: list[tuple[int, ...]]
    parts: dict[str, Count]
    total: Count


class _Loss(nn.Module):
    """The loss of a head on a backbone and a batch that is at hand, as a module to be traced."""

    def __init__(self, backbone: nn.Module, head: nn.Module, batch: Any) -> None:
        super().__init__()
        self.backbone, self.head, self.batch = backbone, head, batch

    def forward(self, nothing: Tensor) -> Tensor:
        return torch.stack(list(self.head.losses(self.backbone, self.batch).values())).sum()


class _Map(nn.Module):
    """The map of a backbone's last stage."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> Tensor:
        return self.backbone(images)[self.backbone.out_features[-1]]


def count_module(module: nn.Module, inputs: Tensor) -> Count:
    """Count a module on a batch of one."""
    count = Count(*_parameters(module))
    try:
        flops, activations = _analyses(module, inputs)
        count.flops, count.activations = flops.total(), activations.total()
        count.uncounted = dict(flops.unsupported_ops().most_common())
    except _TRACE_ERRORS as error:
        count.problem = _told(error)
    return count


def count_stages(cfg: DictConfig, image: Tensor) -> tuple[list[StageCount], Count]:
    """Every stage of the config's backbone and what follows the last one, and the whole; eval mode.

    Args:
        image: `(1, 3, H, W)`.
    """
    whole = instantiate(cfg.backbone).eval()
    shared = whole.stages.index(cfg.bilevel.shared_stage or whole.stages[-1])
    total = count_module(whole.model, image)
    stages, before = [], Count(0, 0, 0.0, 0.0)
    for index, name in enumerate(whole.stages):
        reached = _up_to(whole, index)
        upto = count_module(reached, image)
        with torch.no_grad():
            size = tuple(reached(image).shape[1:])
        stages.append(StageCount(name, "shared" if index <= shared else "tail", size, _minus(upto, before)))
        before = upto
    rest = _minus(total, before)
    stages.append(StageCount("after the last", "tail", (whole.model.head_hidden_size,), rest))
    return stages, total


def count_losses(context: Context) -> dict[str, LossCount]:
    """The losses of the levels that the config's stages train, in train mode, on the CPU, by data role."""
    found = {}
    if "pretext" in context.data:
        found["pretext"] = _count_loss(context, "pretext", *build_pretext(context.cfg, Weights(), context.device))
    if "train" in context.data:
        found["train"] = _count_loss(context, "train", *build_downstream(context, Weights()))
    return found


def _count_loss(context: Context, role: str, backbone: Backbone, head: nn.Module) -> LossCount:
    loss = _Loss(backbone, head, noise_batch(context, role, head, IMAGES))
    inputs = _inputs(loss)
    parameters = {"shared trunk": _parameters(backbone)}
    parameters |= {name: _parameters(child) for name, child in head.named_children()}
    loose = list(head.parameters(recurse=False))
    if loose:
        parameters["of the head itself"] = _numbers(loose)
    counts = {name: Count(*numbers) for name, numbers in parameters.items()}
    total = Count(*_parameters(loss))
    try:
        flops, activations = _analyses(loss, torch.zeros(1))
        for attribute, analysis in (("flops", flops), ("activations", activations)):
            _share_out(counts, total, attribute, analysis.by_module())
        total.uncounted = dict(flops.unsupported_ops().most_common())
    except _TRACE_ERRORS as error:
        total.problem = _told(error)
    parts = {name: count for name, count in counts.items() if count.parameters or count.flops or count.activations}
    return LossCount(inputs, parts, total)


def _inputs(loss: _Loss) -> list[tuple[int, ...]]:
    """The shapes of the images that the backbone is called with, in order, after what the head does to them."""
    seen: list[tuple[int, ...]] = []
    handle = loss.backbone.register_forward_pre_hook(lambda module, images: seen.append(tuple(images[0].shape)))
    try:
        with torch.no_grad():
            loss(torch.zeros(1))
    finally:
        handle.remove()
    return seen


def _share_out(counts: dict[str, Count], total: Count, attribute: str, by_module: Counter[str]) -> None:
    """Enter the numbers of one image by part; what belongs to no child is the loss itself."""
    setattr(total, attribute, by_module[""] / IMAGES)
    rest = by_module[""]
    for name, count in counts.items():
        number = by_module["backbone" if name == "shared trunk" else f"head.{name}"]
        setattr(count, attribute, number / IMAGES)
        rest -= number
    if rest:
        setattr(counts.setdefault("loss itself", Count(0, 0, 0.0, 0.0)), attribute, rest / IMAGES)


def _analyses(module: nn.Module, inputs: Tensor) -> tuple[FlopCountAnalysis, ActivationCountAnalysis]:
    flops, activations = FlopCountAnalysis(module, inputs), ActivationCountAnalysis(module, inputs)
    flops.set_op_handle("aten::scaled_dot_product_attention", _attention_flops)
    activations.set_op_handle("aten::scaled_dot_product_attention", _attention_activations)
    for analysis in (flops, activations):
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
    return flops, activations


def _attention_flops(inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
    """Of `softmax(q k^T) v` with q `(..., L, E)`, k `(..., S, E)` and v `(..., S, V)`: the two matrix products."""
    *batch, length, width = get_shape(inputs[0])
    keys, values = get_shape(inputs[1])[-2], get_shape(inputs[2])[-1]
    return math.prod(batch) * length * keys * (width + values)


def _attention_activations(inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
    *batch, length, _ = get_shape(inputs[0])
    return math.prod(batch) * length * (get_shape(inputs[1])[-2] + get_shape(inputs[2])[-1])


def _up_to(whole: Backbone, index: int) -> nn.Module:
    """The part of a backbone that runs up to a stage, as :meth:`Backbone.split` cuts it."""
    model = copy.deepcopy(whole.model)
    model.prune_intermediate_layers([index], prune_norm=True, prune_head=True)
    return _Map(Backbone(model, whole.name, [whole.stages[index]], whole.model_args)).eval()


def _minus(after: Count, before: Count) -> Count:
    uncounted = {name: number - before.uncounted.get(name, 0) for name, number in after.uncounted.items()}
    numbers = [
        None if None in (a, b) else a - b
        for a, b in ((getattr(after, name), getattr(before, name)) for name in _NUMBERS)
    ]
    return Count(*numbers, {name: number for name, number in uncounted.items() if number}, after.problem)


def _told(error: Exception) -> str:
    return f"it does not trace ({type(error).__name__}: {str(error).partition(chr(10))[0]})"


def _parameters(module: nn.Module) -> tuple[int, int]:
    """How many there are, shared ones once, and how many of them are trained."""
    trained = {id(p): p.numel() for p in module.parameters() if p.requires_grad}
    return parameter_count(module)[""], sum(trained.values())


def _numbers(parameters: Sequence[Tensor]) -> tuple[int, int]:
    return sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)
