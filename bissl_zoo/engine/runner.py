"""A run from its config to its results: what is checked first, what is said, and the walk."""

import contextlib
import gc
import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NoReturn

from omegaconf import DictConfig
from tabulate import tabulate

from bissl_zoo.distributed import (
    StopRequest,
    barrier,
    get_rank,
    get_world_size,
    is_main_process,
    on_main_process,
    stop_request,
)
from bissl_zoo.downstream import Evaluator
from bissl_zoo.engine.build import STAGE_DATA, Context, Weights, build_datasets, build_downstream
from bissl_zoo.engine.checks import check_config, check_parts
from bissl_zoo.engine.evaluate import LEFT_OUT, Details, evaluate, look_into, write_details
from bissl_zoo.engine.features import build_probe
from bissl_zoo.engine.health import Health
from bissl_zoo.engine.hooks import (
    BadImages,
    EarlyStopping,
    HookBase,
    MetricsWriter,
    PeriodicCheckpoint,
    PeriodicEvaluation,
    Progress,
    SolverWatch,
    format_results,
)
from bissl_zoo.engine.init import as_begun, load_init
from bissl_zoo.engine.launch import choose_device
from bissl_zoo.engine.publishing import RESULTS_FILE, publish_run, published, read_results
from bissl_zoo.engine.randomness import deterministic, restore_random_state
from bissl_zoo.engine.stages.bissl import (
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
from bissl_zoo.engine.stages.finetune import BASELINE, build_finetune, finetune_steps
from bissl_zoo.engine.stages.pretrain import build_pretrain, pretrain_steps
from bissl_zoo.engine.trainer import Trainer
from bissl_zoo.errors import CheckpointError, Interrupted, ZooError
from bissl_zoo.progress.display import FILE_ONLY, console_by_default, doing, end_display, logged, show, signals_aside
from bissl_zoo.progress.file_writers import Writer
from bissl_zoo.progress.run_view import PlannedStage
from bissl_zoo.progress.writers import open_writers
from bissl_zoo.runs.checkpoint import Checkpointer, read_info, write_atomically
from bissl_zoo.runs.directory import CONFIG_FILE, check_run_dir, has_begun, pointing_to_report, prepare_run_dir
from bissl_zoo.runs.lock import run_lock
from bissl_zoo.runs.metadata import add_wall_time, write_facts
from bissl_zoo.runs.state_files import read_state

logger = logging.getLogger(__name__)


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
        stack.enter_context(console_by_default())
        stop = stack.enter_context(stop_request())
        stack.enter_context(signals_aside())
        stack.enter_context(deterministic(cfg.train.deterministic))
        on_main_process(lambda: stack.enter_context(run_lock(folder)))
        walk = Walk(context, phases, initial, folder, resume, stop)
        done = on_main_process(walk.outcome) if resume else None
        if done:
            logger.info(f"the run in {folder} is finished; there is nothing to resume")
            return done
        on_main_process(lambda: prepare_run_dir(cfg, resume))
        stack.enter_context(logged(folder))
        stack.callback(end_display)
        on_main_process(lambda: write_facts(folder, cfg, context.data, ancestors))
        _announce(context, initial)
        outcome = walk.go(stack.enter_context(open_writers(cfg, folder)))
        if outcome["results"]:
            logger.info(results_table(outcome["results"]), extra=FILE_ONLY)
        if write_report and cfg.train.report:
            on_main_process(lambda: write_report(folder))
        return outcome


def _announce(context: Context, initial: Weights) -> None:
    cfg = context.cfg
    logger.info(f"run: {cfg.train.output_dir}  stages: {', '.join(cfg.train.stages)}  device: {context.device}")
    for role, dataset in context.data.items():
        logger.info(f"data: {role} {cfg.dataloader[role].dataset.name}, {len(dataset)} images")
    if "bissl" not in cfg.train.stages:
        return
    value = coupling(context)
    if value is not None and value < LEAST_COUPLING:
        logger.warning(
            f"lambda * lr_eff * lower steps = {value:.2g}, below {LEAST_COUPLING}: the lower level has no "
            "time to follow the upper one, and the stage will do next to nothing. Raise bilevel.lambda."
        )
    if not pretext_head_is_new(cfg, initial):
        return
    missing, steps = f"train.init brings no pretext head of {cfg.pretext.name}", pretext_warmup_steps(context)
    if steps:
        logger.info(
            f"{missing}: a new one is warmed up for {steps} steps on the frozen backbone before the BiSSL stage."
        )
    else:
        logger.warning(f"{missing} and bilevel.pretext_warmup has 0 steps; the BiSSL stage starts with a random one.")


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


class Walk:
    """The phases of one run, one after the other, from where an earlier part of the run left them.

    Args:
        initial: the weights that the first phase starts from.
        folder: the run directory.
        stop: asked after every step and phase.
    """

    def __init__(
        self,
        context: Context,
        phases: list[Phase],
        initial: Weights,
        folder: Path,
        resume: bool,
        stop: StopRequest,
    ) -> None:
        self.context, self.phases, self.initial = context, phases, initial
        self.folder, self.resume, self.stop = folder, resume, stop
        settings = context.cfg.train.checkpoint
        self.checkpointer = Checkpointer(folder / "checkpoints", settings.keep, settings.every, settings.best)
        self.results: dict[str, dict[str, float]] = {}
        self.details: dict[str, Details] = {}
        self.writers: Sequence[Writer] = ()
        self.began = time.monotonic()

    def go(self, writers: Sequence[Writer]) -> dict[str, Any]:
        """Train, evaluate, publish; see :func:`run`.

        Args:
            writers: of the figures.
        Raises:
            Interrupted: asked to stop, after what there is has been saved.
        """
        self.writers = writers
        with pointing_to_report(self.folder):
            return self._go()

    def _go(self) -> dict[str, Any]:
        plan = [PlannedStage(phase.name, phase.steps, phase.steps(self.context)) for phase in self.phases]
        show(folder=str(self.folder), device=self.context.device, stages=plan)
        pretrained = weights = self.initial
        for number, phase in enumerate(self.phases, start=1):
            show(number=number, source=None)
            logger.info(f"stage {number} of {len(self.phases)}: {phase.name}")
            if phase.name == HEAD_WARMUP:
                pretrained = weights
            trainer = self._train(phase, pretrained if phase.name == BASELINE else weights)
            self._end_if_asked(phase, trainer)
            if phase.finetunes:
                trainer.take_best()
                level = trainer.level
                with doing("evaluating on test"):
                    look = partial(self._keep_details, phase.finetunes, time.monotonic())
                    figures = evaluate(self.context, level.backbone, level.head, asked=self.stop.asked, look=look)
                if figures is None:
                    self._end(phase, trainer)
                self.results[phase.finetunes] = figures
                logger.info(f"[{phase.name}] test  {format_results(figures)}")
                show(evaluation=f"[{phase.name}] test  {format_results(figures)}")
            else:
                weights = trainer.result()
            trainer.close()
            self._end_if_asked(phase, trainer)
            del trainer
            gc.collect()  # trainer and hooks refer to each other, and hold the networks
        entry = on_main_process(self._finish)
        return {"results": self.results, "entry": entry}

    def _keep_details(self, start: str, began: float, evaluator: Evaluator) -> None:
        seconds = round(time.monotonic() - began, 3)
        if is_main_process():
            self.details[start] = replace(look_into(evaluator), seconds=seconds)

    def outcome(self) -> dict[str, Any] | None:
        """What :func:`run` returned when it came to its end here; None where it has not."""
        publishes, entry = self._publishes(), published(self.folder)
        written = (self.folder / RESULTS_FILE).exists()
        if not all(map(self._is_done, self.phases)) or not written or (publishes and entry is None):
            return None
        return {"results": read_results(self.folder), "entry": entry if publishes else None}

    def _is_done(self, phase: Phase) -> bool:
        newest = self.checkpointer.newest(phase.name)
        try:
            info = read_info(newest) if newest else None
            return info is not None and (info.ended or info.step >= phase.steps(self.context))
        except CheckpointError:  # a damaged one is told of where it is set aside
            return False

    def _publishes(self) -> bool:
        cfg = self.context.cfg
        return bool(cfg.train.publish.name and {"pretrain", "bissl"} & set(cfg.train.stages))

    def _finish(self) -> Any:
        """Leave the figures of a run, and publish it where its config names an entry and this was not done before."""
        write_details(self.folder, self.details)
        write_atomically(self.folder / RESULTS_FILE, json.dumps(self.results, indent=2) + "\n")
        add_wall_time(self.folder, time.monotonic() - self.began)
        if not self._publishes():
            return None
        try:
            return published(self.folder) or publish_run(self.folder, once=True)
        except ZooError as error:
            raise ZooError(
                f"{error} The training is complete, and its figures are in {self.folder / RESULTS_FILE}; --resume "
                "publishes again."
            ) from error

    def _train(self, phase: Phase, weights: Weights) -> Trainer:
        """The phase's trainer after its last step, from the newest checkpoint on where the run is resumed."""
        newest = None
        if self.resume:
            newest, damaged = on_main_process(lambda: self.checkpointer.newest_intact(phase.name))
            for reason in damaged:
                logger.warning(reason)
        state = read_state(newest) if newest else None
        trainer = phase.build(self.context, weights, state["step"] if state else 0)
        if state:
            self._refuse_growth(phase, read_info(newest).total_steps, trainer.total_steps)
            trainer.load_state_dict(state)
            self._restore_randomness(state["random"])
            what = "done" if trainer.done else "resuming"
            logger.info(
                f"{what}: {phase.name} at step {trainer.step} of {trainer.total_steps}, from {newest}, verified"
            )
        elif self.resume:
            logger.info(f"no checkpoint of {phase.name} to resume; it starts at step 0")
        if not trainer.done or trainer.owed:
            hooks = self._hooks(trainer, phase.finetunes is not None)
            trainer.train(hooks, self._asked)
        barrier()
        return trainer

    def _refuse_growth(self, phase: Phase, before: int, now: int) -> None:
        """A stage from which a later one has begun cannot become longer any more."""
        later = self.phases[self.phases.index(phase) + 1 :]
        begun = [other.name for other in later if self.checkpointer.newest(other.name)]
        if begun and before != now:
            raise CheckpointError(
                f"{phase.name} had {before} steps when {begun[0]} began from what it left; with {now} steps that would "
                f"be another run. Resume with {before}, or start a new run in another train.output_dir."
            )

    def _restore_randomness(self, states: list[dict[str, Any]]) -> None:
        if len(states) == get_world_size():
            restore_random_state(states[get_rank()], self.context.device)
        else:
            logger.warning(
                f"the checkpoint is of {len(states)} processes and this run has {get_world_size()}: what is "
                "drawn at random from here on is not what the run would have drawn"
            )

    def _asked(self) -> bool:
        return self.stop.pending(self.context.device)

    def _end_if_asked(self, phase: Phase, trainer: Trainer) -> None:
        if trainer.stopping or self._asked():
            self._end(phase, trainer)

    def _end(self, phase: Phase, trainer: Trainer) -> NoReturn:
        trainer.close()
        try:
            on_main_process(lambda: add_wall_time(self.folder, time.monotonic() - self.began))
        except CheckpointError as error:  # what matters is saved
            logger.warning(str(error))
        raise Interrupted(
            f"stopped as asked, after step {trainer.step} of {trainer.total_steps} of {phase.name}, which is saved; go "
            "on with --resume",
            self.stop.status,
        )

    def _hooks(self, trainer: Trainer, evaluates: bool) -> list[HookBase]:
        """Every hook of every stage, in the order in which they act."""
        context, cfg, asked = self.context, self.context.cfg, self.stop.asked
        hooks: list[HookBase] = [Progress(cfg.train.log_period)]
        if evaluates and cfg.finetune.eval_period:
            level, role = trainer.levels()["level"], "val" if "val" in context.data else "test"
            measure = partial(evaluate, context, level.backbone, level.head, role, asked)
            hooks.append(PeriodicEvaluation(measure, cfg.finetune.eval_period, role))
        if evaluates and cfg.finetune.early_stopping.metric:
            hooks.append(EarlyStopping(**cfg.finetune.early_stopping))
        if trainer.name == "bissl":
            hooks.append(SolverWatch(self.folder / CONFIG_FILE))
        probe = build_probe(context, trainer, asked)
        if probe:
            hooks.append(probe)
        hooks += [Health(cfg), BadImages(context)]
        # an alternation is many optimizer steps, and there are few of them
        hooks.append(MetricsWriter(self.folder, 1 if trainer.name == "bissl" else cfg.train.log_period, self.writers))
        period = cfg.train.checkpoint.period
        hooks.append(PeriodicCheckpoint(self.checkpointer, period, cfg.backbone.name, context.device))
        return hooks
