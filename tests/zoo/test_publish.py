import json
import os
import tempfile
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file
from tiny_entries import replace_file

from bissl_zoo.errors import ZooError
from bissl_zoo.files import sha256_of
from bissl_zoo.registry import build_backbone
from bissl_zoo.zoo import EntryMetadata, create_backbone, get_entry, list_backbones, publish_entry
from bissl_zoo.zoo.hub import Zoo
from bissl_zoo.zoo.locks import try_lock

REPOSITORY = Path(__file__).resolve().parents[2]
PIXELS = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.25, 0.3), "input_size": (3, 64, 64)}


def trained_state(architecture="test_resnet", seed=0, **model_args):
    """Return a state dict with random values, also in the batch-norm statistics."""
    torch.manual_seed(seed)
    state = timm.create_model(architecture, num_classes=0, **model_args).state_dict()
    return {key: torch.rand_like(value) if value.is_floating_point() else value + 3 for key, value in state.items()}


STATE = trained_state()


def publish(zoo, name="tiny", **changes):
    arguments = {
        "name": name,
        "backbone_state": STATE,
        "architecture": "test_resnet",
        "pretrained_cfg": PIXELS,
        "metadata": EntryMetadata(pretext="simclr", task="detection", metrics={"AP50": 0.5}, seeds=[0]),
        "train_config_text": "train: {seed: 0}\n",
        "zoo": zoo,
    }
    return publish_entry(**{**arguments, **changes})


ARCHITECTURES = {
    "test_resnet": ({}, (64, 64)),
    "test_convnext": ({}, (64, 64)),
    "test_vit3": ({"img_size": [64, 96], "class_token": False, "global_pool": "avg"}, (64, 96)),
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_plain_timm_and_create_backbone_compute_the_same_bits(tmp_path, architecture):
    model_args, (height, width) = ARCHITECTURES[architecture]
    torch.manual_seed(1)
    trained = build_backbone(name=architecture, **model_args)
    with torch.no_grad():  # changes the batch-norm statistics
        trained.train().model(torch.randn(4, 3, height, width))
    images = torch.randn(2, 3, height, width)

    entry = publish(
        tmp_path,
        backbone_state=trained.state_dict(),
        architecture=architecture,
        model_args=trained.model_args,
        pretrained_cfg={**PIXELS, "input_size": (3, height, width)},
    )
    backbone = create_backbone("tiny", zoo=tmp_path)
    backbone = create_backbone("tiny", zoo=tmp_path, out_features=backbone.stages)
    by_timm = timm.create_model(f"local-dir:{entry.location}", pretrained=True).eval()

    with torch.no_grad():
        maps = by_timm.forward_intermediates(images, intermediates_only=True)
        ours = list(backbone(images).values())
        assert len(maps) == len(ours)
        assert all(torch.equal(a, b) for a, b in zip(maps, ours, strict=True))
        assert torch.equal(by_timm(images), backbone.model(images))
        assert torch.equal(by_timm(images), trained.eval().model(images))


def test_timm_reads_pixel_statistics_and_takes_a_new_classifier(tmp_path):
    entry = publish(tmp_path, pretrained_cfg={**PIXELS, "interpolation": "bilinear", "crop_pct": 1.0})
    model = timm.create_model(f"local-dir:{entry.location}", pretrained=True, num_classes=7)
    data = timm.data.resolve_model_data_config(model)
    assert (tuple(data["mean"]), tuple(data["std"])) == (PIXELS["mean"], PIXELS["std"])
    assert (tuple(data["input_size"]), data["interpolation"], data["crop_pct"]) == ((3, 64, 64), "bilinear", 1.0)
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 7)
    assert torch.equal(model.layer1[0].conv1.weight, STATE["layer1.0.conv1.weight"])
    pyramid = timm.create_model(f"local-dir:{entry.location}", pretrained=True, features_only=True)
    assert torch.equal(pyramid.layer1[0].conv1.weight, STATE["layer1.0.conv1.weight"])


