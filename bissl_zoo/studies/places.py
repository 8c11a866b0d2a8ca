"""The places of jobs: each in its own process on this machine, or as a task of a Ray cluster."""

import contextlib
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from omegaconf import DictConfig

from bissl_zoo.config import LazyConfig
from bissl_zoo.engine.checks import open_config
from bissl_zoo.engine.launch import launch
from bissl_zoo.engine.runner import run
from bissl_zoo.errors import CheckpointError, ConfigError
from bissl_zoo.runs.directory import read_metadata, read_results

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


class Places(NamedTuple):
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
def _local(folder: Path, parallel: int | None) -> Iterator[Places]:
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

    yield Places(len(environments), execute)


@contextlib.contextmanager
def _ray(folder: Path, parallel: int | None) -> Iterator[Places]:
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
        yield Places(parallel or max(int(resources.get(kind, 1)), 1), execute)
    finally:
        if not was_connected:
            ray.shutdown()


ENGINES: dict[str, Callable[..., contextlib.AbstractContextManager[Places]]] = {"local": _local, "ray": _ray}


def stop_file(folder: Path, name: str) -> Path:
    """Return the file that asks a job to stop: the number of a signal and the reason."""
    return folder / HIDDEN / f"{name}.stop"


def _run_process(job: Job, folder: Path, environment: dict[str, str], cwd: Path | None = None) -> JobOutcome:
    """Run a job in a new process on this machine and return its outcome; pass on what its stop file asks for."""
    run_dir, start, reason = Path(job.cfg.train.output_dir), time.monotonic(), ""
    log, request = folder / "logs" / f"{job.name}.log", stop_file(folder, job.name)
    if request.exists():
        return JobOutcome(job.name, run_dir, STOPPED, message="stopped before it started")
    log.parent.mkdir(parents=True, exist_ok=True)
    config = folder.absolute() / HIDDEN / f"{job.name}.yaml"
    LazyConfig.save(job.cfg, config)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **environment}
    command = [sys.executable, "-m", "bissl_zoo.studies.places", str(config), job.name]
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
