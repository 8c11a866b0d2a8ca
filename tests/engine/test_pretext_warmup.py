"""A backbone without a head of the config's pretext method: a new head is warmed up on it before the BiSSL stage."""

import shutil

import pytest
import timm
import torch
from safetensors.torch import save_file

from bissl_zoo.config import LazyConfig
from bissl_zoo.engine.checks import open_context
from bissl_zoo.engine.init import load_init
from bissl_zoo.engine.runner import run
from bissl_zoo.engine.stages import Bissl, PretextWarmup, plan_stages
from bissl_zoo.pretext import PretextMethod
from bissl_zoo.registry import PRETEXT_METHODS
from bissl_zoo.runs.checkpoint import load_checkpoint

pytestmark = pytest.mark.slow

# two views of an image that no chance enters: the whole of it, once sharp and once blurred
FIXED_VIEWS = dict(
    crop_scale=[1.0, 1.0],
    aspect_ratio=[1.0, 1.0],
    jitter_probability=0.0,
    grayscale_probability=0.0,
    flip_probability=0.0,
    blur_probability=[0.0, 1.0],
    blur_sigma=[1.0, 1.0],
    solarize_probability=[0.0, 0.0],
)
BYOL = [
    "pretext.name=byol",
    "~pretext.temperature",
    "pretext.projector=[32, 64]",
    "+pretext.predictor=[32, 64]",
    "+pretext.decay=0.75",
]


@pytest.fixture
def weights_file(tmp_path):
    """A backbone's file as others publish it; batch norm has seen images."""
    torch.manual_seed(5)
    model = timm.create_model("test_resnet", num_classes=0)
    model(torch.randn(8, 3, 64, 64))
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    return tmp_path / "weights.safetensors"


@pytest.fixture
def config(tiny_config, at_scenes, weights_file, tmp_path):
    """`config(method, **changed)`: the BiSSL stage from the file, on all unlabelled images at every step."""

    def build(method="simclr", **changed):
        settings = dict(
            train__output_dir=tmp_path / "run",
            train__stages="[bissl]",
            train__init=weights_file,
            train__publish__name="null",
            bilevel__pretext_warmup__steps=4,
            dataloader__pretext__batch_size=24,
        )
        cfg = tiny_config(**settings | changed)
        cfg.pretext.augmentation.update(FIXED_VIEWS)
        return LazyConfig.apply_overrides(cfg, BYOL) if method == "byol" else cfg

    return build


def opened(cfg):
    return open_context(cfg, "test"), load_init(cfg.train.init, cfg)[0]


def copied(module):
    return {key: value.clone() for key, value in module.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())


def part(state, *prefixes):
    return {key: value for key, value in state.items() if key.startswith(prefixes)}


def warmed_up(folder, step=4):
    state = load_checkpoint(folder / "checkpoints" / "pretext_warmup" / f"step_{step:06d}")[1]
    return state["levels"]["level"]


@pytest.mark.parametrize("method", ["simclr", "byol"])
def test_the_loss_of_the_new_head_falls_and_the_backbone_stays_as_it_was(config, method):
    context, weights = opened(config(method, bilevel__pretext_warmup__steps=40))
    trainer = PretextWarmup().build(context, weights)
    level = trainer.level
    views = next(level.data_iterator)

    def loss():
        with torch.no_grad():
            return sum(level.head.losses(level.backbone, views).values()).item()

    first, head = loss(), copied(level.head)
    trainer.train()
    assert loss() < first - 0.1
    after = level.head.state_dict()
    learnt = part(after, "projector", "predictor")
    assert learnt and all(not torch.equal(value, head[key]) for key, value in learnt.items() if "weight" in key)
    assert same(level.backbone.state_dict(), weights.backbone)  # batch-norm statistics included
    assert weights.tail and same(part(after, "tail."), {f"tail.{key}": v for key, v in weights.tail.items()})
    assert any(key.endswith("running_mean") for key in weights.tail)


