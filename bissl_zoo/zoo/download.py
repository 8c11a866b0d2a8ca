"""Bringing a file of a store to this machine: tried again, continued, and hashed while it comes."""

import hashlib
import itertools
import logging
import random
import time
from collections.abc import Callable
from typing import BinaryIO, TypeVar

from tqdm import tqdm

from bissl_zoo.errors import ZooError
from bissl_zoo.zoo.stores.store import Store, Transient

ATTEMPTS = 5  # in a row without a new byte
TOTAL_ATTEMPTS = 50
LONGEST_WAIT_S, LONGEST_ASKED_WAIT_S = 30.0, 120.0
SHOWN_FROM = 8 << 20
_BLOCK = 1 << 20

logger = logging.getLogger(__name__)
T = TypeVar("T")


class GaveUp(ZooError):
    """The last `Transient` after all attempts."""


def retrying(
    attempt: Callable[[], T], reached: Callable[[], int] = lambda: 0, sleep: Callable[[float], None] = time.sleep
) -> T:
    """The result of the first attempt that does not raise `Transient`, with waits that double, and vary, in between.

    Args:
        reached: bytes that have arrived; attempts are counted anew after one that brought further than any before.
        sleep: called with seconds.
    Raises:
        GaveUp: after `ATTEMPTS` in a row that brought nothing new, or `TOTAL_ATTEMPTS`.
    """
    furthest, failures = reached(), 0
    for number in itertools.count(1):
        try:
            return attempt()
        except Transient as error:
            failures = 1 if reached() > furthest else failures + 1
            furthest = max(furthest, reached())
            if failures == ATTEMPTS or number == TOTAL_ATTEMPTS:
                raise GaveUp(f"{error} Given up after {number} attempts.") from error
            # from the system's generator, since that of a run must not move and forked processes would share theirs
            wait = min(2.0 ** (failures - 1), LONGEST_WAIT_S) * random.SystemRandom().uniform(0.75, 1.25)
            wait = max(wait, min(getattr(error, "retry_after", 0.0), LONGEST_ASKED_WAIT_S))
            logger.warning("%s Attempt %d follows in %.1f s.", error, number + 1, wait)
            sleep(wait)


class Download:
    """A file of which a first part may have arrived in `stream`, and the sha256 of that part.

    Args:
        stream: open for reading and writing in the middle; what is in it is read once.
        size: bytes of the whole file; a longer stream is not its first part, and is emptied.
    """

    def __init__(self, stream: BinaryIO, size: int) -> None:
        self.size = size
        self.received = 0
        self._stream = stream
        self._digest = hashlib.sha256()
        while block := stream.read(_BLOCK):
            self._count(block)
        if self.received > size:
            self._restart()

    @property
    def sha256(self) -> str:
        """Of what has arrived, in hex."""
        return self._digest.hexdigest()

    def complete(self, store: Store, path: str, sleep: Callable[[float], None] = time.sleep) -> None:
        """Receive what is missing.

        Raises:
            ZooError: the file is longer than `size`, or the store refuses.
            GaveUp: see :func:`retrying`; the stream keeps what has arrived.
        """
        address = f"{store.location}/{path}"
        shown = self.size >= SHOWN_FROM
        bar = tqdm(
            total=self.size,
            initial=self.received,
            desc=path,
            unit="B",
            unit_scale=True,
            unit_divisor=1024,
            disable=None if shown else True,  # None: off a terminal
        )
        if shown and bar.disable:
            logger.info("Fetching %s (%.1f MiB).", address, self.size / 2**20)
        try:
            with bar:
                retrying(lambda: self._receive(store, path, address, bar), lambda: self.received, sleep)
        except GaveUp as error:
            raise GaveUp(f"{error} {self.received:,} of {self.size:,} bytes have arrived and are kept.") from error

    def _receive(self, store: Store, path: str, address: str, bar: tqdm) -> None:
        if self.received == self.size:
            return
        with store.open(path, self.received) as body:
            if body.start == 0 and self.received:
                self._restart()
                bar.initial = 0
                bar.reset()
            elif body.start != self.received:
                raise ZooError(f"{address} began at byte {body.start} where {self.received} was asked for.")
            for block in body.blocks:
                if self.received + len(block) > self.size:
                    self._restart()
                    raise ZooError(
                        f"{address} is longer than the {self.size:,} bytes that the zoo's index lists; what had "
                        "arrived was removed. Ask whoever keeps this zoo to copy the entry again."
                    )
                self._stream.write(block)
                self._count(block)
                bar.update(len(block))
        if self.received < self.size:
            raise Transient(f"{address} ended after {self.received:,} of {self.size:,} bytes.")

    def _count(self, block: bytes) -> None:
        self._digest.update(block)
        self.received += len(block)

    def _restart(self) -> None:
        self._stream.seek(0)
        self._stream.truncate()
        self._digest = hashlib.sha256()
        self.received = 0
