"""Seconds and memory of the steps of a config's stages, measured on this machine on batches of noise."""

import contextlib
import gc
import itertools
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from fvcore.common.param_scheduler import ConstantParamScheduler
from omegaconf import DictConfig

from bissl_zoo.analysis.data import KnownData, noise_batch, noise_context
from bissl_zoo.bilevel import BiLevel
from bissl_zoo.bilevel.level import Level
from bissl_zoo.engine.build import Context, Weights
from bissl_zoo.engine.checks import open_config
from bissl_zoo.engine.launch import choose_device
from bissl_zoo.engine.resume import deterministic
from bissl_zoo.engine.stages import plan_stages
from bissl_zoo.engine.stages.bissl import BisslTrainer
from bissl_zoo.engine.trainer import Trainer
from bissl_zoo.optim import LRMultiplier
from bissl_zoo.pretext import PretextMethod

#: times that a step is measured, after one to warm up, and seconds after which no further time is begun
REPEATS, ENOUGH_S = 5, 10.0
#: share of the free memory that is left to others, so that too large a batch ends in an error and not in a kill
SPARED = 0.1
STEP, LOWER, CURVATURE, PRODUCT, UPPER = "step", "lower step", "curvature", "product", "upper step"
OUT_OF_MEMORY = "out of memory"
KILLED = "the measuring process was killed, most likely for want of memory"


@dataclass
class Cost:
    """What one thing costs.

    Attributes:
        stage: that it is of.
        what: a step, or a part of an alternation; `curvature` is the loss, its gradient and their graph.
        images: of its batch; of an upper step those of the task.
        seconds: the median, of an upper step the mean over those of an alternation; None where it was not measured.
        peak: bytes of memory at most, on the CPU over what Python and its libraries take themselves.
        products: with the Hessian per upper step.
        problem: why there are no seconds.
    """

    stage: str
    what: str
    images: int
    seconds: float | None = None
    peak: int | None = None
    products: float | None = None
    problem: str = ""


