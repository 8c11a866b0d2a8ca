"""Exported backbones have the same features in the other library, or in a network built as there."""

import json
import pickle
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
import torchvision
from safetensors.torch import load_file
from torch import nn

from bissl_zoo.errors import ZooError
from bissl_zoo.weights import export
from bissl_zoo.weights.export import TORCHVISION_RESNETS, detectron2_state, export_backbone
from bissl_zoo.weights.load import read_weights

PIXELS = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.3]}
IMAGES = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(5))


def trained(architecture, **model_args):
    """Return a model in eval mode with changed batch-norm statistics."""
    torch.manual_seed(0)
    model = timm.create_model(architecture, num_classes=0, **model_args)
    for name, tensor in model.state_dict().items():
        if name.endswith(("running_mean", "running_var")):
            tensor.uniform_(0.5, 1.5)
    return model.eval()


RESNET = trained("resnet18")


def features(model, images=IMAGES):
    with torch.no_grad():
        return model(images)


def close(ours, theirs):
    """Assert equality up to the order of float32 sums in other kernels, over some twenty layers."""
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4 * float(theirs.abs().max()))


@pytest.mark.slow
@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
def test_torchvision_loads_the_state_and_computes_the_same_bits(tmp_path, ending):
    path = tmp_path / f"resnet18{ending}"
    written = export_backbone(RESNET.state_dict(), "resnet18", "torchvision", path, pixels=PIXELS)
    state = torch.load(path, weights_only=True) if ending == ".pth" else load_file(path)
    (tmp_path / "plain").touch()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode  # the umask's
    model = torchvision.models.resnet18()
    difference = model.load_state_dict(state, strict=False)
    assert difference.missing_keys == ["fc.weight", "fc.bias"] and difference.unexpected_keys == []
    model.fc = nn.Identity()
    assert torch.equal(features(model.eval()), features(RESNET))
    assert written.details["mean"] == "0.4, 0.5, 0.6"
    assert torch.equal(read_weights(path, "resnet18").state["conv1.weight"], RESNET.conv1.weight)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", TORCHVISION_RESNETS)
def test_every_resnet_of_torchvision_has_the_blocks_of_timms(architecture):
    with torch.device("meta"):
        theirs = getattr(torchvision.models, architecture)()
        ours = timm.create_model(architecture, num_classes=0)
    theirs.fc = nn.Identity()
    shapes = {name: tensor.shape for name, tensor in theirs.state_dict().items()}
    assert {name: tensor.shape for name, tensor in ours.state_dict().items()} == shapes


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "model_args", "reason"),
    [
        ("resnet18d", {}, "no network for resnet18d. It supports: resnet18"),
        ("test_vit", {}, "no network for test_vit"),
        ("resnet18", {"avg_down": True}, "another resnet18: .*tensors match"),
        ("resnet18", {"norm_layer": lambda channels, **_: nn.GroupNorm(8, channels)}, "another resnet18"),
        ("resnet18", {"norm_layer": lambda channels, **_: nn.BatchNorm2d(channels, eps=1e-3)}, "other features"),
        ("resnet18", {"act_layer": nn.SiLU}, "other features"),
        ("resnet18", {"output_stride": 8}, "other features"),
    ],
)
def test_a_network_that_the_target_lacks_is_refused_with_the_reason(tmp_path, architecture, model_args, reason):
    model = timm.create_model(architecture, num_classes=0, **model_args)
    with pytest.raises(ZooError, match=reason):
        export_backbone(model.state_dict(), architecture, "detectron2", tmp_path / "out.pkl", model_args)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_timm_loads_the_folder_and_reads_the_pixel_statistics(tmp_path):
    export_backbone(RESNET.state_dict(), "resnet18", "timm", tmp_path / "entry", pixels={**PIXELS, "crop_pct": 1.0})
    config = json.loads((tmp_path / "entry" / "config.json").read_text())
    assert config["architecture"] == "resnet18" and config["num_classes"] == 0 and config["num_features"] == 512
    assert config["pretrained_cfg"]["crop_pct"] == 1.0 and config["pretrained_cfg"]["input_size"] == [3, 224, 224]
    model = timm.create_model(f"local-dir:{tmp_path / 'entry'}", pretrained=True).eval()
    assert torch.equal(features(model), features(RESNET))
    data = timm.data.resolve_model_data_config(model)
    assert list(data["mean"]) == PIXELS["mean"] and list(data["std"]) == PIXELS["std"]
    with pytest.raises(ZooError, match="exists. Name another folder"):
        export_backbone(RESNET.state_dict(), "resnet18", "timm", tmp_path / "entry", pixels=PIXELS)
    with pytest.raises(ZooError, match="pass mean and std"):
        export_backbone(RESNET.state_dict(), "resnet18", "timm", tmp_path / "other")


