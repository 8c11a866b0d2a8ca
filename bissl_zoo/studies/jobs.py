"""A pool of training runs: each job has its own process, run directory and log file, and can be resumed."""

import contextlib
import json
import logging
import os
import re
import signal
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from tabulate import tabulate

from bissl_zoo.config import with_defaults
from bissl_zoo.distributed import StopRequest, stop_request
from bissl_zoo.engine.checks import check_config
from bissl_zoo.engine.publishing import published, publishes
from bissl_zoo.errors import CheckpointError, ConfigError, Interrupted
from bissl_zoo.files import write_atomically
from bissl_zoo.progress.console import clock
from bissl_zoo.runs.directory import (
    LENGTHS,
    check_run_dir,
    flatten,
    has_begun,
    is_free,
    load_run_config,
    read_metadata,
)
from bissl_zoo.runs.listing import FINISHED as RUN_FINISHED
from bissl_zoo.runs.listing import look_at
from bissl_zoo.runs.lock import run_lock
from bissl_zoo.studies.places import (
    ENGINES,
    FINISHED,
    HIDDEN,
    TICK,
    Engine,
    Job,
    JobOutcome,
    Places,
    stop_file,
)

logger = logging.getLogger(__name__)


def progress_line(outcome: JobOutcome, details: str = "") -> str:
    """Format an outcome as `[7/100] trial_006 finished  top1 0.6120  0:00:42  ETA 0:41:10`.

    Args:
        details: the middle part; by default the first line of the outcome's message.
    """
    width = len(str(outcome.total))
    parts = [
        f"[{outcome.done:{width}d}/{outcome.total}] {outcome.name} {outcome.status}",
        details or (outcome.message.splitlines() or [""])[0],
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
    stop_if: Callable[[Job], str | None] = lambda job: None,
    engine: Engine = "local",
) -> list[JobOutcome]:
    """Run every job that has not finished, in `folder/runs/NAME`, with its output in `folder/logs/NAME.log`.

    A job that was interrupted resumes at its newest checkpoint; a finished one is only read. A job that fails does not
    stop the others. When this process receives a signal to stop, the running jobs save and end.

    Args:
        parallel: number of jobs at a time; by default one per GPU, or one.
        on_done: called in this process with each outcome; by default it prints one line per job that was started.
        stop_if: called for every running job twice a second; if it returns a reason, the job saves and ends.
        engine: "ray" runs the jobs on a Ray cluster, whose machines must see `folder` at the same path.
    Returns:
        The outcomes in the order of `jobs`.
    Raises:
        ConfigError: before anything starts: invalid names, an invalid config, or a run directory with another config.
        CheckpointError: another process runs jobs in `folder`.
        Interrupted: stopped by a signal, after the jobs have saved.
    """
    folder = Path(folder)
    _check_names(jobs)
    if parallel is not None and parallel < 1:
        raise ConfigError(f"--parallel is {parallel}; at least 1 job at a time is needed.")
    prepared = [job if callable(job.cfg) else _prepare(job, folder) for job in jobs]
    with contextlib.ExitStack() as stack:
        places = stack.enter_context(ENGINES[engine](folder, parallel))
        stack.enter_context(folder_lock(folder))
        stop = stack.enter_context(stop_request())
        return _Queue(prepared, folder, places, on_done or _print_line, stop_if, stop).run()


def _print_line(outcome: JobOutcome) -> None:
    if outcome.ran:
        logger.info(progress_line(outcome))


def _check_names(jobs: Sequence[Job]) -> None:
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        raise ConfigError("Do not start searches and comparisons with torchrun: they start a process for each run.")
    for name, count in Counter(job.name for job in jobs).items():
        if count > 1:
            raise ConfigError(f"{count} jobs have the name '{name}'. Give each one a unique name.")
        if not re.fullmatch(r"\w[\w.+-]{0,199}", name, re.ASCII):
            raise ConfigError(f"Invalid job name '{name}': use letters, digits and _ . + - only.")


def _prepare(job: Job, folder: Path) -> Job:
    """Return the job with its final config, checked against its run directory."""
    cfg = with_defaults(job.cfg() if callable(job.cfg) else job.cfg)
    cfg.train.output_dir = str(folder / "runs" / job.name)
    cfg.train.report = False  # bissl report can write it later
    check_config(cfg, job.name)
    try:
        check_run_dir(cfg, resume=has_begun(cfg))
    except ConfigError as error:
        raise ConfigError(f"{job.name}: {error}") from error
    return Job(job.name, cfg)


