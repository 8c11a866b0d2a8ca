"""Rank, world size and the few collectives the project needs; every function also works in a single process."""

import contextlib
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from bissl_zoo.errors import BisslZooError

#: signals that ask a run to stop: a scheduler's end, Slurm's warning (`--signal=USR1@120`), and Ctrl-C
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


def is_initialized() -> bool:
    """Whether a process group is up, so that collectives mean something."""
    return dist.is_available() and dist.is_initialized()


def get_rank() -> int:
    """This process's number among all processes, 0 where there is only one."""
    return dist.get_rank() if is_initialized() else 0


def get_world_size() -> int:
    """How many processes train together, 1 without a process group."""
    return dist.get_world_size() if is_initialized() else 1


def get_local_rank() -> int:
    """This process's number on its machine (torchrun's `LOCAL_RANK`), which is also its GPU."""
    return int(os.environ.get("LOCAL_RANK", 0))


def is_main_process() -> bool:
    """Whether this process writes the files and prints the progress."""
    return get_rank() == 0


def is_lost_contact(error: RuntimeError) -> bool:
    """Whether a collective failed because another process is gone or does not answer."""
    if isinstance(error, dist.DistError):
        return True
    text = str(error).lower()
    return any(sign in text for sign in ("closed by peer", "reset by peer", "broken pipe", "gloo", "timed out waiting"))


def barrier() -> None:
    """Wait until every process has come here."""
    if get_world_size() > 1:
        dist.barrier()


def all_gather_objects(obj: Any) -> list[Any]:
    """Every rank's `obj`, in rank order, on every rank; `obj` is pickled between processes of this run only."""
    if get_world_size() == 1:
        return [obj]
    gathered: list[Any] = [None] * get_world_size()
    dist.all_gather_object(gathered, obj)
    return gathered


def broadcast_object(obj: Any) -> Any:
    """Rank 0's `obj` on every rank."""
    if get_world_size() == 1:
        return obj
    box = [obj]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def any_rank(flag: bool, device: torch.device | str = "cpu") -> bool:
    """Whether `flag` is true on at least one rank, with the same answer on every rank.

    One number travels and nothing is pickled, so a loop may ask at every step. `device` is where it travels: one that
    the process group has a backend for.
    """
    if get_world_size() == 1:
        return flag
    vote = torch.tensor(float(flag), device=device)
    dist.all_reduce(vote, op=dist.ReduceOp.MAX)
    return bool(vote.item())


def on_main_process(action: Callable[[], Any]) -> Any:
    """Run `action` on rank 0 alone; what it returns or raises reaches every rank.

    A `BisslZooError` is raised as it is everywhere. Any other exception is raised on rank 0, and a `RuntimeError` that
    tells of it on the other ranks, which would otherwise wait for rank 0 until they time out.
    """
    result, raised, told = None, None, None
    if is_main_process():
        try:
            result = action()
        except Exception as error:
            raised = error
            told = (
                error if isinstance(error, BisslZooError) else RuntimeError(f"rank 0: {type(error).__name__}: {error}")
            )
    result, told = broadcast_object((result, told))
    if raised or told:
        raise raised or told
    return result


def flatten(tensors: Iterable[Tensor]) -> Tensor:
    """The tensors as one flat vector `(P,)`, in order, each in C order."""
    return torch.cat([t.reshape(-1) for t in tensors])


def unflatten_like(vector: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Views of `vector` `(P,)` in the shapes of `like`; the inverse of :func:`flatten`."""
    chunks = vector.split([t.numel() for t in like])
    return [chunk.view_as(t) for chunk, t in zip(chunks, like, strict=True)]


def all_reduce_mean(vector: Tensor) -> Tensor:
    """The mean of `vector` over ranks, bit-equal on every rank; the input itself in a single process."""
    if get_world_size() == 1:
        return vector
    vector = vector.clone()
    dist.all_reduce(vector)
    return vector / get_world_size()


@torch.no_grad()
def average_gradients(parameters: Iterable[Tensor]) -> None:
    """Replace each `.grad` by its mean over ranks, in one flat all-reduce.

    A parameter without a gradient counts as zero, so that ranks whose batches used different parameters agree.
    """
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
    """Give every rank rank 0's parameters and buffers."""
    if get_world_size() > 1:
        for tensor in module.state_dict(keep_vars=True).values():
            dist.broadcast(tensor.data, src=0)


def gather_with_gradient(x: Tensor) -> Tensor:
    """Concatenate every rank's `x` `(N, D)` along the batch, in rank order, to `(W * N, D)`.

    The backward pass sums over ranks the gradients that each rank's loss sends to a row, and is made of collectives
    that have a backward of their own, so that losses that gather embeddings can be differentiated twice.
    All ranks must hold the same `N`.
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
    """Sum over ranks, then this rank's rows: the transpose of `_AllGather`, which in turn is its own transpose."""

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
        before = {number: signal.signal(number, request.receive) for number in STOP_SIGNALS}
    except ValueError:  # not the main thread, as in a notebook's executor
        yield request
        return
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
