"""Runs in forks of the test process, which has imported everything: a run starts in no time and may be killed."""

import os
import sys
import time
import traceback

import torch
import torch.distributed as dist

from bissl_zoo.engine.launch import _run
from bissl_zoo.engine.runner import run


def start_run(cfg, rank=0, processes=1, meeting=None, before=None, after=None, resume="auto", errors=os.devnull):
    """The process number of a fork that goes through `cfg` and exits as the command line does.

    Args:
        rank, processes, meeting: of a run in several processes, which meet at that file.
        before, after: called in the fork.
        errors: the file that its standard error is appended to.
    """
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        torch.set_num_threads(1)
        for descriptor, file in ((1, os.devnull), (2, errors)):
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), descriptor)
        sys.stdout, sys.stderr = (open(descriptor, "w", buffering=1, closefd=False) for descriptor in (1, 2))
        if before:
            before()
        if processes > 1:
            dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=processes)
        status = _run(lambda: run(cfg, "test", resume=resume) and 0, ())
        if after:
            after()
    except Exception:
        traceback.print_exc()
    finally:
        os._exit(status)


def wait_for(condition, pid, seconds=120):
    """Until something is so, while the fork lives."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert os.waitpid(pid, os.WNOHANG) == (0, 0), "the run has ended"
        assert time.monotonic() < deadline
        time.sleep(0.01)


def exit_status(pid):
    """What the fork came to: its exit status, negative where a signal ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
