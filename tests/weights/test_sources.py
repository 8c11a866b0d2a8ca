"""Every source of weights by one function; the hub's cache is made by hand, and timm itself reads it for comparison."""

import json

import pytest
import timm
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

import bissl_zoo
from bissl_zoo.errors import ZooError
from bissl_zoo.files import sha256_of
from bissl_zoo.weights.files import save_backbone
from bissl_zoo.weights.load import read_weights

TAG, REPO = "test_vit.r160_in1k", "timm/test_vit.r160_in1k"


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """Return `add(repository, {file: content})`; the hub is not asked."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    def add(repo, files):
        folder = tmp_path / "hub" / f"models--{repo.replace('/', '--')}"
        snapshot = folder / "snapshots" / ("1" * 40)
        snapshot.mkdir(parents=True)
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text("1" * 40)
        for name, content in files.items():
            if name.endswith(".safetensors"):
                save_file(content, snapshot / name)
            else:
                (snapshot / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return snapshot

    return add


def weights_of(name="test_vit", **args):
    torch.manual_seed(3)
    return {key: torch.randn_like(value) for key, value in timm.create_model(name, **args).state_dict().items()}


def test_a_timm_tag_is_read_with_what_timm_knows_of_it(hub_cache):
    state = weights_of()
    folder = hub_cache(REPO, {"model.safetensors": state})
    read = read_weights(f"timm:{TAG}")
    assert (
        read.architecture == "test_vit"
        and read.source == f"timm:{TAG}"
        and set(read.head) == {"head.weight", "head.bias"}
    )
    assert read.state.keys() == state.keys() - read.head.keys() and not read.missing and not read.unexpected
    assert all(torch.equal(value, state[key]) for key, value in read.state.items())
    assert read.sha256 == sha256_of(folder / "model.safetensors") and read.licence == "apache-2.0"
    assert read.pixels == {"channel_order": "RGB", "mean": [0.5] * 3, "std": [0.5] * 3, "input_size": [3, 160, 160]}
    assert bissl_zoo.create_backbone("test_vit").state_dict().keys() == read.state.keys()  # timm's default tag


@pytest.mark.parametrize("args", [{"img_size": 96}, {"in_chans": 1}, {"in_chans": 5, "img_size": 64}])
def test_positions_and_channels_are_adapted_as_timm_does(hub_cache, args):
    hub_cache(REPO, {"model.safetensors": weights_of()})
    ours = bissl_zoo.create_backbone(TAG, pretrained=True, **args)
    theirs = timm.create_model(TAG, pretrained=True, num_classes=0, **args)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert all(torch.equal(ours.state_dict()[key], value) for key, value in theirs.state_dict().items())


def test_a_repository_states_its_licence_in_its_config_or_card(hub_cache):
    config = {"architecture": "test_vit", "pretrained_cfg": {"mean": [0.1] * 3, "std": [0.2] * 3}}
    files = {"config.json": json.dumps(config), "model.safetensors": weights_of(num_classes=0)}
    hub_cache("me/plain", files)
    hub_cache("me/card", {**files, "README.md": "---\nlicense: cc-by-nc-4.0\n---\n"})
    assert read_weights("hf-hub:me/plain").licence == "unknown"
    read = read_weights("hf-hub:me/card")
    assert read.licence == "cc-by-nc-4.0" and read.source == "hf-hub:me/card" and read.pixels["mean"] == [0.1] * 3


def test_source_licence_and_pixels_pass_through_a_converted_file(hub_cache, tmp_path):
    hub_cache(REPO, {"model.safetensors": weights_of()})
    first = read_weights(f"timm:{TAG}")
    save_backbone(first, tmp_path / "own.safetensors")
    read = read_weights(tmp_path / "own.safetensors")
    assert (read.licence, read.pixels, read.architecture) == (first.licence, first.pixels, "test_vit")
    assert [parent["name"] for parent in read.lineage] == ["own.safetensors", f"timm:{TAG}"]
    assert read.lineage[1] == first.lineage[0] and all(torch.equal(first.state[k], v) for k, v in read.state.items())


def test_a_pickle_of_the_hub_is_not_run(hub_cache, tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "canary"), "w"))

    torch.save({"head.weight": Bomb()}, tmp_path / "bomb")
    hub_cache(REPO, {"pytorch_model.bin": (tmp_path / "bomb").read_bytes()})
    with pytest.raises(ZooError, match="could run code"):
        read_weights(f"timm:{TAG}")
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("timm:test_vit.r160_in1", "Did you mean 'test_vit.r160_in1k'"),
        ("timm:resnet51.a1_in1k", "no weights.*Did you mean 'resnet50.a1_in1k'"),
        (f"timm:{TAG}", f"{REPO}.*HF_HUB_OFFLINE is set.*cache .*hub lacks it.*offline"),
        ("hf-hub:me/nothing", "config.json.*cache .*hub lacks it"),
        ("resnet50.a1_in1k", "neither a file nor a folder.*timm:NAME.*'timm:resnet50.a1_in1k'"),
    ],
)
def test_what_is_not_found_is_named_with_the_way_out(hub_cache, source, message):
    with pytest.raises(ZooError, match=message):
        read_weights(source)


def test_a_partial_match_is_refused_with_counts(hub_cache):
    state = weights_of()
    hub_cache(REPO, {"model.safetensors": {k: v for k, v in state.items() if not k.startswith("blocks.1.")}})
    with pytest.raises(ZooError, match=r"66 of 78 tensors match; 12 missing: blocks\.1\."):
        read_weights(f"timm:{TAG}")
