"""What is written of a run's figures, and the files it goes to: `metrics.jsonl` and TensorBoard's."""

import json
import logging
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from bissl_zoo.progress.log_files import AppendedFile, EventFile, drop_lines_after
from bissl_zoo.runs.directory import METRICS_FILE
from bissl_zoo.runs.disk import reason_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Record:
    """Figures after a step of a stage; of finer grain than a step, they have their own number under `key`."""

    stage: str
    step: int
    figures: dict[str, Any]
    key: str = ""

    @property
    def number(self) -> int:
        """What the record is drawn over."""
        return self.figures[self.key] if self.key else self.step

    @property
    def name(self) -> str:
        """What the figures are of: the stage, or `stage/key`."""
        return f"{self.stage}/{self.key}" if self.key else self.stage

    def numbers(self) -> dict[str, float]:
        """The figures that can be drawn."""
        return {k: v for k, v in self.figures.items() if isinstance(v, (int, float)) and k != self.key}


class Writer(ABC):
    """Writes records somewhere; what it cannot write is a warning, never the end of the run."""

    @abstractmethod
    def begin(self, stage: str, step: int) -> None:
        """A stage begins, or goes on after `step`."""

    @abstractmethod
    def write(self, records: Sequence[Record], step: int) -> None:
        """Append the records of a step, mostly none, and what has waited."""

    @abstractmethod
    def end(self) -> None:
        """The stage is over: write what waits, and tell what is lost."""


class FileWriter(Writer):
    """A writer of a file; what a full or failing disk refuses waits in memory for the next step.

    Args:
        again: steps after which a warning that the file could not be written is repeated; None for never.
    """

    file: AppendedFile

    def __init__(self, again: int | None = None) -> None:
        self.again = again
        self.warned: int | None = None

    def _try(self, append: Callable[[], None], step: int) -> None:
        try:
            append()
        except OSError as error:
            if self.warned is None or (self.again and step - self.warned >= self.again):
                self.warned = step
                logger.warning(
                    f"{self.file.path} could not be written: {self._reason(error)}. The run goes on; entries "
                    f"that wait in memory for the next write: {len(self.file.waiting)}."
                )

    def end(self) -> None:
        """Write what waits, and tell what is lost."""
        file = self.file
        reason = f"more than {file.waiting.maxlen} had to wait"
        try:
            if file.waiting:
                file.append()
        except OSError as error:
            file.lost += len(file.waiting)
            reason = self._reason(error)
        if file.lost:
            logger.warning(f"entries of {file.path} that are lost: {file.lost}. {reason[0].upper()}{reason[1:]}.")

    def _reason(self, error: OSError) -> str:
        return reason_of(error, self.file.path, sum(map(len, self.file.waiting)))


class JsonWriter(FileWriter):
    """A line of `metrics.jsonl` for each record.

    Lines that an earlier part of the run wrote of steps that are taken again are dropped, so that each is there once.
    """

    def __init__(self, folder: Path, again: int) -> None:
        super().__init__(again)
        self.path = Path(folder) / METRICS_FILE

    def begin(self, stage: str, step: int) -> None:
        """Drop lines of steps to come; raises as `drop_lines_after` does."""
        drop_lines_after(self.path, stage, step)
        self.file, self.warned = AppendedFile(self.path), None

    def write(self, records: Sequence[Record], step: int) -> None:
        """A line each."""
        heads = [{"stage": record.stage, "step": record.step, "time": time.time()} for record in records]
        lines = [
            (json.dumps({**head, **_jsonable(record.figures)}) + "\n").encode()
            for head, record in zip(heads, records, strict=True)
        ]
        if lines or self.file.waiting:
            self._try(partial(self.file.append, lines), step)


class TensorBoardWriter(FileWriter):
    """Scalars for TensorBoard, a file per stage and start, in the folder `tensorboard`."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = Path(folder) / "tensorboard"

    def begin(self, stage: str, step: int) -> None:
        """Name the file."""
        self.file, self.warned = EventFile(self.folder), None

    def write(self, records: Sequence[Record], step: int) -> None:
        """Every number under its name, at the record's own."""
        shown = [
            ({f"{record.name}/{name}": value for name, value in record.numbers().items()}, record.number)
            for record in records
        ]
        if shown or self.file.waiting:
            self._try(partial(self.file.append_scalars, shown), step)


def _jsonable(figures: dict[str, Any]) -> dict[str, Any]:
    def finite(value: Any) -> bool:
        return not isinstance(value, float) or math.isfinite(value)

    # JSON has no infinity and no NaN
    return {name: value if finite(value) else str(value) for name, value in figures.items()}
