"""Checkpoints: each is complete or absent, and holds tensors and plain types only."""

import hashlib
import json
import os
import shutil
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from bissl_zoo.errors import CheckpointError

FORMAT = 1


@dataclass(frozen=True)
class CheckpointInfo:
    """What `state.json` says: the stage, its step, whether it ended there, the architecture and the state's digest."""

    stage: str
    step: int
    total_steps: int
    done: bool
    architecture: str
    sha256: str
    format: int = FORMAT


class Checkpointer:
    """The `checkpoints/` folder of a run: `<stage>/step_000120/{state.pt, state.json}` and `latest`.

    Args:
        folder: of the run's checkpoints.
        keep: how many of a stage's newest checkpoints stay; what is there is read from the folder, not remembered.
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder = Path(folder)
        self.keep = max(1, keep)

    def save(self, stage: str, step: int, total_steps: int, architecture: str, state: dict[str, Any]) -> Path:
        """Write a checkpoint beside its final place, force it to disk, rename it there, and drop the oldest."""
        target = self.folder / stage / f"step_{step:06d}"
        draft = target.with_name(f".{target.name}-{uuid.uuid4().hex}")
        for left in target.parent.glob(".step_*"):  # by a process that was killed while it wrote
            shutil.rmtree(left, ignore_errors=True)
        try:
            draft.mkdir(parents=True)
            with open(draft / "state.pt", "wb") as file:
                torch.save(state, file)
            info = CheckpointInfo(
                stage, step, total_steps, step >= total_steps, architecture, sha256_of(draft / "state.pt")
            )
            (draft / "state.json").write_text(json.dumps(asdict(info), indent=2) + "\n")
            for path in draft.iterdir():
                _fsync(path)
            if target.exists():  # the same step again, from a run that was taken up before it
                shutil.rmtree(target)
            os.replace(draft, target)
            write_atomically(self.folder / "latest", f"{stage}/{target.name}\n")
        except (OSError, RuntimeError) as error:  # torch reports a failed write as RuntimeError, the reason behind it
            shutil.rmtree(draft, ignore_errors=True)
            reason = error.__context__ if isinstance(error.__context__, OSError) else error
            raise CheckpointError(
                f"Could not write checkpoint {target}: {reason}. Earlier checkpoints are untouched; free space and go "
                "on with --resume."
            ) from error
        for old in self._complete(stage)[: -self.keep]:
            shutil.rmtree(old)
        return target

    def newest(self, stage: str) -> Path | None:
        """The stage's newest complete checkpoint, or None."""
        complete = self._complete(stage)
        return complete[-1] if complete else None

    def _complete(self, stage: str) -> list[Path]:
        complete = (path.parent for path in (self.folder / stage).glob("step_*/state.json"))
        return sorted(complete, key=lambda path: int(path.name.partition("_")[2]))


def read_info(path: Path) -> CheckpointInfo:
    """The facts of the checkpoint folder `path`."""
    try:
        fields = json.loads((path / "state.json").read_text())
        if fields["format"] != FORMAT:
            raise CheckpointError(
                f"Checkpoint {path} has format {fields['format']}; this version reads format {FORMAT}."
            )
        return CheckpointInfo(**fields)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path / 'state.json'} cannot be read: {error}. Remove the checkpoint's folder to use the one before it."
        ) from error


def load_checkpoint(path: Path) -> tuple[CheckpointInfo, dict[str, Any]]:
    """Read a checkpoint onto the CPU, its digest checked first; nothing is unpickled beyond tensors and plain types.

    Raises:
        CheckpointError: missing, damaged, or of a newer format.
    """
    info = read_info(path)
    found = sha256_of(path / "state.pt")
    if found != info.sha256:
        raise CheckpointError(
            f"{path / 'state.pt'} is damaged: sha256 {found[:16]}..., expected {info.sha256[:16]}.... "
            "Remove the folder to use the checkpoint before it."
        )
    return info, torch.load(path / "state.pt", map_location="cpu", weights_only=True)


def write_atomically(path: Path, text: str) -> None:
    """Replace a text file in one step: readers see the old or the new content, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}-{uuid.uuid4().hex}")
    try:
        draft.write_text(text)
        _fsync(draft)
        os.replace(draft, path)
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


def _fsync(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
