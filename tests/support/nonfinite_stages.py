"""Small stages with NaN or Inf at chosen places, in one process or in two."""

import copy
import math

import torch
from fvcore.common.param_scheduler import ConstantParamScheduler
from omegaconf import OmegaConf
from torch import nn

from bissl_zoo.bilevel.level import Level
from bissl_zoo.data.loaders import build_train_loader
from bissl_zoo.engine.build import Batches
from bissl_zoo.engine.health import Health
from bissl_zoo.engine.stages.pretrain import PretrainTrainer
from bissl_zoo.errors import NonFiniteLoss
from bissl_zoo.optim import LRMultiplier

CPU = torch.device("cpu")
SIZE, BATCH = 20, 4


class Unnamed:
    """A data set whose sample is its number."""

    def __len__(self):
        return SIZE

    def __getitem__(self, index):
        return index, None


class Numbers(Unnamed):
    """The same in files of that name."""

    def source(self, index):
        return f"images/{index}.png"


def sample(number, target):
    """Return the number and a vector that is a function of it."""
    return torch.tensor(number), torch.randn(6, generator=torch.Generator().manual_seed(number))


def batches(start_step=0, seed=0, dataset=None):
    loader = build_train_loader(dataset or Numbers(), BATCH, sample, seed=seed, start_step=start_step)
    return Batches(loader, start_step, CPU)


class Head(nn.Module):
    """Loss with batch norm and a queue; `wrong(numbers, output)` is added to it."""

    def __init__(self, wrong):
        super().__init__()
        self.layers = nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 3))
        self.register_buffer("queue", torch.zeros(2))
        self.wrong = wrong

    def losses(self, backbone, batch):
        numbers, inputs = batch
        output = self.layers(backbone(inputs))
        self.queue = self.queue + 1  # replaced, not written in place
        return {"square": (output - 1).square().mean(), "wrong": self.wrong(numbers, output)}

    def after_step(self, backbone):
        pass


def fine(numbers, output):
    return output.sum() * 0.0


def value_at(number, value):
    """Return a loss term that is `value` for the batch with the sample `number`."""
    return lambda numbers, output: output.sum() * 0.0 + (value if number in numbers else 0.0)


def level_of(name, stream, wrong=fine, seed=0):
    torch.manual_seed(seed)
    backbone, head = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh()), Head(wrong)
    optimizer = torch.optim.SGD([*backbone.parameters(), *head.parameters()], lr=0.1, momentum=0.9)
    constant = LRMultiplier(ConstantParamScheduler(1.0))
    return Level(name, backbone, head, optimizer, stream, constant, 100, clip_norm=None)


def stage(wrong=fine, steps=10, stream=None):
    trainer = PretrainTrainer(level_of("pretrain", stream or batches(), wrong))
    trainer.total_steps = steps
    return trainer


def health(policy="stop", most=10, log_period=1, period=100):
    checkpoint = {"period": period}
    train = {"on_nonfinite": policy, "max_skipped": most, "log_period": log_period, "checkpoint": checkpoint}
    return [Health(OmegaConf.create({"train": train}))]


def state_of(trainer):
    """Return parameters, buffers and the state of the optimizer."""
    return {
        name: (
            copy.deepcopy(level.backbone.state_dict()),
            copy.deepcopy(level.head.state_dict()),
            copy.deepcopy(level.optimizer.state_dict()["state"]),
        )
        for name, level in trainer.levels().items()
    }


def same(first, second):
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    return True


def drawn(count, seed=0):
    """Return the sample numbers of the first batches."""
    stream = batches(seed=seed)
    return [next(stream)[0].tolist() for _ in range(count)]


#: a sample of the second rank's half of batch 2
BAD_ON_ONE_RANK = drawn(3)[2][3]


def outcome(policy):
    """Return the error, or skipped steps and final weights, of one of two processes when the other has a NaN."""
    trainer = stage(value_at(BAD_ON_ONE_RANK, math.nan), steps=4)
    try:
        trainer.train(health(policy))
    except NonFiniteLoss as error:
        return str(error)
    return [trainer.skipped, *[parameter.sum().item() for parameter in trainer.level.parameters]]
