"""The Gauss-Newton matrix of the lower level, positive semidefinite everywhere, as a linear operator."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

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
            outputs = self.outputs()
            varying = [output for output in outputs if output.requires_grad]
            cotangents = [torch.zeros_like(output, requires_grad=True) for output in varying]
            transposed = torch.autograd.grad(
                varying, self.parameters, grad_outputs=cotangents, create_graph=True, materialize_grads=True
            )
            constants = [output.detach().requires_grad_(output.requires_grad) for output in outputs]
            points = [point for point in constants if point.requires_grad]
            slopes = torch.autograd.grad(
                self.outer(tuple(constants)), points, create_graph=True, materialize_grads=True
            )
        return _Graphs(varying, cotangents, transposed, points, slopes)

    def product(self, graph: "_Graphs", u: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return `G u = J^T C J u`."""
        grad = functools.partial(torch.autograd.grad, retain_graph=True, materialize_grads=True)
        pairs = [(g, part) for g, part in zip(graph.transposed, u, strict=True) if g.requires_grad]
        gradients, directions = zip(*pairs, strict=True)
        tangents = grad(gradients, graph.cotangents, grad_outputs=directions)
        curved = [(slope, t) for slope, t in zip(graph.slopes, tangents, strict=True) if slope.requires_grad]
        if not curved:  # outer is linear
            return [torch.zeros_like(part) for part in u]
        slopes, tangents = zip(*curved, strict=True)
        weighted = grad(slopes, graph.points, grad_outputs=tangents)
        return grad(graph.outputs, self.parameters, grad_outputs=weighted)


class _Graphs(NamedTuple):
    """Outputs, `w` and `J^T w`, and the detached outputs with the gradient of `outer` there."""

    outputs: Sequence[Tensor]
    cotangents: Sequence[Tensor]
    transposed: Sequence[Tensor]
    points: Sequence[Tensor]
    slopes: Sequence[Tensor]
