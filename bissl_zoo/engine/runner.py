"""The pipeline: config -> context -> stages -> evaluation -> publishing -> results."""

import contextlib
import gc
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NoReturn

from omegaconf import DictConfig

from bissl_zoo.distributed import barrier, on_main_process, stop_request
from bissl_zoo.engine.build import build_downstream
from bissl_zoo.engine.checks import check_parts, open_context
from bissl_zoo.engine.evaluate import Details, evaluate, format_metrics, results_table, safe_details, write_details
from bissl_zoo.engine.hooks import default_hooks
from bissl_zoo.engine.init import load_init, pinned_init
from bissl_zoo.engine.publishing import RESULTS_FILE, publish_when_done, published, publishes, read_results, write_results
from bissl_zoo.engine.resume import build_resumed, deterministic, is_done, newest_checkpoint
from bissl_zoo.engine.stages import plan_stages
from bissl_zoo.engine.trainer import Context, Stage, Trainer, Weights
from bissl_zoo.errors import CheckpointError, Interrupted
from bissl_zoo.progress.display import FILE_ONLY, console_by_default, doing, end_display, logged, show, signals_aside
from bissl_zoo.progress.run_view import PlannedStage
from bissl_zoo.progress.writers import open_writers
from bissl_zoo.runs.checkpoint import Checkpointer
from bissl_zoo.runs.directory import check_run_dir, has_begun, pointing_to_report, prepare_run_dir
from bissl_zoo.runs.lock import run_lock
from bissl_zoo.runs.metadata import add_wall_time, write_facts

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
    begin = time.monotonic()
    resume = on_main_process(lambda: has_begun(cfg)) if resume == "auto" else resume
    context = open_context(cfg, source)
    initial, lineage = load_init(pinned_init(cfg.train.init, Path(cfg.train.output_dir)) if resume else cfg.train.init, cfg)
    stages = plan_stages(context, initial)
    plan = [PlannedStage(stage.name, type(stage), stage.steps(context)) for stage in stages]
    check_parts(context, initial)
    context.folder = folder = on_main_process(lambda: check_run_dir(cfg, resume))
    checkpoint = cfg.train.checkpoint
    context.checkpointer = Checkpointer(folder / "checkpoints", checkpoint.keep, checkpoint.every, checkpoint.best)
    with contextlib.ExitStack() as stack:
        stack.enter_context(console_by_default())
        context.stop = stack.enter_context(stop_request())
        stack.enter_context(signals_aside())
        stack.enter_context(deterministic(cfg.train.deterministic))
        on_main_process(lambda: stack.enter_context(run_lock(folder)))
        if resume and (outcome := on_main_process(lambda: finished_outcome(context, stages))):
            logger.info(f"the run in {folder} is finished; there is nothing to resume")
            return outcome
        on_main_process(lambda: prepare_run_dir(cfg, resume))
        stack.enter_context(logged(folder))
        stack.callback(end_display)
        on_main_process(lambda: write_facts(folder, cfg, context.data, lineage))
        show(folder=str(folder), device=context.device, stages=plan)
        logger.info(f"run: {folder}  stages: {', '.join(cfg.train.stages)}  device: {context.device}")
        for role, dataset in context.data.items():
            logger.info(f"data: {role} {cfg.dataloader[role].dataset.name}, {len(dataset)} images")
        for stage in stages:
            stage.announce(context, initial, stages)
        context.writers = stack.enter_context(open_writers(cfg, folder))
        with pointing_to_report(folder), _counted_time(folder, begin):
            results, details = run_stages(context, stages, initial, resume)
            on_main_process(lambda: (write_details(folder, details), write_results(folder, results)) and None)
        entry = on_main_process(lambda: publish_when_done(folder, cfg))
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
        logger.info(f"stage {number} of {len(stages)}: {stage.name}")
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
            results[stage.start] = test(context, stage, trainer, details)
        else:
            weights = trainer.result()
        trainer.close()
        del trainer
        gc.collect()  # trainer and hooks refer to each other and hold the networks
    return results, details


def test(context: Context, stage: Stage, trainer: Trainer, details: dict[str, Details]) -> dict[str, float]:
    """Return the metrics of a fine-tuned model on the test set, and add their details to `details`."""
    trainer.take_best()
    level, begin = trainer.level, time.monotonic()

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


def interrupt(context: Context, trainer: Trainer) -> NoReturn:
    """Raise `Interrupted` for a stage whose state is saved."""
    trainer.close()
    raise Interrupted(
        f"Interrupted at {trainer.name} step {trainer.step}/{trainer.total_steps}; checkpoint saved. Continue with "
        "--resume.",
        context.stop.status,
    )


@contextlib.contextmanager
def _counted_time(folder: Path, begin: float) -> Any:
    """Add the time of this process to the run's wall time, also if a signal stops it."""
    try:
        yield
    except Interrupted:
        try:
            on_main_process(lambda: add_wall_time(folder, time.monotonic() - begin))
        except CheckpointError as error:  # the checkpoint is saved
            logger.warning(str(error))
        raise
    on_main_process(lambda: add_wall_time(folder, time.monotonic() - begin))


def finished_outcome(context: Context, stages: list[Stage]) -> dict[str, Any] | None:
    """Return what :func:`run` returned if the run came to its end; None otherwise."""
    cfg, folder = context.cfg, context.folder
    entry = published(folder)
    written = (folder / RESULTS_FILE).exists()
    if not all(is_done(stage, context) for stage in stages) or not written or (publishes(cfg) and entry is None):
        return None
    return {"results": read_results(folder), "entry": entry if publishes(cfg) else None}


def evaluate_only(cfg: DictConfig, source: str) -> dict[str, dict[str, float]]:
    """Evaluate the fine-tuned model of the run directory `train.init` on the config's test set.

    Raises:
        CheckpointError: there is no fine-tuned model in it.
    """
    context = open_context(cfg, source, roles={"test"})
    weights, _ = load_init(cfg.train.init, cfg, evaluate=True)
    if weights.task is None:
        raise CheckpointError(
            f"--eval-only needs a fine-tuned model: train.init='{cfg.train.init}' holds no task head. "
            "Give the directory of a run that fine-tunes, as in train.init=runs/a."
        )
    backbone, task = build_downstream(context, weights)
    return {"finetuned": evaluate(context, backbone, task)}
