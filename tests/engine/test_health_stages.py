"""Numbers that go wrong in an alternation, in a teacher, in a run of the command line; and what a config may say."""

import copy
import json
import math
import re

import pytest
import torch
from nonfinite_stages import batches, drawn, fine, health, level_of, same, stage, state_of, value_at

from bissl_zoo.bilevel import BiLevel
from bissl_zoo.bilevel.level import Level
from bissl_zoo.engine.stages.bissl import BisslTrainer
from bissl_zoo.engine.stages.pretrain import PretrainTrainer
from bissl_zoo.errors import BadHypergradient, NonFiniteLoss
from bissl_zoo.hypergradient import MinRes, Solution
from bissl_zoo.pretext.simclr import SimCLR
from bissl_zoo.registry import build_backbone, build_pretext

# alternations


def bilevel(lower=fine, upper=fine, solver=None, start=0, **options):
    levels = [
        level_of("lower", batches(3 * start, seed=1), lower, seed=1),
        level_of("upper", batches(2 * start, seed=2), upper, seed=1),
    ]
    problem = BiLevel(*levels, solver or MinRes(damping=10.0), lam=0.1, lower_steps=2, upper_steps=2, **options)
    trainer = BisslTrainer(problem)
    trainer.total_steps = 3
    return trainer


@pytest.mark.parametrize("name", ["lower", "upper"])
def test_an_alternation_goes_on_without_a_skipped_step(name, capsys):
    number = drawn(1, seed={"lower": 1, "upper": 2}[name])[0][0]  # in the first batch of the level
    trainer = bilevel(**{name: value_at(number, math.nan)}, on_bad_hypergradient="plain")
    before = state_of(trainer)
    trainer.total_steps = 1
    seen = []
    level = getattr(trainer.problem, name)
    step = f"{name}_step"
    original = getattr(trainer.problem, step)

    def watched(*arguments):
        seen.append(state_of(trainer))
        return original(*arguments)

    setattr(trainer.problem, step, watched)
    trainer.train(health("skip"))
    first, second = seen[:2]
    assert same(first, second)  # of both levels: an upper step moves the lower one's statistics too
    assert (trainer.problem.lower.step, trainer.problem.upper.step) == (2, 2)
    assert trainer.skipped == 1
    assert all(torch.isfinite(value).all() for value in level.backbone.state_dict().values())
    assert not torch.equal(before[name][0]["0.weight"], level.backbone.state_dict()["0.weight"])
    expected = [1, 2] if name == "lower" else [2]  # records keep their numbers
    assert [record["upper_step"] for record in trainer.records] == expected
    assert f"warning: {name} level, step 0" in capsys.readouterr().out


def test_alternations_with_skipped_steps_resume_to_the_same_end():
    wrong = {"lower": value_at(3, math.nan), "upper": value_at(4, math.nan), "on_bad_hypergradient": "plain"}
    whole = bilevel(**wrong)
    whole.train(health("skip"))
    first = bilevel(**wrong)
    first.total_steps = 2
    first.train(health("skip"))
    second = bilevel(**wrong, start=2)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    second.train(health("skip"))
    assert same(state_of(second), state_of(whole))
    assert second.skipped == whole.skipped > 0 and second.problem.fallbacks == whole.problem.fallbacks


def no_answer(operator, v):
    return Solution(v * math.nan, math.nan, 1, "diverged")


no_answer.damping = 0.0


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_a_solver_without_an_answer_ends_the_run_and_both_batches_are_named(policy):
    trainer = bilevel(solver=no_answer)
    with pytest.raises(BadHypergradient) as error:
        trainer.train(health(policy))
    curvature, downstream = drawn(3, seed=1)[2], drawn(1, seed=2)[0]
    for fact in (
        "upper level, step 0: function returned no usable hypergradient: status diverged, residual nan, |x| nan",
        f"Batch 2 of lower has 4 samples: {curvature[0]} (",
        f"Batch 0 of upper has 4 samples: {downstream[0]} (",
    ):
        assert fact in str(error.value)


# what no single step shows


