"""List, show and prune run directories. Reading never waits, changes nothing, and needs no torch."""

import os
import re
import shlex
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from tabulate import tabulate

from bissl_zoo.config import LazyConfig
from bissl_zoo.errors import CheckpointError, ConfigError, printable
from bissl_zoo.files import parse_json
from bissl_zoo.runs.checkpoint import DAMAGED, CheckpointInfo, read_info, verify
from bissl_zoo.runs.directory import (
    CONFIG_FILE,
    METRICS_FILE,
    RECEIPT_FILE,
    RESULTS_FILE,
    read_json,
    read_metadata,
    read_results,
)
from bissl_zoo.runs.lock import LOCK_FILE, run_lock, writer_of

RUNNING, FINISHED, INTERRUPTED, EMPTY = "running", "finished", "interrupted", "no checkpoint"
#: beginnings of the metrics that summarise a stage, the best summary first
SUMMARY = ("test/", "probe/", "total_loss", "lower/total_loss")
#: bytes at the end of metrics.jsonl that `runs list` reads
TAIL = 1 << 18
_WRITTEN = (CONFIG_FILE, METRICS_FILE, LOCK_FILE, RESULTS_FILE, RECEIPT_FILE, "checkpoints/latest")


@dataclass
class SavedState:
    """A checkpoint folder: its manifest, or the `problem` with it; `verified`: its files match the manifest."""

    path: Path
    step: int
    size: int
    info: CheckpointInfo | None = None
    problem: str | None = None
    verified: bool = False


@dataclass
class StageProgress:
    """Last known step of a stage, total steps if known, last value of each metric, and checkpoints."""

    name: str
    step: int = 0
    total: int | None = None
    done: bool = False
    metrics: dict[str, Any] = field(default_factory=dict)
    checkpoints: list[SavedState] = field(default_factory=list)


@dataclass
class RunState:
    """Content of a run directory.

    Attributes:
        state: running, finished, interrupted (a checkpoint can be resumed), or no checkpoint.
        writer: the process that holds the lock, if any.
        changed: time of the last write, in seconds since 1970.
        size: bytes of all files.
        output_dir, best: `train.output_dir` and `train.checkpoint.best` of the config.
        damaged: checkpoints that a resumed run has set aside; drafts: half-written ones of a killed run.
        results, entry, metadata: content of results.json, zoo_entry.json and metadata.json.
        problems: one line for each file that cannot be read.
    """

    folder: Path
    state: str = EMPTY
    writer: str | None = None
    changed: float = 0.0
    size: int = 0
    output_dir: str | None = None
    best: str | None = None
    stages: list[StageProgress] = field(default_factory=list)
    damaged: list[Path] = field(default_factory=list)
    drafts: list[Path] = field(default_factory=list)
    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    entry: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)
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
    """Yield the run directories in and below `folder`, except those in hidden folders and inside of runs.

    Raises:
        ConfigError: the folder cannot be read.
    """
    if is_run(folder):
        yield folder
        return
    try:
        below = sorted(path for path in folder.iterdir() if os.path.isdir(path) and not path.name.startswith("."))
    except OSError as error:
        raise ConfigError(f"{folder} cannot be read: {error.strerror}. Give a folder that contains runs.") from error
    for path in below:
        if not os.access(path, os.R_OK | os.X_OK):
            yield path  # listed with its problem
        elif not path.is_symlink() or is_run(path):  # a linked tree could contain itself
            yield from find_runs(path)


def is_run(folder: Path) -> bool:
    """Return True if `folder` contains a file that only runs have."""
    return any(os.path.isfile(folder / name) for name in (CONFIG_FILE, METRICS_FILE, LOCK_FILE))


def look_at(folder: Path, whole: bool = False, verified: bool = False) -> RunState:
    """Read the run directory `folder`; files that cannot be read are listed in `problems`.

    Args:
        whole: read all of `metrics.jsonl`, not only its end.
        verified: compare the files of every checkpoint with its manifest.
    """
    run = RunState(folder)
    try:
        _fill(run, whole, verified)
    except OSError as error:
        run.problems.append(f"{error.filename} cannot be read: {error.strerror}")
    return run


