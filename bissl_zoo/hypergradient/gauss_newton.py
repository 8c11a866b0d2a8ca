"""The Gauss-Newton matrix of the lower level, positive semidefinite everywhere, as a linear operator."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bissl_zoo.hypergradient.operator import GraphOperator
from bissl_zoo.hypergradient.second_order import fast_second_order


class GaussNewtonOperator(GraphOperator):
    """`A = I + G / shift` with `G = J^T C J`, where the loss is `outer(outputs)` and `outer` is convex.

    `J (M, P)` is the Jacobian of the outputs in the parameters and `C (M, M)` the Hessian of `outer` at the outputs, so
    `G` is the Hessian without the curvature of the network itself, which is where all negative curvature comes from
    (Schraudolph, Neural Computation 14, 2002; Martens, arXiv 1412.1193). It is the Hessian if the network is linear.

    `J u` differentiates `w -> J^T w`, which is linear in `w`, with activations and weights held constant in that graph;
    `J^T` is an ordinary backward pass. A product costs four convolutions a layer where the Hessian's costs six.

    Args:
        outputs: computes the outputs on the batch that defines `G`, a tuple of tensors; those that do not depend on the
            parameters, such as a teacher's, are constants.
        outer: convex scalar function of the outputs, twice differentiable.
        options: arguments of :class:`GraphOperator`.
    """

    def __init__(
        self,
        outputs: Callable[[], tuple[Tensor, ...]],
        outer: Callable[[tuple[Tensor, ...]], Tensor],
        parameters: Sequence[Tensor],
        shift: float | None,
        *args: Any,
        **options: Any,
    ) -> None:
        super().__init__(parameters, shift, *args, **options)
        self.outputs = outputs
        self.outer = outer

    def build(self) -> "_Graphs":
        """Return the graphs of the outputs, of `J^T w` and of the gradient of `outer`."""
        with fast_second_order(linear_backward=True):
            return _Graphs(self.outputs(), self.outer, self.parameters)

    def product(self, graph: "_Graphs", u: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return `G u`."""
        return graph.product(u, self.parameters)


class _Graphs:
    """The graphs of the outputs, of `w -> J^T w` and of the gradient of `outer`, for products with one matrix."""

    def __init__(
        self,
        outputs: tuple[Tensor, ...],
        outer: Callable[[tuple[Tensor, ...]], Tensor],
        parameters: Sequence[Tensor],
    ) -> None:
        self.outputs = [output for output in outputs if output.requires_grad]
        self.cotangents = [torch.zeros_like(output, requires_grad=True) for output in self.outputs]
        self.transposed = torch.autograd.grad(
            self.outputs, parameters, grad_outputs=self.cotangents, create_graph=True, materialize_grads=True
        )
        points = [output.detach().requires_grad_(output.requires_grad) for output in outputs]
        self.points = [point for point in points if point.requires_grad]
        self.slopes = torch.autograd.grad(outer(tuple(points)), self.points, create_graph=True, materialize_grads=True)

    def product(self, u: Sequence[Tensor], parameters: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return `J^T C J u` for a vector in parts like the parameters."""
        pairs = [(g, part) for g, part in zip(self.transposed, u, strict=True) if g.requires_grad]
        gradients, directions = zip(*pairs, strict=True)
        tangents = torch.autograd.grad(
            gradients, self.cotangents, grad_outputs=directions, retain_graph=True, materialize_grads=True
        )
        curved = [(slope, tangent) for slope, tangent in zip(self.slopes, tangents, strict=True) if slope.requires_grad]
        if not curved:  # outer is linear
            return tuple(torch.zeros_like(parameter) for parameter in parameters)
        slopes, tangents = zip(*curved, strict=True)
        weighted = torch.autograd.grad(
            slopes, self.points, grad_outputs=tangents, retain_graph=True, materialize_grads=True
        )
        return torch.autograd.grad(
            self.outputs, parameters, grad_outputs=weighted, retain_graph=True, materialize_grads=True
        )
