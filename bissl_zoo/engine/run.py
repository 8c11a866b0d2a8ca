"""The walk of a run: its stages in order, each from what the one before left, then the figures and the zoo entry."""

import gc
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from tabulate import tabulate

from bissl_zoo.distributed import barrier, on_main_process
from bissl_zoo.engine.bissl import (
    HEAD_WARMUP,
    LEAST_COUPLING,
    PRETEXT_WARMUP,
    bissl_steps,
    build_bissl,
    build_head_warmup,
    build_pretext_warmup,
    coupling,
    pretext_head_is_new,
    pretext_warmup_steps,
    warmup_steps,
)
from bissl_zoo.engine.build import STAGE_DATA, Context, Weights, build_datasets, build_downstream
from bissl_zoo.engine.checkpoint import Checkpointer, load_checkpoint, write_atomically
from bissl_zoo.engine.checks import check_config, check_parts
from bissl_zoo.engine.facts import add_wall_time, write_facts
from bissl_zoo.engine.finetune import BASELINE, build_finetune, evaluate, finetune_steps
from bissl_zoo.engine.hooks import (
    HookBase,
    MetricsWriter,
    PeriodicCheckpoint,
    PeriodicEvaluation,
    Progress,
    format_results,
    say,
)
from bissl_zoo.engine.init import load_init
from bissl_zoo.engine.launch import choose_device
from bissl_zoo.engine.pretrain import build_pretrain, pretrain_steps
from bissl_zoo.engine.probe import build_probe
from bissl_zoo.engine.publishing import RESULTS_FILE, publish_run, published
from bissl_zoo.engine.run_dir import prepare_run_dir
from bissl_zoo.engine.solver_watch import SolverWatch
from bissl_zoo.engine.trainer import Trainer
from bissl_zoo.errors import CheckpointError


@dataclass(frozen=True)
class Phase:
    """One trainer of the walk.

    Attributes:
        steps: how many it takes; of `bissl`, alternations.
        build: makes the trainer from `(context, weights, start_step)`.
        finetunes: what the fine-tuning starts from, for the table; None where the phase fine-tunes nothing.
    """

    name: str
    steps: Callable[[Context], int]
    build: Callable[[Context, Weights, int], Trainer]
    finetunes: str | None = None


def phases_of(context: Context, initial: Weights) -> list[Phase]:
    """The trainers that the config's stages come to, in order, when they start from `initial`."""
    cfg = context.cfg
    phases, origin = [], "init"
    for stage in cfg.train.stages:
        if stage == "pretrain":
            phases.append(Phase("pretrain", pretrain_steps, build_pretrain))
            origin = "pretrained"
        elif stage == "bissl":
            if pretext_head_is_new(cfg, initial) and pretext_warmup_steps(context):
                phases.append(Phase(PRETEXT_WARMUP, pretext_warmup_steps, build_pretext_warmup))
            phases += [Phase(HEAD_WARMUP, warmup_steps, build_head_warmup), Phase("bissl", bissl_steps, build_bissl)]
            origin = "bissl"
        else:
            if cfg.finetune.baseline and origin == "bissl":
                build = partial(build_finetune, name=BASELINE)
                phases.append(Phase(BASELINE, finetune_steps, build, finetunes="pretrained"))
            phases.append(Phase("finetune", finetune_steps, build_finetune, finetunes=origin))
    return phases


def open_context(cfg: DictConfig, source: str, roles: set[str] | None = None) -> Context:
    """Check the config and open the data sets that its stages (or `roles`) read, before anything else is loaded."""
    check_config(cfg, source)
    roles = roles or {role for stage in cfg.train.stages for role in STAGE_DATA[stage]}
    device = choose_device(cfg.train.device)
    return Context(cfg, build_datasets(cfg, roles), device)


