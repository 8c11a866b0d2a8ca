"""Runs with the Detectron2 task, from our data to our zoo."""

import pytest
from detectron2_tasks import needs_detectron2
from run_outcomes import assert_same, outcome
from safetensors.torch import load_file

from bissl_zoo.bilevel.level import Level
from bissl_zoo.config import LazyConfig, load_config
from bissl_zoo.engine.runner import run
from bissl_zoo.runs.checkpoint import load_checkpoint
from bissl_zoo.zoo import get_config, get_entry

pytestmark = [pytest.mark.slow, needs_detectron2]


@pytest.fixture
def config(tiny_config, at_scenes, tmp_path):
    """The tiny config with its task exchanged: `config("run", finetune__steps=3)`."""

    def build(name, *overrides, **changed):
        folders = dict(train__output_dir=tmp_path / name, train__publish__zoo=tmp_path / f"{name}-zoo")
        cfg = tiny_config(**folders, **changed)
        task = load_config("bissl/voc_det_detectron2.py").task
        task.update(min_size=64, max_size=64, anchor_sizes=[16, 24, 32], box_head=16)
        cfg.task = task
        return LazyConfig.apply_overrides(cfg, ["+task.roi_batch=16", "+task.rpn_proposals=[50, 20]", *overrides])

    return build


def test_the_walk_goes_from_pretraining_to_the_zoo(config, tmp_path):
    cfg = config("run", finetune__eval_period=1)
    result = run(cfg, "test")
    assert set(result["results"]) == {"pretrained", "bissl"}
    for figures in result["results"].values():
        assert {"AP50", "voc07_AP50", "detectron2_AP"} <= set(figures)
    entry = get_entry(result["entry"].name, zoo=cfg.train.publish.zoo)
    assert entry["task"] == "detectron2_faster_rcnn"
    assert {"AP50 (bissl)", "detectron2_AP50 (bissl)"} <= set(entry["metrics"])
    assert get_config(result["entry"].name, zoo=cfg.train.publish.zoo).task == cfg.task
    head = load_file(next((tmp_path / "run-zoo").rglob("task_head.safetensors")))
    assert {".".join(key.split(".")[:2]) for key in head} == {"model.proposal_generator", "model.roi_heads"}
    state = load_checkpoint(tmp_path / "run" / "checkpoints" / "bissl" / "step_000002")[1]
    assert set(state["levels"]["upper"]["head"]) == set(head)


def test_a_run_that_stops_in_the_middle_goes_on_to_the_same_bits(config, tmp_path, monkeypatch):
    changed = dict(bilevel__alternations=3, finetune__steps=3, finetune__baseline=False)
    run(config("whole", **changed), "test")
    optimize, steps = Level.optimize, {"upper": 0, "finetune": 0}
    for name, last in (("upper", 2), ("finetune", 2)):

        def failing(level, name=name, last=last):
            if level.name == name:
                steps[name] += 1
                if steps[name] == last:
                    raise KeyboardInterrupt
            return optimize(level)

        monkeypatch.setattr(Level, "optimize", failing)
        with pytest.raises(KeyboardInterrupt):
            run(config("stopped", **changed), "test", resume=name == "finetune")
    monkeypatch.setattr(Level, "optimize", optimize)
    run(config("stopped", **changed), "test", resume=True)
    assert_same(*(outcome(tmp_path / name, tmp_path / f"{name}-zoo") for name in ("stopped", "whole")))


def test_a_pyramid_takes_all_maps_of_the_shared_trunk(config, tmp_path):
    overrides = [
        "train.stages=[bissl, finetune]",
        "+backbone.out_features=[c2, c3, c4, c5]",
        "bilevel.shared_stage=c5",
        "task.config=FPN",
        "+task.fpn_channels=16",
        "task.anchor_sizes=[8, 16, 24, 32, 48]",
        "bilevel.alternations=1",
    ]
    outcome = run(config("pyramid", *overrides, train__publish__name="null"), "test")
    assert outcome["results"]["bissl"]["AP50"] >= 0
    state = load_checkpoint(tmp_path / "pyramid" / "checkpoints" / "finetune" / "step_000002")[1]
    head = state["levels"]["level"]["head"]
    assert "model.backbone.fpn_lateral2.weight" in head and not any("bottom_up" in key for key in head)
