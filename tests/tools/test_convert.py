"""tools/convert.py: from a checkpoint of another project, to another library, and its output."""

import argparse
import pickle

import pytest
import timm
import torch
import torchvision
from command_line import load_tool
from safetensors.torch import load_file, save_file
from torch import nn

from bissl_zoo.zoo import publish_entry

PIXELS = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.25, 0.3), "input_size": (3, 64, 64)}
IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def random_resnet():
    torch.manual_seed(0)
    return timm.create_model("resnet18", num_classes=0).eval()


MODEL = random_resnet()


@pytest.fixture(scope="module")
def tool():
    """The module tools/convert.py."""
    return load_tool("convert")


@pytest.fixture
def convert(tool, capsys):
    """Call the command line; return status, standard output and standard error."""

    def call(*arguments):
        status = tool.cli([str(argument) for argument in arguments])
        output = capsys.readouterr()
        return status, output.out, output.err

    return call


@pytest.fixture
def moco(tmp_path):
    """A MoCo v2 checkpoint of `MODEL`."""
    state = {f"module.encoder_q.{name}": tensor for name, tensor in MODEL.state_dict().items()}
    state |= {"module.encoder_q.fc.0.weight": torch.randn(8, 512), "module.queue": torch.randn(8, 4)}
    torch.save({"epoch": 200, "arch": "resnet18", "state_dict": state}, tmp_path / "moco.pth.tar")
    return tmp_path / "moco.pth.tar"


def features(model):
    with torch.no_grad():
        return model.eval()(IMAGES)


def test_in_and_out_again_computes_the_same(convert, moco, tmp_path):
    backbone, head = tmp_path / "made" / "backbone.safetensors", tmp_path / "made" / "head.safetensors"
    status, out, err = convert("in", moco, "--architecture", "resnet18", "--output", backbone, "--head-output", head)
    assert (status, err) == (0, "")
    assert "layout     moco_v2" in out and "resnet18: 120 of 120 tensors match" in out
    assert "head       1: encoder_q.fc.0.weight" in out
    assert "unexpected 1: state_dict.module.queue (8, 4)" in out and "mean 0.485, 0.456, 0.406" in out
    assert f"wrote      {backbone}" in out and load_file(head).keys() == {"encoder_q.fc.0.weight"}
    plain = timm.create_model("resnet18", num_classes=0)
    plain.load_state_dict(load_file(backbone))
    assert torch.equal(features(plain), features(MODEL))

    status, out, err = convert("out", backbone, "--to", "torchvision", "--output", tmp_path / "tv.pth")
    assert (status, err) == (0, "")
    network = torchvision.models.resnet18()
    assert network.load_state_dict(torch.load(tmp_path / "tv.pth"), strict=False).unexpected_keys == []
    network.fc = nn.Identity()
    assert torch.equal(features(network), features(MODEL))
    assert "mean" in out and "0.485, 0.456, 0.406" in out  # kept in the file


@pytest.mark.slow
def test_a_zoo_entry_goes_out_with_its_pixel_statistics(convert, tmp_path, monkeypatch):
    zoo = tmp_path / "zoo"
    monkeypatch.setenv("BISSL_ZOO", str(zoo))
    publish_entry(
        name="tiny",
        backbone_state=MODEL.state_dict(),
        architecture="resnet18",
        pretrained_cfg=PIXELS,
        metadata={},
        train_config_text="",
        zoo=zoo,
    )
    status, out, err = convert("out", "tiny", "--to", "detectron2", "--output", tmp_path / "r18.pkl")
    assert (status, err) == (0, "")
    assert "MODEL.PIXEL_MEAN" in out and "[102, 127.5, 153]" in out and "INPUT.FORMAT" in out
    content = pickle.loads((tmp_path / "r18.pkl").read_bytes())  # as Detectron2 reads it; this test wrote the file
    assert content["input"]["pixel_std"] == [51.0, 63.75, 76.5]
    status, out, err = convert("out", "tiny", "--to", "timm", "--output", tmp_path / "folder")
    assert (status, err) == (0, "")
    again = timm.create_model(f"local-dir:{tmp_path / 'folder'}", pretrained=True)
    assert torch.equal(features(again), features(MODEL))
    assert list(again.pretrained_cfg["input_size"]) == [3, 64, 64]


@pytest.mark.slow
def test_a_file_without_metadata_needs_statistics(convert, tmp_path):
    save_file(MODEL.state_dict(), tmp_path / "plain.safetensors")
    plain, folder = tmp_path / "plain.safetensors", tmp_path / "folder"
    arguments = ["out", plain, "--to", "timm", "--output", folder]  # a resnet18 is recognized by its tensors
    status, _, err = convert(*arguments)
    assert status == 1 and "pass mean and std" in err
    status, _, err = convert(*arguments, "--mean", 0.5, 0.5, 0.5, "--std", 0.25, 0.25, 0.25)
    assert (status, err) == (0, "")
    assert list(timm.create_model(f"local-dir:{folder}", pretrained=True).pretrained_cfg["mean"]) == [0.5, 0.5, 0.5]


@pytest.mark.slow
def test_a_partial_backbone_and_objects_each_need_an_option(convert, tmp_path):
    trunk = {name: tensor for name, tensor in MODEL.state_dict().items() if not name.startswith("layer4.")}
    torch.save({"model": trunk, "args": argparse.Namespace(lr=1)}, tmp_path / "c4.pth")
    arguments = ["in", tmp_path / "c4.pth", "--architecture", "resnet18", "--output", tmp_path / "c4.safetensors"]
    status, _, err = convert(*arguments)
    assert status == 1 and "argparse.Namespace" in err and "--skip-objects" in err
    arguments.append("--skip-objects")
    status, _, err = convert(*arguments)
    assert status == 1 and err.startswith("error: ") and "ends at layer3" in err
    assert not (tmp_path / "c4.safetensors").exists()
    status, out, err = convert(*arguments, "--allow-partial")
    assert (status, err) == (0, "")
    assert "90 of 120 tensors match" in out and "missing    30: layer4.0.conv1.weight (512, 256, 3, 3)" in out
    assert load_file(tmp_path / "c4.safetensors").keys() == trunk.keys()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["in", "nothing.pth", "--output", "a.safetensors"], "There is no file nothing.pth"),
        (["out", "nothing", "--to", "onnx", "--output", "a.onnx"], "Unknown zoo entry 'nothing'"),
    ],
)
def test_a_missing_source_is_one_message(convert, arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BISSL_ZOO", str(tmp_path))
    status, out, err = convert(*arguments)
    assert status == 1 and out == "" and message in err and err.count("\n") == 1
