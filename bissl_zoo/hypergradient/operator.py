"""The damped curvature of the lower level as a linear operator on flat vectors."""

import contextlib
import functools
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from bissl_zoo.hypergradient.second_order import fast_second_order
from bissl_zoo.hypergradient.solver import LinearOperator

T = TypeVar("T")


@contextlib.contextmanager
def float32_precision(precision: Literal["float32", "tf32"]) -> Iterator[None]:
    """Set the precision of float32 convolutions and matrix products on CUDA, and restore it afterwards.

    cuDNN computes convolutions in TF32 by default.
    """
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    settings = (cudnn.conv, cudnn.rnn, matmul) if hasattr(cudnn, "conv") else ()  # before PyTorch 2.9: flags alone
    before = [setting.fp32_precision for setting in settings]
    flags = (before[0] == "tf32", before[2] == "tf32") if settings else (cudnn.allow_tf32, matmul.allow_tf32)
    try:
        # `allow_tf32` sets all of a backend alike; PyTorch raises an error where it is read and they differ
        cudnn.allow_tf32 = matmul.allow_tf32 = precision == "tf32"
        yield
    finally:
        cudnn.allow_tf32, matmul.allow_tf32 = flags
        for setting, value in zip(settings, before, strict=True):
            setting.fp32_precision = value