def test_every_file_is_in_the_index_with_the_digest_of_its_bytes(tmp_path):
    head = {"projector.0.weight": torch.rand(4, 4)}
    published = publish(tmp_path, pretext_head_state=head, task_head_state={"box.bias": torch.rand(3)})
    record = json.loads((tmp_path / "index.json").read_text())["entries"]["tiny"]
    on_disk = {p.name: {"sha256": sha256_of(p), "size": p.stat().st_size} for p in Path(published.location).iterdir()}
    assert record["files"] == on_disk
    assert set(on_disk) == {
        *("model.safetensors", "pretext_head.safetensors", "task_head.safetensors"),
        *("config.json", "entry.json", "train_config.yaml", "README.md"),
    }
    assert published.sha256 == on_disk["model.safetensors"]["sha256"]
    assert len({path.stat().st_mode for path in [tmp_path / "index.json", *Path(published.location).iterdir()]}) == 1
    assert get_entry("tiny", zoo=tmp_path)["files"] == {k: v for k, v in on_disk.items() if k != "entry.json"}
    assert torch.equal(
        load_file(Path(published.location) / "pretext_head.safetensors")["projector.0.weight"],
        head["projector.0.weight"],
    )


def test_weights_are_stored_as_contiguous_float32(tmp_path):
    exact = {k: v.half().float() if v.is_floating_point() else v for k, v in STATE.items()}
    half = {k: v.half() if v.is_floating_point() else v for k, v in exact.items()}
    strided = {k: v.to(memory_format=torch.channels_last) if v.ndim == 4 else v for k, v in half.items()}
    flat = torch.cat([v.flatten() for v in exact.values() if v.is_floating_point()])
    views, start = {}, 0
    for key, value in exact.items():
        size = value.numel() if value.is_floating_point() else 0
        views[key] = flat[start : start + size].view_as(value) if size else value
        start += size
    digests = {publish(tmp_path, backbone_state=state).sha256 for state in (exact, strided, views)}
    assert len(digests) == 1
    stored = load_file(tmp_path / "tiny" / "model.safetensors")
    assert all(torch.equal(stored[key], value) for key, value in exact.items())
    assert stored["bn1.num_batches_tracked"].dtype == torch.int64


def test_half_precision_halves_the_size_and_keeps_the_features(tmp_path):
    publish(tmp_path, backbone_state=STATE)
    publish(tmp_path, "small", backbone_state=STATE, pretext_head_state={"weight": torch.rand(4, 4)}, half=True)
    files = [tmp_path / name / "model.safetensors" for name in ("tiny", "small")]
    assert files[1].stat().st_size < 0.6 * files[0].stat().st_size
    assert load_file(tmp_path / "small" / "pretext_head.safetensors")["weight"].dtype == torch.float16
    full, half = (create_backbone(name, zoo=tmp_path).eval() for name in ("tiny", "small"))
    assert next(half.parameters()).dtype == torch.float32
    images = torch.rand(2, 3, 64, 64)
    expected, features = (backbone(images)["c5"].double() for backbone in (full, half))
    assert (features - expected).norm() < 2e-3 * expected.norm() and not torch.equal(features, expected)
    with pytest.raises(ZooError, match="beyond float16"):
        publish(
            tmp_path,
            backbone_state=STATE | {"bn1.running_var": torch.full_like(STATE["bn1.running_var"], 1e6)},
            half=True,
        )


def test_a_taken_name_gets_the_next_version_and_the_first_is_unchanged(tmp_path):
    first = publish(tmp_path)
    before = {path.name: sha256_of(path) for path in Path(first.location).iterdir()}
    assert publish(tmp_path, backbone_state=trained_state(seed=1)).name == "tiny@2"
    assert {path.name: sha256_of(path) for path in Path(first.location).iterdir()} == before
    assert list_backbones(zoo=tmp_path) == ["tiny", "tiny@2"] and get_entry("tiny@2", zoo=tmp_path)["name"] == "tiny@2"


def test_publishing_does_not_change_the_random_state(tmp_path):
    torch.manual_seed(5)
    publish(tmp_path)
    after = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(after, torch.rand(3))


def without_one_and_one_more():
    state = dict(STATE)
    state["fc.weight"] = state.pop("bn1.weight")
    return state


