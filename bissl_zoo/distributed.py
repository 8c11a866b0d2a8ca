"""Ranks, collectives and stop requests; every function also works in a single process."""

import contextlib
import os
import signal
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from bissl_zoo.errors import BisslZooError

#: signals that ask a run to stop: from a scheduler, Slurm's warning (`--signal=USR1@120`), a closed terminal, Ctrl-C
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)


def stop_signals() -> list[signal.Signals]:
    """Return the `STOP_SIGNALS` that this process obeys; nohup makes programs ignore SIGHUP."""
    return [n for n in STOP_SIGNALS if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]


def is_initialized() -> bool:
    """Return True if a process group is initialized."""
    return dist.is_available() and dist.is_initialized()


def get_rank() -> int:
    """Return the rank of this process, 0 without a process group."""
    return dist.get_rank() if is_initialized() else 0


def get_world_size() -> int:
    """Return the number of processes, 1 without a process group."""
    return dist.get_world_size() if is_initialized() else 1


def get_local_rank() -> int:
    """Return the rank of this process on its machine (torchrun's `LOCAL_RANK`), which is also its GPU."""
    return int(os.environ.get("LOCAL_RANK", 0))


def is_main_process() -> bool:
    """Return True on rank 0, which writes files and prints progress."""
    return get_rank() == 0


def is_lost_contact(error: RuntimeError) -> bool:
    """Return True if the error comes from a collective: another process is gone or does not answer."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    # gloo raises a plain RuntimeError, which only its origin identifies
    return isinstance(error, dist.DistError) or frame.f_globals["__name__"].startswith("torch.distributed")


def barrier() -> None:
    """Wait until every process has called this function."""
    if get_world_size() > 1:
        dist.barrier()


def all_gather_objects(obj: Any) -> list[Any]:
    """Return every rank's `obj`, in rank order, on every rank; pickled, but only between processes of this run."""
    if get_world_size() == 1:
        return [obj]
    gathered: list[Any] = [None] * get_world_size()
    dist.all_gather_object(gathered, obj)
    return gathered


def broadcast_object(obj: Any) -> Any:
    """Return rank 0's `obj` on every rank."""
    if get_world_size() == 1:
        return obj
    box = [obj]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def any_rank(flag: bool, device: torch.device | str = "cpu") -> bool:
    """Return True on every rank if `flag` is true on at least one.

    It transfers one number, so it can be called at every step. The process group needs a backend for `device`.
    """
    return flag if get_world_size() == 1 else bool(maximum_over_ranks(torch.tensor(float(flag), device=device)).item())


def maximum_over_ranks(x: Tensor) -> Tensor:
    """Return the elementwise maximum over ranks, in place; a NaN may get lost."""
    if get_world_size() > 1:
        dist.all_reduce(x, op=dist.ReduceOp.MAX)
    return x


def on_main_process(action: Callable[[], Any]) -> Any:
    """Run `action` on rank 0; return its result or raise its error on every rank.

    A `BisslZooError` is raised unchanged on every rank. Any other exception is raised on rank 0 and as a `RuntimeError`
    with its message on the other ranks, so that they do not wait for rank 0 until a timeout.
    """
    result = raised = shared = None
    if is_main_process():
        try:
            result = action()
        except Exception as error:
            raised = shared = error
            if not isinstance(error, BisslZooError):
                shared = RuntimeError(f"rank 0: {type(error).__name__}: {error}")
    result, shared = broadcast_object((result, shared))
    if raised or shared:
        raise raised or shared
    return result


def flatten(tensors: Iterable[Tensor]) -> Tensor:
    """Concatenate the tensors to one flat vector `(P,)`, each in C order."""
    return torch.cat([t.reshape(-1) for t in tensors])


def unflatten_like(vector: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Return views of `vector (P,)` with the shapes of `like`; the inverse of :func:`flatten`."""
    chunks = vector.split([t.numel() for t in like])
    return [chunk.view_as(t) for chunk, t in zip(chunks, like, strict=True)]


def all_reduce_mean(vector: Tensor) -> Tensor:
    """Return the mean of `vector` over ranks, bit-equal on every rank; the input itself in a single process."""
    if get_world_size() == 1:
        return vector
    vector = vector.clone()
    dist.all_reduce(vector)
    return vector / get_world_size()


@torch.no_grad()
def average_gradients(parameters: Iterable[Tensor]) -> None:
    """Replace each `.grad` by its mean over ranks, in one flat all-reduce; a missing gradient counts as zero."""
    if get_world_size() == 1:
        return
    parameters = list(parameters)
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    mean = all_reduce_mean(flatten(p.grad for p in parameters))
    for parameter, grad in zip(parameters, unflatten_like(mean, parameters), strict=True):
        parameter.grad.copy_(grad)


@torch.no_grad()
def broadcast_module(module: torch.nn.Module) -> None:
    """Copy the parameters and buffers of rank 0 to every rank."""
    if get_world_size() > 1:
        for tensor in module.state_dict(keep_vars=True).values():
            dist.broadcast(tensor.data, src=0)


def gather_with_gradient(x: Tensor) -> Tensor:
    """Concatenate `x (N, D)` of all W ranks, in rank order, to `(W * N, D)`; all ranks must have the same N.

    The backward pass sums the gradients of a row over ranks. Its collectives have a backward themselves, so losses that
    gather embeddings can be differentiated twice.
    """
    return x if get_world_size() == 1 else _AllGather.apply(x)


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _ReduceScatter.apply(grad)


class _ReduceScatter(torch.autograd.Function):
    """Sum over ranks and keep the rows of this rank: the transpose of `_AllGather`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total.chunk(get_world_size())[get_rank()].clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _AllGather.apply(grad)


class StopRequest:
    """Record the first signal that asks to stop; a second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def receive(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal: only record it, since the handler runs between two arbitrary instructions."""
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.signal is None:
            self.signal = number
            name = signal.Signals(number).name
            again = "; press Ctrl-C again to stop now" if number == signal.SIGINT else ""
            # not print(), which may be what was interrupted; standard error may be a file on a full disk
            with contextlib.suppress(OSError):
                os.write(2, f"\n{name}: saving after this step{again}\n".encode())

    def asked(self) -> bool:
        """Return True if this process received a signal; no collective."""
        return self.signal is not None

    def pending(self, device: torch.device) -> bool:
        """Return True if any process of the run received a signal; a collective."""
        return any_rank(self.asked(), device)

    @property
    def status(self) -> int:
        """Exit status, 128 + the signal's number; that of SIGTERM if only another process received one."""
        return 128 + (self.signal or signal.SIGTERM)


@contextlib.contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Record stop signals while the context lasts; do nothing outside the main thread, which has no handlers."""
    request = StopRequest()
    try:
        before = {number: signal.signal(number, request.receive) for number in stop_signals()}
    except ValueError:  # not the main thread, as in a notebook's executor
        yield request
        return
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
