"""The log file of a run."""

import logging
import time
from pathlib import Path

logger = logging.getLogger(__name__)

LOG_FILE = "log.txt"
#: bytes that are kept in memory while the disk refuses writes; the oldest are lost first
BUFFER_LIMIT = 1 << 20


def line_of(record: logging.LogRecord) -> str:
    """Return the message of a record; of warnings and errors with their level, as in `warning: message`."""
    message = record.getMessage()
    if record.exc_info:
        message += "\n" + logging.Formatter().formatException(record.exc_info)
    return message if record.levelno < logging.WARNING else f"{record.levelname.lower()}: {message}"


class LogFile(logging.Handler):
    """Append log records to a file, each line with its time. If the disk is full or fails, warn once and retry later.

    A forked process, such as a loader's worker, may log as well: a write is one append, and the lock is `logging`'s.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(logging.INFO)
        self.path = Path(path)
        self.pending = b""
        self.problem: OSError | None = None

    def emit(self, record: logging.LogRecord) -> None:
        """Append a record."""
        before = self.problem
        self.write(line_of(record))
        if self.problem and not before:
            logger.warning(
                f"{self.path} could not be written: {self.problem.strerror}. The run goes on; log lines are kept in "
                "memory and written later."
            )

    def write(self, text: str) -> None:
        """Append `text`, each line with the time; an error of the disk is kept in `problem`."""
        stamp = time.strftime("%Y-%m-%d %H:%M:%S")
        lines = "".join(f"{stamp} {line}\n" for line in text.splitlines() or [""])
        with self.lock:
            self.pending = (self.pending + lines.encode(errors="backslashreplace"))[-BUFFER_LIMIT:]
            try:
                with open(self.path, "ab", buffering=0) as file:
                    while self.pending:
                        self.pending = self.pending[file.write(self.pending) :]
                self.problem = None
            except OSError as error:
                self.problem = error
