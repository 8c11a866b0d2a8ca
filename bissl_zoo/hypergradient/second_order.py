"""Convolution and batch norm with an efficient double backward; value and gradient come from ATen's kernels."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional
from torch.overrides import TorchFunctionMode

aten = torch.ops.aten


def fast_second_order(linear_backward: bool = False) -> TorchFunctionMode:
    """Context in which to build a graph that will be differentiated twice, as for Hessian-vector products.

    `torch.nn.functional.conv2d` and `batch_norm` in training mode, and all modules that call them, get a custom double
    backward. That of the convolution computes its weight term with the kernel of ordinary weight gradients, while ATen
    convolves with batch and channels exchanged. That of batch norm makes seven passes over the activations, while ATen
    composes dozens of elementwise operations. On CUDA, batch norm runs ATen's kernel instead of cuDNN's.

    PyTorch's functions are used for tensors that are not dense float32 or float64 of one dtype, for convolutions whose
    input is not `(N, C, H, W)` or whose padding is a string, for batch norm with running statistics, under autocast,
    and without gradients.

    Args:
        linear_backward: a backward pass with `create_graph=True` records only how the gradients depend on the incoming
            gradient, in which they are linear, and treats activations and weights as constants. This is the graph of a
            product with the Jacobian: two convolutions a layer where a Hessian-vector product needs four more.
    Raises:
        RuntimeError: on a backward pass through the graph with `create_graph=True`: the third derivative is missing.
    """
    replacements = {functional.conv2d: _conv2d, functional.batch_norm: _batch_norm}
    with_linear = {name: functools.partial(new, linear=linear_backward) for name, new in replacements.items()}
    return _Replace({**with_linear, functional.hardsigmoid: _hard_sigmoid})


def _hard_sigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    """Return `hardsigmoid(input)` by functions that have a double backward, which ATen's own lacks."""
    return functional.relu6(input + 3) / 6


class _Replace(TorchFunctionMode):
    """Call the replacement of a function, or the function if there is none or it returns NotImplemented."""

    def __init__(self, replacements: dict[Callable, Callable]) -> None:
        super().__init__()
        self.replacements = replacements

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func in self.replacements:
            result = self.replacements[func](*args, **kwargs)
            if result is not NotImplemented:
                return result
        return func(*args, **kwargs)


#: stride, padding, dilation, transposed, output padding and groups of a convolution
_Geometry = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], bool, tuple[int, ...], int]


def _conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, ...] = 1,
    padding: int | str | tuple[int, ...] = 0,
    dilation: int | tuple[int, ...] = 1,
    groups: int = 1,
    *,
    linear: bool,
) -> Tensor:
    if not _are_plain(input, weight, bias) or input.dim() != 4 or isinstance(padding, str):
        return NotImplemented
    geometry = (_pair(stride), _pair(padding), _pair(dilation), False, (0, 0), groups)
    return _Convolution.apply(input, weight, bias, geometry, linear)


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    linear: bool,
) -> Tensor:
    # torch raises its own error for a single value per channel
    if not training or input.dim() < 2 or input.numel() <= input.shape[1]:
        return NotImplemented
    if not _are_plain(input, weight, bias, running_mean, running_var):
        return NotImplemented
    return _BatchNorm.apply(input, weight, bias, (running_mean, running_var), momentum, eps, linear)


def _pair(value: int | tuple[int, ...]) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * 2 if len(values) == 1 else values


def _are_plain(*tensors: Tensor | None) -> bool:
    """Return True if a graph is recorded and the tensors are dense, of one real dtype, without autocast."""
    given = [tensor for tensor in tensors if tensor is not None]
    return (
        torch.is_grad_enabled()
        and all(type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided for tensor in given)
        and len({tensor.dtype for tensor in given}) == 1
        and given[0].dtype in (torch.float32, torch.float64)
        and not torch.is_autocast_enabled(given[0].device.type)
    )


def _refuse_third_derivative() -> None:
    # in a backward pass, gradients are enabled only with create_graph=True
    if torch.is_grad_enabled():
        raise RuntimeError(
            "create_graph=True needs a third derivative, and a graph built under fast_second_order() has two; "
            "build the graph outside of fast_second_order()"
        )


def _constants(tensors: tuple[Tensor | None, ...]) -> list[Tensor | None]:
    return [None if tensor is None else tensor.detach() for tensor in tensors]


