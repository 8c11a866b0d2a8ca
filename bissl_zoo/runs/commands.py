"""Runs as text, for a terminal: whatever a run directory holds, it comes out as plain lines."""

import shlex
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tabulate import tabulate

from bissl_zoo.engine.evaluate import results_table
from bissl_zoo.progress.console import printable
from bissl_zoo.runs.listing import RUNNING, RunState, StageProgress
from bissl_zoo.runs.pruning import Pruning

#: beginnings of the figures that say how a stage does, the most telling first
TELLING = ("test/", "probe/", "total_loss", "lower/total_loss")


def runs_table(runs: Iterable[RunState]) -> str:
    """A line per run."""
    header = ["run", "state", "stage", "step", "last", "checkpoint", "size", "written", "note"]
    return _table([_row(run) for run in runs], header)


def _row(run: RunState) -> list[str]:
    stage, saved = run.current, run.newest
    where = [stage.name, _steps(stage), _figure(run, stage)] if stage else ["-"] * 3
    kept = f"{saved.path.parent.name} {saved.step}" if saved else "-"
    more = f" (and {len(run.problems) - 1} more)" if len(run.problems) > 1 else ""
    note = f"{run.problems[0]}{more}" if run.problems else ""
    return [str(run.folder), run.state, *where, kept, _size(run.size), _ago(run.changed), note]


def _figure(run: RunState, stage: StageProgress) -> str:
    """The result of a run that has one, or what was last measured in its stage, or else the loss."""
    for start, figures in reversed(run.results.items()):
        for name, value in figures.items():
            return f"{name} {_short(value)} ({start})"
    names = (name for telling in TELLING for name in stage.metrics if name.startswith(telling))
    return next((f"{name} {_short(stage.metrics[name])}" for name in names), "-")


def run_page(run: RunState) -> str:
    """All that a run directory holds, and the command that resumes it."""
    parts = [_table(_head(run), (), "plain"), _table(_stages(run), ["stage", "steps", "last figures"])]
    checkpoints = _checkpoints(run)
    if checkpoints:
        parts.append(_table(checkpoints, ["checkpoint", "size", ""]))
    if run.results:
        parts.append(printable(results_table(run.results)))
    parts += [f"problem: {_line(problem)}" for problem in run.problems]
    if run.state != RUNNING:
        parts.append(f"resume it with\n    {_line(resume_command(run))}")
    return "\n\n".join(parts)


def _head(run: RunState) -> list[list[str]]:
    facts = {
        "run": run.folder,
        "state": run.state,
        "written by": run.writer,
        "written": _ago(run.changed),
        "disk": _size(run.size),
        "hardware": run.facts.get("hardware"),
        "wall time": _wall_time(run.facts.get("wall_time_s")),
        "published": f"{run.entry['name']} at {run.entry.get('location')}" if "name" in run.entry else None,
    }
    return [[key, str(value)] for key, value in facts.items() if value is not None]


def _stages(run: RunState) -> list[list[str]]:
    return [[stage.name, _steps(stage), _last_figures(stage)] for stage in run.stages]


def _last_figures(stage: StageProgress) -> str:
    shown = {name: value for name, value in stage.metrics.items() if not name.startswith(("time", "speed/"))}
    telling = [name for name in shown if name.startswith((*TELLING, "upper/total_loss", "solver/residual"))]
    names = [name for name in telling if name.count("/") < 2] or list(shown)[:4]
    return "  ".join(f"{name} {_short(shown[name])}" for name in names) or "-"


def _checkpoints(run: RunState) -> list[list[str]]:
    rows = []
    for stage in run.stages:
        for saved in stage.checkpoints:
            said = "unusable, see below" if saved.problem else "verified" if saved.verified else "not verified"
            rows.append([str(saved.path.relative_to(run.folder)), _size(saved.size), said])
    rows += [[str(path.relative_to(run.folder)), "", "set aside as damaged"] for path in run.aside]
    return rows + [[str(path.relative_to(run.folder)), "", "half-written"] for path in run.drafts]


def resume_command(run: RunState) -> str:
    """What goes on with the run where it lies now."""
    command = ["python", "tools/train_net.py", "--config-file", str(run.folder / "config.yaml"), "--resume"]
    if run.output_dir is None or Path(run.output_dir).resolve() != run.folder.resolve():  # it was moved here
        command.append(f"train.output_dir={run.folder}")
    return shlex.join(command)


def pruning_page(pruning: Pruning, removed: bool) -> str:
    """What of a run goes, what stays, and what is worth knowing."""
    lines = [f"stays    {_line(path)}" for path in pruning.stay]
    lines += [f"removed  {_line(path)}  {_size(size)}, {why}" for path, size, why in pruning.remove]
    lines += [_line(note) for note in pruning.notes]
    told = f"{len(pruning.remove)} folders, {_size(pruning.size)}"
    if not pruning.remove:
        return "\n".join([*lines, "There is nothing to remove."])
    if removed:
        return "\n".join([*lines, f"removed {told}"])
    lines = [line.replace("removed  ", "goes     ", 1) if line.startswith("removed  ") else line for line in lines]
    return "\n".join([*lines, f"{told} would be removed; --yes removes them"])


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


def _wall_time(seconds: Any) -> str | None:
    if not isinstance(seconds, (int, float)) or not 0 <= seconds < 1e12:
        return None
    return f"{seconds // 3600:.0f} h {seconds % 3600 / 60:.1f} min, without parts that were killed"


def _ago(moment: float) -> str:
    seconds = max(0.0, time.time() - moment)
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds // length:.0f} {unit} ago" if moment else "-"
    return f"{seconds:.0f} s ago"
