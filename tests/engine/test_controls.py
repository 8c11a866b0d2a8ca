"""The controls of a comparison: LP-FT, L2-SP, self-training, and a share of the labels."""

import copy
import shutil

import pytest
import torch

from bissl_zoo.downstream.classification import Classification
from bissl_zoo.downstream.multilabel import MultilabelClassification
from bissl_zoo.engine.build import Weights
from bissl_zoo.engine.checks import open_context
from bissl_zoo.engine.runner import run
from bissl_zoo.engine.stages import Finetune, HeadWarmup, Teacher, plan_stages
from bissl_zoo.engine.stages.finetune import WithPseudoLabels, with_pseudo_labels
from bissl_zoo.errors import DatasetError
from bissl_zoo.registry import build_backbone


@pytest.fixture
def config(tiny_config, at_scenes, tmp_path):
    def build(name="run", **changed):
        settings = dict(train__stages="[finetune]", train__deterministic=True, train__publish__name="null")
        return tiny_config(train__output_dir=tmp_path / name, **settings | changed)

    return build


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())


def test_a_warm_head_is_trained_on_the_frozen_backbone_and_handed_to_fine_tuning(config):
    context = open_context(config(finetune__head="warm"), "test")
    stages = plan_stages(context, Weights())
    assert [type(stage) for stage in stages] == [HeadWarmup, Finetune]
    weights = stages[0].build(context, Weights(Finetune().build(context, Weights()).level.backbone.state_dict()))
    weights.train()
    start = stages[1].build(context, weights.result()).level
    assert same(start.head.state_dict(), weights.result().task)
    assert [type(stage) for stage in plan_stages(open_context(config(), "test"), Weights())] == [Finetune]


def test_l2_sp_adds_the_distance_from_the_start_to_the_gradient(config):
    levels = []
    for strength in (0.0, 0.5):
        context = open_context(config(finetune__l2_sp=strength, clip_grad__finetune="null"), "test")
        trainer = Finetune().build(context, Weights())
        start = [p.detach().clone() for p in trainer.level.backbone_parameters]
        with torch.no_grad():
            for parameter in trainer.level.backbone_parameters:
                parameter.add_(0.01)
        gradients = []
        trainer.level.optimizer.step = lambda level=trainer.level, kept=gradients: kept.extend(
            p.grad.clone() for p in level.backbone_parameters
        )
        trainer.run_step()
        levels.append((start, [p.detach().clone() for p in trainer.level.backbone_parameters], gradients))
    (_, _, plain), (start, moved, pulled) = levels
    for gradient, with_pull, begin, now in zip(plain, pulled, start, moved, strict=True):
        torch.testing.assert_close(with_pull, gradient + 0.5 * (now - begin), rtol=1e-5, atol=1e-6)


def test_the_teacher_is_fine_tuned_with_the_same_pull(config):
    cfg = config(train__stages="[teacher, finetune]", finetune__l2_sp=0.5)
    assert Teacher().build(open_context(cfg, "test"), Weights()).l2_sp == 0.5


def test_longer_pretraining_may_warm_a_missing_head_up(config):
    stages = '["pretrain"]'
    context = open_context(config(train__stages=stages, pretrain__head_warmup=True), "test")
    assert [stage.name for stage in plan_stages(context, Weights())] == ["pretext_warmup", "pretrain"]
    assert [stage.name for stage in plan_stages(context, Weights(pretext={}))] == ["pretrain"]


@pytest.mark.parametrize("pseudo, length", [(2, 8), (6, 12)])
def test_labelled_samples_are_repeated_to_the_number_of_pseudo_labelled_ones(pseudo, length):
    class Labelled(list):
        classes = ["a", "b"]

    labelled = Labelled(("labelled", number) for number in range(6 if pseudo == 2 else 4))
    pile = [(f"image{number}", None) for number in range(10)]
    union = WithPseudoLabels(labelled, pile, {number + 1: 1 for number in range(pseudo)})
    samples = [union[index] for index in range(len(union))]
    assert len(union) == length and samples[:pseudo] == [(f"image{n + 1}", 1) for n in range(pseudo)]
    counts = [samples.count(sample) for sample in labelled]
    assert min(counts) >= 1 and sum(counts) == length - pseudo


def test_pseudo_targets_are_the_confident_part_of_predictions():
    backbone = build_backbone(name="test_resnet")
    task = Classification(backbone, ["a", "b", "c"])
    logits = torch.tensor([0.7, 0.2, 0.1]).log()
    assert task.pseudo_target(logits, 0.6) == 0 and task.pseudo_target(logits, 0.8) is None
    several = MultilabelClassification(backbone, ["a", "b", "c"])
    logits = torch.tensor([0.9, 0.5, 0.1]).logit()
    assert several.pseudo_target(logits, 0.8).tolist() == [1.0, -1.0, 0.0]
    assert several.pseudo_target(logits, 0.95) is None


def test_a_teacher_without_confident_predictions_is_an_error_that_names_the_threshold(config):
    context = open_context(config(train__stages="[teacher, finetune]", finetune__pseudo_threshold=0.999), "test")
    teacher = Teacher().build(context, Weights())
    with pytest.raises(DatasetError, match=r"pseudo_threshold"):
        with_pseudo_labels(context, teacher.result().teacher)


def test_the_pseudo_labelled_context_holds_the_predictions_of_the_teacher_in_image_pixels(config):
    context = open_context(config(train__stages="[teacher, finetune]", finetune__pseudo_threshold=0.0), "test")
    teacher = Teacher().build(context, Weights())
    before = copy.deepcopy(teacher.level.backbone.state_dict())
    labelled = with_pseudo_labels(context, teacher.result().teacher).data["train"]
    assert same(before, teacher.level.backbone.state_dict())
    image, target = labelled[0]
    assert image.size == context.data["pretext"][0][0].size and len(target["boxes"])
    assert target["boxes"].min() >= 0 and target["boxes"].max() <= max(image.size)
    assert set(target["labels"].tolist()) <= set(range(len(context.classes)))


@pytest.mark.slow
def test_self_training_gives_the_same_results_when_it_is_resumed_after_the_teacher(config, tmp_path):
    cfg = config(train__stages="[teacher, finetune]", finetune__pseudo_threshold=0.0, finetune__steps=3)
    folder = tmp_path / "run"
    results = run(cfg, "test")["results"]
    assert (folder / "checkpoints" / "teacher").is_dir() and results["init"]["AP"] >= 0
    shutil.rmtree(folder / "checkpoints" / "finetune")
    for file in folder.glob("*results*"):
        file.unlink()
    assert run(cfg, "test", resume=True)["results"] == results and (folder / "checkpoints" / "finetune").is_dir()