@pytest.mark.slow
def test_the_timm_folder_includes_model_arguments(tmp_path):
    model = trained("test_vit", img_size=64, num_heads=1)
    arguments = {"img_size": 64, "num_heads": 1}
    export_backbone(model.state_dict(), "test_vit", "timm", tmp_path / "vit", arguments, pixels=PIXELS)
    again = timm.create_model(f"local-dir:{tmp_path / 'vit'}", pretrained=True).eval()
    assert torch.equal(features(again), features(model))


@pytest.mark.slow
def test_a_detectron2_pickle_has_the_expected_content_and_is_read_back(tmp_path):
    path = tmp_path / "resnet18.pkl"
    written = export_backbone(RESNET.state_dict(), "resnet18", "detectron2", path, pixels=PIXELS)
    content = pickle.loads(path.read_bytes(), encoding="latin1")  # as Detectron2 reads it
    assert content["__author__"] == "bissl_zoo" and content["matching_heuristics"] is True
    assert all(type(array) is np.ndarray for array in content["model"].values())
    assert set(content["model"]) == set(detectron2_state(RESNET.state_dict()))
    details = written.details
    assert details["INPUT.FORMAT"] == "RGB" and details["MODEL.PIXEL_MEAN"] == "[102, 127.5, 153]"
    assert details["MODEL.RESNETS.DEPTH"] == "18" and details["MODEL.RESNETS.RES2_OUT_CHANNELS"] == "64"

    read = read_weights(path)
    assert read.format == "detectron2" and read.architecture == "resnet18" and read.unexpected == []
    assert read.pixels["mean"] == pytest.approx(PIXELS["mean"]) and read.pixels["std"] == pytest.approx(PIXELS["std"])
    again = timm.create_model("resnet18", num_classes=0).eval()
    again.load_state_dict(read.state)
    assert torch.equal(features(again), features(RESNET))


def test_detectron2_names_equal_those_of_its_conversion_script():
    """Compare with tools/convert-torchvision-to-d2.py of Detectron2, for every tensor."""
    with torch.device("meta"):
        state = timm.create_model("resnet50", num_classes=0).state_dict()
    theirs = []
    for name in state:
        words = name.split(".")
        if not words[0].startswith("layer"):
            words = ["stem", *words]
        else:
            words[0] = f"res{int(words[0][-1]) + 1}"
        words = [f"conv{word[-1]}.norm" if word.startswith("bn") else word for word in words]
        if "downsample" in words:
            place = words.index("downsample")
            words[place : place + 2] = ["shortcut"] if words[place + 1] == "0" else ["shortcut", "norm"]
        theirs.append(".".join(words))
    assert list(detectron2_state(state)) == theirs