def test_the_bissl_stage_starts_from_the_warm_head_and_trains_all_of_it(config):
    context, weights = opened(config("byol"))
    warmup = PretextWarmup().build(context, weights)
    warmup.train()
    problem = Bissl().build(context, warmup.result()).problem
    assert same(problem.lower.head.state_dict(), warmup.level.head.state_dict())
    for level in (problem.lower, problem.upper):
        assert same(level.backbone.state_dict(), weights.backbone)
        assert all(p.requires_grad for p in level.backbone.parameters()) and level.backbone.training
    head = problem.lower.head
    assert head.tail.training and all(p.requires_grad for p in head.tail.parameters())
    assert not same(head.teacher["projector"].state_dict(), head.projector.state_dict())
    context.cfg.bilevel.reset_teacher = True
    head = Bissl().build(context, warmup.result()).problem.lower.head
    assert same(head.teacher["projector"].state_dict(), head.projector.state_dict())


def test_a_warm_up_of_0_steps_is_left_out_with_a_warning(config, capsys):
    context, weights = opened(config(bilevel__pretext_warmup__steps=0))
    stages = plan_stages(context, weights)
    assert [stage.name for stage in stages] == ["head_warmup", "bissl"]
    stages[-1].announce(context, weights, stages)
    assert "warning: train.init brings no pretext head of simclr" in (out := capsys.readouterr().out)
    assert "starts with a random one" in out


def test_a_run_of_another_method_provides_its_backbone_and_its_tail(config, finished):
    same_method = load_init(str(finished), config())[0]
    other = load_init(str(finished), config("byol"))[0]
    assert other.pretext is None and same(other.backbone, same_method.backbone) and same(other.tail, same_method.tail)


def test_a_warm_up_that_is_resumed_ends_as_one_that_was_not_interrupted(config, tmp_path, capsys):
    cfg = config("byol", train__checkpoint__keep=9, dataloader__pretext__batch_size=8)
    run(cfg, "test")
    line = "train.init brings no pretext head of byol: a new one is trained for 4 steps on the frozen backbone"
    assert line in capsys.readouterr().out
    whole = shutil.copytree(tmp_path / "run", tmp_path / "whole")
    checkpoints = tmp_path / "run" / "checkpoints"
    for later in ("pretext_warmup/step_000003", "pretext_warmup/step_000004", "head_warmup", "bissl"):
        shutil.rmtree(checkpoints / later)
    run(cfg, "test", resume=True)
    newest = checkpoints / "pretext_warmup" / "step_000002"
    assert f"resuming: pretext_warmup at step 2 of 4, from {newest}" in capsys.readouterr().out
    one, other = warmed_up(whole), warmed_up(tmp_path / "run")
    assert same(one["head"], other["head"]) and same(one["backbone"], other["backbone"])
    shutil.rmtree(checkpoints / "bissl")
    run(cfg, "test", resume=True)
    out = capsys.readouterr().out
    assert "stage 1 of 3: pretext_warmup" in out and "done: pretext_warmup at step 4 of 4" in out
    before, after = (load_checkpoint(f / "checkpoints/bissl/step_000002")[1] for f in (whole, tmp_path / "run"))
    assert same(before["levels"]["lower"]["head"], after["levels"]["lower"]["head"])


class Mine(PretextMethod):
    """The README's example, which has no parameters if all of the backbone is shared."""

    def losses(self, backbone, views):
        first, second = (self.embed(backbone, view) for view in views)
        return {"distance": (first - second).square().mean()}


@pytest.mark.parametrize("stage", ["null", "c4"])
def test_a_method_without_parameters_runs_whether_all_of_the_backbone_is_shared_or_a_part(
    config, tmp_path, stage, monkeypatch
):
    monkeypatch.setitem(PRETEXT_METHODS._obj_map, "mine_without_parameters", Mine)
    monkeypatch.setitem(PRETEXT_METHODS._arguments, "mine_without_parameters", {})
    changes = ["pretext.name=mine_without_parameters", "~pretext.temperature", "~pretext.projector"]
    cfg = config(bilevel__curvature="hessian", bilevel__shared_stage=stage)
    run(LazyConfig.apply_overrides(cfg, changes, "test"), "test")
    stages = {path.parent.name for path in (tmp_path / "run" / "checkpoints").glob("*/step_*")}
    assert {"pretext_warmup", "bissl"} <= stages
