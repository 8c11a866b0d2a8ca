"""The damped curvature of the lower level as a linear operator on flat vectors."""

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn


@contextlib.contextmanager
def frozen_state(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Run forward passes that leave no trace: buffers and the random state are afterwards what they were before.

    Buffers (batch-norm statistics above all) are exchanged for clones rather than restored in place, because a graph
    that is still to be differentiated may hold them.
    """
    owners = {id(module): module for root in modules for module in root.modules()}.values()
    kept = [
        (module, name, buffer) for module in owners for name, buffer in module._buffers.items() if buffer is not None
    ]
    tensors = [tensor for root in modules for tensor in (*root.parameters(), *root.buffers())]
    devices = {tensor.device.index for tensor in tensors if tensor.is_cuda}
    with torch.random.fork_rng(devices=sorted(devices)):
        for module, name, buffer in kept:
            module._buffers[name] = buffer.clone()
        try:
            yield
        finally:
            for module, name, buffer in kept:
                module._buffers[name] = buffer


class CurvatureOperator:
    """`A = I + H / strength` with `H` the Hessian of one loss in one set of parameters (arXiv 2410.02387, section 3.2).

    `prepare` builds the loss, its gradient and their graph once; each product is then one backward pass through that
    graph, so that all products of an alternation are with the same matrix, dropout and batch statistics included.

    Args:
        loss: computes the scalar lower loss on the batch that defines `H`.
        parameters: the backbone's parameters, the variables of `H`; vectors are flat `(P,)` in their order.
        strength: lambda + damping, positive.
        modules: what `loss` runs through; their buffers do not move.
        reduce: mean over ranks of a flat vector; the identity in a single process.
    """

    def __init__(
        self,
        loss: Callable[[], Tensor],
        parameters: Sequence[Tensor],
        strength: float,
        modules: Sequence[nn.Module] = (),
        reduce: Callable[[Tensor], Tensor] = lambda vector: vector,
    ) -> None:
        if not strength > 0:
            raise ValueError(f"strength (lambda + damping) must be positive, not {strength}")
        self.loss = loss
        self.parameters = list(parameters)
        self.strength = strength
        self.modules = list(modules)
        self.reduce = reduce
        self._gradient: list[Tensor] | None = None

    @property
    def block_sizes(self) -> list[int]:
        """Number of elements of each parameter tensor, in the order of a flat vector."""
        return [parameter.numel() for parameter in self.parameters]

    def prepare(self) -> "CurvatureOperator":
        """Build the graph that products go through; call again for a new batch or new parameters."""
        with frozen_state(self.modules), torch.enable_grad():
            self._gradient = list(
                torch.autograd.grad(self.loss(), self.parameters, create_graph=True, materialize_grads=True)
            )
        return self

    def release(self) -> None:
        """Free the graph."""
        self._gradient = None

    def matvec(self, u: Tensor) -> Tensor:
        """`A @ u` for a flat `(P,)` vector, the same on every rank."""
        return u + self.hessian_product(u) / self.strength

    __call__ = matvec

    def hessian_product(self, u: Tensor) -> Tensor:
        """`H @ u` for a flat `(P,)` vector, averaged over ranks.

        Raises:
            RuntimeError: `prepare` was not called.
        """
        if self._gradient is None:
            raise RuntimeError("CurvatureOperator.matvec before prepare(), or after release()")
        chunks = [chunk.view_as(p) for chunk, p in zip(u.split(self.block_sizes), self.parameters, strict=True)]
        # a gradient without a graph is constant in the parameters, so its rows of H are zero
        pairs = [(g, c) for g, c in zip(self._gradient, chunks, strict=True) if g.requires_grad]
        if not pairs:
            return torch.zeros_like(u)
        gradients, directions = zip(*pairs, strict=True)
        products = torch.autograd.grad(
            gradients, self.parameters, grad_outputs=directions, retain_graph=True, materialize_grads=True
        )
        return self.reduce(torch.cat([product.reshape(-1) for product in products]))
