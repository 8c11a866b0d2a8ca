"""The pretrain stage's options: an average of the weights, parts of a batch, memory format, compilation, its speed."""

import copy
import json
import re
from functools import partialmethod

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from bissl_zoo.bilevel.level import Level
from bissl_zoo.data.samples import split_samples
from bissl_zoo.engine.build import Weights
from bissl_zoo.engine.checks import open_context
from bissl_zoo.engine.init import weights_of
from bissl_zoo.engine.stages import Pretrain
from bissl_zoo.engine.stages.pretrain import WeightAverage
from bissl_zoo.engine.trainer import SingleLevelTrainer
from bissl_zoo.errors import CheckpointError, ConfigError
from bissl_zoo.registry import build_backbone, build_pretext
from bissl_zoo.runs.checkpoint import Checkpointer, load_checkpoint

METHOD = (
    "{_target_: bissl_zoo.registry.build_pretext, name: %s, projector: [16, 8], %s"
    " augmentation: {_target_: bissl_zoo.data.views.two_views, size: 32}}"
)
BYOL = METHOD % ("byol", "predictor: [12, 8],")


@pytest.fixture
def build(tiny_config, at_scenes):
    """The stage of the tiny config: `build(pretrain__ema=0.9)`."""

    def make(weights=None, **changed):
        return Pretrain().build(open_context(tiny_config(**changed), "test"), weights or Weights())

    return make


