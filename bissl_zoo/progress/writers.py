"""Writers of metrics: `metrics.jsonl`, TensorBoard, and Weights & Biases. A failure is a warning; the run continues."""

import contextlib
import json
import logging
import math
import os
import secrets
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bissl_zoo.distributed import is_main_process
from bissl_zoo.errors import ConfigError, did_you_mean
from bissl_zoo.files import follow, parse_json, reason_of, write_error
from bissl_zoo.runs.directory import METRICS_FILE

logger = logging.getLogger(__name__)

NAMES = ("json", "tensorboard", "wandb")
#: entries of a file that are kept in memory while the disk refuses writes; the oldest are lost first
BUFFER_LIMIT = 10_000
#: project of Weights & Biases if WANDB_PROJECT is not set, and seconds to wait for uploads at the end of the run
PROJECT, UPLOAD_TIMEOUT = "bissl_zoo", 60.0


@dataclass(frozen=True)
class Record:
    """Metrics after a step of a stage; records of finer grain than a step have their own number in `metrics[key]`."""

    stage: str
    step: int
    metrics: dict[str, Any]
    key: str = ""

    @property
    def number(self) -> int:
        """The step, or the record's own number."""
        return self.metrics[self.key] if self.key else self.step

    def numbers(self) -> dict[str, float]:
        """Return the metrics that can be plotted."""
        return {k: v for k, v in self.metrics.items() if isinstance(v, (int, float)) and k != self.key}


class Writer:
    """A destination of metrics; an optional one that fails is a warning, and the run continues without it."""

    name = ""
    folder: Path
    target: Any = None

    def begin(self, stage: str, step: int) -> None:
        """Start a stage, or resume it after `step`."""

    def write(self, records: Sequence[Record], step: int) -> None:
        """Write the records of a step, often none, and pending ones."""

    def end(self) -> None:
        """Flush pending records at the end of the stage."""

    def close(self, failed: bool) -> None:
        """Close the writer at the end of the run."""

    @contextlib.contextmanager
    def _warning(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of any type; the training matters more than a copy of its metrics
            self.target = None
            logger.warning(
                f"{self.name}: {type(error).__name__}: {error} The run continues without it; all metrics are in "
                f"{self.folder / METRICS_FILE}."
            )


class JsonWriter(Writer):
    """Append one line to `metrics.jsonl` for each record; a resumed run drops the lines of steps that it repeats.

    Lines are written as a whole or not at all; if the disk refuses, they are kept in memory for the next step.

    Args:
        period: steps between records, and between warnings that the file cannot be written.
    """

    def __init__(self, folder: Path, period: int) -> None:
        self.path, self.period = Path(folder) / METRICS_FILE, period

    def begin(self, stage: str, step: int) -> None:
        """Drop the lines of later steps.

        Raises:
            CheckpointError: the file cannot be truncated.
        """
        last = drop_lines_after(self.path, stage, step)
        if last + self.period < step:
            logger.warning(f"{self.path} has no records of the steps {last + 1} to {step} of {stage}: they are lost.")
        self.size = self.path.stat().st_size if self.path.exists() else 0
        self.pending: deque[bytes] = deque(maxlen=BUFFER_LIMIT)
        self.lost, self.warned = 0, -math.inf

    def write(self, records: Sequence[Record], step: int) -> None:
        """Append a line for each record."""
        for record in records:
            head = {"stage": record.stage, "step": record.step, "time": time.time()}
            self.lost += len(self.pending) == BUFFER_LIMIT
            self.pending.append((json.dumps({**head, **_jsonable(record.metrics)}) + "\n").encode())
        problem = self._flush()
        if problem and step - self.warned >= self.period:
            self.warned = step
            logger.warning(
                f"{self.path} could not be written: {problem}. The run continues; {len(self.pending)} lines are kept "
                "in memory for the next write."
            )

    def end(self) -> None:
        """Write pending lines, and warn about those that are lost."""
        problem = self._flush()
        lost = self.lost + len(self.pending)
        if lost:
            logger.warning(
                f"{lost} lines of {self.path} are lost: {problem or f'more than {BUFFER_LIMIT} were pending'}."
            )

    def _flush(self) -> str:
        """Write pending lines through to the disk; return the problem, or an empty string."""
        if not self.pending:
            return ""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "ab") as file:
                if file.tell() > self.size:  # drop what remained of a failed write
                    file.truncate(self.size)
                file.write(b"".join(self.pending))
                file.flush()
                os.fsync(file.fileno())
                self.size = file.tell()
            self.pending.clear()
            return ""
        except OSError as error:
            with contextlib.suppress(OSError):  # or before the next write
                os.truncate(self.path, self.size)
            return reason_of(error, self.path, sum(map(len, self.pending)))


def drop_lines_after(path: Path, stage: str, step: int) -> int:
    """Truncate `metrics.jsonl` after `step` of `stage`, or at a damaged line; a resumed run repeats the later steps.

    Returns:
        The last step of `stage` that is left; 0 if there is none.
    Raises:
        CheckpointError: the file cannot be truncated.
    """
    if not path.exists():
        return 0
    try:
        with open(path, "rb", opener=follow) as file:
            content = file.read()
        length, last, damaged = _length_up_to(content, stage, step)
        if damaged:
            lines, number = content[length:].count(b"\n"), content[:length].count(b"\n") + 1
            logger.warning(f"{path}: line {number} is damaged, so it and {lines - 1} later lines are dropped.")
        if length < len(content):
            with open(path, "r+b") as file:  # truncating needs no free space
                file.truncate(length)
                os.fsync(file.fileno())
        return last
    except OSError as error:
        raise write_error(
            f"{path} could not be truncated", error, path, 0, "Fix this, then continue with --resume."
        ) from error


