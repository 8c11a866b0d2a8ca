import math
from pathlib import Path

import numpy as np
import pytest
import torch
from fvcore.common.param_scheduler import ConstantParamScheduler, CosineParamScheduler, MultiStepParamScheduler

from bissl_zoo.optim import LRMultiplier, clip_gradients, effective_learning_rate, set_learning_rate

# the learning rates of two groups over 45 steps of a 40-step schedule, by the BiSSL authors' published code
SCHEDULE = np.load(Path(__file__).parent / "golden" / "sched_plain.npz")["lrs"]
COSINE = CosineParamScheduler(start_value=1.0, end_value=0.001)


def test_cosine_equals_the_authors_schedule_up_to_its_end():
    multiplier = LRMultiplier(COSINE)
    ours = np.outer([multiplier(step, 40) for step in range(41)], [0.3, 1.2])
    np.testing.assert_allclose(ours, SCHEDULE[:41], rtol=1e-12)


def test_the_end_value_is_held_where_the_authors_rate_rises_again():
    multiplier = LRMultiplier(COSINE)
    assert [multiplier(step, 40) for step in range(40, 45)] == pytest.approx([0.001] * 5, rel=1e-12)
    assert (np.diff(SCHEDULE[40:, 0]) > 0).all()


def test_warm_up_starts_at_one_nth_and_ends_at_the_base_rate():
    multiplier = LRMultiplier(COSINE, warmup_steps=4)
    assert [multiplier(step, 20) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert multiplier(4, 20) == 1.0
    after = [0.001 + 0.999 * (1 + math.cos(math.pi * k / 16)) / 2 for k in range(17)]
    assert [multiplier(step, 20) for step in range(4, 21)] == pytest.approx(after, rel=1e-12)


def test_schedulers_stay_at_their_end_value_beyond_the_end():
    for scheduler in (
        COSINE,
        ConstantParamScheduler(0.5),
        MultiStepParamScheduler([1.0, 0.1], milestones=[5], num_updates=10),
    ):
        multiplier = LRMultiplier(scheduler)
        assert multiplier(10, 10) == multiplier(99, 10)


def test_total_is_the_run_length_at_the_base_rate():
    assert LRMultiplier(ConstantParamScheduler(1.0), warmup_steps=4).total(10) == pytest.approx(2.5 + 6)


def two_groups():
    groups = [{"params": [torch.zeros(2, requires_grad=True)], "lr": lr} for lr in (0.3, 1.2)]
    return torch.optim.SGD(groups, lr=1.0, momentum=0.9)


def test_rates_are_multiples_of_what_each_group_was_built_with():
    optimizer = two_groups()
    for factor in (0.5, 0.1, 1.0):  # not of the rate left by the call before
        assert set_learning_rate(optimizer, factor) == pytest.approx(0.3 * factor)
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.3 * factor, 1.2 * factor])


def test_base_rates_survive_a_checkpoint():
    optimizer, resumed = two_groups(), two_groups()
    set_learning_rate(optimizer, 0.1)
    resumed.load_state_dict(optimizer.state_dict())
    set_learning_rate(resumed, 0.5)
    assert [group["lr"] for group in resumed.param_groups] == pytest.approx([0.15, 0.6])


def test_effective_rate_counts_momentum_and_not_the_present_factor():
    optimizer = two_groups()
    set_learning_rate(optimizer, 0.01)
    assert effective_learning_rate(optimizer) == pytest.approx(3.0)
    assert effective_learning_rate(torch.optim.AdamW([torch.zeros(1)], lr=0.2)) == pytest.approx(0.2)


def with_gradients(*gradients):
    parameters = [torch.zeros(len(g), dtype=torch.float64, requires_grad=True) for g in gradients]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = torch.tensor(gradient, dtype=torch.float64)
    return parameters


def test_clipping_scales_the_global_norm_and_returns_the_one_before():
    parameters = with_gradients([3.0, 0.0], [0.0, 4.0, 12.0])
    assert clip_gradients(iter(parameters), 6.5).item() == pytest.approx(13.0)
    # clip_grad_norm_ adds 1e-6 to the norm it divides by
    torch.testing.assert_close(
        parameters[1].grad, torch.tensor([0.0, 2.0, 6.0], dtype=torch.float64), rtol=1e-6, atol=0
    )


def test_gradients_below_the_limit_or_without_one_stay_bit_equal():
    for limit in (14.0, None):
        parameters = with_gradients([3.0, 4.0], [12.0])
        assert clip_gradients(parameters, limit).item() == pytest.approx(13.0)
        assert parameters[0].grad.tolist() == [3.0, 4.0] and parameters[1].grad.tolist() == [12.0]


def test_parameters_without_a_gradient_are_left_out():
    parameters = [*with_gradients([3.0, 4.0]), torch.zeros(2, requires_grad=True)]
    assert clip_gradients(parameters, 10.0).item() == pytest.approx(5.0)
    assert parameters[1].grad is None
