"""A pool of training runs: each job has its own process, run directory and log file, and can be resumed."""

import contextlib
import json
import logging
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from omegaconf import DictConfig, OmegaConf
from tabulate import tabulate

from bissl_zoo.config import LazyConfig, with_defaults
from bissl_zoo.distributed import StopRequest, stop_request
from bissl_zoo.engine.checks import check_config, open_config
from bissl_zoo.engine.launch import launch
from bissl_zoo.engine.publishing import published, publishes
from bissl_zoo.engine.runner import run
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
    read_results,
)
from bissl_zoo.runs.listing import FINISHED as RUN_FINISHED
from bissl_zoo.runs.listing import look_at
from bissl_zoo.runs.lock import run_lock

logger = logging.getLogger(__name__)

#: outcomes of a job; stopped means that `stop_if` gave a reason
FINISHED, FAILED, STOPPED = "finished", "failed", "stopped"
#: folder for the lock, the config of each job, and requests to stop one; hidden, so that it is not listed as a run
HIDDEN = ".jobs"
#: seconds between polls of the running jobs
TICK = 0.5
Engine = Literal["local", "ray"]


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
    if engine not in _ENGINES:
        raise ConfigError(f"Unknown engine '{engine}'. Choose {' or '.join(_ENGINES)}.")
    prepared = [job if callable(job.cfg) else _prepare(job, folder) for job in jobs]
    with contextlib.ExitStack() as stack:
        places = stack.enter_context(_ENGINES[engine](folder, parallel))
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
        places: "_Places",
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
            _stop_file(self.folder, job.name).unlink(missing_ok=True)
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
        write_atomically(_stop_file(self.folder, job.name), f"{int(number)} {reason}")

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


# ------------------------------------------------------------------------------------------------ where jobs run


class _Places(NamedTuple):
    """The number of jobs that run at a time, and the function that runs one and returns when it has ended."""

    count: int
    execute: Callable[[Job], JobOutcome]