def _fill(run: RunState, whole: bool, verified: bool) -> None:
    folder, checkpoints = run.folder, run.folder / "checkpoints"
    _read_config(run)
    run.size = _size_of(folder)
    run.changed = max(_modified(folder / name) for name in _WRITTEN)
    records, problems = _last_records(folder / METRICS_FILE, whole)
    run.results, run.metadata = _read(run, read_results), _read(run, read_metadata)
    run.entry = _read(run, lambda folder: read_json(folder / RECEIPT_FILE))
    if run.entry and "name" not in run.entry:
        run.problems.append(f"{RECEIPT_FILE} names no entry")
    planned = run.metadata.get("stages", {})
    present = sorted((path for path in _entries(checkpoints) if os.path.isdir(path)), key=_modified)
    for name in dict.fromkeys([*planned, *(path.name for path in present), *records]):
        run.stages.append(_stage(run, name, planned.get(name), records.get(name, {}), verified))
    run.problems += problems
    run.writer = writer_of(folder)
    ended = os.path.isfile(folder / RESULTS_FILE) and all(stage.done for stage in run.stages)
    if run.writer:
        run.state = RUNNING
    elif run.newest:
        run.state = FINISHED if ended else INTERRUPTED


def _read_config(run: RunState) -> None:
    try:
        cfg = LazyConfig.load(run.folder / CONFIG_FILE)
        values = [OmegaConf.select(cfg, key) for key in ("train.output_dir", "train.checkpoint.best")]
    except ConfigError as error:
        run.problems.append(str(error))
        return
    except OmegaConfBaseException as error:
        run.problems.append(f"{CONFIG_FILE} cannot be read: {error}")
        return
    run.output_dir, run.best = (value if isinstance(value, str) else None for value in values)
    if "train" not in cfg:
        run.problems.append(f"{CONFIG_FILE} has no section train")


def _read(run: RunState, read: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    try:
        return read(run.folder)
    except CheckpointError as error:
        run.problems.append(str(error))
        return {}


def _last_records(path: Path, whole: bool) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Return by stage the last step and the last value of each metric; and the problems of the file."""
    last: dict[str, dict[str, Any]] = {}
    unread = 0
    if not os.path.isfile(path):
        return last, []
    try:
        with open(path, "rb") as file:
            if not whole and path.stat().st_size > TAIL:
                file.seek(-TAIL, os.SEEK_END)
                file.readline()  # the rest of a line
            for line in file:
                record = _record(line)
                if record:
                    stage = record.pop("stage")
                    last[stage] = {**last.get(stage, {}), **record}
                elif line.endswith(b"\n"):  # otherwise it is being written, or a resumed run drops it
                    unread += 1
    except OSError as error:
        return last, [f"{path.name} cannot be read: {error.strerror}"]
    return last, [f"{path.name}: {unread} lines cannot be read"] if unread else []


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = parse_json(line, parse_constant=str)
    except ValueError:
        return None
    if not isinstance(record, dict) or type(record.get("step")) is not int:
        return None
    # the stage is the name of a folder
    return record if re.fullmatch(r"\w{1,64}", str(record.get("stage")), re.ASCII) else None


def _stage(run: RunState, name: str, total: int | None, metrics: dict[str, Any], verified: bool) -> StageProgress:
    stage = StageProgress(name, metrics.pop("step", 0), metrics=metrics)
    for path in _entries(run.folder / "checkpoints" / name):
        if path.name.startswith(DAMAGED):
            run.damaged.append(path)
        elif path.name.startswith(".step_"):
            run.drafts.append(path)
        elif re.fullmatch(r"step_[0-9]{1,18}", path.name, re.ASCII):
            saved = _saved(path, verified)
            stage.checkpoints += [saved] if os.path.isdir(path) else []  # the run may just have removed it
    stage.checkpoints.sort(key=lambda saved: saved.step)
    run.problems += [saved.problem for saved in stage.checkpoints if saved.problem]
    info = next((saved.info for saved in reversed(stage.checkpoints) if saved.info), None)
    stage.total = total or (info.total_steps if info else None)
    newest = stage.checkpoints[-1].info if stage.checkpoints else None
    saved_step = stage.checkpoints[-1].step if newest else 0
    stage.done = bool(newest and newest.ended) or (stage.total is not None and saved_step >= stage.total)
    stage.step = max(stage.step, saved_step)
    return stage


def _saved(path: Path, verified: bool) -> SavedState:
    saved = SavedState(path, int(path.name.partition("_")[2]), _size_of(path))
    try:
        saved.info, saved.verified = (verify if verified else read_info)(path), verified
    except CheckpointError as error:
        saved.problem = str(error)
    return saved


def _entries(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if os.path.isdir(folder) else []


def _modified(path: Path) -> float:
    """Return when a file was last written, in seconds since 1970; 0 if it does not exist."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _size_of(folder: Path) -> int:
    """Return the bytes of all files in and below `folder`; files that are removed meanwhile do not count."""
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(root, name)).st_size
            except FileNotFoundError:
                continue
    return total


def runs_table(runs: Iterable[RunState]) -> str:
    """Return a table with one line per run."""
    header = ["run", "state", "stage", "step", "last", "checkpoint", "size", "written", "note"]
    return _table([_row(run) for run in runs], header)