def test_detectron2_itself_loads_the_pickle(tmp_path):
    pytest.importorskip("detectron2", reason="Detectron2 is not installed")
    from detectron2.checkpoint import DetectionCheckpointer
    from detectron2.config import get_cfg
    from detectron2.modeling import build_backbone

    model = trained("resnet50")
    written = export_backbone(model.state_dict(), "resnet50", "detectron2", tmp_path / "r50.pkl", pixels=PIXELS)
    cfg = get_cfg()
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res5"]
    cfg.merge_from_list([x for k, v in written.details.items() if k.startswith("MODEL.RESNETS") for x in (k, v)])
    backbone = build_backbone(cfg).eval()
    DetectionCheckpointer(backbone).load(str(tmp_path / "r50.pkl"))
    close(features(lambda images: backbone(images)["res5"].mean((2, 3))), features(model))


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["resnet18", "test_vit"])
def test_onnxruntime_computes_the_same_for_any_batch(tmp_path, architecture):
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    model_args = {"img_size": 64} if architecture == "test_vit" else {}
    model, path = trained(architecture, **model_args), tmp_path / "backbone.onnx"
    written = export_backbone(model.state_dict(), architecture, "onnx", path, model_args, image_size=(64, 64))
    assert [file.name for file in tmp_path.iterdir()] == ["backbone.onnx"]  # the weights are inside
    onnx.checker.check_model(onnx.load(path))
    assert onnx.load(path).opset_import[0].version == int(written.details["opset"]) == export.ONNX_OPSET
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for count in (1, 3):
        theirs = session.run(["features"], {"images": IMAGES[:count].numpy()})[0]
        close(torch.from_numpy(theirs), features(model, IMAGES[:count]))


def test_onnx_without_its_packages_names_the_extra(tmp_path, monkeypatch):
    find_spec = export.importlib.util.find_spec
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None if "onnx" in name else find_spec(name))
    with pytest.raises(ZooError, match=r'needs onnx and onnxscript: pip install "bissl_zoo\[onnx\]"'):
        export_backbone(RESNET.state_dict(), "resnet18", "onnx", tmp_path / "a.onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_torch_export_program_runs_without_timm_for_any_batch(tmp_path):
    path = tmp_path / "backbone.pt2"
    export_backbone(RESNET.state_dict(), "resnet18", "export", path, image_size=(64, 64))
    torch.save(IMAGES, tmp_path / "images.pt")
    code = (
        "import sys, torch\nmodel = torch.export.load('backbone.pt2').module()\n"
        "torch.save(model(torch.load('images.pt')).detach(), 'features.pt')\n"
        "assert not {'timm', 'bissl_zoo'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True)
    close(torch.load(tmp_path / "features.pt"), features(RESNET))


@pytest.mark.slow
def test_images_of_an_unsupported_size_are_refused(tmp_path):
    model_args = {"img_size": 64, "dynamic_img_size": False}
    model, arguments = trained("test_vit", **model_args), {"model_args": model_args, "image_size": (32, 32)}
    with pytest.raises(ZooError, match="test_vit does not take images of 32 x 32"):
        export_backbone(model.state_dict(), "test_vit", "export", tmp_path / "a.pt2", **arguments)


def test_an_incomplete_state_an_unknown_target_and_a_wrong_suffix_are_refused(tmp_path):
    state = dict(RESNET.state_dict())
    with pytest.raises(ZooError, match="Did you mean 'torchvision'"):
        export_backbone(state, "resnet18", "torchvison", tmp_path / "a.pth")
    with pytest.raises(ZooError, match=r"takes a \.pkl"):
        export_backbone(state, "resnet18", "detectron2", tmp_path / "a.pth")
    with pytest.raises(ZooError, match=r"written as \.pt2"):
        export_backbone(state, "resnet18", "export", tmp_path / "a.pth")
    with pytest.raises(ZooError, match="Did you mean 'resnet18'"):
        export_backbone(state, "resnet81", "torchvision", tmp_path / "a.pth")
    del state["layer4.1.bn2.weight"]
    with pytest.raises(ZooError, match=r"1 missing: layer4\.1\.bn2\.weight"):
        export_backbone(state, "resnet18", "torchvision", tmp_path / "a.pth")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_keeps_the_existing_file(tmp_path, monkeypatch):
    path = tmp_path / "a.pth"
    path.write_bytes(b"existing")

    def full(state, file):
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export.torch, "save", full)
    with pytest.raises(ZooError, match="cannot be written.*No space left"):
        export_backbone(RESNET.state_dict(), "resnet18", "torchvision", path)
    assert path.read_bytes() == b"existing" and [file.name for file in tmp_path.iterdir()] == ["a.pth"]
