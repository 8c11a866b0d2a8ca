"""Checkpoints: each is complete or absent, is verified before it is read, and holds data only."""

import contextlib
import hashlib
import io
import json
import os
import shutil
import sys
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bissl_zoo.errors import CheckpointError
from bissl_zoo.files import fsync, is_sha256, read_json, sha256_of, write_error

# torch is imported in the functions that read or write tensors, so that manifests are read without it

FORMAT = 3
MANIFEST_FILE, STATE_FILE, LATEST = "manifest.json", "state.pt", "latest"
DAMAGED = "damaged_"

#: format 2 of bissl_zoo 0.1, which is still read: tensors in safetensors, the rest as JSON with tags
_OLD_FORMAT, _OLD_FILES = 2, ("state.json", "state.safetensors")
_MANIFEST_LIMIT = 1 << 20
_KINDS = {"stage": str, "step": int, "total_steps": int, "done": bool, "architecture": str, "metrics": dict}


@dataclass(frozen=True)
class CheckpointInfo:
    """The manifest of a checkpoint.

    Attributes:
        architecture: name of the backbone.
        done: True if the stage ended with this step.
        files: sha256 and size in bytes by file name.
        metrics: measured after this step, such as `test/AP50`.
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
        """True if the stage ended before its last step."""
        return self.done and self.step < self.total_steps

    @property
    def sha256(self) -> str:
        """One digest of the checkpoint, made of those of its files."""
        digests = (f"{name} {file['sha256']}\n" for name, file in sorted(self.files.items()))
        return hashlib.sha256("".join(digests).encode()).hexdigest()


class Checkpointer:
    """The `checkpoints/` folder of a run: `<stage>/step_000120/` with the state and its manifest, and `latest`.

    Retention is decided by what is on disk, so that an interrupted run continues as it began.

    Args:
        keep: number of newest checkpoints of a stage that are kept.
        every: also keep checkpoints at multiples of this step.
    """

    def __init__(self, folder: Path, keep: int = 2, every: int | None = None) -> None:
        self.folder = Path(folder)
        self.keep, self.every = max(1, keep), every

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
        """Write a checkpoint to a temporary folder, flush it to disk, rename it, and remove checkpoints not kept.

        Args:
            state: nested dicts, lists and tuples of tensors and plain values.
            ended: the stage ends with this step although it is not the last.
        Raises:
            DiskError: the disk is full or fails; nothing half-written remains.
            CheckpointError: it cannot be written for another reason, or the state holds another type.
        """
        target = self.folder / stage / f"step_{step:06d}"
        draft = _draft_of(target)
        state = _plain(state)
        for leftover in target.parent.glob(".step_*"):  # of a killed process or a failing disk
            shutil.rmtree(leftover, ignore_errors=True)
        try:
            draft.mkdir(parents=True)
            files = {STATE_FILE: _write_state(draft / STATE_FILE, state)}
            done = ended or step >= total_steps
            info = CheckpointInfo(stage, step, total_steps, done, architecture, files, dict(metrics or {}))
            (draft / MANIFEST_FILE).write_text(json.dumps(asdict(info), indent=2) + "\n")
            (draft / LATEST).write_text(f"{stage}/{target.name}\n")  # here, so that a full disk leaves no checkpoint
            for path in (*draft.iterdir(), draft):
                fsync(path)
            if target.exists():  # the same step again, after a resume from an earlier one
                _remove(target)
            os.replace(draft, target)
            os.replace(target / LATEST, self.folder / LATEST)
            for folder in (target, target.parent, self.folder):
                fsync(folder)
        except OSError as error:
            shutil.rmtree(draft, ignore_errors=True)
            last = self.newest_step(stage)
            start = f"the beginning of {stage}" if last is None else f"step {last} of {stage}"
            advice = f"Earlier checkpoints are intact. Free space or fix the disk; --resume continues from {start}."
            raise write_error(f"Could not write checkpoint {target}", error, target, _size(state), advice) from error
        self._apply_retention(stage)
        return target

    def newest(self, stage: str) -> Path | None:
        """Return the stage's newest checkpoint, not verified, or None."""
        complete = self._complete(stage)
        return complete[-1] if complete else None

    def newest_step(self, stage: str) -> int | None:
        """Return the step of the stage's newest checkpoint, or None."""
        newest = self.newest(stage)
        return None if newest is None else _step_of(newest)

    def newest_intact(self, stage: str) -> tuple[Path | None, list[str]]:
        """Return the stage's newest checkpoint that verifies, or None, and a message for each that does not.

        Damaged checkpoints are renamed to `damaged_...` and never read again.
        """
        damaged = []
        for path in reversed(self._complete(stage)):
            try:
                verify(path)
                self._apply_retention(stage)  # a process may have been killed before it did
                return path, damaged
            except CheckpointError as error:
                aside = path.with_name(f"{DAMAGED}{path.name}-{uuid.uuid4().hex[:8]}")
                os.replace(path, aside)
                damaged.append(f"{error} It is kept as {aside}.")
        return None, damaged

    def _complete(self, stage: str) -> list[Path]:
        complete = (path.parent for path in (self.folder / stage).glob(f"step_*/{MANIFEST_FILE}"))
        numbered = (path for path in complete if path.name.partition("_")[2].isdecimal())  # not "step_000003 (copy)"
        return sorted(numbered, key=_step_of)

    def _apply_retention(self, stage: str) -> None:
        complete = self._complete(stage)
        keep = set(complete[-self.keep :])
        if self.every:
            keep |= {path for path in complete if _step_of(path) % self.every == 0}
        for path in complete:
            if path not in keep:
                _remove(path)


