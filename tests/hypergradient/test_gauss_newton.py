"""Gauss-Newton products against dense `J^T C J` in float64, for every pretext method."""

import pytest
import timm
import torch
from pretext_methods import MASKED, tiny_method
from torch.nn import functional

from bissl_zoo.hypergradient import ConjugateGradient, GaussNewtonOperator, MinRes
from bissl_zoo.registry import PRETEXT_METHODS


def problem(name):
    """A method in float64 on a tiny backbone, and a batch of views."""
    torch.manual_seed(0)
    backbone, method = tiny_method(name)
    if name in MASKED:
        images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
        images += images.sign()  # no residual is below the smallest one, where the parabola ends
        views = images, torch.tensor([[[True, False], [False, True]]] * 2)
    else:
        views = tuple(torch.randn(2, 5, 3, 8, 8, dtype=torch.float64))
    backbone, method = backbone.double().train(), method.double().train()
    with torch.no_grad():  # a teacher that differs from the student, and weights that matter
        for module in (backbone, *method.children()):
            for parameter in module.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return backbone, method, views


def operator_of(backbone, method, views, **options):
    return GaussNewtonOperator(
        lambda: method.outputs(backbone, views),
        lambda outputs: sum(method.outer(outputs).values()),
        list(backbone.parameters()),
        shift=1.0,
        modules=(backbone, method),
        **options,
    )


def dense(backbone, method, views):
    """`J^T C J` from rows of the Jacobian and of the Hessian of `outer`, one autograd call each."""
    parameters = list(backbone.parameters())
    outputs = method.outputs(backbone, views)
    varying = [output for output in outputs if output.requires_grad]
    flat = torch.cat([output.reshape(-1) for output in varying])
    keep = torch.isfinite(flat)  # logits that are masked out
    rows = [
        torch.autograd.grad(value, parameters, retain_graph=True, materialize_grads=True)
        if finite
        else [torch.zeros_like(p) for p in parameters]
        for value, finite in zip(flat, keep, strict=True)
    ]
    jacobian = torch.stack([torch.cat([g.reshape(-1) for g in row]) for row in rows])
    sizes = [output.numel() for output in varying]

    def outer(vector):
        parts = iter(vector.split(sizes))
        given = [next(parts).view_as(o) if o.requires_grad else o for o in outputs]
        return sum(method.outer(tuple(given)).values())

    hessian = torch.autograd.functional.hessian(outer, flat.detach())
    hessian = hessian.where(keep[:, None] & keep[None, :], 0.0)
    return jacobian.T @ hessian @ jacobian


@pytest.mark.parametrize("name", PRETEXT_METHODS.list())
def test_products_equal_the_dense_matrix_and_it_is_semidefinite(name):
    backbone, method, views = problem(name)
    expected = dense(backbone, method, views)
    operator = operator_of(backbone, method, views).prepare()
    for u in torch.randn(4, len(expected), dtype=torch.float64):
        product = expected @ u
        assert (operator.hessian_product(u) - product).norm() <= 1e-12 * product.norm()
    values = torch.linalg.eigvalsh(expected)
    assert values[-1] > 0 and values[0] > -1e-10 * values[-1]


@pytest.mark.parametrize("name", PRETEXT_METHODS.list())
def test_outer_of_the_outputs_is_the_loss(name):
    backbone, method, views = problem(name)
    losses, composed = method.losses(backbone, views), method.outer(method.outputs(backbone, views))
    assert losses.keys() == composed.keys()
    parameters = list(backbone.parameters())
    for key, loss in losses.items():
        torch.testing.assert_close(composed[key], loss, rtol=1e-4, atol=0)
        gradients = (
            torch.autograd.grad(one, parameters, retain_graph=True, allow_unused=True) for one in (composed[key], loss)
        )
        for first, second in zip(*gradients, strict=True):
            torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-6)


def test_products_are_equal_in_the_channels_last_memory_format():
    labels, products = torch.arange(6) % 3, []
    for layout in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        network = timm.create_model("test_resnet", num_classes=3).double().to(memory_format=layout)
        x, parameters = torch.randn(6, 3, 32, 32, dtype=torch.float64), list(network.parameters())
        u = torch.randn(sum(p.numel() for p in parameters), dtype=torch.float64)
        operator = GaussNewtonOperator(
            lambda network=network, x=x: (network(x),),
            lambda outputs: functional.cross_entropy(outputs[0], labels),
            parameters,
            1.0,
            [network],
        )
        products.append(operator.prepare().hessian_product(u))
    torch.testing.assert_close(*products, rtol=1e-9, atol=1e-12)


def test_recomputed_graphs_give_the_same_products_and_no_state_changes():
    backbone, method, views = problem("byol")
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    u = torch.randn(sum(p.numel() for p in backbone.parameters()), dtype=torch.float64)
    products = [
        operator_of(backbone, method, views, hvp_mode=mode).prepare().hessian_product(u)
        for mode in ("retain_graph", "recompute")
    ]
    assert torch.equal(*products)
    assert all(torch.equal(before[name], value) for name, value in backbone.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in backbone.parameters())


@pytest.mark.parametrize("solver", [ConjugateGradient(50, 1e-8, damping=0.1), MinRes(50, 1e-8, damping=0.1)], ids=repr)
def test_solvers_reach_the_dense_solution_and_never_lengthen_v(solver):
    backbone, method, views = problem("simclr")
    matrix = dense(backbone, method, views)
    operator = operator_of(backbone, method, views).prepare()
    operator.shift = 0.1
    v = torch.randn(len(matrix), dtype=torch.float64)
    solution = solver(operator, v)
    expected = torch.linalg.solve(torch.eye(len(v), dtype=torch.float64) + matrix / 0.1, v)
    assert solution.residual <= 1e-6 and solution.x.norm() <= v.norm()
    torch.testing.assert_close(solution.x, expected, rtol=1e-3, atol=1e-5)
