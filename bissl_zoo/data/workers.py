"""The workers of loaders: they never keep a process from ending, and what becomes of them is told."""

import contextlib
import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import count
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize
from typing import Any

from torch.utils.data import DataLoader

from bissl_zoo.errors import DatasetError

logger = logging.getLogger(__name__)

#: samples named in a message
NAMED = 5
#: seconds to wait for a worker that was killed; one that the kernel holds in a read dies when that ends
PATIENCE = 5.0
_LATE = re.compile(r"DataLoader timed out")
_LOST = re.compile(r"DataLoader worker \(pid.*\) (is killed|exited)")


class Loader(DataLoader):
    """A loader of `(batch, bad samples)` whose workers end with its iterator or this process; it tells of both.

    They ignore the signals that ask a run to stop. So would they ignore the one by which a process ends its children,
    and it would wait for them without end after an error that leaves the iterator alive.

    Args:
        start_step: the number of its first batch.
        instead: what becomes of a bad sample, as a sentence of the warning that names it.

    Attributes:
        bad: the samples that could not be used so far: what names each, and what is wrong with it. They arrive with the
            batches that they were drawn for, so that which are known after a batch does not depend on the workers.
    """

    def __init__(self, *args: Any, start_step: int = 0, instead: str = "", **options: Any) -> None:
        self.start_step, self.instead = start_step, instead
        self.bad: dict[str, str] = {}
        super().__init__(*args, **options)

    def __iter__(self) -> Iterator[Any]:
        """The batches, but for those of which nothing is left.

        Raises:
            DatasetError: `timeout` has passed without a batch, or a worker was lost.
        """
        batches = super().__iter__()
        if self.num_workers:
            Finalize(batches, kill, (batches._workers,), exitpriority=0)
        for step in count(self.start_step):
            try:
                batch, bad = next(batches)
            except StopIteration:
                return
            except (RuntimeError, KeyboardInterrupt) as error:
                workers = getattr(batches, "_workers", [])
                told = self._late(error, step) or self._lost(error, step, workers)
                kill(workers)
                if told is None:
                    raise
                raise told from error
            self._tell(bad)
            if batch is not None:
                yield batch

    def _tell(self, bad: Iterable[Sequence[str]]) -> None:
        for name, problem in bad:
            if name not in self.bad:
                self.bad[name] = problem
                logger.warning("%s %s (%d bad so far).", problem, self.instead, len(self.bad))

    def _late(self, error: BaseException, step: int) -> DatasetError | None:
        if not _LATE.match(str(error)):
            return None
        return DatasetError(
            f"The loader's workers gave no batch within timeout={self.timeout:g} seconds; they were to deliver "
            f"{self._describe(step)}. Look whether these files can be read: where a network file system is gone, a "
            "read waits for ever. Then go on with --resume, or with a longer timeout if reading is only slow."
        )

    def _lost(self, error: BaseException, step: int, workers: list[BaseProcess]) -> DatasetError | None:
        # they take batches by turns, so it is known which ones a worker has, but not which of them it was at
        turns = [turn for turn, worker in enumerate(workers) if not worker.is_alive()]
        owed = [step + (turn - (step - self.start_step)) % len(workers) for turn in turns]
        return lost_worker(error, f"It was to deliver {self._describe(min(owed))}." if owed else "")

    def _describe(self, step: int) -> str:
        """Batch `step` with its samples and their files, as part of a sentence."""
        if not hasattr(self.sampler, "batch"):
            return f"batch {step} of a stream, whose samples have no numbers"
        return f"batch {step}, which has {name_samples(self.sampler.batch(step), self.dataset.dataset)}"


def name_samples(numbers: Sequence[int], dataset: Any) -> str:
    """Such as `8 samples: 3 (a.jpg), 7 (b.jpg) and 6 more`; files are named of a data set that has `source(index)`."""
    source = getattr(dataset, "source", None)
    shown = [f"{number} ({source(number)})" if source else f"{number}" for number in numbers[:NAMED]]
    more = f" and {len(numbers) - NAMED} more" if len(numbers) > NAMED else ""
    return f"{len(numbers)} samples: {', '.join(shown)}{more}"


def lost_worker(error: BaseException, reading: str = "") -> DatasetError | None:
    """The death of a loader's worker in words, from the RuntimeError that torch makes of it; None for another error.

    torch notices by a signal, so that its error may come out of any line of the main thread, not of the loader alone.

    Args:
        reading: a sentence on what the worker was to deliver, where that is known.
    """
    said = next((str(one) for one in (error.__cause__, error) if one and _LOST.match(str(one))), None)
    if said is None or not isinstance(error, RuntimeError):
        return None
    parts = (
        f"A loader's worker was lost: {said.strip().rstrip('.')}.",
        reading,
        "Killed is most often for want of memory: take fewer workers (num_workers), or give the job more memory, and "
        "go on with --resume.",
    )
    return DatasetError(" ".join(filter(None, parts)))


def kill(workers: Iterable[BaseProcess]) -> None:
    """End worker processes at once, whatever they wait for."""
    for worker in workers:
        with contextlib.suppress(RuntimeError):  # by which torch tells of this death as of any other
            worker.kill()
            worker.join(PATIENCE)
