"""The momentum teacher of every method that has one."""

import pytest
import torch
from pretext_methods import build_method, shake
from torch import nn

METHODS = ["byol", "dino", "moco_v2", "moco_v3"]


def students(trunk, pretext):
    return nn.ModuleDict({"backbone": trunk, "tail": pretext.tail, "projector": pretext.projector})


@pytest.mark.parametrize("method", METHODS)
def test_the_teacher_is_a_copy_without_gradients_and_reset_makes_it_one_again(method):
    trunk, pretext = build_method(method, decay=0.9)
    student, teacher = students(trunk, pretext), pretext.teacher
    assert sorted(teacher) == ["backbone", "projector", "tail"]
    assert all(torch.equal(teacher.state_dict()[key], value) for key, value in student.state_dict().items())
    assert not any(p.requires_grad for p in teacher.parameters())
    shake(student)
    trunk(torch.randn(4, 3, 32, 32))  # moves the statistics
    teacher.reset(**student)
    assert all(torch.equal(teacher.state_dict()[key], value) for key, value in student.state_dict().items())
    assert not {id(p) for p in teacher.parameters()} & {id(p) for p in student.parameters()}


@pytest.mark.parametrize("method", METHODS)
def test_only_after_step_moves_the_teacher_by_an_exponential_moving_average(method):
    trunk, pretext = build_method(method, decay=0.9)
    student = students(trunk, pretext)
    shake(student)
    before = [p.clone() for p in pretext.teacher.parameters()]
    center = pretext.center.clone() if method == "dino" else None
    sum(pretext.losses(trunk, tuple(torch.randn(2, 4, 3, 32, 32))).values()).backward()
    for parameter, old in zip(pretext.teacher.parameters(), before, strict=True):
        assert torch.equal(parameter, old) and parameter.grad is None
    assert center is None or torch.equal(pretext.center, center)
    buffers = [b.clone() for b in pretext.teacher.buffers()]
    for _ in range(2):
        pretext.after_step(trunk)
    for slow, old, fast in zip(pretext.teacher.parameters(), before, student.parameters(), strict=True):
        torch.testing.assert_close(slow, 0.81 * old + 0.19 * fast, rtol=1e-5, atol=1e-6)
    assert all(torch.equal(b, old) for b, old in zip(pretext.teacher.buffers(), buffers, strict=True))
