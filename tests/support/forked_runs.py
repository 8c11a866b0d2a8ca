"""Runs in forks of the test process: they start fast, since everything is imported, and can be killed."""

import os
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

from bissl_zoo.engine import launch
from bissl_zoo.engine.runner import run


def start_run(cfg, rank=0, processes=1, meeting=None, before=None, after=None, resume="auto", errors=None):
    """Run `cfg` in a fork that exits as the command line does, and return its process id.

    Args:
        rank, processes, meeting: for a run in several processes; `meeting` is the rendezvous file.
        before, after: called in the fork.
        errors: the file to which standard error is appended; by default one that `exit_status` prints.
    """
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        torch.set_num_threads(1)
        for descriptor, file in ((1, os.devnull), (2, errors or errors_of(os.getpid()))):
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), descriptor)
        sys.stdout, sys.stderr = (open(descriptor, "w", buffering=1, closefd=False) for descriptor in (1, 2))
        if before:
            before()
        group = dict(init_method=f"file://{meeting}", rank=rank, world_size=processes)
        launch._init_group = lambda: dist.init_process_group("gloo", **group)
        start = launch._run_in_group if processes > 1 else launch._run
        status = start(lambda: run(cfg, "test", resume=resume) and 0, ())
        if after:
            after()
    except Exception:
        traceback.print_exc()
    finally:
        os._exit(status)


def wait_for(condition, pid, seconds=120):
    """Wait until `condition()` is true; fail if the fork ends first."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert os.waitpid(pid, os.WNOHANG) == (0, 0), "the run has ended"
        assert time.monotonic() < deadline
        time.sleep(0.01)


def errors_of(pid):
    """Return the file for the standard error of a fork."""
    return Path(tempfile.gettempdir()) / f"forked-run-{os.getppid() if pid == os.getpid() else os.getpid()}-{pid}.txt"


def exit_status(pid):
    """Wait for the fork and return its exit status, negative if a signal ended it; print the errors of a failed one."""
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    errors = errors_of(pid)
    if errors.exists():
        if status > 0:
            print(errors.read_text(), file=sys.stderr)
        errors.unlink()
    return status