def with_nan():
    return {**STATE, "bn1.weight": torch.full_like(STATE["bn1.weight"], float("nan"))}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backbone_state": without_one_and_one_more()}, "1 missing: bn1.weight; 1 unexpected: fc.weight"),
        (
            {"backbone_state": trained_state("test_resnet", in_chans=1)},
            "conv1.0.weight (16, 1, 3, 3) instead of (16, 3, 3, 3)",
        ),
        ({"backbone_state": with_nan()}, "'bn1.weight' contains NaN"),
        ({"backbone_state": {"bn1.weight": [1.0]}}, "has a list as 'bn1.weight'"),
        ({"architecture": "test_resnetz"}, "Did you mean 'test_resnet'?"),
        ({"architecture": "test_vit"}, "built for images of [160, 160]"),
        ({"pretrained_cfg": {"mean": [0, 0, 0]}}, "lacks input_size, std"),
        ({"pretrained_cfg": {**PIXELS, "means": 0}}, "Did you mean 'mean'?"),
        ({"metadata": {"metric": {}}}, "Did you mean 'metrics'?"),
        ({"metadata": {"metrics": {"AP": [0.5, 0.6]}, "seeds": [0]}}, "one finite value per seed"),
        ({"metadata": {"metrics": {"AP": float("nan")}, "seeds": [0]}}, "one finite value per seed"),
        ({"metadata": {"parents": [{"sha256": "resnet18"}]}}, "has no sha256"),
        ({"metadata": {"datasets": {"train": {"images": 3}}}}, "has no 'name'"),
        ({"metadata": {"datasets": {"train": {"name": "x", "path": Path("x")}}}}, "JSON cannot store"),
        ({"name": "../tiny"}, "not a valid entry name"),
        ({"name": "tiny@2"}, "leave out '@'"),
        ({"name": "index.json"}, "file suffixes"),
    ],
)
def test_invalid_entries_are_refused_before_anything_is_written(tmp_path, changes, message):
    zoo = tmp_path / "zoo"
    with pytest.raises(ZooError) as caught:
        publish(zoo, **changes)
    assert message in str(caught.value)
    assert not zoo.exists()


def test_a_zoo_that_cannot_be_written_is_an_error_and_its_index_kept(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ZooError, match="Publishing 'tiny' to .*file.zoo failed"):
        publish(tmp_path / "file" / "zoo")
    (tmp_path / "index.json").write_text("{")
    with pytest.raises(ZooError, match=r"index\.json cannot be read as JSON"):
        publish(tmp_path)
    assert (tmp_path / "index.json").read_text() == "{"


def test_what_killed_publishers_left_in_the_temporary_folder_is_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    left, living = tmp_path / "bissl_zoo-publish-left", tmp_path / "bissl_zoo-publish-living"
    for folder in (left, living):
        (folder / "entry").mkdir(parents=True)
        (folder / "lock").touch()
    descriptor = try_lock(living / "lock")
    publish(tmp_path / "zoo")
    os.close(descriptor)
    assert [path.name for path in tmp_path.iterdir() if path.name != "zoo"] == [living.name]


def test_once_returns_the_entry_with_the_same_weights_and_config(tmp_path):
    first = publish(tmp_path, once=True)
    assert publish(tmp_path, once=True) == first
    assert publish(tmp_path, once=True, train_config_text="train: {seed: 1}\n").name == "tiny@2"
    assert publish(tmp_path).name == "tiny@3"


def test_entries_and_runs_of_version_0_1_are_read(tmp_path):
    parent = {"name": "base@1", "sha256": "ab" * 32}
    entry = publish(tmp_path, metadata={"ancestors": [parent]})
    assert Zoo(tmp_path).find("tiny").parents() == [{**parent, "licence": "unknown"}]
    old = (Path(entry.location) / "entry.json").read_bytes().replace(b'"parents"', b'"ancestors"')
    replace_file(tmp_path, "tiny", "entry.json", old)
    assert Zoo(tmp_path).find("tiny").parents() == [{**parent, "licence": "unknown"}]
