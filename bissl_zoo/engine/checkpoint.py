"""Checkpoints: each is complete or absent, verified before it is used, and holds data only."""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bissl_zoo.engine.state_files import read_state, write_state
from bissl_zoo.errors import CheckpointError

FORMAT = 2
MANIFEST_FILE = "manifest.json"
DAMAGED = "damaged_"


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
    ) -> Path:
        """Write a checkpoint beside its final place, force it to disk, rename it there, and drop what need not stay.

        Raises:
            CheckpointError: it could not be written; there is the reason, and nothing half-written.
        """
        target = self.folder / stage / f"step_{step:06d}"
        draft = target.with_name(f".{target.name}-{uuid.uuid4().hex}")
        for left in target.parent.glob(".step_*"):  # by a process that was killed while it wrote
            shutil.rmtree(left, ignore_errors=True)
        try:
            draft.mkdir(parents=True)
            write_state(draft, state)
            files = {path.name: _facts(path) for path in sorted(draft.iterdir())}
            info = CheckpointInfo(
                stage, step, total_steps, step >= total_steps, architecture, files, dict(metrics or {})
            )
            (draft / MANIFEST_FILE).write_text(json.dumps(asdict(info), indent=2) + "\n")
            for path in (*draft.iterdir(), draft):
                _fsync(path)
            if target.exists():  # the same step again, from a run that was taken up before it
                shutil.rmtree(target)
            os.replace(draft, target)
            _fsync(target.parent)
            write_atomically(self.folder / "latest", f"{stage}/{target.name}\n")
        except OSError as error:
            shutil.rmtree(draft, ignore_errors=True)
            raise CheckpointError(
                f"Could not write checkpoint {target}: {error}. Earlier checkpoints are untouched; free space and go "
                "on with --resume."
            ) from error
        for old in self._to_drop(stage):
            shutil.rmtree(old)
        return target

    def newest(self, stage: str) -> Path | None:
        """The stage's newest checkpoint, not verified, or None."""
        complete = self._complete(stage)
        return complete[-1] if complete else None

    def newest_intact(self, stage: str) -> tuple[Path | None, list[str]]:
        """The stage's newest checkpoint that verifies, or None, and what was wrong with those that do not.

        These are renamed to `damaged_...`, for someone to look at, and never looked at again.
        """
        damaged = []
        for path in reversed(self._complete(stage)):
            try:
                verify(path)
                return path, damaged
            except CheckpointError as error:
                aside = path.with_name(f"{DAMAGED}{path.name}-{uuid.uuid4().hex[:8]}")
                os.replace(path, aside)
                damaged.append(f"{error} It is kept as {aside}.")
        return None, damaged

    def _complete(self, stage: str) -> list[Path]:
        complete = (path.parent for path in (self.folder / stage).glob(f"step_*/{MANIFEST_FILE}"))
        return sorted(complete, key=lambda path: int(path.name.partition("_")[2]))

    def _to_drop(self, stage: str) -> list[Path]:
        complete = self._complete(stage)
        stay = set(complete[-self.keep :])
        if self.every:
            stay |= {path for path in complete if int(path.name.partition("_")[2]) % self.every == 0}
        if self.best:
            measured = {path: read_info(path).metrics.get(self.best) for path in complete}
            values = {path: value for path, value in measured.items() if value is not None}
            stay |= {max(values, key=lambda path: (values[path], path.name))} if values else set()
        return [path for path in complete if path not in stay]


def read_info(path: Path) -> CheckpointInfo:
    """The facts of the checkpoint folder `path`.

    Raises:
        CheckpointError: it has no manifest, or one that is damaged or of another version.
    """
    try:
        fields = json.loads((path / MANIFEST_FILE).read_text())
        if fields["format"] != FORMAT:
            raise CheckpointError(
                f"Checkpoint {path} has format {fields['format']}; this version reads format {FORMAT}."
            )
        info = CheckpointInfo(**fields)
        if not all(isinstance(facts["sha256"], str) and facts["size"] >= 0 for facts in info.files.values()):
            raise ValueError("sizes or digests that are none")
        return info
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
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
    """Replace a text file in one step: readers see the old or the new content, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}-{uuid.uuid4().hex}")
    try:
        draft.write_text(text)
        _fsync(draft)
        os.replace(draft, path)
        _fsync(path.parent)
    finally:
        draft.unlink(missing_ok=True)


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