def _row(run: RunState) -> list[str]:
    stage, saved = run.current, run.newest
    where = [stage.name, _steps(stage), _summary(run, stage)] if stage else ["-"] * 3
    newest = f"{saved.path.parent.name} {saved.step}" if saved else "-"
    more = f" (and {len(run.problems) - 1} more)" if len(run.problems) > 1 else ""
    note = f"{run.problems[0]}{more}" if run.problems else ""
    return [str(run.folder), run.state, *where, newest, _size(run.size), _ago(run.changed), note]


def _summary(run: RunState, stage: StageProgress) -> str:
    """Return the result of the run if it has one, else the last evaluation of its stage, else the loss."""
    for start, metrics in reversed(run.results.items()):
        for name, value in metrics.items():
            return f"{name} {_short(value)} ({start})"
    names = (name for beginning in SUMMARY for name in stage.metrics if name.startswith(beginning))
    return next((f"{name} {_short(stage.metrics[name])}" for name in names), "-")


def results_table(results: dict[str, dict[str, float]]) -> str:
    """Return a table of the test metrics of one or more fine-tunings, one row per starting point."""
    names = dict.fromkeys(name for metrics in results.values() for name in metrics if "/" not in name)
    default = {"left_out": 0}  # images that an evaluation left out, which only some rows have
    rows = [
        [start, *(metrics.get(name, default.get(name, float("nan"))) for name in names)]
        for start, metrics in results.items()
    ]
    return tabulate(rows, headers=["fine-tuned from", *names], floatfmt=".4f")


def run_page(run: RunState) -> str:
    """Return all that a run directory holds as text and, if it is not finished, the command that resumes it."""
    stages = [[stage.name, _steps(stage), _last_metrics(stage)] for stage in run.stages]
    parts = [_table(_head(run), (), "plain"), _table(stages, ["stage", "steps", "last metrics"])]
    checkpoints = [
        [
            str(saved.path.relative_to(run.folder)),
            _size(saved.size),
            "unusable, see below" if saved.problem else "verified" if saved.verified else "not verified",
        ]
        for stage in run.stages
        for saved in stage.checkpoints
    ]
    checkpoints += [[str(path.relative_to(run.folder)), "", "set aside as damaged"] for path in run.damaged]
    checkpoints += [[str(path.relative_to(run.folder)), "", "half-written"] for path in run.drafts]
    if checkpoints:
        parts.append(_table(checkpoints, ["checkpoint", "size", ""]))
    if run.results:
        parts.append(printable(results_table(run.results)))
    parts += [f"problem: {_line(problem)}" for problem in run.problems]
    if run.state in (INTERRUPTED, EMPTY):
        parts.append(f"resume it with\n    {_line(resume_command(run))}")
    return "\n\n".join(parts)


def _head(run: RunState) -> list[list[str]]:
    seconds = run.metadata.get("wall_time_s", 0.0)
    rows = {
        "run": run.folder,
        "state": run.state,
        "written by": run.writer,
        "written": _ago(run.changed),
        "disk": _size(run.size),
        "hardware": run.metadata.get("hardware"),
        "wall time": f"{seconds // 3600:.0f} h {seconds % 3600 / 60:.1f} min, without parts that were killed",
        "published": f"{run.entry['name']} at {run.entry.get('location')}" if "name" in run.entry else None,
    }
    return [[key, str(value)] for key, value in rows.items() if value is not None]


def _last_metrics(stage: StageProgress) -> str:
    metrics = {name: value for name, value in stage.metrics.items() if not name.startswith(("time", "speed/"))}
    summary = [name for name in metrics if name.startswith((*SUMMARY, "upper/total_loss", "solver/residual"))]
    names = [name for name in summary if name.count("/") < 2] or list(metrics)[:4]
    return "  ".join(f"{name} {_short(metrics[name])}" for name in names) or "-"


def resume_command(run: RunState) -> str:
    """Return the command that resumes the run in the folder where it is now."""
    command = ["bissl", "train", "--config-file", str(run.folder / CONFIG_FILE), "--resume"]
    if run.output_dir is None or Path(run.output_dir).resolve() != run.folder.resolve():  # it was moved
        command.append(f"train.output_dir={run.folder}")
    return shlex.join(command)


def _table(rows: list[list[str]], header: Any, style: str = "simple") -> str:
    cells = [[_line(cell) for cell in row] for row in rows]
    return tabulate(cells, header, tablefmt=style, disable_numparse=True)


def _line(value: Any) -> str:
    return " ".join(printable(str(value)).split())


