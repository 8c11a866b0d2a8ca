"""One run among many: in a process of its own, with a log and an outcome in words; and the room there is for such."""

import contextlib
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path
from typing import Protocol

import torch
import torch.multiprocessing as mp
from omegaconf import DictConfig, OmegaConf

from bissl_zoo.config import LazyConfig
from bissl_zoo.engine.checks import open_config
from bissl_zoo.engine.launch import launch
from bissl_zoo.engine.publishing import published, read_results
from bissl_zoo.engine.runner import run
from bissl_zoo.errors import CheckpointError
from bissl_zoo.runs.directory import LENGTHS, has_begun, load_run_config
from bissl_zoo.runs.listing import FINISHED as RUN_FINISHED
from bissl_zoo.runs.listing import look_at
from bissl_zoo.runs.metadata import read_facts

#: what a job comes to; stopped: `stop_if` gave a reason
FINISHED, FAILED, STOPPED = "finished", "failed", "stopped"
#: hidden, so that nobody takes it for a run: the lock of the folder, and the config of every job
HIDDEN = ".jobs"


@dataclass(frozen=True)
class Job:
    """A run to be done: its name, unique in its folder, and its config, but for `train.output_dir`."""

    name: str
    cfg: DictConfig


@dataclass(frozen=True)
class JobOutcome:
    """What a job came to.

    Attributes:
        folder: the run directory.
        status: finished, failed, or stopped (`stop_if` gave a reason).
        results: the figures of the run, by what was fine-tuned; empty where it did not finish.
        message: the error in words, or the reason for stopping.
        seconds: of a finished run, all parts of it together; otherwise of this start.
        ran: whether it was started now, rather than found finished.
        done, total: how many jobs have an outcome by now, and how many there are.
        eta: seconds until the last one ends, from what those that were started took; None where none was.
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


def found_finished(cfg: DictConfig) -> JobOutcome | None:
    """The outcome of the run in `train.output_dir` where it came to the end that `cfg` asks for; None otherwise."""
    folder = Path(cfg.train.output_dir)
    found = look_at(folder) if has_begun(cfg) else None
    if found is None or found.state != RUN_FINISHED:
        return None
    before = load_run_config(folder)
    if any(OmegaConf.select(before, key) != OmegaConf.select(cfg, key) for key in LENGTHS):
        return None
    if cfg.train.publish.name and {"pretrain", "bissl"} & set(cfg.train.stages) and published(folder) is None:
        return None
    seconds = found.facts.get("wall_time_s", 0.0)
    return JobOutcome(folder.name, folder, FINISHED, found.results, seconds=seconds, ran=False)


class Running(Protocol):
    """A job that was started; see `JobProcess`."""

    job: Job
    reason: str

    def ended(self) -> bool: ...
    def stop(self, number: int, reason: str) -> None: ...
    def outcome(self) -> JobOutcome: ...


class Pool(Protocol):
    """Where jobs run."""

    def has_room(self) -> bool: ...
    def start(self, job: Job) -> Running: ...
    def wait(self, running: Sequence[Running], timeout: float) -> None: ...
    def release(self, running: Running) -> None: ...


class JobProcess:
    """A job that runs in a process of its own on this machine.

    Args:
        job: its config has `train.output_dir`.
        folder: where its log goes, below `logs`.
        environment: variables that differ from this process's.
    """

    def __init__(self, job: Job, folder: Path, environment: dict[str, str]) -> None:
        self.job, self.reason, self.began = job, "", time.monotonic()
        self.environment = environment
        self.run_dir, self.log = Path(job.cfg.train.output_dir), folder / "logs" / f"{job.name}.log"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.log.touch()
        self._said_before = self.log.stat().st_size
        config = folder / HIDDEN / f"{job.name}.yaml"
        LazyConfig.save(job.cfg, config)
        context = mp.get_context("spawn")
        self.process = context.Process(target=_work, args=(config, job.name, self.log), name=job.name)
        with _environment(environment):
            self.process.start()

    def ended(self) -> bool:
        """Whether there is an outcome."""
        return self.process.exitcode is not None

    def stop(self, number: int, reason: str) -> None:
        """Ask the run to save and end; `reason`: what it is then said to have been stopped for."""
        self.reason = reason
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, number)

    def outcome(self) -> JobOutcome:
        """What the process, which has ended, came to."""
        self.process.join()
        code, seconds, name = self.process.exitcode, time.monotonic() - self.began, self.job.name
        if self.reason and code in (-signal.SIGTERM, 128 + signal.SIGTERM):
            return JobOutcome(name, self.run_dir, STOPPED, message=self.reason, seconds=seconds)
        if code:
            return JobOutcome(name, self.run_dir, FAILED, message=self._message(code), seconds=seconds)
        try:
            results, whole = read_results(self.run_dir), read_facts(self.run_dir).get("wall_time_s", seconds)
        except CheckpointError as error:
            return JobOutcome(name, self.run_dir, FAILED, message=str(error), seconds=seconds)
        return JobOutcome(name, self.run_dir, FINISHED, results, seconds=whole)

    def _message(self, code: int) -> str:
        """The error that the run ended with: the signal's name, or what it said last."""
        if code < 0:
            name = signal.Signals(-code).name
            hint = ", as where memory runs out" if code == -signal.SIGKILL else ""
            return f"killed ({name}{hint}); see {self.log}"
        with open(self.log, "rb") as file:
            file.seek(self._said_before)
            said = file.read().decode(errors="replace").strip()
        start = max((found.start() for found in re.finditer(r"^error\b.*?: ", said, re.M)), default=None)
        # before it has a log, as where an import fails, it writes where this process does
        last = said.splitlines()[-1] if said else f"ended with status {code} before it began; see standard error"
        return last if start is None else said[start:].partition(": ")[2]


class LocalPool:
    """This machine: so many jobs at a time, each with a GPU and a share of the CPU's threads.

    Args:
        parallel: None for one per GPU, or one.
    """

    def __init__(self, folder: Path, parallel: int | None = None) -> None:
        self.folder = folder
        count = torch.cuda.device_count()
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        gpus = [name.strip() for name in visible.split(",")] if visible else [str(number) for number in range(count)]
        number = parallel or max(count, 1)
        # both are read once, when torch is imported; loader workers share the cores with threads, which otherwise spin
        share = {"OMP_NUM_THREADS": str(max(torch.get_num_threads() // number, 1)), "OMP_WAIT_POLICY": "PASSIVE"}
        #: the environment of each job that may still be started
        self.slots = [share | ({"CUDA_VISIBLE_DEVICES": gpus[slot % count]} if count else {}) for slot in range(number)]

    def has_room(self) -> bool:
        """Whether another job may be started."""
        return bool(self.slots)

    def start(self, job: Job) -> JobProcess:
        """Start a job."""
        return JobProcess(job, self.folder, self.slots.pop(0))

    def wait(self, running: Sequence[JobProcess], timeout: float) -> None:
        """Wait until one of them ends, at most so many seconds."""
        wait([one.process.sentinel for one in running], timeout=timeout)

    def release(self, running: JobProcess) -> None:
        """Take back what a job that has ended had."""
        self.slots.append(running.environment)


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
    """What the process of a job does."""
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for standard in (1, 2):
        os.dup2(handle, standard)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    sys.exit(launch(_run, 1, config, name))


def _run(config: Path, name: str) -> int:
    run(open_config(str(config)), name, resume="auto")
    return 0


def _end_with_parent() -> None:
    """Save and end where the process that started this one is gone."""
    multiprocessing.parent_process().join()
    os.kill(os.getpid(), signal.SIGTERM)
