"""Checkpoints: each is complete or absent, verified before it is used, and holds data only."""

import contextlib
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bissl_zoo.errors import CheckpointError
from bissl_zoo.runs.disk import write_error
from bissl_zoo.runs.state_files import PLAIN_FILE, TENSORS_FILE, read_state, tensor_bytes, write_state

FORMAT = 2
MANIFEST_FILE = "manifest.json"
LATEST = "latest"
DAMAGED = "damaged_"

#: bytes of a manifest, far above what any has
_MANIFEST_LIMIT = 1 << 20
#: what the manifest's fields are
_KINDS = {"stage": str, "step": int, "total_steps": int, "done": bool, "architecture": str, "metrics": dict}


@dataclass(frozen=True)
class CheckpointInfo:
    """What the manifest says.

    Attributes:
        architecture: of the backbone; done: whether the stage ended with this step.
        files: sha256 and size in bytes by name.
        metrics: what was measured after this step, such as `test/AP50`.
    """

    stage: str
    step: int
    total_steps: int
    done: bool
    architecture: str
    files: dict[str, dict[str, Any]]
    metrics: dict[str, float] = field(default_factory=dict)
    format: int = FORMAT

    @property
    def ended(self) -> bool:
        """Whether the stage ended before its last step."""
        return self.done and self.step < self.total_steps

    @property
    def sha256(self) -> str:
        """One digest for the checkpoint: of those of its files."""
        digests = (f"{name} {facts['sha256']}\n" for name, facts in sorted(self.files.items()))
        return hashlib.sha256("".join(digests).encode()).hexdigest()


class Checkpointer:
    """The `checkpoints/` folder of a run: `<stage>/step_000120/` with the state, its manifest, and `latest`.

    What stays is decided by what is there, so that a run that was interrupted goes on as it began.

    Args:
        folder: of the run's checkpoints.
        keep: how many of a stage's newest checkpoints stay.
        every: checkpoints at multiples of so many steps stay too; None for none.
        best: a measured figure, such as `test/AP50`; the checkpoint of its highest value stays too.
    """

    def __init__(self, folder: Path, keep: int = 2, every: int | None = None, best: str | None = None) -> None:
        self.folder = Path(folder)
        self.keep, self.every, self.best = max(1, keep), every, best

    def save(
        self,
        stage: str,
        step: int,
        total_steps: int,
        architecture: str,
        state: dict[str, Any],
        metrics: Mapping[str, float] | None = None,
        ended: bool = False,
    ) -> Path:
        """Write a checkpoint beside its final place, force it to disk, rename it there, and drop what need not stay.

        Args:
            ended: the stage ends with this step although it is not the last.
        Raises:
            DiskError: the disk is full or fails; there is how much room is needed, and nothing half-written.
            CheckpointError: it could not be written for another reason.
        """
        target = self.folder / stage / f"step_{step:06d}"
        draft = _draft_of(target)
        for left in target.parent.glob(".step_*"):  # by a process that was killed while it wrote, or a failing disk
            shutil.rmtree(left, ignore_errors=True)
        try:
            draft.mkdir(parents=True)
            write_state(draft, state)
            files = {path.name: _facts(path) for path in sorted(draft.iterdir())}
            done = ended or step >= total_steps
            info = CheckpointInfo(stage, step, total_steps, done, architecture, files, dict(metrics or {}))
            (draft / MANIFEST_FILE).write_text(json.dumps(asdict(info), indent=2) + "\n")
            (draft / LATEST).write_text(f"{stage}/{target.name}\n")  # while a lack of room still leaves no checkpoint
            for path in (*draft.iterdir(), draft):
                _fsync(path)
            if target.exists():  # the same step again, from a run that was taken up before it
                _remove(target)
            os.replace(draft, target)
            os.replace(target / LATEST, self.folder / LATEST)
            for folder in (target, target.parent, self.folder):
                _fsync(folder)
        except OSError as error:
            shutil.rmtree(draft, ignore_errors=True)
            last = self.newest_step(stage)
            raise write_error(
                f"Could not write checkpoint {target}",
                error,
                target,
                tensor_bytes(state),
                "Earlier checkpoints are untouched; once that is mended, --resume goes on from "
                f"{f'the beginning of {stage}' if last is None else f'step {last} of {stage}'}.",
            ) from error
        self._drop(stage)
        return target

    def newest(self, stage: str) -> Path | None:
        """The stage's newest checkpoint, not verified, or None."""
        complete = self._complete(stage)
        return complete[-1] if complete else None

    def newest_step(self, stage: str) -> int | None:
        """The step of the stage's newest checkpoint, or None."""
        newest = self.newest(stage)
        return None if newest is None else _step_of(newest)

    def newest_intact(self, stage: str) -> tuple[Path | None, list[str]]:
        """The stage's newest checkpoint that verifies, or None, and what was wrong with those that do not.

        These are renamed to `damaged_...`, for someone to look at, and never looked at again. What need not stay goes,
        as it does after saving: a process may have been killed between the two.
        """
        damaged = []
        for path in reversed(self._complete(stage)):
            try:
                verify(path)
                self._drop(stage)
                return path, damaged
            except CheckpointError as error:
                aside = path.with_name(f"{DAMAGED}{path.name}-{uuid.uuid4().hex[:8]}")
                os.replace(path, aside)
                damaged.append(f"{error} It is kept as {aside}.")
        return None, damaged

    def _complete(self, stage: str) -> list[Path]:
        complete = (path.parent for path in (self.folder / stage).glob(f"step_*/{MANIFEST_FILE}"))
        own = (path for path in complete if path.name.partition("_")[2].isdecimal())  # and not "step_000003 (copy)"
        return sorted(own, key=_step_of)

    def _drop(self, stage: str) -> None:
        complete = self._complete(stage)
        stay = set(complete[-self.keep :])
        if self.every:
            stay |= {path for path in complete if _step_of(path) % self.every == 0}
        values = {}
        for path in complete if self.best else ():
            try:
                value = read_info(path).metrics.get(self.best)
            except CheckpointError:  # perhaps the best; a resume tells of it when it sets it aside
                stay.add(path)
                continue
            if value is not None:
                values[path] = value
        if values:
            stay.add(max(values, key=lambda path: (values[path], path.name)))
        for path in complete:
            if path not in stay:
                _remove(path)


