import pytest
import torch
from pretext_methods import batch_of_views, build_method
from torch import nn

from bissl_zoo.hypergradient import CurvatureOperator, frozen_state
from bissl_zoo.registry import PRETEXT_METHODS


def smooth_net(**extra):
    """Return a small smooth network in float64 and its loss on a fixed batch."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2, **extra)).double()
    x, y = torch.randn(7, 3, dtype=torch.float64), torch.randn(7, 2, dtype=torch.float64)
    return net, lambda: (net(x) - y).square().mean()


def dense_hessian(net, loss):
    """Return the Hessian of `loss` in the parameters of `net`, by torch's own dense routine on a functional call."""
    shapes = {name: p.shape for name, p in net.named_parameters()}
    flat = torch.cat([p.detach().reshape(-1) for p in net.parameters()])

    def at(vector):
        chunks = vector.split([shape.numel() for shape in shapes.values()])
        values = {name: c.view(s) for (name, s), c in zip(shapes.items(), chunks, strict=True)}
        with torch.nn.utils.stateless._reparametrize_module(net, values):
            return loss()

    return torch.autograd.functional.hessian(at, flat)


def test_products_equal_the_dense_hessian():
    net, loss = smooth_net()
    hessian = dense_hessian(net, loss)
    operator = CurvatureOperator(loss, list(net.parameters()), shift=0.3).prepare()
    size = len(hessian)
    assert operator.block_sizes == [12, 4, 8, 2] and size == 26
    columns = torch.stack([operator.hessian_product(e) for e in torch.eye(size, dtype=torch.float64)], dim=1)
    # both are exact; they add up in another order
    torch.testing.assert_close(columns, hessian, rtol=1e-10, atol=1e-13)
    u = torch.randn(size, dtype=torch.float64)
    torch.testing.assert_close(operator(u), u + hessian @ u / 0.3, rtol=1e-10, atol=1e-13)
    assert torch.equal(operator(u), operator.matvec(u))