@contextlib.contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Lock `folder` for the jobs of this process.

    Raises:
        CheckpointError: another process runs jobs in it.
        ConfigError: it cannot be created or written.
    """
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(run_lock(folder / HIDDEN))
        except CheckpointError as error:
            raise CheckpointError(f"{folder} is in use. Stop the other process or choose another folder.") from error
        except ConfigError as error:
            raise ConfigError(f"Cannot write to the folder {folder}: {error.__cause__}.") from error
        yield


class _Queue:
    """Pending and running jobs, and the outcomes so far."""

    def __init__(
        self,
        jobs: list[Job],
        folder: Path,
        places: Places,
        on_done: Callable[[JobOutcome], None],
        stop_if: Callable[[Job], str | None],
        stop: StopRequest,
    ) -> None:
        self.jobs, self.folder, self.places = jobs, folder, places
        self.on_done, self.stop_if, self.stop = on_done, stop_if, stop
        self.pending: deque[Job] = deque()
        self.running: dict[Future[JobOutcome], Job] = {}
        self.stopping: set[str] = set()
        self.outcomes: dict[str, JobOutcome] = {}
        self.start_time, self.ended = time.monotonic(), 0

    def run(self) -> list[JobOutcome]:
        """Read the finished jobs and run the others."""
        for job in self.jobs:
            outcome = None if callable(job.cfg) else finished_outcome(job.cfg)
            if outcome:
                self._finish(outcome)
            else:
                self.pending.append(job)
        with ThreadPoolExecutor(self.places.count) as threads:
            try:
                while self.running or (self.pending and not self.stop.asked()):
                    self._fill(threads)
                    ended, _ = wait(self.running, TICK, FIRST_COMPLETED)
                    for future in ended:
                        self._take(future)
                    self._stop_jobs()
            except KeyboardInterrupt:  # the second Ctrl-C, which the processes of this terminal have received as well
                self._stop_all(signal.SIGKILL)
                raise
            except BaseException:
                self._stop_all(signal.SIGTERM)
                raise
        if self.stop.asked() and len(self.outcomes) < len(self.jobs):
            finished = sum(outcome.status == FINISHED for outcome in self.outcomes.values())
            raise Interrupted(
                f"Interrupted: {finished} of {len(self.jobs)} runs are finished, the running ones have saved. "
                "Repeat the command to continue.",
                self.stop.status,
            )
        return [self.outcomes[job.name] for job in self.jobs]

    def _fill(self, threads: ThreadPoolExecutor) -> None:
        while self.pending and len(self.running) < self.places.count and not self.stop.asked():
            job = self.pending.popleft()
            job = _prepare(job, self.folder) if callable(job.cfg) else job
            stop_file(self.folder, job.name).unlink(missing_ok=True)
            self.running[threads.submit(self.places.execute, job)] = job

    def _take(self, future: Future[JobOutcome]) -> None:
        del self.running[future]
        self.ended += 1
        outcome = future.result()
        if not self.stop.asked() or outcome.status == FINISHED:
            self._finish(outcome)

    def _stop_jobs(self) -> None:
        """Pass a request to stop on to the jobs that have not received one, or the reason that `stop_if` gives."""
        for job in [job for job in self.running.values() if job.name not in self.stopping]:
            if self.stop.asked():
                # a terminal sends Ctrl-C to the jobs as well; SIGTERM after it changes nothing
                self._stop(job, signal.SIGTERM if self.stop.signal == signal.SIGINT else self.stop.signal)
            elif reason := self.stop_if(job):
                self._stop(job, signal.SIGTERM, reason)

    def _stop_all(self, number: int) -> None:
        self.pending.clear()
        for job in self.running.values():
            self._stop(job, number)

    def _stop(self, job: Job, number: int, reason: str = "stop requested") -> None:
        self.stopping.add(job.name)
        write_atomically(stop_file(self.folder, job.name), f"{int(number)} {reason}")

    def _finish(self, outcome: JobOutcome) -> None:
        self.stopping.discard(outcome.name)
        done = len(self.outcomes) + 1
        progress = self.ended + len(self.running) / 2  # running jobs count as half done
        eta = (time.monotonic() - self.start_time) / progress * (len(self.jobs) - done) if self.ended else None
        outcome = replace(outcome, done=done, total=len(self.jobs), eta=eta)
        self.outcomes[outcome.name] = outcome
        self.on_done(outcome)


def finished_outcome(cfg: DictConfig) -> JobOutcome | None:
    """Return the outcome of the run in `train.output_dir` if it has finished with the lengths of `cfg`, else None."""
    folder = Path(cfg.train.output_dir)
    state = look_at(folder) if has_begun(cfg) else None
    if state is None or state.state != RUN_FINISHED:
        return None
    before = load_run_config(folder)
    if any(OmegaConf.select(before, key) != OmegaConf.select(cfg, key) for key in LENGTHS):
        return None
    if publishes(cfg) and published(folder) is None:
        return None
    seconds = read_metadata(folder).get("wall_time_s", 0.0)
    return JobOutcome(folder.name, folder, FINISHED, state.results, seconds=seconds, ran=False)


def override(key: str, value: Any) -> str:
    """Format `key=value` as a command-line override."""
    plain = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
    return f"{key}={json.dumps(plain, ensure_ascii=False)}"


def check_unchanged(folder: Path, before: dict[str, Any], now: dict[str, Any], kind: str) -> None:
    """Compare what the results in `folder` depend on with that of this call.

    Args:
        before, now: nested records; keys in `config` that do not change the results of a run may differ.
        kind: "search" or "comparison", for the message.
    Raises:
        ConfigError: with a table of the keys that differ.
    """
    old, new = flatten(before), flatten(now)
    rows = [
        (key, json.dumps(old.get(key)), json.dumps(new.get(key)))
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not (key.startswith("config.") and is_free(key[len("config.") :]))
    ]
    if rows:
        table = tabulate(rows, headers=["key", "was", "is"], disable_numparse=True)
        raise ConfigError(
            f"{folder} holds a {kind} with another configuration:\n{table}\n"
            "Use the same configuration, or another folder, such as runs/another."
        )
