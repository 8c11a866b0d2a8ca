"""What fine-tuning may leave alone, train more slowly, or end before its time; and which weights it hands on."""

import os
import signal
from itertools import count

import pytest
import timm
import torch
from forked_runs import exit_status, start_run
from run_outcomes import assert_same, outcome
from timm.optim import param_groups_layer_decay
from torch import nn

from bissl_zoo.config import LazyConfig
from bissl_zoo.engine import hooks
from bissl_zoo.engine.build import Weights
from bissl_zoo.engine.checks import open_context
from bissl_zoo.engine.hooks import EarlyStopping, PeriodicEvaluation
from bissl_zoo.engine.runner import evaluate_only, run
from bissl_zoo.engine.stages import Finetune, finetune
from bissl_zoo.engine.trainer import SingleLevelTrainer
from bissl_zoo.errors import BisslZooError
from bissl_zoo.registry import build_backbone
from bissl_zoo.runs.listing import FINISHED, look_at


@pytest.fixture
def config(tiny_config, at_scenes, tmp_path):
    """A fine-tuning with validation data: `config(finetune__steps=6)`."""

    def build(name="run", **changed):
        settings = dict(train__stages="[finetune]", train__deterministic=True, train__publish__name="null")
        cfg = tiny_config(train__output_dir=tmp_path / name, **settings | changed)
        cfg.dataloader.val = cfg.dataloader.test
        cfg.dataloader.val.dataset.split = "train"
        return cfg

    return build


def states(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def changed(before, after):
    return {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}


# which parameters are trained, and how fast


def test_stages_that_are_frozen_stay_as_they_are_their_statistics_too(config):
    context = open_context(config(finetune__freeze_at="c2", finetune__steps=3, finetune__eval_period=1), "test")
    trainer = Finetune().build(context, Weights())
    backbone = trainer.level.backbone
    before = states(backbone)
    evaluation = PeriodicEvaluation(
        lambda trainer: hooks.evaluate(context, backbone, trainer.level.head, "val"), 1, "val"
    )
    trainer.train([evaluation])  # which puts modes back
    moved = changed(before, states(backbone))
    assert moved and not any(name.startswith(("stem.", "conv1", "bn1", "layer1")) for name in moved)
    assert any(name.startswith("layer2") and "running_mean" in name for name in moved)


@pytest.mark.parametrize("ranks, device, synchronized", [(2, "cuda", True), (2, "cpu", False), (1, "cuda", False)])
def test_batch_norm_is_synchronized_on_several_gpus(config, monkeypatch, ranks, device, synchronized):
    context = open_context(config(finetune__sync_batch_norm=True), "test")
    networks = finetune.build_downstream(context, Weights())
    monkeypatch.setattr(finetune, "build_downstream", lambda *_: networks)
    monkeypatch.setattr(finetune, "get_world_size", lambda: ranks)
    context.device = torch.device(device)
    backbone = Finetune().build(context, Weights()).level.backbone
    kinds = {type(m) for m in backbone.modules() if isinstance(m, (nn.BatchNorm2d, nn.SyncBatchNorm))}
    assert (nn.SyncBatchNorm in kinds) == synchronized and len(kinds) == 1


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto", "test_vit"])
def test_freezing_covers_what_runs_up_to_the_stage_and_nothing_behind_it(name):
    backbone = build_backbone(name=name, **({"class_token": False, "global_pool": "avg"} if "vit" in name else {}))
    stage = backbone.stages[1]
    trunk, tail = backbone.split(stage)
    backbone.freeze(stage)
    frozen = {key for key, parameter in backbone.model.named_parameters() if not parameter.requires_grad}
    assert frozen == {key.removeprefix("model.") for key, _ in trunk.named_parameters()}
    assert frozen.isdisjoint(key.removeprefix("model.") for key, _ in tail.named_parameters())


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224"])
def test_rates_decay_from_layer_to_layer_as_timm_has_it(config, name):
    vit = "vit" in name
    options = {"class_token": False, "global_pool": "avg"} if vit else {}
    overrides = [f"+backbone.{key}={value}" for key, value in options.items()]
    overrides += ["+backbone.dynamic_img_size=true", "~backbone.zero_init_last"] if vit else []
    cfg = config(backbone__name=name, bilevel__shared_stage="null", finetune__layer_decay=0.5)
    cfg = LazyConfig.apply_overrides(cfg, overrides)
    trainer = Finetune().build(open_context(cfg, "test"), Weights())
    rates = {id(p): group["lr"] for group in trainer.level.optimizer.param_groups for p in group["params"]}
    assert len(rates) == len(trainer.level.parameters)
    base = cfg.optimizer.finetune.lr
    assert all(rates[id(p)] == base for p in trainer.level.head.parameters())
    model = timm.create_model(name, num_classes=0, **options)
    names = {id(p): key for key, p in model.named_parameters()}
    groups = param_groups_layer_decay(model, layer_decay=0.5)
    theirs = {names[id(p)]: group["lr_scale"] for group in groups for p in group["params"]}
    ours = {key: rates[id(p)] / base for key, p in trainer.level.backbone.model.named_parameters()}
    # ours counts from the task's head, a layer above the last of the trunk, which has no final norm
    top = max(theirs[key] for key in ours)
    assert ours == {key: pytest.approx(0.5 * theirs[key] / top) for key in ours}


# the best weights


def trained(config, values, patience=None, steps=6):
    """A fine-tuning whose evaluations find these values."""
    trainer = Finetune().build(open_context(config(finetune__steps=steps), "test"), Weights())
    found = iter(values)
    kept = {}

    class Keep(PeriodicEvaluation):
        def after_step(self):
            super().after_step()
            kept[self.trainer.step] = states(self.trainer.level.backbone)

    trainer.train([Keep(lambda trainer: {"AP50": next(found)}, 1, "val"), EarlyStopping("AP50", patience)])
    return trainer, kept


def test_the_weights_that_were_best_on_validation_data_are_taken_and_of_equal_ones_the_first(config):
    trainer, kept = trained(config, [0.1, 0.3, 0.2, 0.3, 0.0, 0.25])
    assert trainer.step == 6 and not trainer.ended
    assert (trainer.best["step"], trainer.best["value"]) == (2, 0.3)
    trainer.take_best()
    assert not changed(kept[2], states(trainer.level.backbone)) and changed(kept[2], kept[6])


def test_a_stage_ends_when_its_evaluations_have_not_become_better_for_long(config, capsys):
    trainer, _ = trained(config, [0.1, 0.3, 0.2, 0.3, 0.2], patience=3)
    assert trainer.step == 5 and trainer.ended and trainer.done
    out = capsys.readouterr().out
    assert "early stopping: val/AP50 was best at step 2 (0.3000)" in out and "3 evaluations" in out


def test_the_last_step_is_compared_too(config):
    trainer, _ = trained(config, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6], patience=1)
    assert trainer.best["step"] == 6 and not trainer.ended


