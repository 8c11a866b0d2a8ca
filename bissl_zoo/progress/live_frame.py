"""The lines of the live display, for any width."""

import resource
import sys
from collections.abc import Sequence
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import torch
from rich.cells import cell_len
from rich.text import Text

from bissl_zoo.progress.console import clock, printable, short
from bissl_zoo.progress.run_view import RunView, StageView
from bissl_zoo.runs.disk import format_size

#: columns of the names on the left, and of the progress bar at most
LABEL, BAR = 15, 80
#: figures of a level and of the solver, in this order, where a step has them
LEVEL_FIGURES = ("total_loss", "lr", "grad_norm")
SOLVER_FIGURES = ("residual", "products", "status", "damping")


def frame(run: RunView, now: float, width: int, ascii_only: bool = False) -> list[Text]:
    """The display at the time `now` (of `time.monotonic`), no line longer than `width`."""
    view = run.stage()
    lines = [_head(run, now, width, ascii_only)]
    stage = [f"{run.number} of {len(run.stages)}: {run.stages[run.number - 1].name}"] if run.number else []
    if view:
        # of steps the ones that are done are counted, of alternations the one whose steps are being taken
        unit, count = ("alternation", view.step + bool(view.phase)) if len(view.levels) > 1 else ("step", view.step)
        stage += [f"{unit} {count}/{view.total_steps}", view.phase]
    lines += _row("stage", [*stage, run.doing], width, "bold")
    if view:
        lines += [_bar(view.fraction, width, ascii_only), *_figures(view, width)]
    lines += _row("memory", [_memory(run.device)], width)
    left = view.left if view else None
    lines += _row("time left", [f"stage {clock(left)}", f"run {clock(run.left(view))}"], width)
    lines += _row("evaluation", run.evaluation.split("  "), width)
    if run.checkpoint:
        place, written = run.checkpoint
        lines += _row("checkpoint", [place, f"{clock(now - written)} ago"], width)
    return lines


def _figures(view: StageView, width: int) -> list[Text]:
    lines = []
    for level in view.levels:
        several = len(view.levels) > 1
        values = _named(view.figures, f"{level}/" if several else "", LEVEL_FIGURES)
        lines += _row(f"{level} level" if several else "training", values, width)
    lines += _row("hypergradient", _named(view.figures, "solver/", SOLVER_FIGURES), width)
    speed = [f"{view.seconds:.3g} s/step"] if view.seconds is not None else []
    if view.speed:
        speed += ["{images_per_second:.0f} images/s".format(**view.speed)]
        speed += ["{waiting:.0%} waiting for data".format(**view.speed)]
    return lines + _row("speed", speed, width)


def _head(run: RunView, now: float, width: int, ascii_only: bool) -> Text:
    """The run directory, its end where there is no room for all of it, and the time since the start."""
    line, elapsed = "-" if ascii_only else "─", clock(now - run.began)
    room = width - len(elapsed) - 6
    folder = printable(run.folder)
    if cell_len(folder) > room:
        folder = "..." + folder[-max(1, room - 3) :]
    fill = line * max(1, width - cell_len(folder) - len(elapsed) - 5)
    return _cropped(Text.assemble((f"{line} ", "dim"), (folder, "bold"), (f" {fill} ", "dim"), elapsed), width)


def _bar(fraction: float, width: int, ascii_only: bool) -> Text:
    full, empty = ("#", ".") if ascii_only else ("━", "─")
    length = max(1, min(BAR, width - 6))
    done = round(min(max(fraction, 0.0), 1.0) * length)
    percent = f" {int(100 * fraction):3d}%"
    return Text.assemble((full * done, "cyan"), (empty * (length - done), "bright_black"), percent)


def _row(label: str, items: Sequence[str], width: int, style: str = "") -> list[Text]:
    """A name and what it has to say; what does not fit goes on below, indented."""
    lines: list[str] = []
    for item in filter(None, items):
        longer = f"{lines[-1]}  {item}" if lines else item
        if lines and len(longer) <= width - LABEL:
            lines[-1] = longer
        else:
            lines.append(item)
    return [
        _cropped(Text.assemble((head.ljust(LABEL), "dim"), (printable(line), style)), width)
        for head, line in zip(chain([label], repeat("")), lines, strict=False)
    ]


def _cropped(line: Text, width: int) -> Text:
    line.no_wrap, line.overflow = True, "crop"
    line.truncate(width, overflow="crop")
    return line


def _named(figures: dict[str, Any], prefix: str, names: Sequence[str]) -> list[str]:
    found = {name: figures[f"{prefix}{name}"] for name in names if f"{prefix}{name}" in figures}
    return [f"{name} {short(value)}" for name, value in found.items()]


def _memory(device: torch.device | None) -> str:
    if device is not None and device.type == "cuda":
        stats = torch.cuda.memory_stats(device)
        now, peak = (stats.get(f"allocated_bytes.all.{which}", 0) for which in ("current", "peak"))
        return f"GPU {format_size(now)} allocated, {format_size(peak)} peak"
    pages = Path("/proc/self/statm")
    if pages.exists():
        return f"{format_size(int(pages.read_text().split()[1]) * resource.getpagesize())} of this process"
    unit = 1 if sys.platform == "darwin" else 1024
    return f"{format_size(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)} of this process at most"
