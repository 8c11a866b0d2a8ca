"""List and show run directories. Reading never waits, changes nothing, and needs no torch."""

import os
import re
import shlex
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
from bissl_zoo.runs.lock import LOCK_FILE, writer_of

RUNNING, FINISHED, INTERRUPTED, EMPTY = "running", "finished", "interrupted", "no checkpoint"
#: beginnings of the metrics that summarise a stage, the best summary first
SUMMARY = ("test/", "probe/", "total_loss", "lower/total_loss")
#: bytes at the end of metrics.jsonl that are read
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
    """Last known step of a stage, total steps if known, recent values of its metrics, and checkpoints."""

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
        output_dir: `train.output_dir` of the config.
        damaged: checkpoints that a resumed run has set aside.
        results, entry, metadata: content of results.json, zoo_entry.json and metadata.json.
        problems: one line for each file that cannot be read.
    """

    folder: Path
    state: str = EMPTY
    writer: str | None = None
    changed: float = 0.0
    size: int = 0
    output_dir: str | None = None
    stages: list[StageProgress] = field(default_factory=list)
    damaged: list[Path] = field(default_factory=list)
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


def look_at(folder: Path, verified: bool = False) -> RunState:
    """Read the run directory `folder`; files that cannot be read are listed in `problems`.

    Args:
        verified: compare the files of every checkpoint with its manifest.
    """
    run = RunState(folder)
    try:
        _fill(run, verified)
    except OSError as error:
        run.problems.append(f"{error.filename} cannot be read: {error.strerror}")
    return run


def _fill(run: RunState, verified: bool) -> None:
    folder, checkpoints = run.folder, run.folder / "checkpoints"
    _read_config(run)
    run.size = _size_of(folder)
    run.changed = max(_modified(folder / name) for name in _WRITTEN)
    records = _last_records(run)
    run.results, run.metadata = _read(run, read_results), _read(run, read_metadata)
    run.entry = _read(run, lambda folder: read_json(folder / RECEIPT_FILE))
    if run.entry and "name" not in run.entry:
        run.problems.append(f"{RECEIPT_FILE} names no entry")
    planned = run.metadata.get("stages", {})
    present = sorted((path for path in _entries(checkpoints) if os.path.isdir(path)), key=_modified)
    for name in dict.fromkeys([*planned, *(path.name for path in present), *records]):
        run.stages.append(_stage(run, name, planned.get(name), records.get(name, {}), verified))
    run.writer = writer_of(folder)
    ended = os.path.isfile(folder / RESULTS_FILE) and all(stage.done for stage in run.stages)
    if run.writer:
        run.state = RUNNING
    elif run.newest:
        run.state = FINISHED if ended else INTERRUPTED


def _read_config(run: RunState) -> None:
    try:
        output_dir = OmegaConf.select(LazyConfig.load(run.folder / CONFIG_FILE), "train.output_dir")
    except (ConfigError, OmegaConfBaseException) as error:
        run.problems.append(str(error) if isinstance(error, ConfigError) else f"{CONFIG_FILE} cannot be read: {error}")
        return
    if isinstance(output_dir, str):
        run.output_dir = output_dir
    else:
        run.problems.append(f"{CONFIG_FILE} has no train.output_dir")


def _read(run: RunState, read: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    try:
        return read(run.folder)
    except CheckpointError as error:
        run.problems.append(str(error))
        return {}


def _last_records(run: RunState) -> dict[str, dict[str, Any]]:
    """Return by stage the last step and the last value of each metric, from the end of `metrics.jsonl`."""
    path, last, unread = run.folder / METRICS_FILE, {}, 0
    if not os.path.isfile(path):
        return {}
    try:
        with open(path, "rb") as file:
            if path.stat().st_size > TAIL:
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
        run.problems.append(f"{path.name} cannot be read: {error.strerror}")
    if unread:
        run.problems.append(f"{path.name}: {unread} lines cannot be read")
    return last


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = parse_json(line, parse_constant=str)
    except ValueError:
        return None
    if not isinstance(record, dict) or type(record.get("step")) is not int:
        return None
    stage = record.get("stage")  # the name of a folder
    return record if isinstance(stage, str) and re.fullmatch(r"\w{1,64}", stage, re.ASCII) else None


def _stage(run: RunState, name: str, total: int | None, metrics: dict[str, Any], verified: bool) -> StageProgress:
    stage = StageProgress(name, metrics.pop("step", 0), metrics=metrics)
    for path in _entries(run.folder / "checkpoints" / name):
        if path.name.startswith(DAMAGED):
            run.damaged.append(path)
        elif re.fullmatch(r"step_[0-9]{1,18}", path.name, re.ASCII):
            saved = SavedState(path, int(path.name.partition("_")[2]), _size_of(path))
            try:
                saved.info, saved.verified = (verify if verified else read_info)(path), verified
            except CheckpointError as error:
                saved.problem = str(error)
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


# ------------------------------------------------------------------------------------------------ text


def runs_table(runs: Iterable[RunState]) -> str:
    """Return a table with one line per run."""
    rows = []
    for run in runs:
        stage, saved = run.current, run.newest
        where = [stage.name, _steps(stage), _summary(run, stage)] if stage else ["-"] * 3
        newest = f"{saved.path.parent.name} {saved.step}" if saved else "-"
        more = f" (and {len(run.problems) - 1} more)" if len(run.problems) > 1 else ""
        note = f"{run.problems[0]}{more}" if run.problems else ""
        rows.append([str(run.folder), run.state, *where, newest, _size(run.size), _ago(run.changed), note])
    return _table(rows, ["run", "state", "stage", "step", "last", "checkpoint", "size", "written", "note"])


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


def verdict(results: dict[str, dict[str, Any]]) -> str:
    """Return the first test metric with and without BiSSL, or of the last fine-tuning; empty without results."""
    start, metrics = next(reversed(results.items()), ("", {}))
    name, value = next(iter(metrics.items()), ("", None))
    base = results.get("pretrained", {}).get(name) if start == "bissl" else None
    if base is None:
        return f"{name} {_short(value)}, fine-tuned from {start}." if name else ""
    return (
        f"{name} {value:.4f} with BiSSL, {base:.4f} by fine-tuning alone ({value - base:+.4f}). One seed is no "
        "evidence; bissl compare repeats both over seeds."
    )


def run_page(run: RunState) -> str:
    """Return all that a run directory holds as text and, if it is not finished, the command that resumes it."""
    seconds = run.metadata.get("wall_time_s", 0.0)
    head = {
        "run": run.folder,
        "state": run.state,
        "written by": run.writer,
        "written": _ago(run.changed),
        "disk": _size(run.size),
        "hardware": run.metadata.get("hardware"),
        "wall time": f"{seconds // 3600:.0f} h {seconds % 3600 / 60:.1f} min, without parts that were killed",
        "published": f"{run.entry['name']} at {run.entry.get('location')}" if "name" in run.entry else None,
    }
    parts = [_table([[key, str(value)] for key, value in head.items() if value is not None], (), "plain")]
    stages = [[stage.name, _steps(stage), _last_metrics(stage)] for stage in run.stages]
    parts.append(_table(stages, ["stage", "steps", "last metrics"]))
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
    if checkpoints:
        parts.append(_table(checkpoints, ["checkpoint", "size", ""]))
    if run.results:
        parts.append(printable(results_table(run.results)))
    parts += [f"problem: {_line(problem)}" for problem in run.problems]
    if run.state in (INTERRUPTED, EMPTY):
        parts.append(f"resume it with\n    {_line(resume_command(run))}")
    return "\n\n".join(parts)


def _last_metrics(stage: StageProgress) -> str:
    summary = [name for name in stage.metrics if name.startswith((*SUMMARY, "upper/total_loss", "solver/residual"))]
    return "  ".join(f"{name} {_short(stage.metrics[name])}" for name in summary if name.count("/") < 2) or "-"


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
