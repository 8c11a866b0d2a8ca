"""Many runs on one machine: each in a process and a run directory of its own, and all of them resumable."""

import contextlib
import logging
import os
import re
import signal
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from omegaconf import DictConfig

from bissl_zoo.config import with_defaults
from bissl_zoo.distributed import StopRequest, stop_request
from bissl_zoo.engine.checks import check_config
from bissl_zoo.engine.launch import GRACE
from bissl_zoo.errors import CheckpointError, ConfigError, Interrupted
from bissl_zoo.progress.console import clock
from bissl_zoo.runs.directory import check_run_dir, has_begun
from bissl_zoo.runs.lock import run_lock
from bissl_zoo.studies.job_process import (
    FAILED,
    FINISHED,
    HIDDEN,
    STOPPED,
    Job,
    JobOutcome,
    LocalPool,
    Pool,
    Running,
    found_finished,
)

logger = logging.getLogger(__name__)

__all__ = ["FAILED", "FINISHED", "STOPPED", "Job", "JobOutcome", "progress_line", "run_jobs"]

#: seconds between looks at what runs
TICK = 0.5


def progress_line(outcome: JobOutcome, figures: str = "") -> str:
    """Such as `[7/100] trial_006 finished  top1 0.6120  0:00:42  ETA 0:41:10`, with `figures` in the middle."""
    width = len(str(outcome.total))
    told = figures or (outcome.message.splitlines() or [""])[0]
    parts = [
        f"[{outcome.done:{width}d}/{outcome.total}] {outcome.name} {outcome.status}",
        told,
        clock(outcome.seconds),
    ]
    if outcome.eta is not None and outcome.done < outcome.total:
        parts.append(f"ETA {clock(outcome.eta)}")
    return "  ".join(part for part in parts if part)


def run_jobs(
    jobs: Sequence[Job],
    folder: Path,
    parallel: int | None = None,
    on_done: Callable[[JobOutcome], None] | None = None,
    stop_if: Callable[[Job], str | None] | None = None,
    engine: Literal["local", "ray"] = "local",
) -> list[JobOutcome]:
    """Run every job that is not finished, in `folder/runs/NAME`, its output appended to `folder/logs/NAME.log`.

    A job that began before goes on at its newest checkpoint; one that is finished is read. One that fails does not
    stop the others. Those that this process is asked to stop end as single runs do, and go on at the next call.

    Args:
        parallel: jobs at a time, each with a GPU of its own where there are as many; None for one per GPU, or one.
        on_done: called with each outcome as it comes, in this process; None prints a line of those that were started.
        stop_if: asked about every running job twice a second; a reason ends the job, which saves.
        engine: `ray` for the machines of a Ray cluster, to which `folder` must look the same.
    Returns:
        The outcomes, in the order of `jobs`.
    Raises:
        ConfigError: before anything starts: names that are not unique, a config that cannot be, a run directory that
            holds another configuration.
        CheckpointError: another process works in `folder`.
        Interrupted: asked to stop, after the jobs have saved.
    """
    folder = Path(folder)
    _check_names(jobs)
    if parallel is not None and parallel < 1:
        raise ConfigError(f"{parallel} jobs at a time: at least 1 is needed.")
    prepared = [Job(job.name, _prepared(job, folder)) for job in jobs]
    for job in prepared:
        check_config(job.cfg, job.name)
        try:
            check_run_dir(job.cfg, resume=has_begun(job.cfg))
        except ConfigError as error:
            raise ConfigError(f"{job.name}: {error}") from error
    with contextlib.ExitStack() as stack:
        pool = stack.enter_context(_pool(engine, folder, parallel))
        stack.enter_context(folder_lock(folder))
        stop = stack.enter_context(stop_request())
        return _Jobs(prepared, pool, on_done or _tell, stop_if or (lambda job: None), stop).go()


def _pool(engine: str, folder: Path, parallel: int | None) -> contextlib.AbstractContextManager[Pool]:
    if engine == "local":
        return contextlib.nullcontext(LocalPool(folder, parallel))
    if engine == "ray":
        from bissl_zoo.studies.ray_jobs import ray_pool  # an optional library

        return ray_pool(folder, parallel)
    raise ConfigError(f"There is no engine '{engine}' for jobs; accepted are local and ray.")