def slots(parallel: int | None = None) -> list[dict[str, str]]:
    """Return the environment variables of each slot of this machine: a GPU and a share of the CPU threads."""
    count = torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    gpus = [name.strip() for name in visible.split(",")] if visible else [str(number) for number in range(count)]
    number = parallel or max(count, 1)
    # torch reads both at import; with the default policy idle threads spin and slow the data loader down
    share = {"OMP_NUM_THREADS": str(max(torch.get_num_threads() // number, 1)), "OMP_WAIT_POLICY": "PASSIVE"}
    return [share | ({"CUDA_VISIBLE_DEVICES": gpus[slot % count]} if count else {}) for slot in range(number)]


@contextlib.contextmanager
def _local(folder: Path, parallel: int | None) -> Iterator[_Places]:
    """Run jobs on this machine."""
    free: queue.SimpleQueue[dict[str, str]] = queue.SimpleQueue()
    environments = slots(parallel)
    for environment in environments:
        free.put(environment)

    def execute(job: Job) -> JobOutcome:
        environment = free.get()
        try:
            return _run_process(job, folder, environment)
        finally:
            free.put(environment)

    yield _Places(len(environments), execute)


@contextlib.contextmanager
def _ray(folder: Path, parallel: int | None) -> Iterator[_Places]:
    """Run jobs as tasks of the Ray cluster at `RAY_ADDRESS`, of that of this machine, or of a new one.

    Each job has one GPU if the cluster has any, else one CPU core.

    Raises:
        ConfigError: Ray is not installed, or no cluster answers at `RAY_ADDRESS`.
    """
    try:
        import ray
    except ImportError as error:
        raise ConfigError(
            '--engine ray needs Ray: pip install "bissl_zoo[ray]". Or use --engine local on one machine.'
        ) from error
    was_connected = ray.is_initialized()
    try:
        ray.init(log_to_driver=False, ignore_reinit_error=True)
    except ConnectionError as error:
        raise ConfigError(f"No Ray cluster answers at RAY_ADDRESS={os.environ.get('RAY_ADDRESS')}.") from error
    resources = ray.cluster_resources()
    kind = "GPU" if resources.get("GPU") else "CPU"
    task = ray.remote(num_gpus=int(kind == "GPU"), num_cpus=1, max_retries=0)(_run_process)
    environment = {name: value for name, value in os.environ.items() if name.startswith("BISSL_ZOO")}

    def execute(job: Job) -> JobOutcome:
        try:
            return ray.get(task.remote(job, folder.absolute(), environment, Path.cwd()))
        except ray.exceptions.RayError as error:
            message = f"Ray task failed: {str(error).strip().splitlines()[-1]}"
            return JobOutcome(job.name, Path(job.cfg.train.output_dir), FAILED, message=message)

    try:
        yield _Places(parallel or max(int(resources.get(kind, 1)), 1), execute)
    finally:
        if not was_connected:
            ray.shutdown()


_ENGINES: dict[str, Callable[..., contextlib.AbstractContextManager[_Places]]] = {"local": _local, "ray": _ray}


def _stop_file(folder: Path, name: str) -> Path:
    """Return the file that asks a job to stop: the number of a signal and the reason."""
    return folder / HIDDEN / f"{name}.stop"


def _run_process(job: Job, folder: Path, environment: dict[str, str], cwd: Path | None = None) -> JobOutcome:
    """Run a job in a new process on this machine and return its outcome; pass on what its stop file asks for."""
    run_dir, start, reason = Path(job.cfg.train.output_dir), time.monotonic(), ""
    log, request = folder / "logs" / f"{job.name}.log", _stop_file(folder, job.name)
    if request.exists():
        return JobOutcome(job.name, run_dir, STOPPED, message="stopped before it started")
    log.parent.mkdir(parents=True, exist_ok=True)
    config = folder.absolute() / HIDDEN / f"{job.name}.yaml"
    LazyConfig.save(job.cfg, config)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **environment}
    command = [sys.executable, "-m", "bissl_zoo.studies.jobs", str(config), job.name]
    with open(log, "ab") as output:
        log_start = output.tell()
        # the pipe closes when this process ends in any way, upon which the job saves and ends
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=cwd
        )
    with process:
        while process.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(TICK)
            text = request.read_text() if request.exists() else ""
            if text and text != reason:
                process.send_signal(int(text.partition(" ")[0]))
                reason = text
    code, seconds = process.returncode, time.monotonic() - start
    if reason and code in (-signal.SIGTERM, 128 + signal.SIGTERM):
        return JobOutcome(job.name, run_dir, STOPPED, message=reason.partition(" ")[2], seconds=seconds)
    if code:
        return JobOutcome(job.name, run_dir, FAILED, message=_error_message(code, log, log_start), seconds=seconds)
    try:
        results, total = read_results(run_dir), read_metadata(run_dir).get("wall_time_s", seconds)
    except CheckpointError as error:
        return JobOutcome(job.name, run_dir, FAILED, message=str(error), seconds=seconds)
    return JobOutcome(job.name, run_dir, FINISHED, results, seconds=total)


def _error_message(code: int, log: Path, start: int) -> str:
    """Return the signal that killed a job, or the last error in its log from byte `start` on."""
    if code < 0:
        hint = " (for example, out of memory)" if code == -signal.SIGKILL else ""
        return f"killed by {signal.Signals(-code).name}{hint}; see {log}"
    with open(log, "rb") as file:
        file.seek(start)
        text = file.read().decode(errors="replace").strip()
    errors = [match.end() for match in re.finditer(r"^error\b.*?: ", text, re.M)]
    return text[errors[-1] :] if errors else (text.splitlines() or [f"exit status {code}; see {log}"])[-1]


def _work(config: str, name: str) -> int:
    """Run a job in its process."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    return launch(_run, 1, config, name)


def _run(config: str, name: str) -> int:
    run(open_config(config), name, resume="auto")
    return 0


def _end_with_parent() -> None:
    """Save and end when the parent process has gone, which closes this end of the pipe."""
    os.read(0, 1)
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(_work(*sys.argv[1:]))