def run(cfg: DictConfig, source: str, resume: bool = False) -> dict[str, Any]:
    """Go through the stages of `cfg`, evaluate, publish.

    Args:
        source: the config's name, for messages.
        resume: continue the run in `train.output_dir` at its newest checkpoint.
    Returns:
        `results`, the figures by what was fine-tuned, and `entry`, what was published or None.
    """
    context = open_context(cfg, source)
    began = time.monotonic()
    initial, ancestors = load_init(cfg.train.init, cfg)
    phases = phases_of(context, initial)
    for phase in phases:
        phase.steps(context)
    check_parts(context, initial)
    folder = on_main_process(lambda: prepare_run_dir(cfg, resume))
    on_main_process(lambda: write_facts(folder, cfg, context.data, ancestors))
    _announce(context, initial)
    checkpointer = Checkpointer(folder / "checkpoints", cfg.train.checkpoint.keep)
    results: dict[str, dict[str, float]] = {}
    pretrained = weights = initial
    for number, phase in enumerate(phases, start=1):
        say(f"stage {number} of {len(phases)}: {phase.name}")
        if phase.name == HEAD_WARMUP:
            pretrained = weights
        trainer = _train(
            context, phase, pretrained if phase.name == BASELINE else weights, checkpointer, folder, resume
        )
        if phase.finetunes:
            figures = evaluate(context, trainer.level.backbone, trainer.level.head)
            results[phase.finetunes] = figures
            say(f"[{phase.name}] test  {format_results(figures)}")
        else:
            weights = trainer.result()
        trainer.close()
        del trainer
        gc.collect()  # trainer and hooks refer to each other, and hold the networks
    entry = on_main_process(lambda: _finish(cfg, folder, results, time.monotonic() - began))
    return {"results": results, "entry": entry}


def _finish(cfg: DictConfig, folder: Path, results: dict[str, dict[str, float]], seconds: float) -> Any:
    """Leave the figures of a run, and publish it where its config names an entry and this was not done before."""
    write_atomically(folder / RESULTS_FILE, json.dumps(results, indent=2) + "\n")
    add_wall_time(folder, seconds)
    if not cfg.train.publish.name or not {"pretrain", "bissl"} & set(cfg.train.stages):
        return None
    return published(folder) or publish_run(folder)


def _train(
    context: Context, phase: Phase, weights: Weights, checkpointer: Checkpointer, folder: Path, resume: bool
) -> Trainer:
    """The phase's trainer after its last step, from the newest checkpoint on where the run is resumed."""
    newest = checkpointer.newest(phase.name) if resume else None
    state = load_checkpoint(newest)[1] if newest else None
    trainer = phase.build(context, weights, state["step"] if state else 0)
    if state:
        trainer.load_state_dict(state)
        say(f"resumed from {newest}: {phase.name} step {trainer.step} of {trainer.total_steps}")
    elif resume:
        say(f"no checkpoint of {phase.name} to resume; it starts at step 0")
    if trainer.step < trainer.total_steps:
        trainer.train(_hooks(context, trainer, checkpointer, folder, evaluates=phase.finetunes is not None))
    barrier()
    return trainer


def _hooks(
    context: Context, trainer: Trainer, checkpointer: Checkpointer, folder: Path, evaluates: bool
) -> list[HookBase]:
    """Every hook of every stage, in the order in which they act."""
    cfg = context.cfg
    hooks: list[HookBase] = [Progress(cfg.train.log_period)]
    if evaluates and cfg.finetune.eval_period:
        level = trainer.levels()["level"]
        measure = partial(evaluate, context, level.backbone, level.head)
        hooks.append(PeriodicEvaluation(measure, cfg.finetune.eval_period))
    if trainer.name == "bissl":
        hooks.append(SolverWatch(folder / "config.yaml"))
    probe = build_probe(context, trainer)
    if probe:
        hooks.append(probe)
    hooks.append(MetricsWriter(folder, cfg.train.log_period))
    hooks.append(PeriodicCheckpoint(checkpointer, cfg.train.checkpoint.period, cfg.backbone.name))
    return hooks


def _announce(context: Context, initial: Weights) -> None:
    cfg = context.cfg
    say(f"run: {cfg.train.output_dir}  stages: {', '.join(cfg.train.stages)}  device: {context.device}")
    for role, dataset in context.data.items():
        say(f"data: {role} {cfg.dataloader[role].dataset.name}, {len(dataset)} images")
    if "bissl" not in cfg.train.stages:
        return
    value = coupling(context)
    if value < LEAST_COUPLING:
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
    rows = [[start, *(figures.get(metric, float("nan")) for metric in metrics)] for start, figures in results.items()]
    return tabulate(rows, headers=["fine-tuned from", *metrics], floatfmt=".4f")
