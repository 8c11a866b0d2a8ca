"""A process pool for training runs: each job has its own process, run directory and log file, and can be resumed."""

import contextlib
import json
import logging
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Literal

import torch
import torch.multiprocessing as mp
from omegaconf import DictConfig, OmegaConf
from tabulate import tabulate

from bissl_zoo.config import LazyConfig, with_defaults
from bissl_zoo.distributed import StopRequest, stop_request
from bissl_zoo.engine.checks import check_config, open_config
from bissl_zoo.engine.launch import GRACE, launch
from bissl_zoo.engine.publishing import published, publishes
from bissl_zoo.engine.runner import run
from bissl_zoo.errors import CheckpointError, ConfigError, Interrupted
from bissl_zoo.progress.console import clock
from bissl_zoo.runs.directory import (
    FREE_KEYS,
    LENGTHS,
    LOADER_KEYS,
    check_run_dir,
    has_begun,
    load_run_config,
    read_metadata,
    read_results,
)
from bissl_zoo.runs.listing import FINISHED as RUN_FINISHED
from bissl_zoo.runs.listing import look_at
from bissl_zoo.runs.lock import run_lock

logger = logging.getLogger(__name__)

#: outcomes of a job; stopped means that `stop_if` gave a reason
FINISHED, FAILED, STOPPED = "finished", "failed", "stopped"
#: folder for the lock and the config of each job; hidden, so that it is not listed as a run
HIDDEN = ".jobs"
#: seconds between polls of the running jobs
TICK = 0.5


@dataclass(frozen=True)
class Job:
    """A run to be executed.

    Attributes:
        name: unique in its folder.
        cfg: config of the run, or a function that makes it when the job starts; `train.output_dir` is set by the pool.
    """

    name: str
    cfg: DictConfig | Callable[[], DictConfig]


@dataclass(frozen=True)
class JobOutcome:
    """The outcome of a job.

    Attributes:
        folder: run directory.
        status: finished, failed or stopped.
        results: metrics of the run by what was fine-tuned; empty unless it finished.
        message: error message, or the reason for stopping.
        seconds: wall time of a finished run over all its restarts; otherwise of this start.
        ran: True if it was started by this call, False if it had finished before.
        done, total: number of jobs with an outcome so far, and of all jobs.
        eta: estimated seconds until the last job ends; None before the first one has run.
    """

    name: str
    folder: Path
    status: str
    results: dict[str, dict[str, float]] = field(default_factory=dict)
    message: str = ""
    seconds: float = 0.0
    ran: bool = True
    done: int = 0
    total: int = 0
    eta: float | None = None


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
    engine: Literal["local", "ray"] = "local",
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
        pool = stack.enter_context(_open_pool(engine, folder, parallel))
        stack.enter_context(folder_lock(folder))
        stop = stack.enter_context(stop_request())
        return _Queue(prepared, folder, pool, on_done or _print_line, stop_if, stop).run()


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


def _open_pool(engine: str, folder: Path, parallel: int | None) -> contextlib.AbstractContextManager[Any]:
    if engine == "local":
        return contextlib.nullcontext(LocalPool(folder, parallel))
    if engine == "ray":
        from bissl_zoo.studies.ray_jobs import ray_pool  # an optional library

        return ray_pool(folder, parallel)
    raise ConfigError(f"Unknown engine '{engine}'. Choose local or ray.")


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
        pool: Any,
        on_done: Callable[[JobOutcome], None],
        stop_if: Callable[[Job], str | None],
        stop: StopRequest,
    ) -> None:
        self.jobs, self.folder, self.pool = jobs, folder, pool
        self.on_done, self.stop_if, self.stop = on_done, stop_if, stop
        self.pending: deque[Job] = deque()
        self.running: list[Any] = []
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
        try:
            while self.running or (self.pending and not self.stop.asked()):
                while self.pending and self.pool.has_room() and not self.stop.asked():
                    job = self.pending.popleft()
                    self.running.append(self.pool.start(_prepare(job, self.folder) if callable(job.cfg) else job))
                self.pool.wait(self.running, TICK)
                for process in list(self.running):
                    self._poll(process)
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

    def _poll(self, process: Any) -> None:
        if process.ended():
            self.running.remove(process)
            self.pool.release(process)
            self.ended += 1
            outcome = process.outcome()
            if not self.stop.asked() or outcome.status == FINISHED:
                self._finish(outcome)
        elif process.reason:
            return
        elif self.stop.asked():
            # a terminal sends Ctrl-C to the jobs as well; SIGTERM after it changes nothing
            number = signal.SIGTERM if self.stop.signal == signal.SIGINT else self.stop.signal
            process.stop(number, "stop requested")
        elif reason := self.stop_if(process.job):
            process.stop(signal.SIGTERM, reason)

    def _finish(self, outcome: JobOutcome) -> None:
        done = len(self.outcomes) + 1
        progress = self.ended + len(self.running) / 2  # running jobs count as half done
        eta = (time.monotonic() - self.start_time) / progress * (len(self.jobs) - done) if self.ended else None
        outcome = replace(outcome, done=done, total=len(self.jobs), eta=eta)
        self.outcomes[outcome.name] = outcome
        self.on_done(outcome)

    def _stop_all(self, number: int) -> None:
        for process in self.running:
            process.stop(number, "stop requested")
        deadline = time.monotonic() + GRACE
        while not all(process.ended() for process in self.running) and time.monotonic() < deadline:
            time.sleep(TICK)


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
        if old.get(key) != new.get(key) and not _may_differ(key)
    ]
    if rows:
        table = tabulate(rows, headers=["key", "was", "is"], disable_numparse=True)
        raise ConfigError(
            f"{folder} holds a {kind} with another configuration:\n{table}\n"
            "Use the same configuration, or another folder, such as runs/another."
        )


