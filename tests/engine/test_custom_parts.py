"""Stages and hooks of a user: one file, named in the config, goes through the whole pipeline."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from run_outcomes import assert_same, outcome

from bissl_zoo.engine.build import Context
from bissl_zoo.engine.checks import open_config, open_context
from bissl_zoo.engine.hooks import custom_hooks, default_hooks
from bissl_zoo.engine.runner import run
from bissl_zoo.engine.stages import Bissl, Finetune
from bissl_zoo.errors import ConfigError
from bissl_zoo.runs.checkpoint import Checkpointer

PARTS = Path(__file__).resolve().parents[2] / "examples" / "my_stage" / "second_pretraining.py"


@pytest.fixture
def open_custom(tiny, at_scenes, tmp_path):
    """Return the tiny config with the custom parts: `open_custom("train.stages=[finetune]", name="run")`."""

    def build(*overrides, name="run", **changed):
        settings = tiny(train__output_dir=tmp_path / name, train__publish__zoo=tmp_path / f"{name}-zoo", **changed)
        imports = f"train.imports=[{PARTS}]"
        return open_config("quickstart/digit_scenes_det.py", [*settings, imports, *overrides])

    return build


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_custom_stage_takes_part_in_the_pipeline_and_resumes_bit_equal(open_custom, tmp_path):
    stages = "train.stages=[pretrain,second_pretraining,bissl,finetune]"
    cfg = open_custom(stages, train__deterministic=True)
    results = run(cfg, "test")["results"]
    assert list(results) == ["pretrained", "bissl"]
    folder = tmp_path / "run"
    whole = outcome(folder, tmp_path / "run-zoo")
    assert f"second_pretraining/step_{2:06d}" in whole["states"]

    shutil.rmtree(folder / "checkpoints" / "second_pretraining" / "step_000002")
    for later in ("head_warmup", "bissl", "finetune_pretrained", "finetune"):
        shutil.rmtree(folder / "checkpoints" / later)
    (folder / "results.json").unlink()
    run(cfg, "test", resume=True)
    assert_same(outcome(folder, tmp_path / "run-zoo"), whole)


@pytest.mark.slow
def test_a_custom_hook_runs_around_every_step_and_its_metrics_are_written(open_custom, tmp_path):
    hooks = "train.hooks=[{_target_: second_pretraining.LogLearningRate, period: 2}]"
    run(open_custom("train.stages=[pretrain,finetune]", hooks, train__publish__name="null"), "test")
    started = [(line["stage"], line["step"], line["started"]) for line in lines(tmp_path / "run") if "started" in line]
    assert started == [("pretrain", 1, 1), ("pretrain", 2, 2), ("finetune", 1, 1), ("finetune", 2, 2)]


@pytest.mark.parametrize("call", ["{_target_: collections.Counter}", "{factor: 2}", "3"])
def test_an_entry_of_train_hooks_that_makes_no_hook_is_refused(open_custom, call):
    cfg = open_custom(f"train.hooks=[{call}]")
    with pytest.raises(ConfigError, match="train.hooks|_target_"):
        custom_hooks(Context(cfg, {}, torch.device("cpu")))


def test_the_default_hooks_of_a_stage_are_one_ordered_list(open_custom, tmp_path):
    hooks = "train.hooks=[{_target_: second_pretraining.LogLearningRate, period: 2}]"
    context = open_context(open_custom(hooks, "finetune.eval_period=1", train__probe__period=1), "test")
    context.folder, context.checkpointer = tmp_path, Checkpointer(tmp_path)
    names = [type(hook).__name__ for hook in default_hooks(Bissl(), context)]
    first, last = (
        ["Progress"],
        ["Health", "UndecodableImages", "LogLearningRate", "MetricsWriter", "PeriodicCheckpoint"],
    )
    assert names == [*first, "SolverWatch", "Probe", *last]
    names = [type(hook).__name__ for hook in default_hooks(Finetune(), context)]
    assert names == [*first, "PeriodicEvaluation", *last]
