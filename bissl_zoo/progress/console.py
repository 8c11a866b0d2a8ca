"""Formats of numbers and durations, and exit statuses of the tools."""

import datetime
import os
import sys
from collections.abc import Callable
from typing import Any

from bissl_zoo.errors import BisslZooError, printable

#: exit status if the reader of standard output is gone, as a shell reports it: 128 + SIGPIPE
READER_GONE = 141


def clock(seconds: float | None) -> str:
    """Format a duration as hours, minutes and seconds, such as `0:41:10`; `?` if it is unknown."""
    return "?" if seconds is None else str(datetime.timedelta(seconds=max(0, round(seconds))))


def short(value: Any) -> str:
    """Format a float with four digits, anything else as it is."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def exit_status(command: Callable[[], int | None]) -> int:
    """Run a command of a tool; return its exit status, 1 after printing a `BisslZooError`, or 130 after Ctrl-C."""
    try:
        status = command() or 0
        sys.stdout.flush()  # raises here if the reader is gone, not when the interpreter exits
        return status
    except BisslZooError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr, flush=True)
        return 1
    except BrokenPipeError:
        write_to_nobody()
        return READER_GONE
    except KeyboardInterrupt:
        return 130


def write_to_nobody() -> None:
    """Discard what is still written to standard output after its reader is gone, as after `| head`."""
    with open(os.devnull, "w") as null:
        os.dup2(null.fileno(), sys.stdout.fileno())
