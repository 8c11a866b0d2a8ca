"""The trainers of the stages: what each starts from, trains, leaves alone and hands on; also in two processes."""

import pytest
import torch
from omegaconf import OmegaConf

from bissl_zoo.config import LazyConfig
from bissl_zoo.engine.build import Context, Weights, build_split_backbone, count_steps
from bissl_zoo.engine.checks import check_parts, open_context
from bissl_zoo.engine.evaluate import evaluate
from bissl_zoo.engine.launch import launch
from bissl_zoo.engine.resume import seed_everything
from bissl_zoo.engine.stages import Bissl, Finetune, HeadWarmup, Pretrain
from bissl_zoo.engine.stages.bissl import coupling
from bissl_zoo.errors import BisslZooError, ConfigError
from bissl_zoo.registry import SOLVERS
from bissl_zoo.runs.checkpoint import Checkpointer, load_checkpoint


@pytest.fixture
def context(tiny_config, at_scenes):
    return open_context(tiny_config(), "test")


def copied(module):
    return {key: value.clone() for key, value in module.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())


def trunk_weights(context, seed=11):
    seed_everything(seed)
    return Weights(build_split_backbone(context.cfg)[0].state_dict())


def test_the_head_warm_up_trains_the_head_alone(context):
    weights = trunk_weights(context)
    trainer = HeadWarmup().build(context, weights)
    assert not trainer.level.backbone.training
    head = copied(trainer.level.head)
    trainer.train()
    assert same(trainer.level.backbone.state_dict(), weights.backbone)  # batch-norm statistics included
    assert not same(head, trainer.result().task) and trainer.result().backbone is weights.backbone


def test_both_levels_start_from_the_same_backbone_and_the_lower_one_leaves(context):
    weights = trunk_weights(context)
    trainer = Bissl().build(context, weights)
    lower, upper = trainer.problem.lower.backbone, trainer.problem.upper.backbone
    assert same(lower.state_dict(), upper.state_dict()) and same(lower.state_dict(), weights.backbone)
    trainer.train()
    assert not same(lower.state_dict(), upper.state_dict())
    assert same(trainer.result().backbone, lower.state_dict())
    assert trainer.problem.lower.step == 4 and trainer.problem.upper.step == 2


@pytest.mark.slow
def test_all_stages_have_the_same_losses_in_the_channels_last_memory_format(tiny_config, at_scenes):
    runs = []
    for channels_last in (False, True):
        context = open_context(tiny_config(train__channels_last=channels_last, bilevel__alternations=1), "test")
        stages = [stage.build(context, trunk_weights(context)) for stage in (Pretrain(), Bissl(), Finetune())]
        weight = stages[0].level.backbone.state_dict()["conv1.3.weight"]
        assert weight.is_contiguous(memory_format=torch.channels_last) == channels_last
        for trainer in stages:
            trainer.train()
        runs.append({key: value for trainer in stages for key, value in trainer.metrics.items() if "loss" in key})
    plain, other = runs
    assert plain.keys() == other.keys() and len(plain) > 4
    for key, value in plain.items():
        assert other[key] == pytest.approx(value, rel=2e-3), key


def test_the_baseline_and_the_fine_tuning_differ_in_the_backbone_only(context):
    one = Finetune(baseline=True).build(context, trunk_weights(context, 1))
    other = Finetune().build(context, trunk_weights(context, 2))
    assert same(one.level.head.state_dict(), other.level.head.state_dict())
    assert not same(one.level.backbone.state_dict(), other.level.backbone.state_dict())
    first, second = next(one.level.data_iterator), next(other.level.data_iterator)
    assert all(torch.equal(a, b) for a, b in zip(first[0], second[0], strict=True))


def test_a_stage_resumed_at_a_step_takes_the_batches_that_follow(context, tiny_config, at_scenes):
    cfg = tiny_config(task__flip_probability=0.0)
    quiet = Context(cfg, context.data, context.device)
    weights = trunk_weights(context)
    whole = Finetune().build(quiet, weights).level.data_iterator
    batches = [next(whole) for _ in range(3)]
    resumed = next(Finetune().build(quiet, weights, start_step=2).level.data_iterator)
    assert [t["image_id"] for t in resumed[1]] == [t["image_id"] for t in batches[2][1]]


