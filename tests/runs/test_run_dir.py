"""The run directory, the checks before a run, and what can be started from."""

import json

import pytest
import timm
import torch

from bissl_zoo.backbones import merge_split_states
from bissl_zoo.config import LazyConfig, load_config
from bissl_zoo.engine.build import Weights
from bissl_zoo.engine.checks import check_config, open_config
from bissl_zoo.engine.init import load_init, resplit
from bissl_zoo.errors import CheckpointError, ConfigError
from bissl_zoo.registry import build_backbone
from bissl_zoo.runs.checkpoint import load_checkpoint, read_info
from bissl_zoo.runs.directory import prepare_run_dir
from bissl_zoo.zoo.names import pin


def voc_det(*overrides):
    return LazyConfig.apply_overrides(load_config("bissl/voc_det.py"), overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        ["bilevel.adaptation={every: 100, alpha: 0.1}"],
        ["bilevel.lambda=1", "bilevel.gamma=0"],
        ["clip_grad.lower=null", "clip_grad.finetune=5.0"],
        ["finetune.epochs=0.5"],
        ["finetune.epochs=null", "finetune.steps=3"],
        ["+my_section={a: 1}"],
        ["train.amp=bf16", "bilevel.hvp_mode=rebuild"],
        ["train.amp=null"],
    ],
)
def test_what_is_meant_to_be_free_is_accepted(overrides):
    check_config(voc_det(*overrides), "test")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("+bilevel.lamda=1", "no key 'bilevel.lamda'. Did you mean 'lambda'"),
        ("+bilevel.head_warmup.step=1", "no key 'bilevel.head_warmup.step'. Did you mean 'head_warmup.steps'"),
        ("~train.checkpoint.keep", "'train.checkpoint.keep' is missing"),
        ("~optimizer", "section 'optimizer' is missing"),
        ("train.seed=1.5", "train.seed is 1.5; it must be a whole number"),
        ("train.seed=true", "train.seed is True; it must be a whole number"),
        ("finetune.baseline=1", "finetune.baseline is 1; it must be true or false"),
        ("train.checkpoint={period: 2}", "'train.checkpoint.keep' is missing"),
        ("train.stages=bissl", "'train.stages' is a list"),
        ("bilevel.curvature_batch_size=1", "must be 2 or more"),
        ("train.amp=fp16", "train.amp is 'fp16'; accepted are null and bf16. Did you mean 'bf16'?"),
        ("train.amp=true", "train.amp is 'True'; accepted are null and bf16."),
        ("bilevel.hvp_mode=rebuilt", "bilevel.hvp_mode is 'rebuilt'; accepted are graph and rebuild. Did you mean"),
        ("bilevel.hvp_mode=null", "bilevel.hvp_mode is None; it must be text, such as 'graph'"),
        ("bilevel.head_warmup.backbone_mode=evl", "accepted are eval and train. Did you mean 'eval'?"),
    ],
)
def test_what_cannot_be_names_the_key(override, message):
    with pytest.raises(ConfigError) as error:
        check_config(voc_det(override), "mine.py")
    assert message in str(error.value)


def test_a_new_directory_holds_the_config_and_the_environment(tmp_path):
    cfg = voc_det(f"train.output_dir={tmp_path / 'runs' / 'a'}")
    folder = prepare_run_dir(cfg, resume=False)
    assert LazyConfig.load(folder / "config.yaml") == cfg
    assert f"torch: {torch.__version__}" in (folder / "environment.txt").read_text()
    assert sorted(path.name for path in folder.iterdir()) == ["config.yaml", "environment.txt"]


def test_a_resumed_run_may_change_where_and_how_it_runs_only(tmp_path):
    out = f"train.output_dir={tmp_path / 'a'}"
    prepare_run_dir(voc_det(out), resume=False)
    free = ["train.device=cpu", "train.log_period=3", "train.checkpoint.keep=5", "dataloader.train.num_workers=0"]
    prepare_run_dir(voc_det(out, *free, "train.publish.name=x"), resume=True)
    prepare_run_dir(voc_det(out, *free, "bilevel.hvp_mode=rebuild"), resume=True)
    for bound in ("train.seed=1", "train.init=x", "task.min_size=3", "optimizer.upper.lr=0.1", "train.amp=bf16"):
        with pytest.raises(ConfigError, match=f"\n{bound.split('=')[0]} +.* +{bound.split('=')[1]}\n"):
            prepare_run_dir(voc_det(out, *free, bound), resume=True)


#: keys that came one by one after there were runs
LATER = (
    "train.amp train.deterministic train.on_nonfinite train.max_skipped train.probe train.checkpoint.every "
    "train.checkpoint.best pretrain.ema pretrain.accumulate pretrain.channels_last pretrain.compile "
    "bilevel.on_bad_hypergradient"
).split()


