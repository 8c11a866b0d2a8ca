import pytest
import timm
import torch
import torchvision
from cuda_batch_norm import RefuseBatchNormThatCudaRefuses
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional

from bissl_zoo.hypergradient import frozen_state
from bissl_zoo.hypergradient.second_order import fast_second_order

DOUBLE = {"dtype": torch.float64}

#: shape of the weight, and the geometry
CONVOLUTIONS = {
    "padded": ((4, 3, 3, 3), {"padding": 1}),
    "pointwise": ((2, 3, 1, 1), {"stride": 2}),
    "uneven": ((2, 3, 3, 2), {"stride": (2, 1), "padding": [1, 0]}),
    "not reaching the border": ((2, 3, 2, 2), {"stride": 3}),
    "dilated": ((2, 3, 2, 3), {"dilation": (2, 1), "padding": (0, 2)}),
    "grouped": ((4, 1, 3, 3), {"groups": 2, "stride": 2, "padding": 1}),
    "depthwise": ((3, 1, 3, 3), {"groups": 3, "stride": (2,)}),
}
#: shape of the input, and whether there is a weight and a bias
BATCH_NORMS = {
    f"{len(shape)}d {'affine' if affine else 'bare'}": (shape, affine)
    for shape in [(5, 3), (4, 3, 5), (3, 3, 4, 2)]
    for affine in (True, False)
}


def fast(function):
    def under_the_context(*args, **kwargs):
        with fast_second_order():
            return function(*args, **kwargs)

    return under_the_context


def all_equal(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def is_replaced(tensor):
    return tensor.grad_fn.name() in {"_ConvolutionBackward", "_BatchNormBackward"}


def convolution(case, bias=True, **options):
    """Return a convolution as a function of its tensors, and the tensors."""
    torch.manual_seed(0)
    shape, geometry = CONVOLUTIONS[case]
    inputs = [torch.randn(2, shape[1] * geometry.get("groups", 1), 5, 6, **options), torch.randn(shape, **options)]
    inputs += [torch.randn(shape[0], **options)] if bias else []
    return lambda *tensors: functional.conv2d(*tensors, **geometry), [tensor.requires_grad_() for tensor in inputs]


def batch_norm(case, **options):
    """Return training-mode batch norm as a function of its tensors, and the tensors; the first weight is zero."""
    torch.manual_seed(0)
    shape, affine = BATCH_NORMS[case]
    inputs = [torch.randn(shape, **options) * 2 + 1]
    inputs += [torch.tensor([0.0, 1.5, -0.7], **options), torch.randn(3, **options)] if affine else []

    def function(x, weight=None, bias=None):
        return functional.batch_norm(x, None, None, weight, bias, training=True)

    return function, [tensor.requires_grad_() for tensor in inputs]


@pytest.mark.parametrize("case, bias", [*((case, True) for case in CONVOLUTIONS), ("padded", False)])
def test_both_derivatives_of_a_convolution_equal_finite_differences(case, bias):
    function, inputs = convolution(case, bias, **DOUBLE)
    assert is_replaced(fast(function)(*inputs))
    assert gradcheck(fast(function), inputs)
    assert gradgradcheck(fast(function), inputs)


@pytest.mark.parametrize("case", BATCH_NORMS)
def test_both_derivatives_of_batch_norm_equal_finite_differences(case):
    function, inputs = batch_norm(case, **DOUBLE)
    assert is_replaced(fast(function)(*inputs))
    assert gradcheck(fast(function), inputs)
    assert gradgradcheck(fast(function), inputs)


@pytest.mark.parametrize("constants", [(0,), (1,), (2,), (1, 2)])
@pytest.mark.parametrize("make, case", [(convolution, "padded"), (batch_norm, "4d affine")])
def test_second_derivatives_are_right_if_some_inputs_are_constant(make, case, constants):
    function, inputs = make(case, **DOUBLE)
    free = [tensor for i, tensor in enumerate(inputs) if i not in constants]

    def of_the_free(*tensors):
        given = iter(tensors)
        return function(*(tensor.detach() if i in constants else next(given) for i, tensor in enumerate(inputs)))

    assert gradgradcheck(fast(of_the_free), free)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 1)])
