"""The damped curvature of the lower level as a linear operator on flat vectors."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from bissl_zoo.hypergradient.second_order import fast_second_order
from bissl_zoo.hypergradient.solver import LinearOperator

T = TypeVar("T")


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


class CurvatureOperator(LinearOperator):
    """`A = I + H / shift`, with `H` the Hessian of a loss in some parameters (arXiv 2410.02387, section 3.2).

    Between `prepare` and `release` all products are with the same matrix: the loss is computed with the random state of
    `prepare`, so dropout uses the same masks, and buffers such as batch-norm statistics do not change.

    Args:
        loss: computes the scalar lower loss on the batch that defines `H`.
        parameters: the variables of `H`, the backbone's parameters; vectors are flat `(P,)` in this order.
        shift: lambda + damping, positive; None if it is chosen later.
        modules: modules that `loss` runs; their buffers are protected.
        reduce: mean of a flat vector over ranks; the identity in a single process.
        hvp_mode: "retain_graph" builds the graph of the gradient once, and each product is one backward pass through
            it; "recompute" builds the graph for each product, which is slower and holds no graph between products.
    Raises:
        ValueError: an unknown `hvp_mode`, or a shift that is not positive.
    """

    def __init__(
        self,
        loss: Callable[[], Tensor],
        parameters: Sequence[Tensor],
        shift: float | None,
        modules: Sequence[nn.Module] = (),
        reduce: Callable[[Tensor], Tensor] = lambda vector: vector,
        hvp_mode: Literal["retain_graph", "recompute"] = "retain_graph",
    ) -> None:
        super().__init__([parameter.numel() for parameter in parameters], shift)
        if hvp_mode not in ("retain_graph", "recompute"):
            raise ValueError(f'hvp_mode is {hvp_mode!r}; use "retain_graph" (faster) or "recompute" (less memory).')
        self.loss = loss
        self.parameters = list(parameters)
        self.modules = list(modules)
        self.reduce = reduce
        self.hvp_mode = hvp_mode
        self._gradient: Callable[[], list[Tensor]] | None = None

    def prepare(self) -> "CurvatureOperator":
        """Fix the matrix and return the operator; call again for a new batch or new parameters."""
        self.subspace.clear()
        build = replayed(self._build_gradient, self.modules)
        if self.hvp_mode == "retain_graph":
            gradient = build()
            self._gradient = lambda: gradient
        else:
            self._gradient = build
        return self

    def release(self) -> None:
        """Free the graph and the subspace."""
        self._gradient = None
        self.subspace.clear()

    def hessian_product(self, u: Tensor) -> Tensor:
        """Return `H @ u` for `u (P,)`, averaged over ranks and therefore equal on every rank.

        Raises:
            RuntimeError: `prepare` was not called.
        """
        if self._gradient is None:
            raise RuntimeError("CurvatureOperator: call prepare() before products; release() ends them.")
        chunks = [chunk.view_as(p) for chunk, p in zip(u.split(self.block_sizes), self.parameters, strict=True)]
        # a gradient without a graph does not depend on the parameters: its rows of H are zero
        pairs = [(g, c) for g, c in zip(self._gradient(), chunks, strict=True) if g.requires_grad]
        if not pairs:
            return torch.zeros_like(u)
        gradients, directions = zip(*pairs, strict=True)
        products = torch.autograd.grad(
            gradients,
            self.parameters,
            grad_outputs=directions,
            retain_graph=self.hvp_mode == "retain_graph",
            materialize_grads=True,
        )
        return self.reduce(torch.cat([product.reshape(-1) for product in products]))

    def _build_gradient(self) -> list[Tensor]:
        constant = constant_except(self.parameters, self.modules)
        # fused attention has no second derivative
        with torch.enable_grad(), fast_second_order(), sdpa_kernel(SDPBackend.MATH), constant:
            return list(torch.autograd.grad(self.loss(), self.parameters, create_graph=True, materialize_grads=True))