@contextlib.contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Hold `folder` for the jobs of this process.

    Raises:
        CheckpointError: the jobs of another process are in it.
        ConfigError: it cannot be made or written.
    """
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(run_lock(folder / HIDDEN))
        except CheckpointError as error:
            reason = str(error).partition(". ")[0]
            raise CheckpointError(f"{folder} is in use. {reason}. Stop that one, or give another folder.") from error
        except ConfigError as error:
            raise ConfigError(f"The folder {folder} cannot be written: {error.__cause__}.") from error
        yield


def _tell(outcome: JobOutcome) -> None:
    if outcome.ran:
        logger.info(progress_line(outcome))


def _check_names(jobs: Sequence[Job]) -> None:
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        raise ConfigError("Several runs cannot be started under torchrun: each is a process of its own. Leave it out.")
    for name, times in Counter(job.name for job in jobs).items():
        if times > 1:
            raise ConfigError(f"{times} jobs are called '{name}'; names must be unique, being those of folders.")
        if not re.fullmatch(r"\w[\w.+-]{0,199}", name, re.ASCII):
            raise ConfigError(f"'{name}' cannot be the name of a job: use letters, digits and _ . + -, no folders.")


def _prepared(job: Job, folder: Path) -> DictConfig:
    cfg = with_defaults(job.cfg)
    cfg.train.output_dir = str(folder / "runs" / job.name)
    cfg.train.report = False  # of one run among many nobody reads it; tools/report.py makes it
    return cfg


class _Jobs:
    """The jobs that wait, those that run, and what the others came to."""

    def __init__(
        self,
        jobs: list[Job],
        pool: Pool,
        on_done: Callable[[JobOutcome], None],
        stop_if: Callable[[Job], str | None],
        stop: StopRequest,
    ) -> None:
        self.jobs, self.pool, self.on_done, self.stop_if, self.stop = jobs, pool, on_done, stop_if, stop
        self.waiting: deque[Job] = deque()
        self.running: list[Running] = []
        self.outcomes: dict[str, JobOutcome] = {}
        self.began, self.ended = time.monotonic(), 0

    def go(self) -> list[JobOutcome]:
        """Read what is finished, run the rest."""
        for job in self.jobs:
            found = found_finished(job.cfg)
            if found:
                self._end(found)
            else:
                self.waiting.append(job)
        try:
            while self.running or (self.waiting and not self.stop.asked()):
                while self.waiting and self.pool.has_room() and not self.stop.asked():
                    self.running.append(self.pool.start(self.waiting.popleft()))
                self.pool.wait(self.running, TICK)
                for running in list(self.running):
                    self._look_at(running)
        except KeyboardInterrupt:  # the second Ctrl-C, which the processes of the same terminal were sent, too
            self._take_down(signal.SIGKILL)
            raise
        except BaseException:
            self._take_down(signal.SIGTERM)
            raise
        if self.stop.asked() and len(self.outcomes) < len(self.jobs):
            finished = sum(outcome.status == FINISHED for outcome in self.outcomes.values())
            raise Interrupted(
                f"stopped as asked: {finished} of {len(self.jobs)} runs are finished, those that ran have saved; the "
                "same command goes on",
                self.stop.status,
            )
        return [self.outcomes[job.name] for job in self.jobs]

    def _look_at(self, running: Running) -> None:
        """Take what has ended; stop what is to be stopped."""
        if running.ended():
            self.running.remove(running)
            self.pool.release(running)
            self.ended += 1
            outcome = running.outcome()
            if not self.stop.asked() or outcome.status == FINISHED:
                self._end(outcome)
        elif running.reason:
            return
        elif self.stop.asked():
            # of a terminal's Ctrl-C they know, and SIGTERM after it is nothing new to them
            number = signal.SIGTERM if self.stop.signal == signal.SIGINT else self.stop.signal
            running.stop(number, "asked to stop")
        else:
            reason = self.stop_if(running.job)
            if reason:
                running.stop(signal.SIGTERM, reason)

    def _end(self, outcome: JobOutcome) -> None:
        done = len(self.outcomes) + 1
        taken = self.ended + len(self.running) / 2  # those that run are taken to be half done
        eta = (time.monotonic() - self.began) / taken * (len(self.jobs) - done) if self.ended else None
        outcome = replace(outcome, done=done, total=len(self.jobs), eta=eta)
        self.outcomes[outcome.name] = outcome
        self.on_done(outcome)

    def _take_down(self, number: int) -> None:
        for running in self.running:
            running.stop(number, "taken down")
        deadline = time.monotonic() + GRACE
        while not all(running.ended() for running in self.running) and time.monotonic() < deadline:
            time.sleep(TICK)