@pytest.mark.parametrize("make, case", [(convolution, "padded"), (batch_norm, "4d affine")])
def test_second_derivatives_are_right_if_only_some_gradients_are_differentiated(make, case, wanted):
    function, inputs = make(case, **DOUBLE)

    def second_derivatives(function):
        y = function(*inputs)
        gradients = torch.autograd.grad(y.square().sum(), inputs, create_graph=True)
        total = sum(gradients[i].sin().sum() for i in wanted)
        return torch.autograd.grad(total, inputs, materialize_grads=True, allow_unused=True)

    # other kernels add up in another order
    torch.testing.assert_close(second_derivatives(fast(function)), second_derivatives(function), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_value_and_gradient_of_a_convolution_are_atens_bit_for_bit(case, layout):
    function, inputs = convolution(case)
    inputs[0] = inputs[0].detach().contiguous(memory_format=layout).requires_grad_()
    ordinary, replaced = function(*inputs), fast(function)(*inputs)
    assert torch.equal(replaced, ordinary)
    weights = torch.randn_like(ordinary)
    gradients = [torch.autograd.grad(y, inputs, weights) for y in (replaced, ordinary)]
    assert all_equal(*gradients)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_batch_norm_module_is_the_ordinary_one_bit_for_bit_with_its_statistics(layout):
    torch.manual_seed(0)
    x = torch.randn(4, 3, 6, 5).contiguous(memory_format=layout).requires_grad_()
    weights = torch.randn(4, 3, 6, 5)
    results = []
    for call in (lambda module: module(x), fast(lambda module: module(x))):
        module = nn.BatchNorm2d(3, momentum=0.3)
        y = call(module)
        gradients = torch.autograd.grad(y, [x, *module.parameters()], weights)
        results.append([y, *gradients, *module.buffers()])
    assert is_replaced(results[1][0]) and not is_replaced(results[0][0])
    assert all_equal(*results)
    assert module.running_mean.any() and module.num_batches_tracked == 1


def networks():
    torch.manual_seed(0)
    yield timm.create_model("test_resnet", num_classes=7, drop_path_rate=0.3)
    yield torchvision.models.resnet18(num_classes=7, zero_init_residual=True)


@pytest.mark.parametrize(
    "network, dtype, tolerance",
    [(0, torch.float64, 1e-9), pytest.param(1, torch.float32, 1e-4, marks=pytest.mark.slow)],
)
def test_hessian_products_of_networks_equal_those_of_torch(network, dtype, tolerance):
    net = list(networks())[network].to(dtype).train()
    parameters = list(net.parameters())
    x, directions = torch.randn(4, 3, 32, 32, dtype=dtype), [torch.randn_like(p) for p in parameters]

    def gradient_and_product():
        torch.manual_seed(1)  # of the dropped paths
        with frozen_state([net]):
            loss = functional.cross_entropy(net(x), torch.arange(4))
            gradient = torch.autograd.grad(loss, parameters, create_graph=True)
        product = torch.autograd.grad(gradient, parameters, directions, retain_graph=True)
        again = torch.autograd.grad(gradient, parameters, directions, retain_graph=True)
        assert all_equal(product, again)
        return gradient, torch.cat([p.flatten() for p in product])

    gradient, product = fast(gradient_and_product)()
    ordinary_gradient, ordinary_product = gradient_and_product()
    assert all_equal(gradient, ordinary_gradient)
    # the terms add up in another order: rounding, through some twenty layers
    assert (product - ordinary_product).norm() < tolerance * ordinary_product.norm()


@pytest.mark.parametrize("case", BATCH_NORMS)
def test_batch_norm_products_call_kernels_as_cuda_accepts_them(case):
    function, inputs = batch_norm(case, **DOUBLE)
    with RefuseBatchNormThatCudaRefuses() as mode:
        value = fast(function)(*inputs).square().sum()
        gradients = torch.autograd.grad(value, inputs, create_graph=True)
        torch.autograd.grad(gradients, inputs, gradients)
    assert mode.calls > 1


@pytest.mark.parametrize("make, case", [(convolution, "padded"), (batch_norm, "4d affine")])
def test_a_third_derivative_is_refused(make, case):
    function, inputs = make(case)
    loss = fast(function)(*inputs).pow(3).sum()
    gradient = torch.autograd.grad(loss, inputs, create_graph=True)
    with pytest.raises(RuntimeError, match="third derivative"):
        torch.autograd.grad(sum(g.sum() for g in gradient), inputs, create_graph=True)


def left_to_torch():
    """What the context does not replace: a name, and a function of `(2, 4, 4, 4)`."""
    w = torch.linspace(-1, 1, 4 * 4 * 9).view(4, 4, 3, 3)
    mean, var = torch.full((4,), 0.3), torch.full((4,), 2.0)
    yield "named padding", lambda x: functional.conv2d(x, w.to(x), padding="same")
    yield "one image", lambda x: functional.conv2d(x[0], w.to(x))
    yield "transposed", lambda x: functional.conv_transpose2d(x, w.to(x))
    yield "one dimension", lambda x: functional.conv1d(x[..., 0], w[..., 0].to(x))
    yield "running statistics", lambda x: functional.batch_norm(x, mean.to(x), var.to(x))
    yield "eval mode", lambda x: nn.BatchNorm2d(4).to(x).eval()(x)
    yield "instance norm", lambda x: functional.instance_norm(x)


@pytest.mark.parametrize(
    "name, function", list(left_to_torch()), ids=lambda value: value if isinstance(value, str) else ""
)
def test_what_is_not_replaced_is_torchs_own(name, function):
    torch.manual_seed(0)
    x = torch.randn(2, 4, 4, 4, **DOUBLE, requires_grad=True)
    y = fast(function)(x)
    assert not is_replaced(y) and torch.equal(y, function(x))
    assert gradgradcheck(fast(function), (x,))


def test_other_types_and_autocast_are_left_to_torch():
    function, inputs = convolution("padded", dtype=torch.bfloat16)
    assert not is_replaced(fast(function)(*inputs))
    function, inputs = convolution("padded")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not is_replaced(fast(function)(*inputs))
    norm = nn.BatchNorm2d(3)
    assert not is_replaced(fast(norm)(torch.randn(2, 3, 4, 4, dtype=torch.bfloat16, requires_grad=True)))
    with torch.no_grad():
        assert torch.equal(fast(function)(*inputs), function(*inputs))


def test_outside_of_the_context_nothing_is_replaced():
    function, inputs = convolution("padded")
    with pytest.raises(ZeroDivisionError), fast_second_order():
        assert is_replaced(function(*inputs))
        raise ZeroDivisionError
    assert not is_replaced(function(*inputs))
