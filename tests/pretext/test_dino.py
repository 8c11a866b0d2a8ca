import copy
import functools

import pytest
import torch
from pretext_methods import VIT, build_method, shake

from bissl_zoo.errors import ConfigError
from bissl_zoo.hypergradient import CurvatureOperator
from bissl_zoo.pretext.dino import dino_head, self_distillation

build = functools.partial(build_method, "dino", projector=[16, 8, 32])


def crops(count=4, size=32, local_size=16, local=3, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    large, small = (
        torch.randn(n, count, 3, side, side, dtype=dtype, generator=generator)
        for n, side in ((2, size), (local, local_size))
    )
    return *large, *small


def logits(views=5, images=4, width=6):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(n, images, width, dtype=torch.float64, generator=generator) for n in (views, 2))
    return student.requires_grad_(), teacher, torch.randn(width, dtype=torch.float64, generator=generator)


def test_loss_gradient_and_center_equal_lightlys():
    lightly_loss = pytest.importorskip("lightly.loss", reason="lightly is the reference").DINOLoss
    student, teacher, center = logits()
    reference = lightly_loss(output_dim=6, teacher_temp=0.05, student_temp=0.2, center_momentum=0.8).double()
    reference.center.copy_(center.view(1, 1, -1))
    expected = reference(list(teacher), list(student), teacher_temp=0.05)
    actual = self_distillation(student, teacher, center, 0.2, 0.05)
    # theirs has the teacher's temperature in float32
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=0)
    gradients = [torch.autograd.grad(loss, student)[0] for loss in (actual, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-8)
    _, method = build(center_decay=0.8)
    method.double().center.resize_(6).copy_(center)
    method.teacher_mean = teacher.mean(dim=(0, 1))
    method.after_step(build()[0].double())
    torch.testing.assert_close(method.center, reference.center.view(-1), rtol=1e-12, atol=1e-12)


def test_second_derivatives_of_loss_and_head_are_right():
    student, teacher, center = logits(views=3, images=2, width=4)
    assert torch.autograd.gradgradcheck(lambda s: self_distillation(s, teacher, center, 0.4, 0.3), (student,))
    torch.manual_seed(0)
    head = dino_head([3, 4, 4, 5]).double()
    shake(head)  # away from weights so small that finite differences see nothing but rounding
    names, values = zip(*((n, p.detach().requires_grad_()) for n, p in head.named_parameters()), strict=True)
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)

    def outputs(x, *parameters):
        return torch.func.functional_call(head, dict(zip(names, parameters, strict=True)), (x,))

    assert torch.autograd.gradgradcheck(outputs, (x, *values))


def test_the_head_is_lightlys():
    heads = pytest.importorskip("lightly.models.modules.heads", reason="lightly is the reference")
    torch.manual_seed(0)
    theirs, mine = heads.DINOProjectionHead(6, 5, 4, 9).double(), dino_head([6, 5, 5, 4, 9]).double()
    values = {name: value for name, value in theirs.state_dict().items() if not name.endswith("weight_g")}
    assert [tuple(v.shape) for v in values.values()] == [tuple(p.shape) for p in mine.state_dict().values()]
    mine.load_state_dict(dict(zip(mine.state_dict(), values.values(), strict=True)))
    x = torch.randn(3, 6, dtype=torch.float64)
    torch.testing.assert_close(mine(x), theirs(x), rtol=1e-12, atol=1e-12)


def test_the_student_sees_all_crops_and_the_teacher_the_first_two():
    trunk, method = build()
    shake(method.teacher)
    method.center.normal_()
    for module in (trunk, method):
        module.eval()  # without batch statistics, each crop may pass by itself
    views, teacher = crops(), method.teacher
    student = torch.stack([method.projector(method.tail(trunk(view)["c3"])) for view in views])
    targets = torch.stack(
        [teacher["projector"](teacher["tail"](teacher["backbone"](view)["c3"])) for view in views[:2]]
    ).detach()
    expected = self_distillation(student, targets, method.center, 0.1, 0.04)
    torch.testing.assert_close(method.losses(trunk, views)["cross_entropy"], expected, rtol=1e-5, atol=1e-5)
    with_other_local = method.losses(trunk, (*views[:2], *torch.randn(3, 4, 3, 16, 16)))["cross_entropy"]
    assert not torch.isclose(with_other_local, expected)
    torch.testing.assert_close(method.teacher_mean, targets.mean(dim=(0, 1)), rtol=1e-5, atol=1e-6)


def test_what_a_solve_computes_does_not_reach_the_next_center():
    trunk, method = build()
    views, other = crops(), tuple(view.flip(0) * 2 for view in crops())
    twin_trunk, twin = copy.deepcopy((trunk, method))
    twin.losses(twin_trunk, views)
    twin.after_step(twin_trunk)
    operator = CurvatureOperator(
        lambda: sum(method.losses(trunk, other).values()), list(trunk.parameters()), 1.0, (trunk, method)
    ).prepare()
    operator(torch.ones(sum(operator.block_sizes)))
    operator.release()
    method.losses(trunk, views)
    method.after_step(trunk)
    assert torch.equal(method.center, twin.center) and method.center.any()


def test_small_crops_are_embedded_by_a_vit_of_any_size_and_refused_by_one_of_a_fixed_size():
    trunk, method = build(VIT)
    assert method.losses(trunk, crops())["cross_entropy"].isfinite()
    trunk, method = build(VIT | {"dynamic_img_size": False})
    with pytest.raises(ConfigError, match=r"'test_vit' takes only images of \(32, 32\).*dynamic_img_size=True"):
        method.losses(trunk, crops())
