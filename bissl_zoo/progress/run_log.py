"""The log of a run, `log.txt`: every line that was said, with its time, whatever the screen shows of it."""

import logging
import time
from pathlib import Path

LOG_FILE = "log.txt"
#: bytes that wait in memory while the disk refuses; the oldest are lost first
MOST_WAITING = 1 << 20


class RunLog(logging.Handler):
    """Appends lines to a file, and as a handler the records of `logging`; what the disk refuses waits.

    A forked process, as a loader's worker, may log as well: a write is one append, and the lock is `logging`'s own.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(logging.WARNING)
        self.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
        self.path = Path(path)
        self.waiting = b""
        self.problem: OSError | None = None

    def write(self, text: str) -> None:
        """Append `text`, each of its lines with the time; an error of the disk is left in `problem`."""
        stamp = time.strftime("%Y-%m-%d %H:%M:%S")
        lines = "".join(f"{stamp} {line}\n" for line in text.splitlines() or [""])
        with self.lock:
            self.waiting = (self.waiting + lines.encode(errors="backslashreplace"))[-MOST_WAITING:]
            try:
                with open(self.path, "ab", buffering=0) as file:
                    while self.waiting:
                        self.waiting = self.waiting[file.write(self.waiting) :]
                self.problem = None
            except OSError as error:
                self.problem = error

    def emit(self, record: logging.LogRecord) -> None:
        """Append a record of `logging`."""
        self.write(self.format(record))