def read_info(path: Path) -> CheckpointInfo:
    """The facts of the checkpoint folder `path`.

    Raises:
        CheckpointError: it has no manifest, or one that is damaged or of another version.
    """
    try:
        manifest = path / MANIFEST_FILE
        if not manifest.is_file() or manifest.stat().st_size > _MANIFEST_LIMIT:
            raise ValueError(f"it is missing, no file, or has more than {_MANIFEST_LIMIT:,} bytes")
        fields = json.loads(manifest.read_text())
        if fields["format"] != FORMAT:
            raise CheckpointError(
                f"Checkpoint {path} has format {fields['format']!r:.50}; this version reads format {FORMAT}."
            )
        info = CheckpointInfo(**fields)
        if info.files.keys() != {TENSORS_FILE, PLAIN_FILE}:  # nothing that is not verified, and nothing elsewhere
            raise ValueError(f"its files are not {TENSORS_FILE} and {PLAIN_FILE}")
        if not all(isinstance(facts["sha256"], str) and type(facts["size"]) is int for facts in info.files.values()):
            raise ValueError("sizes or digests that are none")
        wrong = [name for name, kind in _KINDS.items() if not isinstance(getattr(info, name), kind)]
        if wrong or not all(isinstance(value, (int, float)) for value in info.metrics.values()):
            raise ValueError(f"{', '.join(wrong) or 'metrics'}: of another kind than a manifest has")
        return info
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{path / MANIFEST_FILE} cannot be read: {error}. Remove the checkpoint's folder to use the one before it."
        ) from error


def verify(path: Path) -> CheckpointInfo:
    """Compare a checkpoint's files with its manifest.

    Raises:
        CheckpointError: with the file that is missing or damaged.
    """
    info = read_info(path)
    for name, facts in info.files.items():
        file = path / name
        size = file.stat().st_size if file.is_file() else None
        if size != facts["size"]:
            found = "is missing" if size is None else f"has {size:,} bytes instead of {facts['size']:,}"
            raise CheckpointError(f"{file} {found}.")
        found = sha256_of(file)
        if found != facts["sha256"]:
            raise CheckpointError(f"{file} is damaged: sha256 {found[:16]}..., expected {facts['sha256'][:16]}....")
    return info


def load_checkpoint(path: Path) -> tuple[CheckpointInfo, dict[str, Any]]:
    """Read a checkpoint onto the CPU, verified first; what it holds is data and cannot run anything.

    Raises:
        CheckpointError: missing, damaged, or of another format.
    """
    info = verify(path)
    return info, read_state(path)


def write_atomically(path: Path, text: str) -> None:
    """Replace a text file in one step: readers see the old or the new content, never a part.

    Raises:
        CheckpointError: it could not be written, and is as it was; a DiskError where the disk is full or fails.
    """
    draft = _draft_of(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(text)
        _fsync(draft)
        os.replace(draft, path)
        _fsync(path.parent)
    except OSError as error:
        then = "It is as it was; once that is mended, go on with --resume."
        raise write_error(f"{path} could not be written", error, path, len(text), then) from error
    finally:
        with contextlib.suppress(OSError):  # it is there only where something else is raised
            draft.unlink()


def _draft_of(path: Path) -> Path:
    return path.with_name(f".{path.name}-{uuid.uuid4().hex}")


def _step_of(path: Path) -> int:
    return int(path.name.partition("_")[2])


def _remove(path: Path) -> None:
    """Take a checkpoint away whole; what a failing disk keeps of it is taken away when the next one is saved."""
    aside = _draft_of(path)
    with contextlib.suppress(OSError):
        os.replace(path, aside)
    shutil.rmtree(aside, ignore_errors=True)


def sha256_of(path: Path) -> str:
    """The sha256 of a file, 64 hex digits."""
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}.") from error
    return digest.hexdigest()


def _facts(path: Path) -> dict[str, Any]:
    return {"size": path.stat().st_size, "sha256": sha256_of(path)}


def _fsync(path: Path) -> None:
    """Force a file, or a folder's list of names, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