def test_fused_attention_has_products_as_well():
    torch.manual_seed(0)
    project, words = nn.Linear(8, 24).double(), torch.randn(3, 5, 8, dtype=torch.float64)

    def loss(fused):
        q, k, v = project(words).unflatten(2, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        if fused:
            return nn.functional.scaled_dot_product_attention(q, k, v).square().mean()
        return ((q @ k.transpose(2, 3) / 2.0).softmax(dim=3) @ v).square().mean()

    with pytest.raises(RuntimeError, match="not implemented"):  # the kernel without a second derivative
        gradient = torch.autograd.grad(loss(fused=True), project.weight, create_graph=True)[0]
        torch.autograd.grad(gradient.sum(), project.weight)
    u = torch.randn(sum(p.numel() for p in project.parameters()), dtype=torch.float64)
    operators = [CurvatureOperator(lambda f=f: loss(f), list(project.parameters()), 1.0) for f in (True, False)]
    fused, written_out = (operator.prepare().hessian_product(u) for operator in operators)
    torch.testing.assert_close(fused, written_out, rtol=1e-10, atol=1e-14)


def test_unused_parameters_have_zero_rows():
    net, loss = smooth_net()
    unused = nn.Parameter(torch.randn(5, dtype=torch.float64))
    parameters = [unused, *net.parameters()]
    u = torch.randn(31, dtype=torch.float64)
    product = CurvatureOperator(loss, parameters, shift=1.0).prepare().hessian_product(u)
    assert not product[:5].any()
    torch.testing.assert_close(product[5:], dense_hessian(net, loss) @ u[5:], rtol=1e-10, atol=1e-13)


def test_a_product_before_prepare_or_after_release_is_refused():
    net, loss = smooth_net()
    operator = CurvatureOperator(loss, list(net.parameters()), shift=1.0)
    u = torch.zeros(26, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="prepare"):
        operator(u)
    assert operator.prepare() is operator
    operator(u)
    operator.release()
    with pytest.raises(RuntimeError, match="release"):
        operator(u)


def test_prepare_again_sees_the_new_parameters():
    net, loss = smooth_net()
    operator = CurvatureOperator(loss, list(net.parameters()), shift=1.0).prepare()
    u = torch.randn(26, dtype=torch.float64)
    with torch.no_grad():
        net[0].weight.mul_(2.0)
    torch.testing.assert_close(
        operator.prepare().hessian_product(u), dense_hessian(net, loss) @ u, rtol=1e-10, atol=1e-13
    )


def snapshot(*modules):
    state = {f"{i}.{k}": v.clone() for i, m in enumerate(modules) for k, v in m.state_dict().items()}
    return {**state, "random state": torch.get_rng_state()}


def buffer_identities(*modules):
    return {f"{i}.{name}": id(buffer) for i, m in enumerate(modules) for name, buffer in m.named_buffers()}


@pytest.mark.parametrize("method", PRETEXT_METHODS.list())
def test_products_leave_no_trace(method):
    trunk, pretext = build_method(method, drop_path_rate=0.3)
    trunk.train(), pretext.train()
    views = batch_of_views(method)
    parameters = list(trunk.parameters())
    u = torch.randn(sum(p.numel() for p in parameters))
    before, buffers = snapshot(trunk, pretext), buffer_identities(trunk, pretext)
    operator = CurvatureOperator(
        lambda: sum(pretext.losses(trunk, views).values()), parameters, shift=1.0, modules=(trunk, pretext)
    ).prepare()
    prepared = snapshot(trunk, pretext)
    assert all(torch.equal(prepared[key], before[key]) for key in before)
    assert buffer_identities(trunk, pretext) == buffers
    first = operator(u)
    with torch.no_grad():  # the upper level moves the lower statistics, where there are any, between two products
        trunk(torch.randn(4, 3, 32, 32))
    moved = snapshot(trunk, pretext)
    assert torch.equal(operator(u), first)  # dropped paths and batch statistics belong to the operator
    operator.release()
    after = snapshot(trunk, pretext)
    assert all(torch.equal(after[key], moved[key]) for key in after)
    for key in before:
        if not key.startswith("0.") and key != "random state":
            assert torch.equal(after[key], before[key]), key
    assert all(p.grad is None for module in (trunk, pretext) for p in module.parameters())
    assert torch.isfinite(first).all() and first.norm() > 0


def test_frozen_state_is_restored_when_the_forward_pass_fails():
    norm = nn.BatchNorm1d(3)
    before, random_state = norm.running_mean, torch.get_rng_state()
    with pytest.raises(ZeroDivisionError), frozen_state([norm]):
        norm(torch.randn(5, 3))
        raise ZeroDivisionError
    assert norm.running_mean is before and not before.any() and norm.num_batches_tracked == 0
    assert torch.equal(torch.get_rng_state(), random_state)


def stochastic_loss():
    """Return a network and a head with dropout and batch norm, and their loss."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 3)).double()
    head = nn.Sequential(nn.Dropout(0.3), nn.Linear(3, 2)).double()
    x = torch.randn(9, 6, dtype=torch.float64)
    return net, head, lambda: head(net(x)).square().mean()


def test_recomputed_products_equal_those_of_the_retained_graph():
    net, head, loss = stochastic_loss()
    parameters = list(net.parameters())
    state = torch.get_rng_state()
    kept, rebuilt = (
        CurvatureOperator(loss, parameters, shift=1.0, modules=(net, head), hvp_mode=hvp_mode).prepare()
        for hvp_mode in ("retain_graph", "recompute")
    )
    assert torch.equal(torch.get_rng_state(), state)
    for seed in range(3):
        u = torch.randn(sum(p.numel() for p in parameters), dtype=torch.float64)
        assert torch.equal(kept(u), rebuilt(u))
        torch.manual_seed(seed)
        net(torch.randn(4, 6, dtype=torch.float64))  # moves the statistics, draws a mask
    before = net[1].running_mean.clone(), torch.get_rng_state()
    rebuilt(u)
    assert torch.equal(net[1].running_mean, before[0]) and torch.equal(torch.get_rng_state(), before[1])
    rebuilt.release()
    with pytest.raises(RuntimeError, match="release"):
        rebuilt(u)


def test_prepare_draws_new_dropout_masks():
    net, head, loss = stochastic_loss()
    operator = CurvatureOperator(loss, list(net.parameters()), shift=1.0, modules=(net, head)).prepare()
    u = torch.ones(sum(operator.block_sizes), dtype=torch.float64)
    first = operator(u)
    assert torch.equal(operator.prepare()(u), first)  # nothing was drawn in between
    torch.randn(1)
    assert not torch.equal(operator.prepare()(u), first)


def test_an_unknown_hvp_mode_or_precision_is_refused():
    with pytest.raises(ValueError, match="hvp_mode.*retain_graph.*recompute"):
        CurvatureOperator(lambda: None, [], shift=1.0, hvp_mode="reuse")
    with pytest.raises(ValueError, match="precision.*float32.*tf32"):
        CurvatureOperator(lambda: None, [], shift=1.0, precision="bf16")


def test_only_the_backbone_is_differentiated_and_the_head_stays_trainable():
    net, head, loss = stochastic_loss()
    frozen = head[1].bias.requires_grad_(False)
    seen = []
    operator = CurvatureOperator(
        lambda: (seen.append([p.requires_grad for p in (*net.parameters(), *head.parameters())]), loss())[1],
        list(net.parameters()),
        shift=1.0,
        modules=(net, head),
    ).prepare()
    assert seen == []  # a solver without products builds no graph
    for _ in range(2):
        assert operator(torch.ones(sum(operator.block_sizes), dtype=torch.float64)).isfinite().all()
    assert seen == [[True] * 6 + [False] * 2]
    assert [p.requires_grad for p in head.parameters()] == [True, False] and not frozen.requires_grad


def test_prepare_and_release_clear_the_subspace():
    net, loss = smooth_net()
    operator = CurvatureOperator(loss, list(net.parameters()), shift=1.0)
    u = torch.randn(26, dtype=torch.float64)
    for forget in (operator.prepare, operator.release):
        operator.prepare()
        space = operator.subspace
        space.explore(operator.hessian_product, space.unexplored(space.coordinates(u)))
        assert space.explored == 1
        forget()
        assert space.explored == 0 and not space.basis


@pytest.mark.parametrize("precision", ["float32", "tf32"])
def test_products_run_in_the_requested_precision_and_the_settings_are_restored(precision):
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul

    def settings():
        finer = (cudnn.conv, cudnn.rnn, matmul) if hasattr(cudnn, "conv") else ()
        return [*(setting.fp32_precision for setting in finer), cudnn.allow_tf32, matmul.allow_tf32]

    def loss():
        seen.append([cudnn.allow_tf32, matmul.allow_tf32])
        return weight.square().sum()

    before, seen, weight = settings(), [], torch.ones(3, requires_grad=True)
    operator = CurvatureOperator(loss, [weight], 1.0, hvp_mode="recompute", precision=precision).prepare()
    operator.hessian_product(torch.ones(3))
    assert seen == [[precision == "tf32"] * 2]
    assert settings() == before
