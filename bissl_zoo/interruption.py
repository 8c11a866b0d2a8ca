"""Requests to stop: what a cluster or a person sends a run, and how the run answers between two steps."""

import contextlib
import os
import signal
from collections.abc import Iterator
from types import FrameType

import torch

from bissl_zoo.distributed import STOP_SIGNALS, any_rank
from bissl_zoo.errors import BisslZooError


class Interrupted(BisslZooError):
    """The run was asked to stop, and has saved; `status` is the exit status, 128 and the signal's number."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class StopRequest:
    """Remembers the first signal that asks to stop; a second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def receive(self, number: int, frame: FrameType | None) -> None:
        """The handler; it only takes a note, since it runs between two instructions of anything."""
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.signal is None:
            self.signal = number
            name = signal.Signals(number).name
            again = "; again to stop now" if number == signal.SIGINT else ""
            # not print(), which might be what was interrupted; standard error may go to a file on a full disk
            with contextlib.suppress(OSError):
                os.write(2, f"\n{name}: saving after this step{again}\n".encode())

    def asked(self) -> bool:
        """Whether this process was asked to stop; no collective."""
        return self.signal is not None

    def pending(self, device: torch.device) -> bool:
        """Whether any process of the run was asked to stop; a collective."""
        return any_rank(self.asked(), device)

    @property
    def status(self) -> int:
        """What to exit with; of a process that was told by others, as for SIGTERM."""
        return 128 + (self.signal or signal.SIGTERM)


@contextlib.contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Take note of the signals while this lasts, in the main thread; elsewhere nothing is noticed."""
    request = StopRequest()
    try:
        before = {number: signal.signal(number, request.receive) for number in STOP_SIGNALS}
    except ValueError:  # not the main thread, as in a notebook's executor
        yield request
        return
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
