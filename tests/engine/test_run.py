"""Whole runs in this process: other methods and tasks, where a run starts from, what it announces."""

import json
import shutil

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from bissl_zoo.config import LazyConfig
from bissl_zoo.engine.build import Context, Weights
from bissl_zoo.engine.runner import run
from bissl_zoo.engine.stages import plan_stages
from bissl_zoo.runs.checkpoint import load_checkpoint

pytestmark = pytest.mark.slow


@pytest.fixture
def folder_of_images(tmp_path, monkeypatch):
    """Write class folders of two easy classes, red and blue noise."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("test", 6)):
        for channel, name in ((0, "red"), (2, "blue")):
            (tmp_path / "sets" / "colours" / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 80, (40, 40, 3), dtype=np.uint8)
                pixels[..., channel] += 150
                Image.fromarray(pixels).save(tmp_path / "sets" / "colours" / split / name / f"{number}.png")
    monkeypatch.setenv("BISSL_ZOO_DATASETS", str(tmp_path / "sets"))


def byol_classification(cfg):
    """The tiny config with BYOL for its pretext method and classification of the colours for its task."""
    return LazyConfig.apply_overrides(
        cfg,
        [
            "pretext.name=byol",
            "~pretext.temperature",
            "+pretext.predictor=[32, 256]",
            "pretext.projector=[32, 256]",
            "+pretext.decay=0.9",
            "task={_target_: bissl_zoo.registry.build_task, name: classification, image_size: 32}",
            "dataloader.pretext.dataset={_target_: bissl_zoo.registry.build_dataset, name: image_folder,"
            " root: colours, split: train, labelled: false}",
            *(
                f"dataloader.{role}.dataset={{_target_: bissl_zoo.registry.build_dataset, name: image_folder,"
                f" root: colours, split: {role}}}"
                for role in ("train", "test")
            ),
            "finetune.steps=20",
            "finetune.eval_period=10",
        ],
    )


#: pretext methods with other views, on a small ViT
ON_A_VIT = {
    "dino": "projector: [16, 8, 32], augmentation: {_target_: bissl_zoo.data.views.multi_crop,"
    " size: 32, local_size: 16, local_crops: 2}",
    "mae": "decoder_dim: 16, decoder_depth: 1, decoder_heads: 2, augmentation:"
    " {_target_: bissl_zoo.data.views.masked_view, size: 32, mask_patch: 16, mask_ratio: 0.75}",
    "simmim": "augmentation: {_target_: bissl_zoo.data.views.masked_view, size: 32, mask_patch: 16}",
}


@pytest.mark.parametrize("method", ON_A_VIT)
def test_a_resumed_run_of_crops_or_masks_on_a_vit_ends_as_one_that_was_not_interrupted(
    tiny_config, folder_of_images, tmp_path, capsys, method
):
    settings = dict(train__output_dir=tmp_path / "run", train__stages="[pretrain,bissl]", train__checkpoint__keep=9)
    cfg = LazyConfig.apply_overrides(
        byol_classification(tiny_config(**settings, bilevel__shared_stage="null")),
        [
            "backbone={_target_: bissl_zoo.registry.build_backbone, name: test_vit, class_token: false,"
            " global_pool: avg, img_size: 32}",
            f"pretext={{_target_: bissl_zoo.registry.build_pretext, name: {method}, {ON_A_VIT[method]}}}",
        ],
    )
    entry = run(cfg, "test")["entry"]
    whole = final_states(tmp_path / "run")
    assert all(value.isfinite().all() for state in whole for value in state.values())
    start = load_checkpoint(tmp_path / "run" / "checkpoints" / "pretrain" / "step_000002")[1]["levels"]["level"]
    assert not any(torch.equal(whole[0][key], value) for key, value in start["backbone"].items() if "weight" in key)
    moved = {"dino": "center", "mae": "mask_token", "simmim": "mask_token"}[method]
    assert not torch.equal(whole[1][moved], start["head"][moved])
    for later in ("pretrain/step_000002", "head_warmup", "bissl"):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / later)
    capsys.readouterr()
    assert run(cfg, "test", resume=True)["entry"].name == entry.name
    assert "resuming: pretrain at step 1 of 2" in capsys.readouterr().out
    for before, after in zip(whole, final_states(tmp_path / "run"), strict=True):
        assert before.keys() == after.keys() and all(torch.equal(value, after[key]) for key, value in before.items())


def test_a_run_with_mae_lora_and_mfac_resumes_and_publishes_merged_weights(tiny_config, folder_of_images, tmp_path):
    settings = dict(train__output_dir=tmp_path / "run", train__checkpoint__keep=9, train__checkpoint__period=1)
    cfg = LazyConfig.apply_overrides(
        byol_classification(tiny_config(**settings, bilevel__shared_stage="null")),
        [
            "backbone={_target_: bissl_zoo.registry.build_backbone, name: test_vit, img_size: 32}",
            f"pretext={{_target_: bissl_zoo.registry.build_pretext, name: mae, {ON_A_VIT['mae']}}}",
            "solver={_target_: bissl_zoo.registry.build_solver, name: mfac, gradients: 3}",
            "bilevel.lora={r: 2, alpha: 4, targets: [q, v]}",
            "bilevel.lower_head_lr=0.001",
        ],
    )
    entry = run(cfg, "test")["entry"]
    start = load_checkpoint(tmp_path / "run" / "checkpoints" / "pretrain" / "step_000002")[1]["levels"]["level"]
    plain = timm.create_model(f"local-dir:{entry.location}", pretrained=True).state_dict()
    changed = {key for key, value in start["backbone"].items() if not torch.equal(plain[key], value)}
    assert changed == {f"blocks.{n}.attn.qkv.weight" for n in range(6)} and plain.keys() == start["backbone"].keys()
    assert all(torch.equal(plain[key][64:128], start["backbone"][key][64:128]) for key in changed)  # no keys
    whole = final_states(tmp_path / "run")
    low = "blocks.0.attn.qkv.lora_"
    expected = start["backbone"]["blocks.0.attn.qkv.weight"].clone()
    for part, rows in (("q", slice(64)), ("v", slice(128, 192))):
        expected[rows] += 2.0 * whole[0][f"{low}b_{part}"] @ whole[0][f"{low}a_{part}"]
    torch.testing.assert_close(plain["blocks.0.attn.qkv.weight"], expected)
    levels = load_checkpoint(tmp_path / "run" / "checkpoints" / "bissl" / "step_000002")[1]["levels"]
    rates = [group["initial_lr"] for group in levels["lower"]["optimizer"]["param_groups"]]
    assert rates == [cfg.optimizer.lower.lr, 0.001]
    for later in ("bissl/step_000002", "finetune_pretrained", "finetune"):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / later, ignore_errors=True)
    (tmp_path / "run" / "results.json").unlink()
    assert run(cfg, "test", resume=True)["entry"].sha256 == entry.sha256
    for before, after in zip(whole, final_states(tmp_path / "run"), strict=True):
        assert before.keys() == after.keys() and all(torch.equal(value, after[key]) for key, value in before.items())


def final_states(folder):
    """Return the states of the lower backbone and its head after the BiSSL stage."""
    lower = load_checkpoint(folder / "checkpoints" / "bissl" / "step_000002")[1]["levels"]["lower"]
    return lower["backbone"], lower["head"]


def test_a_run_whose_levels_shared_another_stage_can_be_started_from(tiny_config, folder_of_images, tmp_path):
    def published(name, **changed):
        cfg = byol_classification(tiny_config(train__output_dir=tmp_path / name, train__stages="[pretrain]", **changed))
        if name == "second":  # a pretraining of no learning rate leaves what it was given
            cfg = LazyConfig.apply_overrides(cfg, ["optimizer.pretrain.lr=0.0"])
        return timm.create_model(f"local-dir:{run(cfg, 'test')['entry'].location}", pretrained=True)

    first = published("first", bilevel__shared_stage="c3")
    second = published("second", bilevel__shared_stage="c4", train__init=tmp_path / "first")
    for one, other in zip(first.named_parameters(), second.named_parameters(), strict=True):
        assert torch.equal(one[1], other[1]), one[0]


def test_the_plan_of_a_run_has_the_warm_ups_and_names_what_each_fine_tuning_starts_from(tiny_config):
    def planned(stages, baseline=True, pretext=None):
        cfg = tiny_config(train__stages=stages, finetune__baseline=baseline)
        context = Context(cfg, {"pretext": range(8), "train": range(8)}, torch.device("cpu"))
        return [(stage.name, stage.start) for stage in plan_stages(context, Weights(pretext=pretext))]

    stages_of_bissl = [
        ("head_warmup", None),
        ("bissl", None),
        ("finetune_pretrained", "pretrained"),
        ("finetune", "bissl"),
    ]
    assert planned("[bissl,finetune]", pretext={}) == stages_of_bissl
    assert planned("[bissl,finetune]") == [("pretext_warmup", None), *stages_of_bissl]
    assert planned("[pretrain,bissl,finetune]", baseline=False) == [
        ("pretrain", None),
        *stages_of_bissl[:2],
        stages_of_bissl[3],
    ]
    assert planned("[pretrain,finetune]") == [("pretrain", None), ("finetune", "pretrained")]
    assert planned("[finetune]") == [("finetune", "init")]


def test_a_resumed_run_starts_from_the_version_that_it_began_with(tiny_config, at_scenes, tmp_path):
    zoo = str(tmp_path / "zoo")

    def config(name, **changed):
        settings = dict(train__stages="[pretrain]", train__publish__zoo=zoo, train__zoo=f"[{zoo}]")
        return tiny_config(train__output_dir=tmp_path / name, **settings | {"train__publish__name": "origin"} | changed)

    run(config("first"), "test")
    later = config("later", train__init="zoo:origin", train__publish__name="later")
    later = LazyConfig.apply_overrides(later, ["optimizer.pretrain.lr=0.0"])
    before = run(later, "test")["entry"].sha256
    run(config("second", train__seed=1), "test")  # origin@2
    shutil.rmtree(tmp_path / "later" / "checkpoints")
    (tmp_path / "later" / "results.json").unlink()
    (tmp_path / "later" / "zoo_entry.json").unlink()
    again = run(later, "test", resume=True)["entry"]
    assert (
        again.sha256 == before
        and json.loads((tmp_path / "later/metadata.json").read_text())["ancestors"][0]["name"] == "origin@1"
    )