def _steps(stage: StageProgress) -> str:
    return f"{stage.step} of {stage.total}" if stage.total is not None else str(stage.step)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)[:40]


def _size(count: int) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"


def _ago(moment: float) -> str:
    seconds = max(0.0, time.time() - moment)
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds // length:.0f} {unit} ago" if moment else "-"
    return f"{seconds:.0f} s ago"


@dataclass
class Pruning:
    """Folders to remove, each with its bytes and the reason; checkpoints that are kept; and notes, a line each."""

    remove: list[tuple[Path, int, str]] = field(default_factory=list)
    keep: list[Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def page(self, removed: bool) -> str:
        """Return what is kept and what would be removed, or was if `removed`, as text."""
        verb = "removed" if removed else "remove"
        lines = [f"keep     {_line(path)}" for path in self.keep]
        lines += [f"{verb:<8} {_line(path)}  {_size(size)}, {reason}" for path, size, reason in self.remove]
        lines += [_line(note) for note in self.notes]
        if not self.remove:
            return "\n".join([*lines, "There is nothing to remove."])
        total = f"{len(self.remove)} folders, {_size(sum(size for _, size, _ in self.remove))}"
        return "\n".join([*lines, f"removed {total}" if removed else f"{total} would be removed; --yes removes them"])


def prune(folder: Path, keep: int | None = None, damaged: bool = False, dry_run: bool = False) -> Pruning:
    """Remove checkpoints that nothing needs any more, and half-written ones of a killed run; return what was removed.

    Kept checkpoints are verified first; an older one is kept in the place of a damaged one. The checkpoint with the
    best `train.checkpoint.best` is kept too.

    Args:
        keep: intact checkpoints of each stage to keep; by default 1 of a finished run (`train.init`, `--eval-only` and
            publishing read a stage's last one), else 2.
        damaged: also remove checkpoints that were set aside as damaged.
        dry_run: remove nothing.
    Raises:
        CheckpointError: there is no run, it is running, or a folder cannot be removed.
    """
    if not is_run(folder):
        raise CheckpointError(f"There is no run in {folder} (no {CONFIG_FILE}). Give the directory of a run.")
    run = look_at(folder)
    if run.state == RUNNING:
        raise CheckpointError(f"The run in {folder} is being written by {run.writer}. Stop it first.")
    keep = keep or (1 if run.state == FINISHED else 2)
    if dry_run:
        return _plan(run, keep, damaged)
    with run_lock(folder):
        pruning = _plan(look_at(folder), keep, damaged)
        for path, _, _ in pruning.remove:
            try:
                shutil.rmtree(path)
            except OSError as error:
                raise CheckpointError(f"{path} cannot be removed: {error.strerror}.") from error
    return pruning


def _plan(run: RunState, keep: int, damaged: bool) -> Pruning:
    pruning = Pruning()
    for stage in run.stages:
        _plan_stage(pruning, run, stage, keep)
    pruning.remove += [(path, _size_of(path), "half-written") for path in run.drafts]
    if damaged:
        pruning.remove += [(path, _size_of(path), "damaged") for path in run.damaged]
    elif run.damaged:
        size = _size(sum(map(_size_of, run.damaged)))
        pruning.notes.append(f"set aside as damaged: {len(run.damaged)}, {size}; --damaged removes them")
    root = run.folder.resolve()
    linked = [path for path, _, _ in pruning.remove if path.is_symlink() or root not in path.resolve().parents]
    pruning.remove = [row for row in pruning.remove if row[0] not in linked]
    pruning.notes += [f"{path} is a link to another place, and is not removed" for path in linked]
    return pruning


def _plan_stage(pruning: Pruning, run: RunState, stage: StageProgress, keep: int) -> None:
    intact: list[SavedState] = []
    others: list[SavedState] = []
    for saved in reversed(stage.checkpoints):
        if saved.problem or len(intact) == keep:
            others.append(saved)
            continue
        try:
            verify(saved.path)
            intact.append(saved)
        except CheckpointError as error:
            saved.problem = str(error)
            others.append(saved)
    pruning.notes += [f"not removed: {saved.problem}" for saved in others if saved.problem]
    measured = {saved.path: saved.info.metrics.get(run.best) for saved in stage.checkpoints if saved.info}
    values = {path: value for path, value in measured.items() if isinstance(value, (int, float))}
    best = max(values, key=lambda path: (values[path], path.name)) if values else None
    for saved in reversed(others):
        if not saved.problem and saved.path != best:
            pruning.remove.append((saved.path, saved.size, f"step {saved.step} of {stage.name}"))
    pruning.keep += [saved.path for saved in stage.checkpoints if saved in intact or saved.path == best]
