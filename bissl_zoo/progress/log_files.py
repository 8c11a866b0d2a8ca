"""The files that grow while a run goes on: `metrics.jsonl` and TensorBoard's; a disk that refuses does not end it."""

import contextlib
import io
import itertools
import json
import os
import socket
import time
from collections import deque
from collections.abc import Iterable, Mapping
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard.summary import scalar

from bissl_zoo.runs.disk import write_error

#: most entries of a file that wait in memory; the oldest are lost first
MOST_WAITING = 10_000

_event_files = itertools.count()


class AppendedFile:
    """A file of entries in order, each in it whole or not at all; those that the disk refuses wait for the next write.

    Attributes:
        waiting: entries that are not in the file yet.
        lost: how many there were too many of to wait.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.waiting: deque[bytes] = deque(maxlen=MOST_WAITING)
        self.lost = 0
        self._whole: int | None = None  # the file's size without the part of an entry that a failed write left

    def append(self, entries: Iterable[bytes] = ()) -> None:
        """Write what waits and `entries`, and force them to disk.

        Raises:
            OSError: they wait, and the file is as it was, or will be before anything else is written to it.
        """
        for entry in entries:
            self.lost += len(self.waiting) == MOST_WAITING
            self.waiting.append(entry)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._cut()
        whole = self._size()
        try:
            with open(self.path, "ab") as file:
                file.write(b"".join(self.waiting))
                file.flush()
                os.fsync(file.fileno())
        except OSError:
            self._whole = whole
            with contextlib.suppress(OSError):  # or at the next write; but the run may be killed before it
                self._cut()
            raise
        self.waiting.clear()

    def _cut(self) -> None:
        if self._whole is not None and self._size() > self._whole:
            os.truncate(self.path, self._whole)
        self._whole = None

    def _size(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0


class EventFile(AppendedFile):
    """A file of scalars for TensorBoard.

    torch's `SummaryWriter` writes in a thread of its own, which a full disk ends with a traceback and a part of a
    record, behind which TensorBoard reads nothing.
    """

    def __init__(self, folder: Path) -> None:
        # TensorBoard reads the files of a folder in the order of their names
        number = f"{os.getpid()}.{next(_event_files):04d}"
        super().__init__(Path(folder) / f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{number}")
        self.waiting.append(_record(Event(file_version="brain.Event:2")))

    def append_scalars(self, figures: Iterable[tuple[Mapping[str, float], int]]) -> None:
        """Append figures by name, each with its step; raises as `append` does."""
        events = (
            Event(summary=scalar(name, value), step=step) for named, step in figures for name, value in named.items()
        )
        self.append(map(_record, events))


def _record(event: Event) -> bytes:
    event.wall_time = time.time()
    record = io.BytesIO()
    RecordWriter(record).write(event.SerializeToString())
    return record.getvalue()


def drop_lines_after(path: Path, stage: str, step: int) -> None:
    """Keep the lines of `metrics.jsonl` up to `step` of `stage`; what follows was not finished and is done again.

    Raises:
        CheckpointError: the file cannot be cut.
    """
    if not path.exists():
        return
    try:
        content = path.read_bytes()
        kept = _length_up_to(content, stage, step)
        if kept < len(content):
            with open(path, "r+b") as file:  # what stays is its beginning, so that this needs no room
                file.truncate(kept)
                os.fsync(file.fileno())
    except OSError as error:
        raise write_error(f"{path} could not be cut", error, path, 0, "Mend that and go on with --resume.") from error


def _length_up_to(content: bytes, stage: str, step: int) -> int:
    length, reached = 0, False
    for line in content.splitlines(keepends=True):
        try:
            record = json.loads(line)
            here, beyond = record["stage"], record["step"] > step
        except (ValueError, KeyError, TypeError, RecursionError):  # cut off in the middle, or no line of a run
            break
        reached = reached or here == stage
        if reached and (here != stage or beyond) or not line.endswith(b"\n"):
            break
        length += len(line)
    return length
