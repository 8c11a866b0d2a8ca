"""The weights that a run starts from."""

import json

import timm
import torch
from safetensors.torch import save_file

from bissl_zoo.backbones import merge_split_states
from bissl_zoo.engine.build import Weights, build_pretext
from bissl_zoo.engine.init import adopt_pixels, load_init, pretext_pixels, resplit
from bissl_zoo.registry import build_backbone
from bissl_zoo.runs.checkpoint import load_checkpoint, read_info
from bissl_zoo.weights.files import StoredBackbone, save_backbone
from bissl_zoo.zoo.index import pin


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


def test_a_zoo_entry_is_started_from_and_becomes_the_parent(finished, tiny_config, monkeypatch):
    entry = json.loads((finished / "zoo_entry.json").read_text())
    monkeypatch.setenv("BISSL_ZOO", entry["location"].rpartition("/")[0])
    weights, ancestors = load_init(f"zoo:{pin(entry['name'])}", tiny_config())
    assert ancestors == [{"name": pin(entry["name"]), "sha256": entry["sha256"], "licence": "Apache-2.0"}]
    plain = timm.create_model(f"local-dir:{entry['location']}", pretrained=True).state_dict()
    whole = merge_split_states(weights.backbone, weights.tail)
    assert whole.keys() == plain.keys() and all(torch.equal(value, plain[key]) for key, value in whole.items())
    levels = load_checkpoint(finished / "checkpoints" / "bissl" / "step_000002")[1]["levels"]
    head = levels["lower"]["head"]
    assert weights.pretext.keys() == head.keys() and all(torch.equal(v, head[k]) for k, v in weights.pretext.items())
    other, _ = load_init(f"zoo:{pin(entry['name'])}", tiny_config(pretext__name="byol"))
    assert other.pretext is None  # a head of another method is not taken


def test_a_file_of_timm_weights_is_split_as_the_run_is(tiny_config, tmp_path):
    state = timm.create_model("test_resnet", num_classes=0).state_dict()
    save_file(state, tmp_path / "weights.safetensors")
    weights, parents = load_init(str(tmp_path / "weights.safetensors"), tiny_config())
    whole = merge_split_states(weights.backbone, weights.tail)
    assert whole.keys() == state.keys() and all(torch.equal(value, state[key]) for key, value in whole.items())
    assert weights.pretext is None and [parent["name"] for parent in parents] == ["weights.safetensors"]


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


def test_pixel_statistics_of_the_weights_reach_the_views_and_the_task(tiny_config, tmp_path, caplog):
    state = timm.create_model("test_resnet", num_classes=0).state_dict()
    pixels = {"mean": [0.5] * 3, "std": [0.25] * 3}
    save_backbone(StoredBackbone(state, "test_resnet", pixels=pixels), tmp_path / "own.safetensors")
    cfg = tiny_config(train__init=tmp_path / "own.safetensors")
    weights, lineage = load_init(cfg.train.init, cfg)
    assert lineage[0]["licence"] == "unknown"
    with caplog.at_level("INFO"):
        adopt_pixels(cfg, weights.pixels)
    assert cfg.task.mean == cfg.pretext.augmentation.mean == [0.5] * 3 and cfg.task.std == [0.25] * 3
    assert "task.mean = [0.5, 0.5, 0.5]" in caplog.text
    assert pretext_pixels(cfg)["std"] == [0.25] * 3  # what the entry of the run states

    cfg.task.mean = [0.1] * 3
    adopt_pixels(cfg, weights.pixels)
    assert cfg.task.mean == [0.1] * 3 and "task.mean is [0.1, 0.1, 0.1]; the initial weights" in caplog.text


def test_an_official_checkpoint_of_mae_brings_backbone_and_decoder(tiny_config, tmp_path):
    cfg = tiny_config(bilevel__shared_stage="null")
    build = "bissl_zoo.registry.build_"
    cfg.backbone = {"_target_": f"{build}backbone", "name": "test_vit"}
    sizes = {"decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2}
    cfg.pretext = {"_target_": f"{build}pretext", "name": "mae", **sizes}
    trunk, method = build_pretext(cfg, Weights(), torch.device("cpu"))
    decoder = {key: torch.randn_like(value) for key, value in method.state_dict().items()}
    official = {**trunk.state_dict(), **decoder, "decoder_pos_embed": torch.zeros(1, 101, 16)}
    torch.save({"model": official}, tmp_path / "mae_pretrain_full.pth")
    weights, _ = load_init(str(tmp_path / "mae_pretrain_full.pth"), cfg)
    _, loaded = build_pretext(cfg, weights, torch.device("cpu"))
    assert decoder and all(torch.equal(value, loaded.state_dict()[key]) for key, value in decoder.items())
    assert all(torch.equal(value, weights.backbone[key]) for key, value in trunk.state_dict().items())