PRETEXT = (
    "{_target_: bissl_zoo.registry.build_pretext, name: %s, projector: [16, 8], %s"
    " augmentation: {_target_: bissl_zoo.data.views.two_views, size: 32}}"
)
HEADS = {
    "moco_v2": "queue_length: 20,",
    "moco_v3": "predictor: [12, 8],",
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "curvature", "solver"),
    [
        ("moco_v3", "gauss_newton", "minres"),
        *(("moco_v2", "hessian", solver) for solver in ("minres", "cg")),
        *(("moco_v2", "gauss_newton", solver) for solver in SOLVERS.list() if solver != "exact"),  # too large for it
    ],
)
def test_a_resumed_stage_goes_on_bit_equal_with_teachers_queues_and_every_solver(
    tiny_config, at_scenes, tmp_path, method, curvature, solver
):
    cfg = tiny_config(pretext=PRETEXT % (method, HEADS[method]), bilevel__curvature=curvature)
    # an alternation has two lower steps, so that the next one keeps a gradient of three
    options = {"mfac": {"gradients": 3}, "cg": {"damping": "auto"}}.get(solver, {})
    cfg.solver = {"_target_": "bissl_zoo.registry.build_solver", "name": solver, **options}
    context = open_context(cfg, "test")
    pretraining = Pretrain().build(context, Weights())
    pretraining.train()
    trainer = Bissl().build(context, pretraining.result())
    trainer.total_steps = 1
    trainer.train()
    path = Checkpointer(tmp_path).save("bissl", 1, 2, "test_resnet", trainer.state_dict())
    resumed = Bissl().build(context, pretraining.result(), start_step=1)
    resumed.load_state_dict(load_checkpoint(path)[1])
    # views are random, so both take the same batches
    batches = {name: [next(level.data_iterator) for _ in range(3)] for name, level in trainer.levels().items()}
    for each in (trainer, resumed):
        torch.manual_seed(0)
        for name, level in each.levels().items():
            level.data_iterator = iter(batches[name])
        each.total_steps = 2
        each.train()
    for name, level in resumed.levels().items():
        assert same(level.backbone.state_dict(), trainer.levels()[name].backbone.state_dict())
        assert same(level.head.state_dict(), trainer.levels()[name].head.state_dict())


SOLVER = "{_target_: bissl_zoo.registry.build_solver, name: %s}"


@pytest.mark.slow
def test_automatic_damping_goes_on_from_the_shift_that_was_saved(tiny_config, at_scenes, tmp_path):
    solver = SOLVER % "minres, damping: auto, iterations: 3"
    context = open_context(tiny_config(solver=solver, bilevel__curvature="hessian"), "test")
    weights = trunk_weights(context)
    trainer = Bissl().build(context, weights)
    assert trainer.state_dict()["shift"] is None
    trainer.train()
    shift = trainer.problem.shift
    assert shift >= context.cfg.bilevel["lambda"]
    assert trainer.metrics["solver/damping"] == pytest.approx(shift - context.cfg.bilevel["lambda"])
    path = Checkpointer(tmp_path).save("bissl", 2, 2, "test_resnet", trainer.state_dict())
    again = Bissl().build(context, weights)
    again.load_state_dict(load_checkpoint(path)[1])
    assert again.problem.shift == shift