class _Convolution(Function):
    """`y = x * w + b`, where `*` is the convolution."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: _Geometry, linear: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.geometry, ctx.linear = geometry, linear
        return torch.convolution(x, weight, bias, *geometry)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = _constants(ctx.saved_tensors) if ctx.linear else ctx.saved_tensors
        return (*_ConvolutionBackward.apply(grad, x, weight, ctx.geometry, ctx.needs_input_grad[:3]), None, None)


class _ConvolutionBackward(Function):
    """Gradients of a convolution in x, w and b; each is bilinear, so its own gradients are convolutions."""

    @staticmethod
    def forward(
        ctx: Any, grad: Tensor, x: Tensor, weight: Tensor, geometry: _Geometry, needed: tuple[bool, ...]
    ) -> tuple[Tensor | None, ...]:
        ctx.save_for_backward(grad, x, weight)
        ctx.set_materialize_grads(False)
        ctx.geometry = geometry
        return aten.convolution_backward(grad, x, weight, weight.shape[:1], *geometry, needed)

    @staticmethod
    def backward(
        ctx: Any, x_dot: Tensor | None, weight_dot: Tensor | None, bias_dot: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """Differentiate `<x_dot, dx> + <weight_dot, dw> + <bias_dot, db>`, as a Hessian-vector product does."""
        _refuse_third_derivative()
        grad, x, weight = ctx.saved_tensors
        needs_grad, needs_x, needs_weight = ctx.needs_input_grad[:3]
        terms = []
        if needs_grad and x_dot is not None:
            terms.append(torch.convolution(x_dot, weight, None, *ctx.geometry))
        if needs_grad and weight_dot is not None:
            terms.append(torch.convolution(x, weight_dot, None, *ctx.geometry))
        if needs_grad and bias_dot is not None:
            terms.append(bias_dot.view(-1, 1, 1).expand_as(grad))
        # the gradients of that sum in x and w are those of a convolution of x_dot with weight_dot
        x_grad, weight_grad, _ = aten.convolution_backward(
            grad,
            x if x_dot is None else x_dot,
            weight if weight_dot is None else weight_dot,
            None,
            *ctx.geometry,
            (needs_x and weight_dot is not None, needs_weight and x_dot is not None, False),
        )
        return functools.reduce(Tensor.add_, terms) if terms else None, x_grad, weight_grad, None, None


class _BatchNorm(Function):
    """`y = weight (x - mean) invstd + bias` with the statistics of the batch (arXiv 1502.03167)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running: tuple,
        momentum: float,
        eps: float,
        linear: bool,
    ) -> Tensor:
        y, mean, invstd = torch.native_batch_norm(x, weight, bias, *running, True, momentum, eps)
        ctx.save_for_backward(x, weight, mean, invstd)
        ctx.eps, ctx.linear = eps, linear
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        saved = _constants(ctx.saved_tensors) if ctx.linear else ctx.saved_tensors
        x_grad, weight_grad, bias_grad = _BatchNormBackward.apply(grad, *saved, ctx.eps, needs_x)
        return x_grad, weight_grad if needs_weight else None, bias_grad if needs_bias else None, *[None] * 4


class _BatchNormBackward(Function):
    """Gradients of batch norm in x, weight and bias.

    With `h = (x - mean) invstd` and sums over the N values of a channel:
    `dx = weight invstd (dy - sum(dy) / N - h sum(dy h) / N)`, `dweight = sum(dy h)` and `dbias = sum(dy)`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        grad: Tensor,
        x: Tensor,
        weight: Tensor | None,
        mean: Tensor,
        invstd: Tensor,
        eps: float,
        needs_x: bool,
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        x_grad, weight_grad, bias_grad = aten.native_batch_norm_backward(
            grad, x, _or_ones(weight, mean), None, None, mean, invstd, True, eps, (needs_x, True, True)
        )
        ctx.save_for_backward(grad, x, weight, mean, invstd, weight_grad, bias_grad)
        return x_grad, weight_grad, bias_grad

    @staticmethod
    def backward(ctx: Any, x_dot: Tensor | None, weight_dot: Tensor, bias_dot: Tensor) -> tuple[Tensor | None, ...]:
        """Differentiate `<x_dot, dx> + <weight_dot, dweight> + <bias_dot, dbias>` in dy, x and weight.

        Each result is a linear combination; `of_*` are its coefficients. It never divides by the weight, since residual
        branches may be initialized with a weight of zero.
        """
        _refuse_third_derivative()
        grad, x, weight, mean, invstd, weight_grad, bias_grad = ctx.saved_tensors
        if x_dot is None:
            x_dot = torch.zeros_like(x)
        size = x.numel() // x.shape[1]
        scale = invstd if weight is None else weight * invstd
        # means over a channel: of dy h and dy, of x_dot h and x_dot
        grad_h, grad_mean = weight_grad / size, bias_grad / size
        dot_h, dot_mean = (total / size for total in _channel_sums(x_dot, x, mean, invstd))
        dot_grad, _ = _channel_sums(x_dot, grad, grad_mean, invstd)
        weight_out = dot_grad - size * invstd * grad_h * dot_h

        of_x = (weight_dot - scale * dot_h) * invstd
        grad_out = _affine(x, of_x, bias_dot - scale * dot_mean - of_x * mean)
        _add_scaled(grad_out, x_dot, scale)

        x_out = None
        if ctx.needs_input_grad[1]:
            of_grad, of_dot = of_x, -scale * invstd * grad_h
            of_x = -invstd * (scale * weight_out / size + of_dot * dot_h + of_grad * grad_h)
            x_out = _affine(x, of_x, -of_dot * dot_mean - of_grad * grad_mean - of_x * mean)
            _add_scaled(x_out, x_dot, of_dot)
            _add_scaled(x_out, grad, of_grad)
        return grad_out, x_out, None if weight is None else weight_out, *[None] * 4


def _channel_sums(a: Tensor, b: Tensor, center: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return `sum(a (b - center) scale)` and `sum(a)` per channel, in one pass over both tensors."""
    _, product, total = aten.native_batch_norm_backward(
        a, b, _or_ones(None, scale), None, None, center, scale, True, 0.0, (False, True, True)
    )
    return product, total


def _or_ones(weight: Tensor | None, like: Tensor) -> Tensor:
    """Return `weight`, or ones if it is None: the CUDA kernel takes dtype and device of two outputs from the weight."""
    return torch.ones_like(like) if weight is None else weight


def _affine(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Return `x * scale + shift` per channel in one pass: batch norm with mean 0 and variance 1."""
    zeros, ones = torch.zeros_like(scale), torch.ones_like(scale)
    return torch.native_batch_norm(x, scale, shift, zeros, ones, False, 0.0, 0.0)[0]


def _add_scaled(total: Tensor, x: Tensor, scale: Tensor) -> None:
    total.addcmul_(x, scale.view(-1, *[1] * (x.dim() - 2)))
