"""Seconds and memory of the training steps of a config, measured on this machine on random images."""

import contextlib
import gc
import itertools
import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fvcore.common.param_scheduler import ConstantParamScheduler
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from torch import nn
from torch.utils.data import Dataset, default_collate

from bissl_zoo.bilevel import BiLevel
from bissl_zoo.data.prepare.check import known_sets
from bissl_zoo.data.samples import to_device
from bissl_zoo.data.views import two_parts
from bissl_zoo.engine.build import Context, ViewsOnly, Weights, build_datasets, data_roles
from bissl_zoo.engine.stages import plan_stages
from bissl_zoo.engine.stages.bissl import BisslTrainer
from bissl_zoo.engine.trainer import Trainer
from bissl_zoo.errors import DatasetError
from bissl_zoo.optim import LRMultiplier
from bissl_zoo.pretext import PretextMethod

#: height and width of the random images before augmentation, those of a photograph of VOC or ImageNet
IMAGE_SIZE = (375, 500)
#: distinct images of a pretext batch; larger batches repeat them
DISTINCT = 8
#: number of images of a missing data set; nothing that is reported depends on it
PLACEHOLDER = 1 << 16
#: number of classes if neither the config nor the data set defines it
DEFAULT_CLASSES = 20
#: measurements of a step after one to warm up, and seconds after which no further one starts
REPEATS, TIME_LIMIT = 5, 10.0
STEP, LOWER, CURVATURE, PRODUCT, UPPER = "step", "lower step", "curvature", "product", "upper step"


# ------------------------------------------------------------------------------------------------ random data


@dataclass
class KnownData:
    """Properties of the data sets of a run.

    Attributes:
        lengths: number of images by role, None for a missing data set.
        classes: names of the downstream classes.
        notes: sentences about missing data sets.
    """

    lengths: dict[str, int | None]
    classes: list[str]
    notes: list[str] = field(default_factory=list)


class RandomImages(Dataset):
    """PIL images of random pixels without targets."""

    def __init__(self, length: int, classes: list[str] | None) -> None:
        self.length, self.classes = length, classes

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Image.Image, None]:
        pixels = np.random.default_rng(index).integers(0, 256, (*IMAGE_SIZE, 3), dtype=np.uint8)
        return Image.fromarray(pixels), None


def find_data(cfg: DictConfig) -> KnownData:
    """Open the data sets that the stages of a config train on; missing ones are allowed."""
    roles = sorted(data_roles(cfg) - {"val", "test"})
    data = KnownData({}, [])
    for role in roles:
        try:
            dataset = build_datasets(cfg, {role})[role]
        except DatasetError as error:
            data.lengths[role] = None
            data.notes.append(f"The data set of dataloader.{role} is missing, so epochs cannot be converted: {error}")
        else:
            data.lengths[role] = len(dataset)
            data.classes = list(dataset.classes) if role == "train" else data.classes
    if not data.classes:
        section = cfg.dataloader.train.dataset
        known = known_sets().get(section.get("name"))
        number = known.classes if known else DEFAULT_CLASSES
        named = OmegaConf.is_list(section.get("classes"))
        data.classes = list(map(str, section.classes)) if named else [f"class {index}" for index in range(number)]
        if "train" in roles and not named and not known:
            data.notes.append(f"The classes of dataloader.train are unknown; {number} are assumed.")
    return data


def random_context(cfg: DictConfig, known: KnownData, device: torch.device) -> Context:
    """Return the context of a run whose data sets are random images."""
    data = {
        role: RandomImages(PLACEHOLDER if length is None else length, known.classes if role == "train" else None)
        for role, length in known.lengths.items()
    }
    return Context(cfg, data, device)


def random_batch(context: Context, role: str, head: nn.Module, size: int | None = None) -> Any:
    """Return a batch of random images as the data loader of `role` makes it for `head`, a pretext method or a task.

    Args:
        size: number of images; by default the batch size of the config.
    """
    section = context.cfg.dataloader[role]
    size = section.batch_size if size is None else size
    if role != "pretext":
        return to_device(head.example_batch(size, IMAGE_SIZE), context.device)
    views, finish = head.views(), None
    if section.get("augment_on") == "device":
        views, finish = two_parts(views)
    transform = ViewsOnly(views)
    samples = [transform(*context.data[role][index]) for index in range(min(size, DISTINCT))]
    batch = to_device(default_collate([samples[index % len(samples)] for index in range(size)]), context.device)
    return finish(batch) if finish else batch


# ------------------------------------------------------------------------------------------------ measurement


@dataclass
class Cost:
    """The cost of a step.

    Attributes:
        stage: stage of the step.
        what: a step, or a part of an alternation; `curvature` is the loss, its gradient and their graph.
        images: batch size; for an upper step that of the task.
        seconds: median over the measurements, for an upper step the mean over an alternation; None if memory ran out.
        peak: peak memory in bytes; on the CPU above that at the start.
        products: Hessian-vector products per upper step.
    """

    stage: str
    what: str
    images: int
    seconds: float | None = None
    peak: int | None = None
    products: float | None = None