def level_of(trunk, head, batches=()):
    parameters = [p for module in (trunk, head) for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    return Level("pretrain", trunk, head, optimizer, iter(batches), lambda *_: 1.0, total_steps=10, clip_norm=None)


def byol(**kwargs):
    torch.manual_seed(0)
    trunk, tail = build_backbone(name="test_resnet").split("c3")
    return trunk, build_pretext(
        name="byol", backbone=trunk, tail=tail, projector=[16, 8], predictor=[12, 8], decay=0.9, **kwargs
    )


def views(size, seed=0, dtype=torch.float32):
    return tuple(torch.randn(2, size, 3, 32, 32, generator=torch.Generator().manual_seed(seed)).to(dtype))


# an average of the weights


def test_the_average_follows_by_its_decay_and_forgets_the_start():
    backbone, head = nn.Linear(1, 1, bias=False).double(), nn.Linear(1, 1)
    level = level_of(backbone, head)
    average = WeightAverage(level, decay=0.4)
    expected = backbone.weight.item()
    for n, value in enumerate((1.0, 5.0, -2.0, 3.0), start=1):
        backbone.weight.data.fill_(value)
        average.update(level)
        decay = min(0.4, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * value
        assert average.backbone.weight.item() == pytest.approx(expected, rel=1e-12)


def test_what_has_a_memory_of_its_own_is_copied_into_the_average():
    trunk, head = byol()
    level = level_of(trunk, head)
    average = WeightAverage(level, decay=0.99)
    started = copy.deepcopy(head.state_dict())
    trainer = SingleLevelTrainer(level)
    for seed in range(2):
        level.data_iterator = iter([views(4, seed)])
        trainer.run_step()
        head.after_step(trunk)
        average.update(level)
    now, own = head.state_dict(), average.head.state_dict()
    assert all(torch.equal(own[name], now[name]) for name in now if name.startswith("teacher."))
    between = [name for name in now if name.startswith("projector.") and not torch.equal(started[name], now[name])]
    assert {"projector.0.weight", "projector.1.running_mean"} <= set(between)
    for name in between:
        if now[name].is_floating_point():
            assert not torch.equal(own[name], now[name]) and not torch.equal(own[name], started[name])
        else:
            assert torch.equal(own[name], now[name])


def test_the_average_is_what_leaves_the_stage_and_what_a_run_directory_hands_on(build, tmp_path):
    trainer = build(pretrain__ema=0.9, pretrain__steps=3)
    trainer.train()
    left = trainer.result()
    name = "conv1.0.weight"
    assert not torch.equal(left.backbone[name], trainer.level.backbone.state_dict()[name])
    path = Checkpointer(tmp_path).save("pretrain", 3, 3, "test_resnet", trainer.state_dict())
    again = weights_of("pretrain", load_checkpoint(path)[1])
    for one, other in ((left.backbone, again.backbone), (left.pretext, again.pretext)):
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.slow
def test_a_resumed_average_goes_on_where_it_was(build):
    whole = build(pretrain__ema=0.9, pretrain__steps=4)
    whole.train()
    other = build(pretrain__ema=0.9, pretrain__steps=4)
    other.load_state_dict(whole.state_dict())
    assert int(other.average.updates) == 4
    pairs = zip(whole.average.state_dict().values(), other.average.state_dict().values(), strict=True)
    assert all(torch.equal(one, two) for one, two in pairs)
    with pytest.raises(CheckpointError, match="has an average of the weights.*pretrain.ema"):
        build().load_state_dict(whole.state_dict())


# parts of a batch


def test_parts_of_a_batch_add_up_to_its_gradient():
    """In eval mode, where batch norm is a function of single images, and in float64."""
    grads = []
    for parts in (1, 3):
        torch.manual_seed(0)
        trunk, tail = build_backbone(name="test_resnet").split("c3")
        head = build_pretext(name="byol", backbone=trunk, tail=tail, projector=[16, 8], predictor=[12, 8])
        trunk, head = trunk.double().eval(), head.double().eval()
        level = level_of(trunk, head, [views(6, dtype=torch.float64)])
        level.optimize = lambda level=level: grads.append([p.grad for p in level.parameters]) or {}
        losses = SingleLevelTrainer(level, accumulate=parts).run_step()
        grads[-1].append(torch.tensor(losses["total_loss"]))
    for whole, summed in zip(*grads, strict=True):
        torch.testing.assert_close(summed, whole, rtol=1e-9, atol=1e-12)


def test_parts_keep_the_order_and_the_nesting_of_a_batch():
    batch = (torch.arange(6), {"mask": torch.arange(12).view(6, 2)})
    first, second = split_samples(batch, 2)
    assert first[0].tolist() == [0, 1, 2] and second[1]["mask"].tolist() == [[6, 7], [8, 9], [10, 11]]


def test_methods_whose_loss_depends_on_the_whole_batch_refuse_accumulation(build):
    with pytest.raises(ConfigError, match="'simclr' depends on the batch.*byol, simmim, simsiam"):
        build(pretrain__accumulate=2)
    with pytest.raises(ConfigError, match="batch_size=4 on 1 processes does not divide"):
        build(pretrain__accumulate=3, pretext=BYOL, dataloader__pretext__batch_size=4)


# memory format and compilation


@pytest.mark.slow
@pytest.mark.parametrize("option", ["channels_last", "compile"])
def test_the_stage_computes_the_same_in_another_memory_format_and_compiled(build, option, monkeypatch):
    # the default backend writes C++ and takes most of a minute to compile it
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="aot_eager"))
    trainers = []
    for extra in ({}, {f"pretrain__{option}": True}):
        trainers.append(build(pretrain__steps=2, **extra))
        trainers[-1].train()
    plain, other = trainers
    compiled = [module for module in other.level.backbone.modules() if module._compiled_call_impl is not None]
    assert compiled == ([other.level.backbone] if option == "compile" else [])
    torch.testing.assert_close(other.metrics["total_loss"], plain.metrics["total_loss"], rtol=1e-4, atol=0)
    assert plain.result().backbone.keys() == other.result().backbone.keys()
    weight = other.level.backbone.state_dict()["conv1.3.weight"]
    assert weight.is_contiguous(memory_format=torch.channels_last) == (option == "channels_last")
    build(Weights(other.result().backbone, pretext=other.result().pretext))  # the plain networks take them


# what a run with these options leaves


@pytest.mark.slow
def test_a_run_with_an_average_shows_its_speed_and_publishes_the_average(train_net, tiny, tmp_path, at_scenes):
    folder, zoo = tmp_path / "run", tmp_path / "zoo"
    settings = tiny(
        train__stages="[pretrain]",
        train__publish__name="averaged",
        train__publish__zoo=str(zoo),
        pretrain__ema=0.9,
        pretrain__channels_last=True,
    )
    outcome = train_net(*settings, f"train.output_dir={folder}")
    assert outcome.status == 0, outcome.err
    assert re.search(r"\[pretrain .* s/step  \d+ images/s  \d+% waiting for data  ETA", outcome.out)
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-2])  # before the event
    assert last["speed/images_per_second"] > 0 and 0 <= last["speed/waiting"] <= 1
    state = load_checkpoint(Checkpointer(folder / "checkpoints").newest("pretrain"))[1]
    stored = load_file(next(zoo.glob("averaged*/model.safetensors")))
    assert torch.equal(stored["conv1.0.weight"], state["average"]["backbone.conv1.0.weight"])
    assert not torch.equal(stored["conv1.0.weight"], state["levels"]["level"]["backbone"]["conv1.0.weight"])
