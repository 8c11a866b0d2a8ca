"""The pipeline: config -> context -> stages -> evaluation -> publishing -> results."""

import contextlib
import gc
import logging
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

from omegaconf import DictConfig, OmegaConf

from bissl_zoo.distributed import barrier, on_main_process, stop_request
from bissl_zoo.engine.build import build_downstream
from bissl_zoo.engine.checks import check_parts, open_context
from bissl_zoo.engine.evaluate import Details, evaluate, format_metrics, safe_details
from bissl_zoo.engine.hooks import default_hooks
from bissl_zoo.engine.init import adopt_pixels, load_init, pinned_init
from bissl_zoo.engine.preflight import preflight
from bissl_zoo.engine.publishing import finish_run, finished_outcome, save_model
from bissl_zoo.engine.resume import build_resumed, deterministic, interrupt, newest_checkpoint
from bissl_zoo.engine.stages import plan_stages
from bissl_zoo.engine.trainer import Context, Stage, Trainer, Weights
from bissl_zoo.errors import CheckpointError
from bissl_zoo.progress.display import (
    FILE_ONLY,
    console_by_default,
    doing,
    end_display,
    logged,
    show,
    signals_aside,
)
from bissl_zoo.progress.writers import open_writers
from bissl_zoo.runs.checkpoint import Checkpointer
from bissl_zoo.runs.directory import check_run_dir, has_begun, prepare_run_dir, write_metadata
from bissl_zoo.runs.listing import results_table
from bissl_zoo.runs.lock import run_lock

logger = logging.getLogger(__name__)


def run(
    cfg: DictConfig,
    source: str,
    resume: bool | Literal["auto"] = False,
    write_report: Callable[[Path], None] | None = None,
) -> dict[str, Any]:
    """Run the stages of `cfg`, evaluate, and publish.

    Args:
        source: the config's name, for messages.
        resume: continue the run in `train.output_dir` from its newest checkpoint; "auto": if there is one.
        write_report: called with the run directory at the end, if `train.report` is True.
    Returns:
        `results`, the metrics by what was fine-tuned from, and `entry`, the published entry or None.
    Raises:
        Interrupted: a signal stopped the run, which is saved.
    """
    resume = on_main_process(lambda: has_begun(cfg)) if resume == "auto" else resume
    context = open_context(cfg, source)
    init = pinned_init(cfg.train.init, Path(cfg.train.output_dir)) if resume else cfg.train.init
    initial, lineage = load_init(init, cfg)
    adopt_pixels(cfg, initial.pixels, Path(cfg.train.output_dir) if resume else None)
    stages = plan_stages(context, initial)
    steps = {stage.name: stage.steps(context) for stage in stages}
    check_parts(context, initial)
    context.folder = folder = on_main_process(lambda: check_run_dir(cfg, resume))
    if not resume:  # the run has passed it
        preflight(context, initial, stages)
    checkpoint = cfg.train.checkpoint
    context.checkpointer = Checkpointer(folder / "checkpoints", checkpoint.keep, checkpoint.every)
    with contextlib.ExitStack() as stack:
        stack.enter_context(console_by_default())
        context.stop = stack.enter_context(stop_request())
        stack.enter_context(signals_aside())
        stack.enter_context(deterministic(cfg.train.deterministic))
        on_main_process(lambda: stack.enter_context(run_lock(folder, cfg.train.lock)))
        if resume and (outcome := on_main_process(lambda: finished_outcome(context, stages))):
            logger.info(f"the run in {folder} is finished; there is nothing to resume")
            return outcome
        on_main_process(lambda: prepare_run_dir(cfg, resume))
        stack.enter_context(logged(folder))
        stack.callback(end_display)
        on_main_process(lambda: write_metadata(folder, cfg, context.data, lineage, steps))
        show(folder=str(folder), device=context.device, stages=list(steps))
        logger.info(f"run: {folder}  stages: {', '.join(cfg.train.stages)}  device: {context.device}")
        for role, dataset in context.data.items():
            logger.info(f"data: {role} {cfg.dataloader[role].dataset.name}, {len(dataset)} images")
        for stage in stages:
            stage.announce(context, initial, stages)
        config = OmegaConf.to_container(cfg, resolve=True)
        writers = open_writers(cfg.train.writers, folder, cfg.train.log_period, config)
        context.writers = stack.enter_context(writers)
        results, details = run_stages(context, stages, initial, resume)
        entry = on_main_process(lambda: finish_run(context, results, details))
        if results:
            logger.info(results_table(results), extra=FILE_ONLY)
        if write_report and cfg.train.report:
            on_main_process(lambda: write_report(folder))
        return {"results": results, "entry": entry}


def run_stages(
    context: Context, stages: list[Stage], weights: Weights, resume: bool
) -> tuple[dict[str, dict[str, float]], dict[str, Details]]:
    """Train each stage from the weights that the one before left; return metrics and details of the evaluated ones."""
    results: dict[str, dict[str, float]] = {}
    details: dict[str, Details] = {}
    for number, stage in enumerate(stages, start=1):
        show(number=number, source=None)
        purpose = f", {stage.purpose}" if stage.purpose else ""
        logger.info(f"stage {number} of {len(stages)}: {stage.name}{purpose}")
        newest = newest_checkpoint(stage, context.checkpointer) if resume else None
        if newest:
            trainer = build_resumed(context, stage, weights, newest, later=stages[number:])
        else:
            trainer = stage.build(context, weights)
        if not trainer.done or trainer.pending:
            trainer.train(default_hooks(stage, context), lambda: context.stop.pending(context.device))
        barrier()
        if trainer.stopping or context.stop.pending(context.device):
            interrupt(context, trainer)
        if stage.evaluates:
            results[stage.start] = metrics = evaluate_stage(context, stage, trainer, details)
            on_main_process(partial(save_model, context, stage, trainer.levels()["level"], metrics))
        else:
            weights = trainer.result()
        trainer.close()
        del trainer
        gc.collect()  # trainer and hooks refer to each other and hold the networks
    return results, details


def evaluate_stage(context: Context, stage: Stage, trainer: Trainer, details: dict[str, Details]) -> dict[str, float]:
    """Return the metrics of a fine-tuned model on the test set, and add their details to `details`."""
    trainer.take_best()
    level, begin = trainer.levels()["level"], time.monotonic()

    def inspect(evaluator: Any) -> None:
        details[stage.start] = safe_details(evaluator, time.monotonic() - begin)

    with doing("evaluating on test"):
        metrics = evaluate(context, level.backbone, level.head, stop=context.stop.asked, inspect=inspect)
    if metrics is None or context.stop.pending(context.device):
        interrupt(context, trainer)
    line = f"[{stage.name}] test  {format_metrics(metrics)}"
    logger.info(line)
    show(evaluation=line)
    return metrics


def evaluate_only(cfg: DictConfig, source: str) -> dict[str, dict[str, float]]:
    """Evaluate the fine-tuned model of the run directory `train.init` on the config's test set."""
    context = open_context(cfg, source, roles={"test"})
    weights, _ = load_init(cfg.train.init, cfg, evaluate=True)
    adopt_pixels(cfg, weights.pixels)
    if weights.task is None:
        raise CheckpointError(
            f"--eval-only needs a fine-tuned model: train.init='{cfg.train.init}' holds no task head. "
            "Give the directory of a run with the stage finetune, as in train.init=runs/a."
        )
    backbone, task = build_downstream(context, weights)
    return {"finetuned": evaluate(context, backbone, task)}