def measure_in_a_process(
    config_file: str, overrides: Sequence[str], scale: float, known: KnownData, initial: Weights
) -> list[Cost]:
    """:func:`measure` in a process of its own, in whose memory nothing else has a part.

    Args:
        scale: factor on the batches.
        initial: weights that the run starts from, as far as they decide on its phases.
    Raises:
        BisslZooError: from opening the config and building its parts.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            return pool.submit(_measure_config, config_file, list(overrides), scale, known, initial).result()
        except BrokenProcessPool:
            return [Cost("all", "all", 0, problem=KILLED)]


def _measure_config(
    config_file: str, overrides: list[str], scale: float, known: KnownData, initial: Weights
) -> list[Cost]:
    cfg = open_config(config_file, overrides)
    scale_batches(cfg, scale)
    device = choose_device(cfg.train.device)
    if device.type == "cpu":
        _limit_memory()
    with deterministic(cfg.train.deterministic):
        return measure(noise_context(cfg, known, device), initial)


def scale_batches(cfg: DictConfig, scale: float) -> None:
    """Multiply the batches of a config by `scale`, in place; two images at least."""
    if scale == 1:
        return
    sections = [(cfg.dataloader[role], "batch_size") for role in cfg.dataloader]
    for section, key in [*sections, (cfg.bilevel, "curvature_batch_size")]:
        if section[key] is not None:
            section[key] = max(2, round(section[key] * scale))


def measure(context: Context, initial: Weights) -> list[Cost]:
    """The costs of every stage, at random weights, which no step moves; standard error tells which is measured.

    Args:
        initial: decides on the phases; none of these weights are loaded.
    """
    gauge, costs = Gauge(context.device), []
    for phase in plan_stages(context, initial):
        if phase.name != phase.section and phase.evaluates:
            continue  # the baseline, whose steps are those of fine-tuning
        print(f"measuring {phase.name}", file=sys.stderr, flush=True)
        cost = Cost(phase.name, "start", 0)
        made: list[Trainer] = []
        if gauge.has_room(cost, lambda phase=phase, made=made: made.append(phase.build(context, Weights(), 0))):
            costs += _costs(context, made.pop(), gauge)
        else:
            costs.append(cost)
        gauge.settle()
    return costs


def _costs(context: Context, trainer: Trainer, gauge: "Gauge") -> list[Cost]:
    for level in trainer.levels().values():
        _feed(context, level)
    if isinstance(trainer, BisslTrainer):
        return _alternation(trainer.problem, gauge)
    (level,) = trainer.levels().values()
    cost = Cost(trainer.name, STEP, level.batch_size)
    gauge.median(cost, trainer.run_step)
    return [cost]


def _feed(context: Context, level: Level) -> None:
    """Give a level the same batch for ever, and a learning rate of 0: at that of the run, noise might diverge."""
    role = "pretext" if isinstance(level.head, PretextMethod) else "train"
    level.data_iterator = itertools.repeat(noise_batch(context, role, level.head))
    level.lr_scheduler = LRMultiplier(ConstantParamScheduler(0.0))


def _alternation(problem: BiLevel, gauge: "Gauge") -> list[Cost]:
    """The parts of an alternation; after one for which memory does not suffice, no other is tried."""
    problem.on_bad_hypergradient = "plain"
    lower, upper = problem.lower, problem.upper
    of_curvature = min(problem.curvature_batch_size or lower.batch_size, lower.batch_size)
    lower_step, curvature, product, upper_step = costs = [
        Cost("bissl", LOWER, lower.batch_size),
        Cost("bissl", CURVATURE, of_curvature),
        Cost("bissl", PRODUCT, of_curvature),
        Cost("bissl", UPPER, upper.batch_size, products=0.0),
    ]
    operator = problem.curvature(lower.next_batch())

    def prepare() -> None:
        operator.release()
        operator.prepare()

    def alternation() -> None:
        operator.shift = None if problem.solver.damping == "auto" else problem.lam + problem.solver.damping
        problem.shift = None
        steps = [gauge.seconds(lambda: counts.append(upper_products())) for _ in range(problem.upper_steps)]
        upper_step.seconds = statistics.mean(steps)
        upper_step.products = statistics.mean(counts[-problem.upper_steps :])

    def upper_products() -> int:
        return problem.upper_step(operator)["solver/products"]

    counts: list[int] = []
    if not gauge.median(lower_step, problem.lower_step) or not gauge.median(curvature, prepare):
        return [cost for cost in costs if cost.seconds is not None or cost.problem]
    vector = torch.randn(sum(p.numel() for p in lower.backbone_parameters), device=gauge.device)
    if gauge.median(product, lambda: operator.hessian_product(vector)):
        # the first upper step warms up, in a subspace that is dropped
        if gauge.has_room(upper_step, lambda: (upper_products(), prepare())):
            gauge.has_room(upper_step, alternation)
    operator.release()
    return [cost for cost in costs if cost.seconds is not None or cost.problem]


class Gauge:
    """Takes time and memory of what runs on a device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._before = _resident() if device.type == "cpu" else 0

    def seconds(self, step: Callable[[], Any]) -> float:
        """Of one call, the device's work included."""
        self._wait()
        start = time.perf_counter()
        step()
        self._wait()
        return time.perf_counter() - start

    def median(self, cost: Cost, step: Callable[[], Any]) -> bool:
        """Enter the median seconds of a step and its memory; whether there is memory for it."""

        def repeat() -> None:
            step()
            taken: list[float] = []
            while not taken or (len(taken) < REPEATS and sum(taken) < ENOUGH_S):
                taken.append(self.seconds(step))
            cost.seconds = statistics.median(taken)

        return self.has_room(cost, repeat)

    def has_room(self, cost: Cost, work: Callable[[], Any]) -> bool:
        """Do the work and enter the memory that it takes, or that this does not suffice."""
        self._reset_peak()
        try:
            work()
        except (RuntimeError, MemoryError) as error:
            if not _lacks_memory(error):
                raise
            cost.seconds, cost.problem = None, OUT_OF_MEMORY
            return False
        cost.peak = self._peak()
        return True

    def settle(self) -> None:
        """Give back what nothing holds any more, so that it does not count with what comes next."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _reset_peak(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return
        with contextlib.suppress(OSError):  # elsewhere than on Linux, the peak is that of all that was done so far
            Path("/proc/self/clear_refs").write_text("5")

    def _peak(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return max(0, _most_resident() - self._before)


def _lacks_memory(error: BaseException) -> bool:
    known = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    return known or "can't allocate memory" in str(error) or "not enough memory" in str(error)


def _limit_memory() -> None:
    """Let this process have most of the memory that is free, so that asking for more raises."""
    free = _status_bytes("/proc/meminfo", "MemAvailable")
    if free is not None:
        _, most = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (int(free * (1 - SPARED)), most))


def _resident() -> int:
    return _status_bytes("/proc/self/status", "VmRSS") or _most_resident()


def _most_resident() -> int:
    # where there is no /proc: macOS counts bytes, others kilobytes
    unit = 1 if sys.platform == "darwin" else 1024
    return _status_bytes("/proc/self/status", "VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _status_bytes(file: str, key: str) -> int | None:
    """A number of a file of /proc that gives kilobytes."""
    try:
        lines = Path(file).read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:")), None)
