"""Resume: the random states of a process, and continuing a stage from its newest checkpoint."""

import contextlib
import logging
import os
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch

from bissl_zoo.distributed import get_rank, get_world_size, on_main_process
from bissl_zoo.engine.trainer import Context, Stage, Trainer
from bissl_zoo.errors import CheckpointError, Interrupted
from bissl_zoo.runs.checkpoint import Checkpointer, read_info, read_state
from bissl_zoo.runs.directory import add_wall_time

logger = logging.getLogger(__name__)


def newest_checkpoint(stage: Stage, checkpointer: Checkpointer) -> Path | None:
    """Return the stage's newest checkpoint that verifies, on every rank; warn about damaged ones."""
    newest, damaged = on_main_process(lambda: checkpointer.newest_intact(stage.name))
    for reason in damaged:
        logger.warning(reason)
    if newest is None:
        logger.info(f"no checkpoint of {stage.name} to resume; it starts at step 0")
    return newest


def build_resumed(context: Context, stage: Stage, weights: Any, checkpoint: Path, later: Sequence[Stage]) -> Trainer:
    """Build the stage's trainer and continue from `checkpoint`, random states included.

    Args:
        later: the stages after this one; if one has begun, this one cannot become longer.
    Raises:
        CheckpointError: the checkpoint belongs to another architecture, or the stage became longer too late.
    """
    state, info = read_state(checkpoint), read_info(checkpoint)
    trainer = stage.build(context, weights, state["step"])
    begun = next((other.name for other in later if context.checkpointer.newest(other.name)), None)
    if begun and info.total_steps != trainer.total_steps:
        raise CheckpointError(
            f"{stage.name} had {info.total_steps} steps when {begun} started from its weights; with "
            f"{trainer.total_steps} steps it would be another run. Resume with {info.total_steps}, or start a new run "
            "in another train.output_dir."
        )
    trainer.load_state_dict(state)
    if len(state["random"]) == get_world_size():
        restore_random_state(state["random"][get_rank()], context.device)
    else:
        logger.warning(
            f"the checkpoint has the random states of {len(state['random'])} processes and this run has "
            f"{get_world_size()}: random draws differ from those of an uninterrupted run"
        )
    status = "done" if trainer.done else "resuming"
    logger.info(f"{status}: {stage.name} at step {trainer.step} of {trainer.total_steps}, from {checkpoint}, verified")
    return trainer


def interrupt(context: Context, trainer: Trainer) -> NoReturn:
    """Raise `Interrupted` for a stage whose state is saved."""
    trainer.close()
    try:
        on_main_process(lambda: add_wall_time(context.folder, time.monotonic() - context.begin))
    except CheckpointError as error:  # the checkpoint is saved
        logger.warning(str(error))
    raise Interrupted(
        f"Interrupted at {trainer.name} step {trainer.step}/{trainer.total_steps}; checkpoint saved. Continue with "
        "--resume.",
        context.stop.status,
    )


def is_done(stage: Stage, context: Context) -> bool:
    """Return True if the stage's newest checkpoint is that of its last step."""
    newest = context.checkpointer.newest(stage.name)
    try:
        info = read_info(newest) if newest else None
        return info is not None and (info.ended or info.step >= stage.steps(context))
    except CheckpointError:  # reported when it is read
        return False


@contextlib.contextmanager
def deterministic(enabled: bool) -> Iterator[None]:
    """Use deterministic algorithms while the context lasts, if `enabled`.

    See PyTorch's notes on reproducibility: slower on GPUs, and an operation without such an algorithm raises.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    if enabled:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read at the first matrix product on CUDA
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch; networks built afterwards are equal on every rank."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def seed_rank(seed: int) -> None:
    """Seed Python, NumPy and torch differently on each rank, for random draws during training."""
    seed_everything(seed + 7919 * (get_rank() + 1))


def random_state(device: torch.device) -> dict[str, Any]:
    """Return the random states of Python, NumPy and torch (CPU and `device`), as tensors and plain values."""
    name, keys, position, has_gauss, gauss = np.random.get_state()
    state = {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
    }
    return state | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def restore_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Restore what `random_state` returned; the state of CUDA only if `device` is a GPU."""
    random.setstate(state["python"])
    name, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


@contextlib.contextmanager
def preserved_randomness(device: torch.device) -> Iterator[None]:
    """Restore the random states of Python, NumPy and torch (CPU and `device`) on leaving."""
    state = random_state(device)
    try:
        yield
    finally:
        restore_random_state(state, device)