def _length_up_to(content: bytes, stage: str, step: int) -> tuple[int, int, bool]:
    """Return the bytes up to `step` of `stage`, its last step in them, and whether they end at a damaged line."""
    length, last, reached = 0, 0, False
    for line in content.splitlines(keepends=True):
        try:
            record = parse_json(line)
            here, beyond = record["stage"], record["step"] > step
        except (ValueError, KeyError, TypeError):  # not a record; the last line of a killed run may be incomplete
            return length, last, line.endswith(b"\n")
        reached = reached or here == stage
        if reached and (here != stage or beyond) or not line.endswith(b"\n"):
            break
        length += len(line)
        last = record["step"] if here == stage else last
    return length, last, False


def _jsonable(metrics: dict[str, Any]) -> dict[str, Any]:
    # JSON has no infinity and no NaN
    return {k: v if not isinstance(v, float) or math.isfinite(v) else str(v) for k, v in metrics.items()}


class TensorBoardWriter(Writer):
    """Write scalars for TensorBoard to the folder `tensorboard`, one file per stage and process."""

    name = "TensorBoard"

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)

    def begin(self, stage: str, step: int) -> None:
        """Open a file."""
        from torch.utils.tensorboard import SummaryWriter

        with self._warning():
            self.target = SummaryWriter(str(self.folder / "tensorboard"), flush_secs=10)

    def write(self, records: Sequence[Record], step: int) -> None:
        """Write every number under its name, at the record's number."""
        with self._warning():
            for record in records if self.target else ():
                name = f"{record.stage}/{record.key}" if record.key else record.stage
                for metric, value in record.numbers().items():
                    self.target.add_scalar(f"{name}/{metric}", value, record.number)

    def end(self) -> None:
        """Flush and close the file."""
        if self.target:
            with self._warning():
                self.target.close()


class WandbWriter(Writer):
    """Write the config and all metrics to a run of Weights & Biases; a resumed run continues the same one.

    Its id is in the run directory. Steps that a resumed run repeats appear twice. WANDB_MODE, WANDB_PROJECT and so
    on have their usual meaning.
    """

    name = "wandb"

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        self.folder = Path(folder)
        self.defined: set[str] = set()
        with self._warning():
            import wandb

            id_file = self.folder / "wandb" / "run_id"
            if not id_file.exists():
                id_file.parent.mkdir(parents=True, exist_ok=True)
                id_file.write_text(secrets.token_hex(4) + "\n")
            names = {"name": self.folder.resolve().name, "project": PROJECT}
            self.target = wandb.init(
                id=id_file.read_text().strip(),
                resume="allow",
                dir=self.folder,
                config=dict(config),
                settings=wandb.Settings(console="off", silent=True, finish_timeout=UPLOAD_TIMEOUT),
                **{key: value for key, value in names.items() if f"WANDB_{key.upper()}" not in os.environ},
            )
            run = self.target
            logger.info(f"wandb: {Path(run.dir).parent if run.offline else run.url}")

    def write(self, records: Sequence[Record], step: int) -> None:
        """Log every number under its name, plotted over the record's number."""
        with self._warning():
            for record in records if self.target else ():
                # not `stage/key`, which `stage/*` would match too
                name, number = (f"{record.stage}_{record.key}", "number") if record.key else (record.stage, "step")
                if name not in self.defined:
                    self.defined.add(name)
                    self.target.define_metric(f"{name}/{number}", hidden=True)
                    self.target.define_metric(f"{name}/*", step_metric=f"{name}/{number}")
                if metrics := {f"{name}/{key}": value for key, value in record.numbers().items()}:
                    self.target.log({**metrics, f"{name}/{number}": record.number})

    def close(self, failed: bool) -> None:
        """Finish the run there, as successful or failed."""
        if self.target:
            with self._warning():
                self.target.finish(exit_code=int(failed))


def check_writers(names: Sequence[str], source: str) -> None:
    """Check the value of `train.writers`.

    Raises:
        ConfigError: a writer does not exist or its library is missing, or `json` is left out.
    """
    if unknown := [name for name in names if name not in NAMES]:
        hint = did_you_mean(str(unknown[0]), NAMES)
        raise ConfigError(f"{source}: train.writers has '{unknown[0]}'.{hint} Writers: {', '.join(NAMES)}.")
    if "json" not in names:
        raise ConfigError(
            f"{source}: train.writers is {list(names)}, but json cannot be left out: a run is resumed and shown from "
            f"{METRICS_FILE}. Add it."
        )
    if "wandb" in names:
        try:
            from wandb import Settings  # noqa: F401, which a folder named wandb does not have
        except ImportError as error:
            raise ConfigError(
                f"{source}: train.writers has wandb, which is not installed ({error}). Install it with "
                'pip install "bissl_zoo[wandb]", or leave it out.'
            ) from error


@contextlib.contextmanager
def open_writers(
    names: Sequence[str], folder: Path, period: int, config: Mapping[str, Any] | None = None
) -> Iterator[list[Writer]]:
    """Open the writers of a run; wandb in the main process only.

    Args:
        names: as in `train.writers`.
        period: see `JsonWriter`.
        config: of the run, for wandb.
    """
    writers: list[Writer] = [JsonWriter(folder, period)]
    if "tensorboard" in names:
        writers.append(TensorBoardWriter(folder))
    if "wandb" in names and is_main_process():
        writers.append(WandbWriter(folder, config or {}))
    failed = True
    try:
        yield writers
        failed = False
    finally:
        for writer in writers:
            writer.close(failed)
