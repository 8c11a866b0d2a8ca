"""Convolution and batch norm that are cheap to differentiate twice; value and gradient are those of ATen's kernels."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional
from torch.overrides import TorchFunctionMode

aten = torch.ops.aten


def fast_second_order() -> TorchFunctionMode:
    """Context in which to build a graph that is to be differentiated a second time, as for Hessian-vector products.

    `torch.nn.functional.conv2d` and training-mode `batch_norm`, hence all modules that call them, are recorded with a
    double backward of their own. The convolution's takes its weight term from the kernel of ordinary weight gradients,
    where ATen's convolves with images and channels exchanged; the batch norm's passes seven times over activations,
    where ATen's is composed of dozens of elementwise operations. On CUDA, batch norm is ATen's kernel, not cuDNN's.

    Left to torch: all that is not dense float32 or float64 of one dtype, convolution of other than `(N, C, H, W)` or
    with named padding, statistics that are not the batch's, and everything under autocast or without gradients.

    Raises:
        RuntimeError: on backward through the graph with `create_graph=True`, since there is no third derivative.
    """
    return _Replace({functional.conv2d: _conv2d, functional.batch_norm: _batch_norm})


class _Replace(TorchFunctionMode):
    """Calls the replacement of a function, and the function where there is none or it returns NotImplemented."""

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


#: of a convolution: stride, padding, dilation, whether transposed, output padding, groups
_Geometry = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], bool, tuple[int, ...], int]


def _conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, ...] = 1,
    padding: int | str | tuple[int, ...] = 0,
    dilation: int | tuple[int, ...] = 1,
    groups: int = 1,
) -> Tensor:
    if not _are_plain(input, weight, bias) or input.dim() != 4 or isinstance(padding, str):
        return NotImplemented
    geometry = (_pair(stride), _pair(padding), _pair(dilation), False, (0, 0), groups)
    return _Convolution.apply(input, weight, bias, geometry)


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    # a single value per channel is refused by torch, in its words
    if not training or input.dim() < 2 or input.numel() <= input.shape[1]:
        return NotImplemented
    if not _are_plain(input, weight, bias, running_mean, running_var):
        return NotImplemented
    return _BatchNorm.apply(input, weight, bias, (running_mean, running_var), momentum, eps)


def _pair(value: int | tuple[int, ...]) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * 2 if len(values) == 1 else values


def _are_plain(*tensors: Tensor | None) -> bool:
    """Whether a graph is recorded, and these are dense tensors of one real dtype, in which torch would compute."""
    given = [tensor for tensor in tensors if tensor is not None]
    return (
        torch.is_grad_enabled()
        and all(type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided for tensor in given)
        and len({tensor.dtype for tensor in given}) == 1
        and given[0].dtype in (torch.float32, torch.float64)
        and not torch.is_autocast_enabled(given[0].device.type)
    )


def _refuse_third_derivative() -> None:
    # in a backward pass, gradients are enabled exactly where it was asked for with create_graph=True
    if torch.is_grad_enabled():
        raise RuntimeError(
            "a graph built under fast_second_order() has two derivatives, and create_graph=True asks for a third; "
            "build it outside of fast_second_order()"
        )


class _Convolution(Function):
    """y = x * w + b."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: _Geometry) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.geometry = geometry
        return torch.convolution(x, weight, bias, *geometry)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        return (*_ConvolutionBackward.apply(grad, x, weight, ctx.geometry, ctx.needs_input_grad[:3]), None)


class _ConvolutionBackward(Function):
    """The gradients of a convolution in x, w and b; each is bilinear, so that its own gradients are convolutions."""

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
        """`*_dot` are what multiplies the gradients in x, w and b: the directions of a Hessian-vector product."""
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
        # the gradients in x and w of <x_dot, dx> + <weight_dot, dw> are those of a convolution of x_dot with weight_dot
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
    """y = weight (x - mean) invstd + bias with the statistics of the batch (arXiv 1502.03167)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, running: tuple, momentum: float, eps: float
    ) -> Tensor:
        y, mean, invstd = torch.native_batch_norm(x, weight, bias, *running, True, momentum, eps)
        ctx.save_for_backward(x, weight, mean, invstd)
        ctx.eps = eps
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        x_grad, weight_grad, bias_grad = _BatchNormBackward.apply(grad, *ctx.saved_tensors, ctx.eps, needs_x)
        return x_grad, weight_grad if needs_weight else None, bias_grad if needs_bias else None, None, None, None


class _BatchNormBackward(Function):
    """The gradients of batch norm in x, weight and bias.

    With h = (x - mean) invstd, N values per channel and sums over them, they are
    dx = weight invstd (dy - sum(dy) / N - h sum(dy h) / N), sum(dy h) and sum(dy).
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
        """`*_dot` are what multiplies the gradients in x, weight and bias; `of_*` the coefficients of a linear result.

        Nothing is divided by the weight, since zero is where residual branches may start.
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
    """`sum(a (b - center) scale)` and `sum(a)` per channel, in one pass over both."""
    _, product, total = aten.native_batch_norm_backward(
        a, b, _or_ones(None, scale), None, None, center, scale, True, 0.0, (False, True, True)
    )
    return product, total


def _or_ones(weight: Tensor | None, like: Tensor) -> Tensor:
    """`weight`, or ones: CUDA's kernel takes the options of the gradients in weight and bias from the weight."""
    return torch.ones_like(like) if weight is None else weight


def _affine(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """`x * scale + shift` per channel, in one pass: batch norm with statistics that do nothing."""
    zeros, ones = torch.zeros_like(scale), torch.ones_like(scale)
    return torch.native_batch_norm(x, scale, shift, zeros, ones, False, 0.0, 0.0)[0]


def _add_scaled(total: Tensor, x: Tensor, scale: Tensor) -> None:
    total.addcmul_(x, scale.view(-1, *[1] * (x.dim() - 2)))
