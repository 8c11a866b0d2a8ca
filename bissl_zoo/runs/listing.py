"""What run directories hold and how far their runs are, read without waiting for anybody or changing anything."""

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from bissl_zoo.config import LazyConfig
from bissl_zoo.engine.publishing import RECEIPT_FILE, RESULTS_FILE, read_results
from bissl_zoo.engine.stages.bissl import HEAD_WARMUP, PRETEXT_WARMUP
from bissl_zoo.engine.stages.finetune import BASELINE
from bissl_zoo.errors import CheckpointError, ConfigError
from bissl_zoo.progress.file_writers import METRICS_FILE
from bissl_zoo.runs.checkpoint import DAMAGED, CheckpointInfo, read_info, verify
from bissl_zoo.runs.directory import CONFIG_FILE
from bissl_zoo.runs.lock import LOCK_FILE
from bissl_zoo.runs.metadata import read_facts, read_json
from bissl_zoo.runs.run_files import last_figures, modified, size_of, writer_of

#: what is written last, at one time or another
WRITTEN = (CONFIG_FILE, METRICS_FILE, LOCK_FILE, RESULTS_FILE, RECEIPT_FILE, "checkpoints/latest")
RUNNING, FINISHED, INTERRUPTED, EMPTY = "running", "finished", "interrupted", "no checkpoint"

#: phases in the order of a walk, and the key that holds the steps of each where they are not given as epochs
STEPS = {
    "pretrain": "pretrain.steps",
    PRETEXT_WARMUP: "bilevel.pretext_warmup.steps",
    HEAD_WARMUP: "bilevel.head_warmup.steps",
    "bissl": "bilevel.alternations",
    BASELINE: "finetune.steps",
    "finetune": "finetune.steps",
}


@dataclass
class SavedState:
    """A checkpoint folder: its manifest, or why it cannot be used; `verified`: its files are those of the manifest."""

    path: Path
    step: int
    size: int
    info: CheckpointInfo | None = None
    problem: str | None = None
    verified: bool = False


@dataclass
class StageProgress:
    """How far a stage is: the step it was last heard of, the total where it is known, the last value of each figure."""

    name: str
    step: int = 0
    total: int | None = None
    done: bool = False
    metrics: dict[str, Any] = field(default_factory=dict)
    checkpoints: list[SavedState] = field(default_factory=list)


@dataclass
class RunState:
    """A run directory.

    Attributes:
        state: running, finished, interrupted (there is a checkpoint to go on from), or no checkpoint.
        writer: the process that writes it, where one does.
        changed: when something was last written, in seconds since 1970.
        aside: damaged checkpoints that a resumed run has set aside; drafts: those that a killed one left half-written.
        problems: what cannot be read, a line each.
    """

    folder: Path
    state: str = EMPTY
    writer: str | None = None
    changed: float = 0.0
    size: int = 0
    output_dir: str | None = None
    best: str | None = None
    stages: list[StageProgress] = field(default_factory=list)
    aside: list[Path] = field(default_factory=list)
    drafts: list[Path] = field(default_factory=list)
    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    entry: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @property
    def current(self) -> StageProgress | None:
        """The last stage that has begun."""
        return next((stage for stage in reversed(self.stages) if stage.step or stage.checkpoints), None)

    @property
    def newest(self) -> SavedState | None:
        """The checkpoint of the last stage that has one."""
        return next((stage.checkpoints[-1] for stage in reversed(self.stages) if stage.checkpoints), None)


def find_runs(folder: Path) -> Iterator[Path]:
    """The run directories in and below `folder`; what is inside of one, and hidden folders, are not looked at.

    Raises:
        ConfigError: the folder cannot be read.
    """
    if is_run(folder):
        yield folder
        return
    try:
        below = sorted(path for path in folder.iterdir() if os.path.isdir(path) and not path.name.startswith("."))
    except OSError as error:
        raise ConfigError(f"{folder} cannot be read: {error.strerror}. Give a folder that holds runs.") from error
    for path in below:
        if not os.access(path, os.R_OK | os.X_OK):
            yield path  # whether there are runs in it nobody can say, so that it is told
        elif not path.is_symlink() or is_run(path):  # a tree that is linked to could come round in a circle
            yield from find_runs(path)


def is_run(folder: Path) -> bool:
    """Whether something in `folder` says that it is a run's."""
    return any(os.path.isfile(folder / name) for name in (CONFIG_FILE, METRICS_FILE, LOCK_FILE))


def look_at(folder: Path, whole: bool = False, verified: bool = False) -> RunState:
    """What the run directory `folder` holds; what cannot be read is among its `problems`.

    Args:
        whole: read all of `metrics.jsonl`, rather than its end.
        verified: compare every checkpoint's files with its manifest.
    """
    run = RunState(folder)
    try:
        _fill(run, whole, verified)
    except OSError as error:
        run.problems.append(f"{error.filename} cannot be read: {error.strerror}")
    return run