@pytest.mark.slow
def test_the_upper_steps_of_an_alternation_are_records_and_counted_over_the_stage(tiny_config, at_scenes):
    context = open_context(tiny_config(bilevel__upper_steps=3), "test")
    trainer = Bissl().build(context, trunk_weights(context))
    seen = []
    for _ in range(2):
        metrics = trainer.run_step()
        seen += trainer.records
        assert {key: metrics[key] for key in trainer.records[-1] if key != "upper_step"} == {
            key: value for key, value in trainer.records[-1].items() if key != "upper_step"
        }
    assert [record["upper_step"] for record in seen] == [1, 2, 3, 4, 5, 6]
    assert len({record["upper/total_loss"] for record in seen}) == 6
    again = Bissl().build(context, trunk_weights(context), start_step=1)
    state = trainer.state_dict()
    again.load_state_dict(state)
    again.run_step()
    assert [record["upper_step"] for record in again.records] == [7, 8, 9]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"solver": SOLVER % "minres, iterations: 0"}, r"^solver: .*iterations=0 .*must be 1 or more"),
        (
            {"solver": SOLVER % "cg, damping: auto, tolerance: 0", "bilevel__curvature": "hessian"},
            "solver.damping=auto .* must be positive",
        ),
        ({"solver__damping": -5.0}, "solver.damping is -5.0; bilevel.lambda . solver.damping must be positive"),
    ],
)
def test_what_a_solver_or_an_optimizer_refuses_is_known_before_the_run(tiny_config, at_scenes, changed, message):
    with pytest.raises(ConfigError, match=message):
        check_parts(open_context(tiny_config(**changed), "test"), Weights())


def test_a_batch_that_does_not_divide_among_processes_is_refused(tiny_config, at_scenes, monkeypatch):
    monkeypatch.setattr("bissl_zoo.engine.checks.get_world_size", lambda: 2)
    context = open_context(tiny_config(dataloader__train__batch_size=3), "test")
    with pytest.raises(ConfigError, match="dataloader.train.batch_size=3 must be .* a multiple of their number .2."):
        check_parts(context, Weights())


def test_evaluation_puts_the_modes_and_the_random_state_back(context):
    trainer = Finetune().build(context, trunk_weights(context))
    backbone, head = trainer.level.backbone, trainer.level.head
    head.eval()
    before, random_state = copied(backbone), torch.get_rng_state()
    first = evaluate(context, backbone, head)
    assert backbone.training and not head.training
    assert same(before, backbone.state_dict()) and torch.equal(random_state, torch.get_rng_state())
    assert evaluate(context, backbone, head) == first


def test_coupling_is_lambda_times_the_rate_summed_over_the_steps(tiny_config, at_scenes):
    flat = "{_target_: bissl_zoo.optim.LRMultiplier, scheduler: "
    flat += "{_target_: fvcore.common.param_scheduler.ConstantParamScheduler, value: 0.5}}"
    cfg = LazyConfig.apply_overrides(
        tiny_config(bilevel__lambda=0.25, bilevel__lower_steps=3, bilevel__alternations=7),
        [f"lr_multiplier.lower={flat}", "optimizer.lower.lr=0.2", "optimizer.lower.momentum=0.8"],
    )
    assert coupling(Context(cfg, {}, torch.device("cpu"))) == pytest.approx(0.25 * (0.2 / 0.2) * 0.5 * 21)


# SGD at 0.05 with momentum 0.9 moves at 0.5; four steps of a warm-up from 1/5 make 1.0 of the full rate


def test_epochs_count_the_samples_and_steps_count_themselves():
    images = range(10)
    assert count_steps(OmegaConf.create({"steps": None, "epochs": 3}), "finetune", images, 4) == 8  # of 7.5
    assert count_steps(OmegaConf.create({"steps": 5, "epochs": None}), "finetune", images, 4) == 5
    for both in ({"steps": 5, "epochs": 3}, {"steps": None, "epochs": None}):
        with pytest.raises(ConfigError, match="finetune: give either steps or epochs"):
            count_steps(OmegaConf.create(both), "finetune", images, 4)


@pytest.mark.slow
def test_a_project_error_ends_in_a_message_and_others_are_raised(capsys):
    def fail(error):
        raise error

    assert launch(fail, 1, BisslZooError("the oven is cold")) == 1
    assert capsys.readouterr().err == "error: the oven is cold\n"
    assert launch(fail, 1, KeyboardInterrupt()) == 130
    assert "--resume" in capsys.readouterr().err
    with pytest.raises(ZeroDivisionError):
        launch(fail, 1, ZeroDivisionError())
