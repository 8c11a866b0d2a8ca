"""Start a run in this process, in torchrun's processes, or in several processes on this machine."""

import contextlib
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from omegaconf.errors import OmegaConfBaseException

from bissl_zoo.data.samples import lost_worker
from bissl_zoo.distributed import get_local_rank, get_rank, is_lost_contact, stop_signals
from bissl_zoo.errors import BisslZooError, CheckpointError, ConfigError, DatasetError, Interrupted, printable
from bissl_zoo.files import DISK_ERRORS
from bissl_zoo.progress.console import READER_GONE, write_to_nobody

#: seconds that the processes of a run have to end by themselves after one of them was lost
GRACE = 20.0


def choose_device(name: str) -> torch.device:
    """Return the device of `train.device`; "auto" is this process's GPU, or the CPU if there is no GPU.

    Raises:
        ConfigError: a GPU is required and there is none, or torch has no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"train.device='{name}' is not a device of torch; use auto, cpu or cuda.") from error
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError("train.device='cuda', but torch finds no GPU. Use train.device=auto or cpu.")
        device = torch.device("cuda", get_local_rank() if device.index is None else device.index)
        if device.index >= torch.cuda.device_count():
            raise ConfigError(f"train.device: there is no {device}; torch finds {torch.cuda.device_count()} GPUs.")
        torch.cuda.set_device(device)
    return device


def launch(main: Callable[..., int], num_processes: int, *args: Any) -> int:
    """Run `main(*args)` in this process, in torchrun's, or in `num_processes` on this machine; return the exit status.

    A `BisslZooError` is printed as one message on standard error, with exit status 1.
    """
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return _run_in_group(main, args)
    if num_processes == 1:
        return _run(main, args)
    if num_processes < 1:
        return _report(ConfigError(f"--num-gpus {num_processes}: at least 1 process is needed."))
    return _start(main, num_processes, args)


def restarted() -> bool:
    """Return True if torchrun has restarted this process after one of its processes was lost."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def _start(main: Callable[..., int], num_processes: int, args: tuple) -> int:
    """Start the processes, forward stop signals, and report a process that was killed."""
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)  # the failed process has printed why
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = (main, args, num_processes, port)
    context = mp.start_processes(_spawned, arguments, nprocs=num_processes, join=False, start_method="spawn")
    try:
        with _forwarded_signals(context.pids()):
            while not context.join(grace_period=GRACE):
                pass
    except mp.ProcessExitedException as ended:
        killed = [(rank, process.exitcode) for rank, process in enumerate(context.processes) if process.exitcode < 0]
        if ended.exit_code >= 0 and not killed:
            return ended.exit_code
        rank, code = killed[0] if killed else (ended.error_index, ended.exit_code)
        name = signal.Signals(-code).name
        _print(f"error: process {rank} was killed ({name}), and the others were stopped. Continue with --resume.")
        return 128 - code
    return 0


@contextlib.contextmanager
def _forwarded_signals(pids: list[int]) -> Iterator[None]:
    """Forward stop signals to the processes; Ctrl-C reaches them directly, from their terminal."""

    def forward(number: int, frame: Any) -> None:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    handlers = dict.fromkeys(stop_signals(), forward) | {signal.SIGINT: signal.SIG_IGN}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _spawned(rank: int, main: Callable[..., int], args: tuple, world_size: int, port: int) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    status = _run_in_group(main, args, parent_reports=True)
    if status:
        sys.exit(status)


def _run_in_group(main: Callable[..., int], args: tuple, parent_reports: bool = False) -> int:
    _init_group()
    try:
        return _run(main, args)
    except RuntimeError as error:
        if not is_lost_contact(error):
            raise
        if get_rank() == 0 and not parent_reports:
            _print(f"error: lost contact with another process ({error}). Continue with --resume.")
        sys.stderr.flush()
        os._exit(1)  # the group can no longer be destroyed in order
    finally:
        dist.destroy_process_group()


def _init_group() -> None:
    # a run on the CPU of a GPU machine needs gloo
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    machines, shares_store = os.environ.get("GROUP_WORLD_SIZE", "1"), os.environ.get("TORCHELASTIC_USE_AGENT_STORE")
    if machines != "1" and shares_store == "True" and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)):
        if os.environ["RANK"] == "0":
            _print(
                "warning: processes that torchrun restarts on several machines do not find each other in the store "
                "that it shares with them. Set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for torchrun."
            )
    if not restarted() or machines != "1":
        return dist.init_process_group(backend)
    # torchrun's store still holds the addresses of the previous processes (pytorch/pytorch#135712)
    store, rank, world_size = next(dist.rendezvous("env://"))
    store = dist.PrefixStore(f"restart_{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    return dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)


def _run(main: Callable[..., int], args: tuple) -> int:
    try:
        return main(*args)
    except Interrupted as request:
        if get_rank() == 0:
            _print(str(request))
        return request.status
    except BisslZooError as error:
        return _report(error)
    except RuntimeError as error:  # torch reports a worker's death in any line of the main thread
        lost = lost_worker(error)
        if lost is None:
            raise
        return _report(lost)
    except OmegaConfBaseException as error:
        return _report(ConfigError(f"The config has no usable '{error.full_key}': {str(error).splitlines()[0]}."))
    except BrokenPipeError:
        write_to_nobody()
        return READER_GONE
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        return _report(CheckpointError(f"Writing failed: {error}. Make room or repair the disk, then use --resume."))
    except KeyboardInterrupt:
        _print("Interrupted. Continue with --resume.")
        return 130


def _report(error: BisslZooError) -> int:
    rank = get_rank()
    if rank == 0 or isinstance(error, DatasetError):  # a file may be unreadable on one rank only
        _print(f"error: {error}" if rank == 0 else f"error on rank {rank}: {error}")
    return 1


def _print(message: str) -> None:
    print(printable(message), file=sys.stderr, flush=True)