def _fill(run: RunState, whole: bool, verified: bool) -> None:
    folder, checkpoints = run.folder, run.folder / "checkpoints"
    cfg = _config(run)
    run.size = size_of(folder)
    run.changed = max(modified(folder / name) for name in WRITTEN)
    records, problems = last_figures(folder / METRICS_FILE, whole)
    names = _expected(cfg, checkpoints)
    extra = {path.name for path in _listed(checkpoints) if os.path.isdir(path)} | records.keys()
    for name in [*names, *sorted(extra - set(names), key=lambda name: ([*STEPS, name].index(name), name))]:
        run.stages.append(_stage(run, name, cfg, records.get(name, {}), verified))
    run.problems += problems
    run.results, run.facts, run.entry = _told(run, read_results), _told(run, read_facts), _told(run, _receipt)
    run.writer = writer_of(folder / LOCK_FILE)
    written = os.path.isfile(folder / RESULTS_FILE)  # with nothing in it where nothing was fine-tuned
    has_ended = bool(names) and written and all(stage.done for stage in run.stages if stage.name in names)
    if run.writer:
        run.state = RUNNING
    elif run.newest:
        run.state = FINISHED if has_ended else INTERRUPTED


def _receipt(folder: Path) -> dict[str, Any]:
    entry = read_json(folder / RECEIPT_FILE)
    if entry and "name" not in entry:
        raise CheckpointError(f"{folder / RECEIPT_FILE} names no entry.")
    return entry


def _told(run: RunState, read: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    try:
        return read(run.folder)
    except CheckpointError as error:
        run.problems.append(str(error))
        return {}


def _listed(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if os.path.isdir(folder) else []


def _config(run: RunState) -> DictConfig:
    try:
        cfg = LazyConfig.load(run.folder / CONFIG_FILE)
    except ConfigError as error:
        run.problems.append(str(error))
        return OmegaConf.create()
    run.output_dir, run.best = _value(cfg, "train.output_dir", str), _value(cfg, "train.checkpoint.best", str)
    if _value(cfg, "train.stages", list) is None:
        run.problems.append(f"{CONFIG_FILE} lists no train.stages")
    return cfg


def _value(cfg: DictConfig, key: str, kind: type) -> Any:
    """A value of a config that may be anything; None where it is not of this kind."""
    try:
        value = OmegaConf.select(cfg, key)
        value = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
    except OmegaConfBaseException:
        return None
    return value if type(value) is kind else None


def _expected(cfg: DictConfig, checkpoints: Path) -> list[str]:
    """The phases of the config's stages, in order; see `plan_stages`."""
    names: list[str] = []
    for stage in _value(cfg, "train.stages", list) or []:
        if stage == "bissl":
            # it depends on what train.init brought
            names += [PRETEXT_WARMUP] if os.path.isdir(checkpoints / PRETEXT_WARMUP) else []
            names += [HEAD_WARMUP, "bissl"]
        elif stage == "finetune":
            names += [BASELINE] if "bissl" in names and _value(cfg, "finetune.baseline", bool) else []
            names.append("finetune")
        elif stage == "pretrain":
            names.append("pretrain")
    return names


def _stage(run: RunState, name: str, cfg: DictConfig, metrics: dict[str, Any], verified: bool) -> StageProgress:
    stage = StageProgress(name, metrics.pop("step", 0), metrics=metrics)
    for path in _listed(run.folder / "checkpoints" / name):
        if path.name.startswith(DAMAGED):
            run.aside.append(path)
        elif path.name.startswith(".step_"):
            run.drafts.append(path)
        elif re.fullmatch(r"step_[0-9]{1,18}", path.name, re.ASCII):
            saved = _saved(path, verified)
            stage.checkpoints += [saved] if os.path.isdir(path) else []  # an older one may just have been dropped
    stage.checkpoints.sort(key=lambda saved: saved.step)
    run.problems += [saved.problem for saved in stage.checkpoints if saved.problem]
    info = next((saved.info for saved in reversed(stage.checkpoints) if saved.info), None)
    stage.total = _value(cfg, STEPS.get(name, ""), int) or (info.total_steps if info else None)
    newest = stage.checkpoints[-1].info if stage.checkpoints else None
    saved_step = stage.checkpoints[-1].step if newest else 0
    stage.done = bool(newest and newest.ended) or (stage.total is not None and saved_step >= stage.total)
    stage.step = max(stage.step, saved_step)
    return stage


def _saved(path: Path, verified: bool) -> SavedState:
    saved = SavedState(path, int(path.name.partition("_")[2]), size_of(path))
    try:
        info = verify(path) if verified else read_info(path)
        if type(info.step) is not int or type(info.total_steps) is not int or not isinstance(info.metrics, dict):
            raise CheckpointError(f"{path} has a manifest without steps or metrics.")
        saved.info, saved.verified = info, verified
    except (CheckpointError, RecursionError, OSError) as error:
        saved.problem = f"{path}: {error}" if not isinstance(error, CheckpointError) else str(error)
    return saved
