"""Parameters and multiply-adds of the networks of a config, and the time and memory of its stages on this machine."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bissl_zoo.analysis.costs import (
    CURVATURE,
    LOWER,
    STEP,
    UPPER,
    Cost,
    KnownData,
    find_data,
    measure,
    random_batch,
    random_context,
)
from bissl_zoo.backbones import Backbone
from bissl_zoo.config import instantiate
from bissl_zoo.engine.build import Context, Weights, build_downstream, build_pretext
from bissl_zoo.engine.checks import check_config, open_config
from bissl_zoo.engine.init import load_init
from bissl_zoo.engine.launch import choose_device
from bissl_zoo.engine.resume import deterministic
from bissl_zoo.engine.stages import plan_stages
from bissl_zoo.engine.trainer import Stage
from bissl_zoo.errors import BisslZooError

#: batch size for counting a loss; batch norm in train mode needs two images
IMAGES = 2
_LEVELS = {"pretext": "lower loss", "train": "upper loss"}
_COUNTED = (
    "GMACs are 1e9 multiply-adds of convolutions, matrix products and attention (half of the FLOPs of "
    "torch.utils.flop_counter); other operators are not counted. The backbone is in eval mode, losses in train mode."
)
_MEASURED = (
    "Time and memory are those of one process on random images in memory, without reading and augmenting images, "
    "evaluations and checkpoints. N processes divide the batch. A trained network may need fewer products."
)


# ------------------------------------------------------------------------------------------------ counting


@dataclass
class Count:
    """Size and work of a part of a network for one image.

    Attributes:
        parameters, trained: number of parameters, and of those that require gradients.
        macs: multiply-adds of the forward pass.
    """

    parameters: int
    trained: int
    macs: float = 0.0


@dataclass
class StageCount:
    """A stage of the backbone, from the output of the previous stage to its feature map of shape `map` (C, H, W)."""

    name: str
    part: str
    map: tuple[int, ...]
    count: Count


@dataclass
class LossCount:
    """The loss of a level on one image.

    Attributes:
        inputs: shapes of the inputs of the backbone for a batch of two images.
        parts: counts of the shared trunk and of the rest.
        backward_macs: multiply-adds of the backward pass.
    """

    inputs: list[tuple[int, ...]]
    parts: dict[str, Count]
    total: Count
    backward_macs: float


def count_macs(function: Callable[[], Any]) -> tuple[dict[str, float], Any]:
    """Call a function and count its multiply-adds.

    Returns:
        Multiply-adds by module name below the module that is called first, with the sum under ""; the output of the
        function.
    """
    # the counter has no formula for the fused attention of the CPU
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        output = function()
    flops = {name: sum(by_operator.values()) for name, by_operator in counter.get_flop_counts().items()}
    macs = {name.partition(".")[2]: flops[name] / 2 for name in flops if name != "Global"}
    return {**macs, "": flops.get("Global", 0) / 2}, output


def count_module(module: nn.Module, inputs: Tensor) -> Count:
    """Count a module on a batch of one."""
    with torch.no_grad():
        macs, _ = count_macs(lambda: module(inputs))
    return Count(*_parameters(module), macs[""])


def count_stages(cfg: DictConfig, image: Tensor) -> tuple[list[StageCount], Count]:
    """Count every stage of the backbone, the layers after the last one, and the whole, in eval mode.

    Args:
        image: (1, 3, H, W).
    """
    whole = instantiate(cfg.backbone).eval()
    shared = whole.stages.index(cfg.bilevel.shared_stage or whole.stages[-1])
    total = count_module(whole.model, image)
    stages, before = [], Count(0, 0)
    for index, name in enumerate(whole.stages):
        model = copy.deepcopy(whole.model)
        model.prune_intermediate_layers([index], prune_norm=True, prune_head=True)  # as `Backbone.split`
        upto = Backbone(model, whole.name, [name], whole.model_args).eval()
        count = count_module(upto, image)
        with torch.no_grad():
            shape = tuple(upto(image)[name].shape[1:])
        stages.append(StageCount(name, "shared" if index <= shared else "tail", shape, _minus(count, before)))
        before = count
    rest = _minus(total, before)
    stages.append(StageCount("after the last", "tail", (whole.model.head_hidden_size,), rest))
    return stages, total


def count_losses(context: Context) -> dict[str, LossCount]:
    """Count the losses that the stages of the config train, in train mode, on the CPU, by data role."""
    counts = {}
    if "pretext" in context.data:
        counts["pretext"] = _count_loss(context, "pretext", *build_pretext(context.cfg, Weights(), context.device))
    if "train" in context.data:
        counts["train"] = _count_loss(context, "train", *build_downstream(context, Weights()))
    return counts


class _Loss(nn.Module):
    """The sum of the losses of a head."""

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, batch: Any) -> Tensor:
        return torch.stack(list(self.head.losses(self.backbone, batch).values())).sum()


def _count_loss(context: Context, role: str, backbone: Backbone, head: nn.Module) -> LossCount:
    loss, batch = _Loss(backbone, head), random_batch(context, role, head, IMAGES)
    inputs: list[tuple[int, ...]] = []
    handle = backbone.register_forward_pre_hook(lambda module, images: inputs.append(tuple(images[0].shape)))
    macs, value = count_macs(lambda: loss(batch))
    handle.remove()
    backward, _ = count_macs(value.backward)
    # a method may call modules of the backbone instead of the whole
    called = [name for name in macs if f"{name}.".startswith("backbone.")]
    outermost = [name for name in called if not any(name.startswith(f"{other}.") for other in called)]
    trunk = Count(*_parameters(backbone), sum(macs[name] for name in outermost) / IMAGES)
    inputs = inputs or [tuple(batch[0].shape)]
    total = Count(*_parameters(loss), macs[""] / IMAGES)
    parts = {"shared trunk": trunk, "head and loss": _minus(total, trunk)}
    return LossCount(inputs, parts, total, backward[""] / IMAGES)


def _minus(after: Count, before: Count) -> Count:
    parameters, trained = after.parameters - before.parameters, after.trained - before.trained
    return Count(parameters, trained, after.macs - before.macs)


def _parameters(module: nn.Module) -> tuple[int, int]:
    """Return the number of parameters, shared ones once, and of those that are trained."""
    parameters = list(module.parameters())
    return sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)


# ------------------------------------------------------------------------------------------------ analysis


@dataclass
class Duration:
    """A stage of the run; `steps` is None if they depend on the length of a missing data set."""

    phase: str
    steps: int | None
    seconds_per_step: float | None

    @property
    def seconds(self) -> float | None:
        """Seconds of the whole stage."""
        unknown = self.steps is None or self.seconds_per_step is None
        return None if unknown else self.steps * self.seconds_per_step


@dataclass
class Analysis:
    """The analysis of a config.

    Attributes:
        image: shape (C, H, W) of the image for the stages of the backbone, as the pretext loss passes it on.
        losses: by data role, `pretext` and `train`.
        costs: empty without timing.
    """

    config: str
    device: str
    image: tuple[int, ...]
    stages: list[StageCount]
    whole: Count
    losses: dict[str, LossCount]
    costs: list[Cost] = field(default_factory=list)
    durations: list[Duration] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def analyse(config_file: str, overrides: Sequence[str] = (), timing: bool = True) -> Analysis:
    """Count the networks of a config and measure its stages on this machine.

    Args:
        config_file: as `--config-file` takes it.
    Raises:
        BisslZooError: an invalid config, or parts of it that cannot be built.
    """
    cfg = open_config(config_file, overrides)
    check_config(cfg, config_file)
    device = choose_device(cfg.train.device)
    known = find_data(cfg)
    notes = [_COUNTED, *known.notes]
    try:
        initial = load_init(cfg.train.init, cfg)[0]  # a pretext head in it makes its warm-up unnecessary
    except BisslZooError as error:
        initial = Weights()
        notes.append(f"Random initial weights are assumed: {error}")
    context = random_context(cfg, known, torch.device("cpu"))
    losses = count_losses(context)
    image = next(iter(losses.values())).inputs[0][1:]
    stages, whole = count_stages(cfg, torch.zeros(1, *image))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    analysis = Analysis(config_file, f"{device}, {name}", image, stages, whole, losses, notes=notes)
    if timing:
        with deterministic(cfg.train.deterministic):
            analysis.costs = measure(random_context(cfg, known, device), initial)
        analysis.durations = [
            Duration(stage.name, _steps(stage, context, known), _seconds_per_step(stage, cfg, analysis.costs))
            for stage in plan_stages(context, initial)
        ]
        notes.append(_MEASURED)
        if any(cost.seconds is None for cost in analysis.costs):
            notes.append("Out of memory: set smaller dataloader.pretext.batch_size and dataloader.train.batch_size.")
    return analysis


def _steps(stage: Stage, context: Context, known: KnownData) -> int | None:
    unknown = stage.section and known.lengths[stage.epoch_role] is None
    if unknown and OmegaConf.select(context.cfg, stage.section).steps is None:
        return None
    return stage.steps(context)


def _seconds_per_step(stage: Stage, cfg: DictConfig, costs: Sequence[Cost]) -> float | None:
    """Return the seconds of a step of a stage, for BiSSL of an alternation; None if a part was not measured."""
    name = stage.section if stage.evaluates else stage.name  # the baseline takes as long as the fine-tuning
    parts = {STEP: 1}
    if stage.unit == "alternation":
        parts = {LOWER: cfg.bilevel.lower_steps, CURVATURE: 1, UPPER: cfg.bilevel.upper_steps}
    seconds = {cost.what: cost.seconds for cost in costs if cost.stage == name}
    if any(seconds.get(part) is None for part in parts):
        return None
    return sum(count * seconds[part] for part, count in parts.items())


# ------------------------------------------------------------------------------------------------ tables


def report(analysis: Analysis) -> str:
    """Format an analysis as tables."""
    headers = ["parameters", "trained", "GMACs"]
    rows = [[s.name, s.part, " x ".join(map(str, s.map)), *_numbers(s.count)] for s in analysis.stages]
    rows.append(["whole", "", "", *_numbers(analysis.whole)])
    size = " x ".join(map(str, analysis.image))
    parts = [
        f"config {analysis.config}\ndevice {analysis.device}",
        f"backbone, one image of {size}\n{_table(rows, ['stage', 'part', 'map', *headers], left=3)}",
    ]
    for role, loss in analysis.losses.items():
        rows = [[name, *_numbers(count)] for name, count in loss.parts.items()]
        rows += [["whole", *_numbers(loss.total)], ["backward pass", "", "", f"{loss.backward_macs / 1e9:.4g}"]]
        inputs = " and ".join(f"{s[0] / IMAGES:g} of {' x '.join(map(str, s[1:]))}" for s in loss.inputs)
        parts.append(f"{_LEVELS[role]}, one image: the backbone takes {inputs}\n{_table(rows, ['part', *headers])}")
    if analysis.costs:
        rows = []
        for cost in analysis.costs:
            speed = f"{cost.images / cost.seconds:.4g}" if cost.seconds else None
            peak = None if cost.peak is None else f"{cost.peak / 2**20:,.0f}"
            seconds = "out of memory" if cost.seconds is None else f"{cost.seconds:.4g}"
            products = None if cost.products is None else f"{cost.products:.3g}"
            rows.append([cost.stage, cost.what, cost.images, seconds, speed, products, peak])
        headers = ["stage", "what", "images", "seconds", "images/s", "products", "peak MiB"]
        parts.append(f"time and memory\n{_table(rows, headers, left=2)}")
        rows = []
        for item in analysis.durations:
            per_step = None if item.seconds_per_step is None else f"{item.seconds_per_step:.4g}"
            rows.append([item.phase, item.steps, per_step, _hours(item.seconds)])
        seconds = [item.seconds for item in analysis.durations]
        rows.append(["whole", None, None, _hours(None if None in seconds else sum(seconds))])
        parts.append(f"duration on this machine\n{_table(rows, ['stage', 'steps', 's/step', 'h:mm:ss'])}")
    parts.append("\n".join(f"note: {note}" for note in analysis.notes))
    return "\n\n".join(parts)


def _numbers(count: Count) -> list[str]:
    return [f"{count.parameters:,}", f"{count.trained:,}", f"{count.macs / 1e9:.4g}"]


def _hours(seconds: float | None) -> str:
    return "unknown" if seconds is None else str(timedelta(seconds=round(seconds)))


def _table(rows: list[list[Any]], headers: list[str], left: int = 1) -> str:
    align = ["left"] * left + ["right"] * (len(headers) - left)
    return tabulate(rows, headers, disable_numparse=True, colalign=align)
