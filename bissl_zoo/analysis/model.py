"""What a config's networks have and do, and what its stages cost on this machine; no data set need be there."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from tabulate import tabulate

from bissl_zoo.analysis.costs import (
    CURVATURE,
    KILLED,
    LOWER,
    OUT_OF_MEMORY,
    PRODUCT,
    STEP,
    UPPER,
    Cost,
    measure_in_a_process,
)
from bissl_zoo.analysis.counts import IMAGES, Count, LossCount, StageCount, count_losses, count_stages
from bissl_zoo.analysis.data import KnownData, look_at_data, noise_context
from bissl_zoo.engine.build import Context, Weights
from bissl_zoo.engine.checks import check_config, open_config
from bissl_zoo.engine.init import load_init
from bissl_zoo.engine.launch import choose_device
from bissl_zoo.engine.stages import alternates, plan_stages
from bissl_zoo.engine.trainer import Stage
from bissl_zoo.errors import BisslZooError, ConfigError

_LEVELS = {"pretext": "lower loss", "train": "upper loss"}
_FIGURES = ["parameters", "trained", "GFLOPs", "M activations"]
_COUNTED = (
    "FLOPs are those of the forward pass, a multiplication with its addition counting as one; activations are what "
    "convolutions and matrix products put out; the backbone alone is counted in eval mode, losses in train mode."
)
_LEFT_OUT = (
    "Measured in one process on batches of noise that are at hand: reading and augmenting images, evaluations and "
    "checkpoints are left out. N processes share a batch."
)
_PRODUCTS = (
    "An upper step takes as many products with the Hessian as the solver asks for at random weights, which is nearly "
    "all that it may; a trained run may need fewer."
)


@dataclass
class Duration:
    """A phase of the run; `steps` is None where epochs of an unknown number of images give them."""

    phase: str
    steps: int | None
    seconds_per_step: float | None

    @property
    def seconds(self) -> float | None:
        """Of the whole phase."""
        unknown = self.steps is None or self.seconds_per_step is None
        return None if unknown else self.steps * self.seconds_per_step


@dataclass
class Analysis:
    """Everything that is found out of a config.

    Attributes:
        image: shape of the image that the stages are counted on, as the pretext loss hands it to the backbone.
        losses: by data role, `pretext` and `train`.
        costs: nothing where no time was taken.
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


def analyse(config_file: str, overrides: Sequence[str] = (), timing: bool = True, scale: float = 1.0) -> Analysis:
    """Count what the networks of a config have and do, and measure what its stages cost here.

    Args:
        config_file: as `--config-file` takes it.
        scale: factor on the batches that are measured; their seconds are stretched to the config's own.
    Raises:
        BisslZooError: a config that is wrong, or parts of it that cannot be built.
    """
    if not 0 < scale <= 1:
        raise ConfigError(f"The scale of the batches is {scale:g}; it must be above 0 and at most 1.")
    cfg = open_config(config_file, overrides)
    check_config(cfg, config_file)
    device = choose_device(cfg.train.device)
    known = look_at_data(cfg)
    initial, told = _what_it_starts_from(cfg)
    context = noise_context(cfg, known, torch.device("cpu"))
    losses = count_losses(context)
    image = next(iter(losses.values())).inputs[0][1:]
    stages, whole = count_stages(cfg, torch.zeros(1, *image))
    found = Analysis(config_file, _describe(device), image, stages, whole, losses, notes=[*known.notes, *told])
    if timing:
        found.costs = measure_in_a_process(config_file, overrides, scale, known, initial)
        found.durations = [
            Duration(stage.name, _steps(stage, context, known), _seconds_per_step(stage, cfg, found.costs))
            for stage in plan_stages(context, initial)
        ]
        found.notes += _on_measuring(cfg, found.costs, scale)
    return found


def _what_it_starts_from(cfg: DictConfig) -> tuple[Weights, list[str]]:
    """The weights of `train.init`, whose pretext head spares the run a warm-up, and what to tell of them."""
    try:
        return load_init(cfg.train.init, cfg)[0], []
    except BisslZooError as error:
        return Weights(), [f"It was taken to start from random weights: {error}"]


