"""A job pool on the machines of a Ray cluster; every job is a Ray task that starts one `JobProcess`."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from bissl_zoo.errors import ConfigError
from bissl_zoo.studies.jobs import FAILED, HIDDEN, STOPPED, TICK, Job, JobOutcome, JobProcess


@contextlib.contextmanager
def ray_pool(folder: Path, parallel: int | None) -> Iterator["RayPool"]:
    """Connect to the cluster at `RAY_ADDRESS`, or to that of this machine, or start Ray on this machine.

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
    try:
        yield RayPool(ray, folder.absolute(), parallel)
    finally:
        if not was_connected:
            ray.shutdown()


class RayPool:
    """Jobs as Ray tasks, each with one GPU if the cluster has any, else with one CPU core.

    Args:
        parallel: jobs at a time on all machines; by default as many as there are GPUs or cores.
    """

    def __init__(self, ray: Any, folder: Path, parallel: int | None) -> None:
        self.ray, self.folder = ray, folder
        resources = ray.cluster_resources()
        kind = "GPU" if resources.get("GPU") else "CPU"
        self.room = parallel or max(int(resources.get(kind, 1)), 1)
        self.task = ray.remote(num_gpus=int(kind == "GPU"), num_cpus=1, max_retries=0)(_run_job)

    def has_room(self) -> bool:
        """Return True if another job can start."""
        return self.room > 0

    def start(self, job: Job) -> "RayJob":
        """Submit a job to the cluster."""
        self.room -= 1
        return RayJob(self.ray, self.task, job, self.folder)

    def wait(self, running: Sequence["RayJob"], timeout: float) -> None:
        """Wait at most `timeout` seconds until one of the jobs ends."""
        self.ray.wait([job.reference for job in running], timeout=timeout)

    def release(self, running: "RayJob") -> None:
        """Free the place of a job that has ended."""
        self.room += 1


class RayJob:
    """A submitted job; a file in the shared folder asks it to stop."""

    def __init__(self, ray: Any, task: Any, job: Job, folder: Path) -> None:
        self.ray, self.job, self.reason = ray, job, ""
        self.request = _stop_file(folder, job)
        self.request.unlink(missing_ok=True)
        variables = {name: value for name, value in os.environ.items() if name.startswith("BISSL_ZOO")}
        self.reference = task.remote(job, folder, Path.cwd(), variables)

    def ended(self) -> bool:
        """Return True if the task has ended."""
        return bool(self.ray.wait([self.reference], timeout=0)[0])

    def stop(self, number: int, reason: str) -> None:
        """Ask the machine of the job to send it a signal."""
        self.reason = reason
        self.request.write_text(f"{int(number)} {reason}")

    def outcome(self) -> JobOutcome:
        """Return the outcome of the task, which has ended."""
        self.request.unlink(missing_ok=True)
        try:
            return self.ray.get(self.reference)
        except self.ray.exceptions.RayError as error:
            message = f"Ray task failed: {str(error).strip().splitlines()[-1]}"
            return JobOutcome(self.job.name, Path(self.job.cfg.train.output_dir), FAILED, message=message)


def _stop_file(folder: Path, job: Job) -> Path:
    return folder / HIDDEN / f"{job.name}.stop"


def _run_job(job: Job, folder: Path, cwd: Path, environment: dict[str, str]) -> JobOutcome:
    """Run a job on a machine of the cluster; Ray has set the visible GPU and the number of threads."""
    os.chdir(cwd)
    request = _stop_file(folder, job)
    if request.exists():
        return JobOutcome(job.name, Path(job.cfg.train.output_dir), STOPPED, message="stopped before it started")
    running = JobProcess(job, folder, environment)
    while not wait([running.process.sentinel], timeout=TICK):
        if request.exists() and not running.reason:
            number, _, reason = request.read_text().partition(" ")
            if reason:  # otherwise the file is still being written
                running.stop(int(number), reason)
    return running.outcome()