# whole runs


STOPPING = dict(
    finetune__steps=6,
    finetune__eval_period=1,
    finetune__early_stopping__metric="AP50",
    finetune__early_stopping__patience=2,
)


def made_up():
    """Has evaluations on validation data find what they never would: the best at step 2, and no better at 3 and 4."""
    evaluate, values = hooks.evaluate, {1: 0.1, 2: 0.3, 3: 0.2, 4: 0.1}

    def evaluated(context, backbone, head, role="test", *others, **options):
        metrics = evaluate(context, backbone, head, role, *others, **options)
        if role == "val":
            metrics["AP50"] = values[backbone_steps(backbone)]
        return metrics

    hooks.evaluate = evaluated


def backbone_steps(backbone):
    """The optimizer steps that its batch-norm layers have seen."""
    return next(int(t) for name, t in backbone.state_dict().items() if name.endswith("num_batches_tracked"))


def made_up_and_killed():
    """As `made_up`, in a process that is killed at its fourth step."""
    made_up()
    step, calls = SingleLevelTrainer.run_step, count(1)

    def armed(trainer):
        if next(calls) == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(trainer)

    SingleLevelTrainer.run_step = armed


@pytest.mark.slow
def test_a_run_that_is_killed_stops_as_early_and_tests_the_same_weights_as_one_that_is_not(config, tmp_path):
    assert exit_status(start_run(config("killed", **STOPPING), before=made_up_and_killed)) == -signal.SIGKILL
    for name in ("killed", "whole"):
        assert exit_status(start_run(config(name, **STOPPING), before=made_up)) == 0
    killed, whole = (outcome(tmp_path / name) for name in ("killed", "whole"))
    assert_same(killed, whole)
    last = max(whole["states"])
    assert last == "finetune/step_000004" and whole["states"][last]["best"]["step"] == 2
    # the metrics are those of the best weights, which later stages get too, and not of the last ones
    assert (
        evaluate_only(config("again", train__init=tmp_path / "whole"), "test")["finetuned"] == whole["results"]["init"]
    )
    weights = whole["states"][last]["best"]["weights"]["backbone"]
    assert changed(weights, whole["states"][last]["levels"]["level"]["backbone"])
    assert run(config("whole", **STOPPING), "test", resume=True)["results"] == whole["results"]
    assert look_at(tmp_path / "whole").state == FINISHED


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"finetune__early_stopping__metric": "AP500"}, "'faster_rcnn' does not measure. Did you mean 'AP50'"),
        ({"finetune__eval_period": "null"}, "early_stopping needs finetune.eval_period"),
        ({"finetune__early_stopping__metric": "null"}, "patience=2 needs finetune.early_stopping.metric"),
        ({"finetune__freeze_at": "c9"}, "has no stage 'c9'"),
        ({}, "early_stopping needs dataloader.val"),  # since weights must not be chosen by the test set
    ],
)
def test_invalid_settings_are_refused_before_training(config, tmp_path, changed, message):
    cfg = config(**STOPPING | changed)
    if not changed:
        del cfg.dataloader.val
    with pytest.raises(BisslZooError, match=message):
        run(cfg, "test")
    assert not (tmp_path / "run").exists()
