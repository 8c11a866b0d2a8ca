"""Numbers that go wrong in a step, on purpose: seen at once, told with their samples; stopped at, or undone."""

import copy
import math

import pytest
import torch
from nonfinite_stages import (
    BATCH,
    CPU,
    batches,
    drawn,
    fine,
    health,
    outcome,
    same,
    sample,
    stage,
    state_of,
    value_at,
)
from ranks import on_ranks

from bissl_zoo.engine.build import Batches
from bissl_zoo.errors import NonFiniteLoss

# which samples a batch holds


@pytest.mark.parametrize("start", [0, 3])
def test_the_numbers_of_the_newest_batch_are_those_that_it_holds(start):
    stream = batches(start, seed=5)
    for number in range(start, start + 8):  # beyond an epoch
        assert next(stream)[0].tolist() == stream.newest() and stream.taken == number + 1
    assert drawn(start + 1, seed=5)[start] == next(batches(start, seed=5))[0].tolist()


def test_a_stream_without_numbers_says_so_and_other_batches_say_nothing():
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter([sample(number, None) for number in range(40)])

    wrong = value_at(0, math.nan)
    with pytest.raises(NonFiniteLoss, match="Batch 0 of pretrain was read in a stream, and its samples have"):
        loader = torch.utils.data.DataLoader(Stream(), batch_size=BATCH)
        stage(wrong, stream=Batches(loader, 0, CPU)).train(health())
    with pytest.raises(NonFiniteLoss) as error:
        stage(wrong, stream=iter([tuple(map(torch.stack, zip(*map(sample, range(4), range(4)), strict=True)))])).train(
            health()
        )
    assert "Batch" not in str(error.value)


# stop


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_goes_wrong_names_the_samples_their_files_and_what_came_before(bad):
    numbers = drawn(3)[2]
    trainer = stage(value_at(numbers[1], bad))
    with pytest.raises(NonFiniteLoss) as error:
        trainer.train(health())
    message = str(error.value)
    assert "pretrain level, step 2, rank 0: the loss is not finite (square=" in message and f"wrong={bad}" in message
    assert f"Batch 2 of pretrain has 4 samples: {numbers[0]} (images/{numbers[0]}.png), {numbers[1]} (" in message
    assert f"Last finite metrics, of step 1: total_loss={trainer.metrics['total_loss']:.4g}, square=" in message
    assert "train.on_nonfinite=skip" in message and trainer.step == 2


def overflow(numbers, output):
    """Finite, with an infinite slope where sample 7 is."""
    return (
        (output - output.detach()).abs().sqrt().sum() * float(7 in numbers) if 7 in numbers else fine(numbers, output)
    )


def test_a_gradient_that_overflows_is_reported_like_a_loss():
    step = next(number for number, batch in enumerate(drawn(5)) if 7 in batch)
    with pytest.raises(NonFiniteLoss, match=rf"step {step}: .*norm of its gradient is nan.* Batch {step} .*7\.png"):
        stage(overflow).train(health())


# skip


@pytest.mark.parametrize("wrong", [value_at(7, math.nan), value_at(7, math.inf), overflow], ids=["nan", "inf", "slope"])
def test_a_run_that_skips_a_batch_is_a_run_without_it(wrong, capsys):
    held = drawn(5)
    step = next(number for number, batch in enumerate(held) if 7 in batch)
    trainer = stage(wrong, steps=5)
    trainer.train(health("skip"))
    stream = batches()
    everything = [next(stream) for _ in range(5)]
    other = stage(steps=4, stream=iter(everything[:step] + everything[step + 1 :]))
    other.train()
    assert same(state_of(trainer), state_of(other))  # parameters, momentum, batch-norm statistics and the queue
    assert trainer.skipped == 1 and trainer.level.step == 5 and trainer.metrics["skipped"] == 1
    (warning,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert f"step {step}" in warning and "7.png" in warning and "skipped, 1 of at most 10 in this stage" in warning


def test_more_steps_than_allowed_end_the_run_and_not_one_fewer():
    def always(numbers, output):
        return output.sum() * math.nan

    allowed = stage(always, steps=3)
    allowed.train(health("skip", most=3))
    assert allowed.skipped == 3
    trainer = stage(always, steps=4)
    with pytest.raises(NonFiniteLoss, match="3 steps of pretrain were skipped before, and train.max_skipped=3"):
        trainer.train(health("skip", most=3))
    assert trainer.step == 3


def test_a_resumed_run_skips_the_same_steps_and_goes_on_counting():
    wrong = value_at(7, math.nan)  # once an epoch, which is five steps
    whole = stage(wrong, steps=12)
    whole.train(health("skip"))
    first = stage(wrong, steps=6)
    first.train(health("skip"))
    second = stage(wrong, steps=12, stream=batches(start_step=6))
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert second.skipped == first.skipped > 0
    second.train(health("skip"))
    assert same(state_of(second), state_of(whole)) and second.skipped == whole.skipped > first.skipped
    old = first.state_dict()
    del old["skipped"]
    second.load_state_dict(old)
    assert second.skipped == 0


# two processes


@pytest.mark.slow
def test_what_goes_wrong_on_one_process_is_decided_alike_on_both(tmp_path):
    first, second = on_ranks(lambda rank, world: [outcome("stop"), outcome("skip")], [2], tmp_path)[2]
    assert first == second
    numbers = drawn(3)[2][2:]  # the part of the rank that is named
    assert "step 2, rank 1: the loss is not finite" in first[0]
    assert (
        f"Batch 2 of pretrain on rank 1 has 2 samples: {numbers[0]} (" in first[0] and f", {numbers[1]} (" in first[0]
    )
    assert first[1][0] == 1 and all(math.isfinite(value) for value in first[1][1:])