def read_info(path: Path) -> CheckpointInfo:
    """Read the manifest of the checkpoint folder `path`; its files are not verified.

    Raises:
        CheckpointError: the manifest is missing, damaged, or of another format.
    """
    try:
        fields = read_json(path / MANIFEST_FILE, _MANIFEST_LIMIT)
        if fields["format"] not in (FORMAT, _OLD_FORMAT):
            raise CheckpointError(
                f"Checkpoint {path} has format {fields['format']!r:.50}, and this version reads 2 and {FORMAT}. "
                "Use the version of bissl_zoo that wrote it, see environment.txt of the run."
            )
        info = CheckpointInfo(**fields)
        expected = {STATE_FILE} if info.format == FORMAT else set(_OLD_FILES)
        if info.files.keys() != expected:  # every file that is read is verified, and none is outside the folder
            raise ValueError(f"its files are not {', '.join(sorted(expected))}")
        if not all(is_sha256(file["sha256"]) and type(file["size"]) is int for file in info.files.values()):
            raise ValueError("a file has no valid size or sha256")
        wrong = [name for name, kind in _KINDS.items() if not isinstance(getattr(info, name), kind)]
        if wrong or not all(isinstance(value, (int, float)) for value in info.metrics.values()):
            raise ValueError(f"wrong type of {', '.join(wrong) or 'metrics'}")
        return info
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path / MANIFEST_FILE} cannot be read: {error}. Remove the checkpoint's folder to use the one before it."
        ) from error


def verify(path: Path) -> CheckpointInfo:
    """Compare a checkpoint's files with its manifest, and return the manifest.

    Raises:
        CheckpointError: with the name of the file that is missing or damaged.
    """
    info = read_info(path)
    for name, expected in info.files.items():
        file = path / name
        try:
            size = file.stat().st_size if file.is_file() else None
            digest = sha256_of(file) if size == expected["size"] else ""
        except OSError as error:
            raise CheckpointError(f"{file} cannot be read: {error}.") from error
        if size != expected["size"]:
            problem = "is missing" if size is None else f"has {size:,} bytes instead of {expected['size']:,}"
            raise CheckpointError(f"{file} {problem}.")
        if digest != expected["sha256"]:
            raise CheckpointError(f"{file} is damaged: sha256 {digest[:16]}..., expected {expected['sha256'][:16]}....")
    return info


def load_checkpoint(path: Path) -> tuple[CheckpointInfo, dict[str, Any]]:
    """Verify a checkpoint and read its state onto the CPU.

    Raises:
        CheckpointError: it is missing, damaged, or of another format.
    """
    info = verify(path)
    return info, read_state(path)