def _describe(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{device}, {torch.cuda.get_device_name(device)}"
    return f"{device}, {torch.get_num_threads()} threads"


def _steps(stage: Stage, context: Context, known: KnownData) -> int | None:
    unknown = stage.section and known.lengths[stage.epoch_role] is None
    if unknown and OmegaConf.select(context.cfg, stage.section).steps is None:
        return None
    return stage.steps(context)


def _seconds_per_step(stage: Stage, cfg: DictConfig, costs: Sequence[Cost]) -> float | None:
    """With the config's own batches, each cost growing with its images; of the BiSSL stage those of an alternation."""
    name = stage.section if stage.evaluates else stage.name  # the baseline takes as long as the fine-tuning
    of_stage = {cost.what: cost for cost in costs if cost.stage == name and cost.seconds is not None}
    wanted = (LOWER, CURVATURE, PRODUCT, UPPER) if stage.unit == "alternation" else (STEP,)
    if any(what not in of_stage for what in wanted):
        return None
    if stage.unit != "alternation":
        cost = of_stage[STEP]
        return cost.seconds * cfg.dataloader[stage.epoch_role].batch_size / cost.images
    lower, curvature, product, upper = (of_stage[what] for what in wanted)
    pretext, train = cfg.dataloader.pretext.batch_size, cfg.dataloader.train.batch_size
    stretch = min(cfg.bilevel.curvature_batch_size or pretext, pretext) / product.images
    products = min(upper.products * product.seconds, upper.seconds)
    upper_step = products * stretch + (upper.seconds - products) * train / upper.images
    lower_step = lower.seconds * pretext / lower.images
    return cfg.bilevel.lower_steps * lower_step + curvature.seconds * stretch + cfg.bilevel.upper_steps * upper_step


def _on_measuring(cfg: DictConfig, costs: Sequence[Cost], scale: float) -> list[str]:
    notes = [_LEFT_OUT]
    if any(map(alternates, cfg.train.stages)):
        notes.append(_PRODUCTS)
    if scale != 1:
        notes.append(f"Measured with {scale:g} of each batch; for the run's own batches the seconds are stretched.")
    if any(cost.problem in (OUT_OF_MEMORY, KILLED) for cost in costs):
        notes.append("Memory does not suffice for everything: see what a smaller batch takes with --batch-scale 0.25.")
    return notes


def report(found: Analysis) -> str:
    """The analysis as tables."""
    size = " x ".join(map(str, found.image))
    parts = [f"config {found.config}\ndevice {found.device}", f"backbone, one image of {size}\n{_stages(found)}"]
    for role, loss in found.losses.items():
        parts.append(f"{_LEVELS[role]}, one image: the backbone takes {_inputs(loss)}\n{_loss(loss)}")
    if found.costs:
        parts.append(f"time and memory\n{_costs(found.costs)}")
        parts.append(f"duration on this machine\n{_durations(found.durations)}")
    parts.append("\n".join(f"note: {note}" for note in [_COUNTED, *found.notes]))
    return "\n\n".join(parts)


def _stages(found: Analysis) -> str:
    rows = [[s.name, s.part, " x ".join(map(str, s.map)), *_figures(s.count)] for s in found.stages]
    rows.append(["whole", "", "", *_figures(found.whole)])
    return _table(rows, ["stage", "part", "map", *_FIGURES]) + _uncounted(found.whole)


def _loss(loss: LossCount) -> str:
    rows = [[name, *_figures(count)] for name, count in loss.parts.items()]
    rows.append(["whole", *_figures(loss.total)])
    return _table(rows, ["part", *_FIGURES]) + _uncounted(loss.total)


def _inputs(loss: LossCount) -> str:
    return " and ".join(f"{shape[0] / IMAGES:g} of {' x '.join(map(str, shape[1:]))}" for shape in loss.inputs)


def _figures(count: Count) -> list[str]:
    flops, activations = (
        "" if number is None else f"{number / unit:.4g}"
        for number, unit in ((count.flops, 1e9), (count.activations, 1e6))
    )
    return [f"{count.parameters:,}", f"{count.trained:,}", flops, activations]


def _uncounted(count: Count) -> str:
    if count.problem:
        return f"\nnot counted: {count.problem}"
    names = ", ".join(f"{name.removeprefix('aten::')} {number}" for name, number in count.uncounted.items())
    return f"\noperators without a count of FLOPs, with their calls: {names or 'none'}"


def _costs(costs: Sequence[Cost]) -> str:
    rows = []
    for cost in costs:
        speed = cost.images / cost.seconds if cost.seconds else None
        peak = None if cost.peak is None else f"{cost.peak / 2**20:,.0f}"
        seconds = cost.problem if cost.seconds is None else f"{cost.seconds:.4g}"
        products = None if cost.products is None or cost.seconds is None else f"{cost.products:.3g}"
        rows.append([cost.stage, cost.what, cost.images, seconds, speed and f"{speed:.4g}", products, peak])
    return _table(rows, ["stage", "what", "images", "seconds", "images/s", "products", "peak MiB"], left=2)


def _durations(durations: Sequence[Duration]) -> str:
    rows = []
    for one in durations:
        per_step = None if one.seconds_per_step is None else f"{one.seconds_per_step:.4g}"
        rows.append([one.phase, one.steps, per_step, _hours(one.seconds)])
    total = None if any(d.seconds is None for d in durations) else sum(d.seconds for d in durations)
    rows.append(["whole", None, None, _hours(total)])
    return _table(rows, ["stage", "steps", "s/step", "h:mm:ss"])


def _hours(seconds: float | None) -> str:
    return "unknown" if seconds is None else str(timedelta(seconds=round(seconds)))


def _table(rows: list[list[Any]], headers: list[str], left: int = 1) -> str:
    words = headers.index(_FIGURES[0]) if _FIGURES[0] in headers else left
    align = ["left"] * words + ["right"] * (len(headers) - words)
    return tabulate(rows, headers, disable_numparse=True, colalign=align)