def flatten(value: Any, key: str = "") -> dict[str, Any]:
    """Return the leaves of nested dictionaries and lists under dotted keys."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if items is None:
        return {key: value}
    leaves: dict[str, Any] = {}
    for name, item in items:
        leaves |= flatten(item, f"{key}.{name}".lstrip("."))
    return leaves


def _may_differ(key: str) -> bool:
    section, _, name = key.partition(".")
    return section == "config" and (name.startswith(FREE_KEYS) or name.endswith(LOADER_KEYS))


class LocalPool:
    """Slots on this machine, each with a GPU and a share of the CPU threads.

    Args:
        parallel: number of slots; by default one per GPU, or one.
    """

    def __init__(self, folder: Path, parallel: int | None = None) -> None:
        self.folder = folder
        count = torch.cuda.device_count()
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        gpus = [name.strip() for name in visible.split(",")] if visible else [str(number) for number in range(count)]
        number = parallel or max(count, 1)
        # torch reads both at import; with the default policy idle threads spin and slow the data loader down
        share = {"OMP_NUM_THREADS": str(max(torch.get_num_threads() // number, 1)), "OMP_WAIT_POLICY": "PASSIVE"}
        #: environment variables of each free slot
        self.slots = [share | ({"CUDA_VISIBLE_DEVICES": gpus[slot % count]} if count else {}) for slot in range(number)]

    def has_room(self) -> bool:
        """Return True if another job can start."""
        return bool(self.slots)

    def start(self, job: Job) -> "JobProcess":
        """Start a job in a free slot."""
        return JobProcess(job, self.folder, self.slots.pop(0))

    def wait(self, running: Sequence["JobProcess"], timeout: float) -> None:
        """Wait at most `timeout` seconds until one of the jobs ends."""
        wait([process.process.sentinel for process in running], timeout=timeout)

    def release(self, running: "JobProcess") -> None:
        """Free the slot of a job that has ended."""
        self.slots.append(running.environment)


class JobProcess:
    """A job that runs in a separate process on this machine.

    Args:
        job: its config has `train.output_dir`.
        folder: its log is written to `folder/logs`.
        environment: environment variables to set in the process.
    """

    def __init__(self, job: Job, folder: Path, environment: dict[str, str]) -> None:
        self.job, self.reason, self.start_time, self.environment = job, "", time.monotonic(), environment
        self.run_dir, self.log = Path(job.cfg.train.output_dir), folder / "logs" / f"{job.name}.log"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.log.touch()
        self._log_start = self.log.stat().st_size
        config = folder / HIDDEN / f"{job.name}.yaml"
        LazyConfig.save(job.cfg, config)
        self.process = mp.get_context("spawn").Process(target=_work, args=(config, job.name, self.log), name=job.name)
        with _environment(environment):
            self.process.start()

    def ended(self) -> bool:
        """Return True if the process has ended."""
        return self.process.exitcode is not None

    def stop(self, number: int, reason: str) -> None:
        """Send a signal, upon which the run saves and ends; `reason` becomes the message of its outcome."""
        self.reason = reason
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, number)

    def outcome(self) -> JobOutcome:
        """Return the outcome of the process, which has ended."""
        self.process.join()
        code, seconds, name = self.process.exitcode, time.monotonic() - self.start_time, self.job.name
        if self.reason and code in (-signal.SIGTERM, 128 + signal.SIGTERM):
            return JobOutcome(name, self.run_dir, STOPPED, message=self.reason, seconds=seconds)
        if code:
            return JobOutcome(name, self.run_dir, FAILED, message=self._error_message(code), seconds=seconds)
        try:
            results, total = read_results(self.run_dir), read_metadata(self.run_dir).get("wall_time_s", seconds)
        except CheckpointError as error:
            return JobOutcome(name, self.run_dir, FAILED, message=str(error), seconds=seconds)
        return JobOutcome(name, self.run_dir, FINISHED, results, seconds=total)

    def _error_message(self, code: int) -> str:
        """Return the signal that killed the process, or its last error message."""
        if code < 0:
            hint = " (for example, out of memory)" if code == -signal.SIGKILL else ""
            return f"killed by {signal.Signals(-code).name}{hint}; see {self.log}"
        with open(self.log, "rb") as file:
            file.seek(self._log_start)
            text = file.read().decode(errors="replace").strip()
        start = max((match.start() for match in re.finditer(r"^error\b.*?: ", text, re.M)), default=None)
        if start is not None:
            return text[start:].partition(": ")[2]
        # before the log is open, for example during a failed import, output goes to standard error of this process
        return text.splitlines()[-1] if text else f"exit status {code} before the run started; see standard error"


@contextlib.contextmanager
def _environment(changed: dict[str, str]) -> Iterator[None]:
    before = {key: os.environ.get(key) for key in changed}
    os.environ.update(changed)
    try:
        yield
    finally:
        for key, value in before.items():
            os.environ.pop(key) if value is None else os.environ.update({key: value})


def _work(config: Path, name: str, log: Path) -> None:
    """Run a job in its process."""
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for standard in (1, 2):
        os.dup2(handle, standard)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    sys.exit(launch(_run, 1, config, name))


def _run(config: Path, name: str) -> int:
    run(open_config(str(config)), name, resume="auto")
    return 0


def _end_with_parent() -> None:
    """Save and end when the parent process has gone."""
    multiprocessing.parent_process().join()
    os.kill(os.getpid(), signal.SIGTERM)