def read_state(path: Path) -> dict[str, Any]:
    """Read the state of a checkpoint that was verified before, onto the CPU; no code in it can run.

    Raises:
        CheckpointError: the file is missing or holds something else.
    """
    import torch

    try:
        if (path / _OLD_FILES[0]).exists():
            state = _read_old_state(path)
        else:
            state = torch.load(path / STATE_FILE, map_location="cpu", weights_only=True)
        if not isinstance(state, dict):
            raise ValueError(f"it holds {type(state).__name__}, not a dict")
        return state
    except Exception as error:  # a crafted file makes torch raise any type
        reason = str(error).partition("\n")[0][:200]
        raise CheckpointError(f"The state in {path} cannot be read ({type(error).__name__}: {reason}).") from error


def _write_state(path: Path, state: dict[str, Any]) -> dict[str, Any]:
    """Save a state; return the size and sha256 of the file."""
    import torch

    with open(path, "wb") as file:
        output = _HashedOutput(file)
        try:
            torch.save(state, output)
        except RuntimeError as error:  # torch raises it after an error of the disk
            raise output.error or error from error
    return {"size": output.size, "sha256": output.digest.hexdigest()}


class _HashedOutput:
    """A binary file that hashes what is written and remembers the first error of the disk."""

    def __init__(self, file: io.BufferedWriter) -> None:
        self.file, self.size, self.digest = file, 0, hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            self.file.write(data)
        except OSError as error:
            self.error = self.error or error
            raise
        self.size += len(data)
        self.digest.update(data)
        return len(data)

    def flush(self) -> None:
        self.file.flush()


def _plain(value: Any, place: str = "") -> Any:
    """Return a state with tensors copied to the CPU, so that equal states make equal files.

    Raises:
        CheckpointError: it holds something that `torch.load` would refuse to read.
    """
    import torch

    if isinstance(value, torch.Tensor):  # a copy, since a view would store the memory of the whole tensor
        return torch.empty_like(value, device="cpu", memory_format=torch.contiguous_format).copy_(value.detach())
    if isinstance(value, dict):
        return {_plain(key, place): _plain(item, f"{place}/{key}".lstrip("/")) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = (_plain(item, f"{place}/{number}".lstrip("/")) for number, item in enumerate(value))
        return tuple(items) if isinstance(value, tuple) else list(items)
    if isinstance(value, str):
        return sys.intern(str(value))  # pickle refers to an equal string only if it is the same object
    if value is None or isinstance(value, (bool, int, float)):
        return value
    raise CheckpointError(
        f"A checkpoint holds tensors and plain values; '{place}' is a {type(value).__name__}. Store it as a tensor (a "
        "buffer), a number or text."
    )


def _size(state: Any) -> int:
    """Return the bytes of the tensors in a state, about the size of its file."""
    if isinstance(state, dict):
        return sum(map(_size, state.values()))
    if isinstance(state, (list, tuple)):
        return sum(map(_size, state))
    return getattr(state, "nbytes", 0)


def _read_old_state(path: Path) -> Any:
    """Read a state of format 2."""
    from safetensors.torch import load_file

    tensors = load_file(path / _OLD_FILES[1])

    def decode(value: Any) -> Any:
        if isinstance(value, list):
            return [decode(item) for item in value]
        if not isinstance(value, dict):
            return value
        if "$tensor" in value:
            return tensors[value["$tensor"]]
        if "$tuple" in value:
            return tuple(decode(item) for item in value["$tuple"])
        if "$dict" in value:
            return {key: decode(item) for key, item in value["$dict"]}
        return {key: decode(item) for key, item in value.items()}

    return decode(read_json(path / _OLD_FILES[0]))


def _draft_of(path: Path) -> Path:
    return path.with_name(f".{path.name}-{uuid.uuid4().hex}")


def _step_of(path: Path) -> int:
    return int(path.name.partition("_")[2])


def _remove(path: Path) -> None:
    """Remove a checkpoint as a whole; what a failing disk keeps is removed by the next `save`."""
    aside = _draft_of(path)
    with contextlib.suppress(OSError):
        os.replace(path, aside)
    shutil.rmtree(aside, ignore_errors=True)