def byol_stage(steps=3):
    torch.manual_seed(0)
    trunk, tail = build_backbone(name="test_resnet").split("c3")
    head = build_pretext(name="byol", backbone=trunk, tail=tail, projector=[16, 8], predictor=[12, 8])
    parameters = [p for module in (trunk, head) for p in module.parameters() if p.requires_grad]
    views = tuple(torch.randn(2, 4, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    optimizer = torch.optim.SGD(parameters, lr=0.01)
    trainer = PretrainTrainer(Level("pretrain", trunk, head, optimizer, iter([views] * steps), lambda *_: 1.0, 10))
    trainer.total_steps = steps
    return trainer


@pytest.mark.parametrize(("kind", "log_period", "checkpoint_period"), [("parameters", 2, 100), ("buffers", 100, 2)])
def test_a_poisoned_teacher_ends_the_run_when_it_is_looked_at(kind, log_period, checkpoint_period):
    trainer = byol_stage()
    # a teacher that the loss does not ask: nothing else would tell
    trainer.level.head.losses = lambda backbone, views: {"loss": backbone(views[0])["c3"].square().mean()}
    name, tensor = next(
        (n, t) for n, t in getattr(trainer.level.head.teacher, f"named_{kind}")() if t.is_floating_point()
    )
    follow = trainer.level.head.after_step

    def poison(backbone):
        follow(backbone)
        tensor.data.view(-1)[0] = math.nan

    trainer.level.head.after_step = poison
    with pytest.raises(NonFiniteLoss) as error:
        trainer.train(health("skip", log_period=log_period, period=checkpoint_period))
    where = f"head.teacher.{name}".replace(".model.", ".")  # as it is called in a checkpoint
    assert f"pretrain level, after step 2 of pretrain: NaN or Inf in {where}" in str(error.value)


def test_numbers_that_are_meant_to_be_infinite_or_are_only_large_are_left_alone():
    trainer = stage(steps=2)
    for module in (trainer.level.backbone, trainer.level.head):
        module.register_buffer("mask", torch.tensor([0.0, -math.inf]))
    trainer.level.head.register_buffer("large", torch.full((4,), 3e38))
    trainer.train(health())
    assert trainer.step == 2


@pytest.mark.parametrize(("std", "expected"), [(1e-4, 1), (0.2, 0)])
def test_a_collapsed_embedding_is_warned_of_once_where_the_probe_measures_it(capsys, std, expected):
    trainer = stage(steps=3)
    step = trainer.run_step
    trainer.run_step = lambda: {**step(), "probe/std": std}
    trainer.train(health())
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert len(lines) == expected and all(
        "embedding has collapsed: its normalised deviation is 0.0001" in x for x in lines
    )


# runs


@pytest.mark.slow
def test_a_run_that_stops_keeps_its_last_checkpoint_and_is_resumed_without_the_batch(
    train_net, tiny, tmp_path, monkeypatch
):
    run = [*tiny(train__stages="[pretrain]", pretrain__steps=3), f"train.output_dir={tmp_path / 'run'}"]
    losses, calls = SimCLR.losses, []
    monkeypatch.setattr("bissl_zoo.engine.runner.preflight", lambda *_: None)  # which calls the losses, too

    def spoilt(self, backbone, views):
        calls.append(None)
        terms = losses(self, backbone, views)
        return {name: value * math.nan if len(calls) == 2 else value for name, value in terms.items()}

    monkeypatch.setattr(SimCLR, "losses", spoilt)
    message = train_net(*run).message()
    assert "pretrain level, step 1, rank 0: the loss is not finite" in message
    named = re.search(r"Batch 1 of pretrain has 8 samples: (.*) and 3 more\.", message)[1]
    assert len(re.findall(r"\d+ \(\S+/unlabeled_\d+\.jpg\)", named)) == 5
    checkpoints = tmp_path / "run" / "checkpoints" / "pretrain"
    assert [path.name for path in checkpoints.iterdir()] == ["step_000001"]
    calls[1:] = []  # what is wrong with the batch is still wrong
    outcome = train_net("--resume", *run, "train.on_nonfinite=skip")
    assert outcome.status == 0, outcome.err
    assert "The step is skipped, 1 of at most 10 in this stage." in outcome.out
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "event" not in line]
    assert [(line["step"], line.get("skipped"), "total_loss" in line) for line in lines] == [
        (1, None, True),
        (2, 1, False),
        (3, 1, True),
    ]
