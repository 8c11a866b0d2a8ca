"""A run from its config to its results: what is checked first, what is said, and the walk."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from omegaconf import DictConfig
from tabulate import tabulate

from bissl_zoo.distributed import on_main_process
from bissl_zoo.engine.bissl import LEAST_COUPLING, coupling, pretext_head_is_new, pretext_warmup_steps
from bissl_zoo.engine.build import STAGE_DATA, Context, Weights, build_datasets, build_downstream
from bissl_zoo.engine.checks import check_config, check_parts
from bissl_zoo.engine.evaluate import LEFT_OUT, evaluate
from bissl_zoo.engine.init import as_begun, load_init
from bissl_zoo.engine.launch import choose_device
from bissl_zoo.engine.randomness import deterministic
from bissl_zoo.engine.walk import Walk, phases_of
from bissl_zoo.errors import CheckpointError
from bissl_zoo.interruption import stop_request
from bissl_zoo.progress.display import end_display, log, logged, say, signals_aside
from bissl_zoo.progress.writers import open_writers
from bissl_zoo.runs.directory import check_run_dir, has_begun, prepare_run_dir
from bissl_zoo.runs.lock import run_lock
from bissl_zoo.runs.metadata import write_facts


def open_context(cfg: DictConfig, source: str, roles: set[str] | None = None) -> Context:
    """Check the config and open the data sets that its stages (or `roles`) read, before anything else is loaded."""
    check_config(cfg, source)
    if roles is None:
        roles = {role for stage in cfg.train.stages for role in STAGE_DATA[stage]}
        roles |= {"val"} if "finetune" in cfg.train.stages and "val" in cfg.dataloader else set()
    device = choose_device(cfg.train.device)
    return Context(cfg, build_datasets(cfg, roles), device)


def run(
    cfg: DictConfig,
    source: str,
    resume: bool | Literal["auto"] = False,
    write_report: Callable[[Path], None] | None = None,
) -> dict[str, Any]:
    """Go through the stages of `cfg`, evaluate, publish.

    Args:
        source: the config's name, for messages.
        resume: continue the run in `train.output_dir` at its newest checkpoint; "auto": where there is one.
        write_report: of the run directory, at the end, where `train.report` asks for it.
    Returns:
        `results`, the figures by what was fine-tuned, and `entry`, what was published or None.
    """
    if resume == "auto":
        resume = on_main_process(lambda: has_begun(cfg))
    context = open_context(cfg, source)
    init = as_begun(cfg.train.init, Path(cfg.train.output_dir)) if resume else cfg.train.init
    initial, ancestors = load_init(init, cfg)
    phases = phases_of(context, initial)
    for phase in phases:
        phase.steps(context)
    check_parts(context, initial)
    folder = on_main_process(lambda: check_run_dir(cfg, resume))
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(stop_request())
        stack.enter_context(signals_aside())
        stack.enter_context(deterministic(cfg.train.deterministic))
        on_main_process(lambda: stack.enter_context(run_lock(folder, say)))
        walk = Walk(context, phases, initial, folder, resume, stop)
        done = on_main_process(walk.outcome) if resume else None
        if done:
            say(f"the run in {folder} is finished; there is nothing to resume")
            return done
        on_main_process(lambda: prepare_run_dir(cfg, resume))
        stack.enter_context(logged(folder))
        stack.callback(end_display)
        on_main_process(lambda: write_facts(folder, cfg, context.data, ancestors))
        _announce(context, initial)
        outcome = walk.go(stack.enter_context(open_writers(cfg, folder)))
        if outcome["results"]:
            log(results_table(outcome["results"]))
        if write_report and cfg.train.report:
            on_main_process(lambda: write_report(folder))
        return outcome


def _announce(context: Context, initial: Weights) -> None:
    cfg = context.cfg
    say(f"run: {cfg.train.output_dir}  stages: {', '.join(cfg.train.stages)}  device: {context.device}")
    for role, dataset in context.data.items():
        say(f"data: {role} {cfg.dataloader[role].dataset.name}, {len(dataset)} images")
    if "bissl" not in cfg.train.stages:
        return
    value = coupling(context)
    if value is not None and value < LEAST_COUPLING:
        say(
            f"warning: lambda * lr_eff * lower steps = {value:.2g}, below {LEAST_COUPLING}: the lower level has no "
            "time to follow the upper one, and the stage will do next to nothing. Raise bilevel.lambda."
        )
    if not pretext_head_is_new(cfg, initial):
        return
    missing, steps = f"train.init brings no pretext head of {cfg.pretext.name}", pretext_warmup_steps(context)
    if steps:
        say(f"{missing}: a new one is warmed up for {steps} steps on the frozen backbone before the BiSSL stage.")
    else:
        say(f"warning: {missing} and bilevel.pretext_warmup has 0 steps; the BiSSL stage starts with a random one.")


def evaluate_only(cfg: DictConfig, source: str) -> dict[str, dict[str, float]]:
    """Measure the fine-tuned model of the run directory `train.init` on the config's test set.

    Raises:
        CheckpointError: there is no fine-tuned model in it.
    """
    context = open_context(cfg, source, roles={"test"})
    weights, _ = load_init(cfg.train.init, cfg, evaluate=True)
    if weights.task is None:
        raise CheckpointError(
            f"--eval-only needs a fine-tuned model: train.init='{cfg.train.init}' holds no task head. "
            "Give the directory of a run with the stage finetune, as in train.init=runs/a."
        )
    backbone, task = build_downstream(context, weights)
    return {"finetuned": evaluate(context, backbone, task)}


def results_table(results: dict[str, dict[str, float]]) -> str:
    """The figures of one or more fine-tunings side by side, the rows named by what they started from."""
    metrics = [m for m in dict.fromkeys(m for figures in results.values() for m in figures) if "/" not in m]
    absent = {LEFT_OUT: 0}
    rows = [
        [start, *(figures.get(metric, absent.get(metric, float("nan"))) for metric in metrics)]
        for start, figures in results.items()
    ]
    return tabulate(rows, headers=["fine-tuned from", *metrics], floatfmt=".4f")