@contextlib.contextmanager
def frozen_state(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Context in which forward passes change neither the buffers of `modules` nor the random state.

    Buffers, such as batch-norm statistics, are replaced by clones instead of being restored in place, because a graph
    that will be differentiated later may hold them.
    """
    buffers = [
        (module, name, buffer)
        for module in _unique_modules(modules)
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    with torch.random.fork_rng(devices=_devices(modules)):
        for module, name, buffer in buffers:
            module._buffers[name] = buffer.clone()
        try:
            yield
        finally:
            for module, name, buffer in buffers:
                module._buffers[name] = buffer


def replayed(function: Callable[[], T], modules: Sequence[nn.Module]) -> Callable[[], T]:
    """Return a function that always runs `function` with the current random state and restores state and buffers."""
    devices = _devices(modules)
    state, device_states = torch.get_rng_state(), [torch.cuda.get_rng_state(device) for device in devices]

    def replay() -> T:
        with frozen_state(modules):
            torch.set_rng_state(state)
            for device, device_state in zip(devices, device_states, strict=True):
                torch.cuda.set_rng_state(device_state, device)
            return function()

    return replay


@contextlib.contextmanager
def constant_except(parameters: Sequence[Tensor], modules: Sequence[nn.Module]) -> Iterator[None]:
    """Context in which graphs treat all other parameters of `modules` as constants, which saves their derivatives."""
    variables = {id(parameter) for parameter in parameters}
    others = {
        id(p): p for root in modules for p in root.parameters() if p.requires_grad and id(p) not in variables
    }.values()
    for parameter in others:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in others:
            parameter.requires_grad_(True)


def _unique_modules(roots: Sequence[nn.Module]) -> list[nn.Module]:
    return list({id(module): module for root in roots for module in root.modules()}.values())


def _devices(roots: Sequence[nn.Module]) -> list[int]:
    tensors = [tensor for root in roots for tensor in (*root.parameters(), *root.buffers())]
    return sorted({tensor.device.index for tensor in tensors if tensor.is_cuda})


class GraphOperator(LinearOperator):
    """Base of operators `A = I + M / shift` whose products are backward passes through graphs of the lower level.

    Between `prepare` and `release` all products are with the same matrix: the graphs are built with the random state of
    `prepare`, so dropout uses the same masks, and buffers such as batch-norm statistics do not change.

    Args:
        parameters: the variables, the backbone's parameters; vectors are flat `(P,)` in this order.
        shift: lambda + damping, positive; None if it is chosen later.
        modules: modules that the graphs run through; their buffers are protected.
        reduce: mean of a flat vector over ranks; the identity in a single process.
        hvp_mode: "retain_graph" builds the graphs once, and each product is a backward pass through them; "recompute"
            builds them for each product, which is slower and holds no graph between products.
        precision: of convolutions and matrix products on CUDA: "float32", or "tf32", which is faster and off by about
            0.1 in a product of a ResNet-50.
    Raises:
        ValueError: an unknown `hvp_mode` or `precision`, or a shift that is not positive.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        shift: float | None,
        modules: Sequence[nn.Module] = (),
        reduce: Callable[[Tensor], Tensor] = lambda vector: vector,
        hvp_mode: Literal["retain_graph", "recompute"] = "retain_graph",
        precision: Literal["float32", "tf32"] = "float32",
    ) -> None:
        super().__init__([parameter.numel() for parameter in parameters], shift)
        if hvp_mode not in ("retain_graph", "recompute"):
            raise ValueError(f'hvp_mode is {hvp_mode!r}; use "retain_graph" (faster) or "recompute" (less memory).')
        if precision not in ("float32", "tf32"):
            raise ValueError(f'precision is {precision!r}; use "float32" (exact) or "tf32" (faster).')
        self.parameters = list(parameters)
        self.modules = list(modules)
        self.reduce = reduce
        self.hvp_mode = hvp_mode
        self.precision = precision
        self._graph: Callable[[], Any] | None = None

    def prepare(self) -> "GraphOperator":
        """Fix the matrix and return the operator; call again for a new batch or new parameters.

        The graphs are built at the first product, so that a solver without products does not pay for them.
        """
        self.subspace.clear()
        build = replayed(self._build, self.modules)
        self._graph = functools.cache(build) if self.hvp_mode == "retain_graph" else build
        return self

    def release(self) -> None:
        """Free the graphs and the subspace."""
        self._graph = None
        self.subspace.clear()

    def hessian_product(self, u: Tensor) -> Tensor:
        """Return `M @ u` for `u (P,)`, averaged over ranks and therefore equal on every rank.

        Raises:
            RuntimeError: `prepare` was not called.
        """
        if self._graph is None:
            raise RuntimeError(f"{type(self).__name__}: call prepare() before products; release() ends them.")
        chunks = [chunk.view_as(p) for chunk, p in zip(u.split(self.block_sizes), self.parameters, strict=True)]
        with float32_precision(self.precision):
            product = self.product(self._graph(), chunks)
            return self.reduce(torch.cat([part.reshape(-1) for part in product]))

    def _build(self) -> Any:
        constant = constant_except(self.parameters, self.modules)
        # fused attention has no second derivative
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), constant, float32_precision(self.precision):
            return self.build()

    @abstractmethod
    def build(self) -> Any:
        """Return the graphs that `product` runs through."""

    @abstractmethod
    def product(self, graph: Any, u: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return `M u` of this rank, for a vector in parts shaped like the parameters, as new tensors."""


class CurvatureOperator(GraphOperator):
    """`A = I + H / shift`, with `H` the Hessian of a loss in some parameters (arXiv 2410.02387, section 3.2).

    Args:
        loss: computes the scalar lower loss on the batch that defines `H`.
        options: arguments of :class:`GraphOperator`.
    """

    def __init__(
        self, loss: Callable[[], Tensor], parameters: Sequence[Tensor], shift: float | None, *args: Any, **options: Any
    ) -> None:
        super().__init__(parameters, shift, *args, **options)
        self.loss = loss

    def build(self) -> tuple[Tensor, ...]:
        """Return the gradient, with its graph."""
        with fast_second_order():
            return torch.autograd.grad(self.loss(), self.parameters, create_graph=True, materialize_grads=True)

    def product(self, graph: tuple[Tensor, ...], u: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return `H u`."""
        # a gradient without a graph does not depend on the parameters: its rows of H are zero
        pairs = [(g, part) for g, part in zip(graph, u, strict=True) if g.requires_grad]
        if not pairs:
            return [torch.zeros_like(part) for part in u]
        gradients, directions = zip(*pairs, strict=True)
        retain = self.hvp_mode == "retain_graph"
        return torch.autograd.grad(
            gradients, self.parameters, grad_outputs=directions, retain_graph=retain, materialize_grads=True
        )