def test_a_run_that_began_before_there_were_some_keys_goes_on_with_their_defaults(tmp_path):
    out = f"train.output_dir={tmp_path / 'a'}"
    cfg = voc_det(out)
    prepare_run_dir(cfg, resume=False)
    saved = tmp_path / "a" / "config.yaml"
    LazyConfig.save(LazyConfig.apply_overrides(cfg, [f"~{key}" for key in LATER]), saved)
    assert open_config(str(saved)) == cfg
    with pytest.raises(ConfigError, match="train.amp +null +bf16"):
        prepare_run_dir(open_config(str(saved), ["train.amp=bf16"]), resume=True)
    prepare_run_dir(open_config(str(saved), ["train.probe.period=5", "train.on_nonfinite=skip"]), resume=True)


def test_the_weights_of_a_run_are_those_its_last_stage_left(finished, tiny_config):
    weights, ancestors = load_init(str(finished), tiny_config())
    path = finished / "checkpoints" / "bissl" / "step_000002"
    levels = load_checkpoint(path)[1]["levels"]
    lower = levels["lower"]["backbone"]
    assert all(torch.equal(weights.backbone[key], value) for key, value in lower.items())
    digest = read_info(path).sha256
    assert [ancestor["sha256"] for ancestor in ancestors] == [digest]
    tuned, _ = load_init(str(finished), tiny_config(), evaluate=True)
    levels = load_checkpoint(finished / "checkpoints" / "finetune" / "step_000002")[1]["levels"]
    assert all(torch.equal(tuned.backbone[key], value) for key, value in levels["level"]["backbone"].items())
    assert tuned.task.keys() == levels["level"]["head"].keys() and tuned.pretext is None


def test_an_unfinished_stage_is_not_started_from(run_copy, tiny_config):
    checkpoints = run_copy / "checkpoints" / "bissl"
    for file in (checkpoints / "step_000002").iterdir():
        file.unlink()
    with pytest.raises(CheckpointError, match="unfinished stage .step 1 of 2.; --resume it first"):
        load_init(str(run_copy), tiny_config())


def test_a_zoo_entry_is_started_from_and_becomes_the_parent(finished, tiny_config, monkeypatch):
    entry = json.loads((finished / "zoo_entry.json").read_text())
    monkeypatch.setenv("BISSL_ZOO", entry["location"].rpartition("/")[0])
    weights, ancestors = load_init(f"zoo:{pin(entry['name'])}", tiny_config())
    assert ancestors == [{"name": pin(entry["name"]), "sha256": entry["sha256"]}]
    plain = timm.create_model(f"local-dir:{entry['location']}", pretrained=True).state_dict()
    whole = merge_split_states(weights.backbone, weights.tail)
    assert whole.keys() == plain.keys() and all(torch.equal(value, plain[key]) for key, value in whole.items())
    levels = load_checkpoint(finished / "checkpoints" / "bissl" / "step_000002")[1]["levels"]
    head = levels["lower"]["head"]
    assert weights.pretext.keys() == head.keys() and all(torch.equal(v, head[k]) for k, v in weights.pretext.items())
    other, _ = load_init(f"zoo:{pin(entry['name'])}", tiny_config(pretext__name="byol"))
    assert other.pretext is None  # a head of another method is not taken


def test_weights_cut_at_one_stage_are_cut_again_at_another():
    whole = build_backbone(name="test_resnet")
    cuts = {stage: whole.split(stage) for stage in ("c3", "c5")}
    parts = {stage: (trunk.state_dict(), tail.state_dict()) for stage, (trunk, tail) in cuts.items()}

    def weights(stage):
        trunk, tail = parts[stage]
        head = {"projector.weight": torch.ones(2), **{f"tail.{key}": value for key, value in tail.items()}}
        teacher = {f"teacher.backbone.{k}": v + 1 for k, v in trunk.items()}
        return Weights(trunk, pretext=head | teacher | {f"teacher.tail.{k}": v + 1 for k, v in tail.items()})

    for before, after in (("c5", "c3"), ("c3", "c5"), ("c3", "c3")):
        cut, expected = resplit(weights(before), *cuts[after]), weights(after)
        assert cut.backbone.keys() == expected.backbone.keys() and cut.pretext.keys() == expected.pretext.keys()
        assert all(torch.equal(value, expected.pretext[key]) for key, value in cut.pretext.items())
    alone = resplit(Weights(parts["c5"][0]), *cuts["c3"])
    assert alone.backbone.keys() == parts["c3"][0].keys() and alone.tail.keys() == parts["c3"][1].keys()
