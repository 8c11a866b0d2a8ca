"""Jobs on the machines of a Ray cluster, each started by a task of its own."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from bissl_zoo.errors import ConfigError
from bissl_zoo.studies.job_process import FAILED, HIDDEN, STOPPED, Job, JobOutcome, JobProcess

#: seconds between looks at whether a job is to be stopped
TICK = 0.5


def _ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise ConfigError(
            'The engine ray needs Ray: pip install "bissl_zoo[search]". Or use the engine local.'
        ) from error
    return ray


@contextlib.contextmanager
def ray_pool(folder: Path, parallel: int | None) -> Iterator["RayPool"]:
    """The cluster that `RAY_ADDRESS` names, or the one that this machine belongs to, or this machine alone.

    Raises:
        ConfigError: Ray is not installed, or there is no cluster at `RAY_ADDRESS`.
    """
    ray = _ray()
    was_there = ray.is_initialized()
    try:
        ray.init(log_to_driver=False, ignore_reinit_error=True)
    except ConnectionError as error:
        raise ConfigError(f"There is no Ray cluster at RAY_ADDRESS={os.environ.get('RAY_ADDRESS')}.") from error
    try:
        yield RayPool(ray, folder.absolute(), parallel)
    finally:
        if not was_there:
            ray.shutdown()


class RayPool:
    """Jobs as Ray tasks, each with a GPU where the cluster has any, else with a CPU core.

    Args:
        parallel: jobs at a time on all machines; None for as many as there are GPUs or cores.
    """

    def __init__(self, ray: Any, folder: Path, parallel: int | None) -> None:
        self.ray, self.folder = ray, folder
        resources = ray.cluster_resources()
        kind = "GPU" if resources.get("GPU") else "CPU"
        self.room = parallel or max(int(resources.get(kind, 1)), 1)
        self.task = ray.remote(num_gpus=int(kind == "GPU"), num_cpus=1, max_retries=0)(_run_job)

    def has_room(self) -> bool:
        """Whether another job may be started."""
        return self.room > 0

    def start(self, job: Job) -> "RayJob":
        """Hand a job to the cluster."""
        self.room -= 1
        return RayJob(self.ray, self.task, job, self.folder)

    def wait(self, running: Sequence["RayJob"], timeout: float) -> None:
        """Wait until one of them ends, at most so many seconds."""
        self.ray.wait([one.reference for one in running], timeout=timeout)

    def release(self, running: "RayJob") -> None:
        """Take back the place of a job that has ended."""
        self.room += 1


class RayJob:
    """A job that the cluster has been given; it is asked to stop by a file in the folder that all machines see."""

    def __init__(self, ray: Any, task: Any, job: Job, folder: Path) -> None:
        self.ray, self.job, self.reason = ray, job, ""
        self.request = _request(folder, job)
        self.request.unlink(missing_ok=True)
        ours = {name: value for name, value in os.environ.items() if name.startswith("BISSL_ZOO")}
        self.reference = task.remote(job, folder, Path.cwd(), ours)

    def ended(self) -> bool:
        """Whether there is an outcome."""
        return bool(self.ray.wait([self.reference], timeout=0)[0])

    def stop(self, number: int, reason: str) -> None:
        """Ask the run to save and end, by the signal of this number."""
        self.reason = reason
        self.request.write_text(f"{int(number)} {reason}")

    def outcome(self) -> JobOutcome:
        """What the task came to."""
        self.request.unlink(missing_ok=True)
        try:
            return self.ray.get(self.reference)
        except self.ray.exceptions.RayError as error:
            message = f"Ray lost it: {str(error).strip().splitlines()[-1]}"
            return JobOutcome(self.job.name, Path(self.job.cfg.train.output_dir), FAILED, message=message)


def _request(folder: Path, job: Job) -> Path:
    return folder / HIDDEN / f"{job.name}.stop"


def _run_job(job: Job, folder: Path, cwd: Path, environment: dict[str, str]) -> JobOutcome:
    """The task: what a machine of the cluster does. Ray has set which GPU is seen, and how many threads there are."""
    os.chdir(cwd)
    request = _request(folder, job)
    if request.exists():
        return JobOutcome(job.name, Path(job.cfg.train.output_dir), STOPPED, message="stopped before it began")
    running = JobProcess(job, folder, environment)
    while not wait([running.process.sentinel], timeout=TICK):
        if request.exists() and not running.reason:
            number, _, reason = request.read_text().partition(" ")
            if reason:  # else it is being written
                running.stop(int(number), reason)
    return running.outcome()
