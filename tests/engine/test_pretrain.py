"""The pretrain stage's options: an average of the weights, parts of a batch, compilation, its speed."""

from functools import partialmethod

import pytest
import torch
from torch import nn

from bissl_zoo.bilevel.level import Level
from bissl_zoo.data.samples import split_samples
from bissl_zoo.engine.build import Weights
from bissl_zoo.engine.checks import open_context
from bissl_zoo.engine.stages import Pretrain
from bissl_zoo.engine.trainer import SingleLevelTrainer
from bissl_zoo.errors import ConfigError
from bissl_zoo.registry import build_backbone, build_pretext

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


def views(size, seed=0, dtype=torch.float32):
    return tuple(torch.randn(2, size, 3, 32, 32, generator=torch.Generator().manual_seed(seed)).to(dtype))


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

        def keep(losses, level=level):
            grads.append([*(p.grad for p in level.parameters), *losses.values()])
            return {}

        level.optimize = keep
        SingleLevelTrainer(level, accumulate=parts).run_step()
    for whole, summed in zip(*grads, strict=True):
        torch.testing.assert_close(summed, whole, rtol=1e-9, atol=1e-12)


def test_parts_keep_the_order_and_the_nesting_of_a_batch():
    batch = (torch.arange(6), {"mask": torch.arange(12).view(6, 2)})
    first, second = split_samples(batch, 2)
    assert first[0].tolist() == [0, 1, 2] and second[1]["mask"].tolist() == [[6, 7], [8, 9], [10, 11]]


def test_methods_whose_loss_depends_on_the_whole_batch_refuse_accumulation(build):
    with pytest.raises(ConfigError, match="'simclr' depends on the batch.*byol, mae, simmim, simsiam"):
        build(pretrain__accumulate=2)
    with pytest.raises(ConfigError, match="batch_size=4 on 1 processes does not divide"):
        build(pretrain__accumulate=3, pretext=BYOL, dataloader__pretext__batch_size=4)


# compilation


@pytest.mark.slow
def test_the_stage_computes_the_same_compiled(build, monkeypatch):
    # the default backend writes C++ and takes most of a minute to compile it
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="aot_eager"))
    plain, compiled = (build(pretrain__steps=2, pretrain__compile=option) for option in (False, True))
    for trainer in (plain, compiled):
        trainer.train()
    modules = [module for module in compiled.level.backbone.modules() if module._compiled_call_impl is not None]
    assert modules == [compiled.level.backbone]
    torch.testing.assert_close(compiled.metrics["total_loss"], plain.metrics["total_loss"], rtol=1e-4, atol=0)
    build(Weights(compiled.result().backbone, pretext=compiled.result().pretext))  # the plain networks take them
