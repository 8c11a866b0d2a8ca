"""How the tools speak: text from strangers made safe for a terminal, errors as one message, and exit statuses."""

import datetime
import os
import sys
from collections.abc import Callable
from typing import Any

from bissl_zoo.errors import BisslZooError, printable

#: status of a command whose reader has gone, as a shell tells it
READER_GONE = 141  # 128 and the number of SIGPIPE


def clock(seconds: float | None) -> str:
    """A duration as hours, minutes and seconds, such as `0:41:10`; `?` for one that is not known."""
    return "?" if seconds is None else str(datetime.timedelta(seconds=max(0, round(seconds))))


def short(value: Any) -> str:
    """A figure in four digits; what is no float as it is."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def exit_status(command: Callable[[], int | None]) -> int:
    """What a tool exits with: what `command` returns, 1 after the message of an error of ours, 130 after Ctrl-C."""
    try:
        status = command() or 0
        sys.stdout.flush()  # here, where a reader that has gone is noticed, rather than at the interpreter's end
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
    """After the reader of standard output has gone, as `| head` does: what is left to write is dropped in silence."""
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())