def measure(context: Context, initial: Weights) -> list[Cost]:
    """Measure the steps of every stage at random weights, with learning rate 0; progress goes to standard error.

    Args:
        initial: decides which stages run; the weights are not loaded.
    """
    gauge, costs = Gauge(context.device), []
    for stage in plan_stages(context, initial):
        if stage.name != stage.section and stage.evaluates:
            continue  # the baseline, whose steps are those of fine-tuning
        print(f"measuring {stage.name}", file=sys.stderr, flush=True)
        start = Cost(stage.name, "start", 0)
        trainers: list[Trainer] = []
        if gauge.fits(start, lambda stage=stage, to=trainers: to.append(stage.build(context, Weights(), 0))):
            costs += _measure_trainer(context, trainers.pop(), gauge)
        else:
            costs.append(start)
        gauge.release()
    return costs


def _measure_trainer(context: Context, trainer: Trainer, gauge: "Gauge") -> list[Cost]:
    for level in trainer.levels().values():
        role = "pretext" if isinstance(level.head, PretextMethod) else "train"
        level.data_iterator = itertools.repeat(random_batch(context, role, level.head))
        level.lr_scheduler = LRMultiplier(ConstantParamScheduler(0.0))  # training on noise may diverge
    if isinstance(trainer, BisslTrainer):
        return _measure_alternation(trainer.problem, gauge)
    (level,) = trainer.levels().values()
    cost = Cost(trainer.name, STEP, level.batch_size)
    gauge.median(cost, trainer.run_step)
    return [cost]


def _measure_alternation(problem: BiLevel, gauge: "Gauge") -> list[Cost]:
    """Measure the parts of an alternation, until one does not fit into memory."""
    problem.on_bad_hypergradient = "plain"
    lower, upper = problem.lower, problem.upper
    size = min(problem.curvature_batch_size or lower.batch_size, lower.batch_size)
    lower_step, curvature, product, upper_step = costs = [
        Cost("bissl", LOWER, lower.batch_size),
        Cost("bissl", CURVATURE, size),
        Cost("bissl", PRODUCT, size),
        Cost("bissl", UPPER, upper.batch_size),
    ]
    operator = problem.curvature(lower.next_batch())
    shift, vector = operator.shift, torch.randn(sum(p.numel() for p in lower.backbone_parameters)).to(gauge.device)
    counts: list[int] = []

    def prepare() -> None:
        operator.release()
        operator.prepare()

    def one_upper_step() -> None:
        counts.append(problem.upper_step(operator)["solver/products"])

    def upper_steps() -> None:
        one_upper_step()  # warms up, in a subspace that `prepare` drops
        prepare()
        operator.shift, problem.shift = shift, None
        counts.clear()
        upper_step.seconds = statistics.mean(gauge.seconds(one_upper_step) for _ in range(problem.upper_steps))
        upper_step.products = statistics.mean(counts)

    if gauge.median(lower_step, problem.lower_step) and gauge.median(curvature, prepare):
        if gauge.median(product, lambda: operator.hessian_product(vector)):
            gauge.fits(upper_step, upper_steps)
        operator.release()
    measured = sum(cost.peak is not None for cost in costs)
    return costs[: measured + 1]  # with the part that does not fit into memory


class Gauge:
    """Measures time and memory of functions on a device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._before = 0 if device.type == "cuda" else _status("VmRSS") or _max_resident()

    def seconds(self, step: Callable[[], Any]) -> float:
        """Return the seconds of a call, including the work of the device."""
        self._synchronize()
        start = time.perf_counter()
        step()
        self._synchronize()
        return time.perf_counter() - start

    def median(self, cost: Cost, step: Callable[[], Any]) -> bool:
        """Enter the median seconds of a step and its peak memory into `cost`; return False if memory runs out."""

        def repeat() -> None:
            step()
            times: list[float] = []
            while not times or (len(times) < REPEATS and sum(times) < TIME_LIMIT):
                times.append(self.seconds(step))
            cost.seconds = statistics.median(times)

        return self.fits(cost, repeat)

    def fits(self, cost: Cost, work: Callable[[], Any]) -> bool:
        """Call `work` and enter its peak memory into `cost`; return False if memory runs out."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            with contextlib.suppress(OSError):  # only Linux can reset it; elsewhere the peak is that of all work so far
                Path("/proc/self/clear_refs").write_text("5")
        try:
            work()
        except (RuntimeError, MemoryError) as error:
            if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "allocate memory" not in str(error):
                raise
            cost.seconds = None
            return False
        if self.device.type == "cuda":
            cost.peak = torch.cuda.max_memory_allocated(self.device)
        else:
            cost.peak = max(0, _max_resident() - self._before)
        return True

    def release(self) -> None:
        """Free unused memory, so that it does not count for the next step."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _max_resident() -> int:
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, other systems kilobytes
    return _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _status(key: str) -> int | None:
    """Return a value of /proc/self/status in bytes, or None on systems without it."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:")), None)
