"""What of a run may go to free disk: checkpoints that nothing asks for any more."""

import shutil
from dataclasses import dataclass, field
from pathlib import Path

from bissl_zoo.errors import CheckpointError
from bissl_zoo.runs.checkpoint import verify
from bissl_zoo.runs.listing import (
    CONFIG_FILE,
    FINISHED,
    RUNNING,
    RunState,
    SavedState,
    StageProgress,
    is_run,
    look_at,
)
from bissl_zoo.runs.lock import run_lock
from bissl_zoo.runs.run_files import size_of


@dataclass
class Pruning:
    """What would be removed, with its bytes and why; what stays by name; and what is worth knowing, a line each."""

    remove: list[tuple[Path, int, str]] = field(default_factory=list)
    stay: list[Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def size(self) -> int:
        """Bytes that would be freed."""
        return sum(size for _, size, _ in self.remove)


def plan(folder: Path, keep: int | None = None, damaged: bool = False) -> Pruning:
    """What may go: all checkpoints of a stage but the newest, and what a killed process left half-written.

    What stays is verified first. An older one stays in the place of one that is damaged, and with it the checkpoint of
    the highest value of `train.checkpoint.best`.

    Args:
        keep: how many intact ones of each stage stay; None for one of a finished run, as `train.init`, `--eval-only`
            and publishing read the last of a stage, and two of another.
        damaged: also remove what a resumed run has set aside as damaged.
    Raises:
        CheckpointError: there is no run, or it is running.
    """
    run = _idle(folder)
    return _plan(run, keep or _usual(run), damaged)


def prune(folder: Path, keep: int | None = None, damaged: bool = False) -> Pruning:
    """Remove what `plan` says, while no other process can take up the run.

    Raises:
        CheckpointError: as `plan` does, or something cannot be removed.
    """
    keep = keep or _usual(_idle(folder))
    with run_lock(folder):
        pruning = _plan(look_at(folder), keep, damaged)
        for path, _, _ in pruning.remove:
            try:
                shutil.rmtree(path)
            except OSError as error:
                raise CheckpointError(f"{path} cannot be removed: {error.strerror}.") from error
    return pruning


def _idle(folder: Path) -> RunState:
    if not is_run(folder):
        raise CheckpointError(f"There is no run in {folder} (no {CONFIG_FILE}). Give the directory of a run.")
    run = look_at(folder)
    if run.state == RUNNING:
        raise CheckpointError(f"The run in {folder} is being written by {run.writer}. Stop it first.")
    return run


def _usual(run: RunState) -> int:
    return 1 if run.state == FINISHED else 2


def _plan(run: RunState, keep: int, damaged: bool) -> Pruning:
    pruning = Pruning()
    for stage in run.stages:
        _plan_stage(pruning, run, stage, keep)
    pruning.remove += [(path, size_of(path), "half-written") for path in run.drafts]
    if damaged:
        pruning.remove += [(path, size_of(path), "damaged") for path in run.aside]
    elif run.aside:
        size = sum(map(size_of, run.aside)) / 1e6
        pruning.notes.append(f"set aside as damaged: {len(run.aside)}, {size:,.1f} MB; --damaged removes them")
    within = run.folder.resolve()
    elsewhere = [path for path, _, _ in pruning.remove if path.is_symlink() or within not in path.resolve().parents]
    pruning.remove = [row for row in pruning.remove if row[0] not in elsewhere]
    pruning.notes += [f"{path} lies elsewhere, behind a link, and is left alone" for path in elsewhere]
    return pruning


def _plan_stage(pruning: Pruning, run: RunState, stage: StageProgress, keep: int) -> None:
    intact: list[SavedState] = []
    rest: list[SavedState] = []
    for saved in reversed(stage.checkpoints):
        if saved.problem or len(intact) == keep:
            rest.append(saved)
            continue
        try:
            verify(saved.path)
            intact.append(saved)
        except CheckpointError as error:
            saved.problem = str(error)
            rest.append(saved)
    pruning.notes += [f"left alone: {saved.problem}" for saved in rest if saved.problem]
    measured = {saved.path: saved.info.metrics.get(run.best) for saved in stage.checkpoints if saved.info}
    figures = {path: value for path, value in measured.items() if isinstance(value, (int, float))}
    best = max(figures, key=lambda path: (figures[path], path.name)) if figures else None
    for saved in reversed(rest):
        if not saved.problem and saved.path != best:
            pruning.remove.append((saved.path, saved.size, f"step {saved.step} of {stage.name}"))
    pruning.stay += [saved.path for saved in stage.checkpoints if saved in intact or saved.path == best]
