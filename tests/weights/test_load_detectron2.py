"""Pickles of Detectron2, MSRA and Detectron, compared with a ResNet built as Detectron2 builds it."""

import pickle
import re

import numpy as np
import pytest
import timm
import torch
from torch import nn

from bissl_zoo.errors import ZooError
from bissl_zoo.weights.load import read_weights

pytestmark = pytest.mark.slow  # networks of 50 layers
IMAGENET_MEAN = [0.485, 0.456, 0.406]


class Norm(nn.Module):
    """Detectron2's frozen batch norm: scale and shift with fixed statistics."""

    def __init__(self, channels):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.rand(channels) + 0.5), nn.Parameter(0.1 * torch.randn(channels))
        self.register_buffer("running_mean", 0.1 * torch.randn(channels))
        self.register_buffer("running_var", torch.rand(channels) + 0.5)

    def forward(self, x):
        scale = self.weight / (self.running_var + 1e-5).sqrt()
        return x * scale[:, None, None] + (self.bias - self.running_mean * scale)[:, None, None]


class NormedConv(nn.Conv2d):
    def __init__(self, inside, outside, size, stride=1):
        super().__init__(inside, outside, size, stride, size // 2, bias=False)
        self.norm = Norm(outside)

    def forward(self, x):
        return self.norm(super().forward(x))


class Bottleneck(nn.Module):
    def __init__(self, inside, width, outside, stride, stride_in_1x1):
        super().__init__()
        self.shortcut = NormedConv(inside, outside, 1, stride) if inside != outside else nn.Identity()
        self.conv1 = NormedConv(inside, width, 1, stride if stride_in_1x1 else 1)
        self.conv2 = NormedConv(width, width, 3, 1 if stride_in_1x1 else stride)
        self.conv3 = NormedConv(width, outside, 1)

    def forward(self, x):
        y = self.conv3(self.conv2(self.conv1(x).relu()).relu())
        return (y + self.shortcut(x)).relu()


class Detectron2ResNet(nn.Module):
    """Detectron2's build_resnet_backbone with bottlenecks and equal parameter names; returns pooled res5."""

    def __init__(self, stride_in_1x1, blocks):
        super().__init__()
        self.stem = nn.Module()
        self.stem.conv1 = NormedConv(3, 64, 7, 2)
        inside = 64
        for stage, (count, width, stride) in enumerate(zip(blocks, (64, 128, 256, 512), (1, 2, 2, 2), strict=True), 2):
            layers = []
            for block in range(count):
                layers.append(Bottleneck(inside, width, 4 * width, stride if block == 0 else 1, stride_in_1x1))
                inside = 4 * width
            setattr(self, f"res{stage}", nn.Sequential(*layers))

    def forward(self, x):
        x = nn.functional.max_pool2d(self.stem.conv1(x).relu(), 3, 2, 1)
        return self.res5(self.res4(self.res3(self.res2(x)))).mean((2, 3))


def detectron2_model(stride_in_1x1, blocks=(2, 2, 2, 2)):
    """Return the smallest ResNet with bottlenecks in timm, resnet26."""
    torch.manual_seed(0)
    return Detectron2ResNet(stride_in_1x1, blocks).eval()


def numpy_state(state):
    return {name: tensor.numpy() for name, tensor in state.items()}


def caffe2_names(state, norms):
    """Rename to Caffe2's names, as in the MSRA files of the model zoos of Detectron2 and Detectron."""
    renamed = {}
    for name, tensor in state.items():
        name = name.replace("stem.conv1.norm.", "res_conv1_bn_").replace("stem.conv1.", "conv1_")
        name = re.sub(r"(res\d)\.(\d+)\.", r"\1_\2_", name).replace("shortcut.", "branch1.")
        for number, letter in zip("123", "abc", strict=True):
            name = re.sub(rf"_conv{number}\.", f"_branch2{letter}.", name)
        name = name.replace(".norm.", "_bn_").replace(".", "_")
        if "_bn_" in name:
            before, _, kind = name.partition("_bn_")
            name = f"{before}_bn_{norms[kind]}"
        elif name.endswith("weight"):
            name = f"{name.removesuffix('weight')}w"
        renamed[name] = tensor
    return renamed


def with_stride_in_1x1(model):
    for stage in (model.layer2, model.layer3, model.layer4):
        stage[0].conv1.stride, stage[0].conv2.stride = (2, 2), (1, 1)
    return model


def pickled(tmp_path, content):
    path = tmp_path / "model.pkl"
    path.write_bytes(pickle.dumps(content, protocol=2))
    return path


def compare_with_detectron2(read, original, pixels_of_original, stride_in_1x1):
    """Compare features of raw images under the pixel statistics of the original with those under the reported ones."""
    rgb = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    order, mean, std = pixels_of_original
    seen = 255 * (rgb.flip(1) if order == "BGR" else rgb)
    seen = (seen - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    ours = (rgb - torch.tensor(read.pixels["mean"])[:, None, None]) / torch.tensor(read.pixels["std"])[:, None, None]
    model = timm.create_model(read.architecture, num_classes=0).eval()
    model.load_state_dict(read.state)
    with torch.no_grad():
        expected = original(seen)
        features = (with_stride_in_1x1(model) if stride_in_1x1 else model)(ours)
    # float32 through 50 layers of other kernels: far below the effect of a wrong name, order or statistic
    torch.testing.assert_close(features, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


BGR = ("BGR", [103.530, 116.280, 123.675], [1.0, 1.0, 1.0])  # Detectron2's defaults
RGB = ("RGB", [123.675, 116.280, 103.530], [58.395, 57.120, 57.375])  # with torchvision's weights


@pytest.mark.parametrize(
    ("norms", "nested"),
    [
        ({"weight": "gamma", "bias": "beta", "running_mean": "running_mean", "running_var": "running_var"}, False),
        ({"weight": "s", "bias": "b", "running_mean": "rm", "running_var": "riv"}, True),
    ],
)
def test_an_msra_pickle_is_converted_to_rgb_and_notes_its_strides(tmp_path, norms, nested):
    original = detectron2_model(stride_in_1x1=True, blocks=(3, 4, 6, 3))
    arrays = numpy_state(caffe2_names(original.state_dict(), norms))
    arrays |= {"conv1_b": np.zeros(64, np.float32), "fc1000_w": np.ones((10, 2048), np.float32)}
    read = read_weights(pickled(tmp_path, {"blobs": arrays} if nested else arrays))
    assert read.architecture == "resnet50" and read.format == "caffe2"
    assert read.pixels["mean"] == pytest.approx(IMAGENET_MEAN, abs=1e-12) and read.pixels["std"] == [1 / 255] * 3
    assert any("first convolution was converted to RGB" in note for note in read.notes)
    assert any("stride in the 1x1 convolution" in note for note in read.notes)
    assert [name.split()[0].removeprefix("blobs.") for name in read.unexpected] == ["conv1_b"]
    compare_with_detectron2(read, original, BGR, stride_in_1x1=True)


def test_fused_batch_norms_of_detectron_are_a_scale_and_a_shift(tmp_path):
    original = detectron2_model(stride_in_1x1=True)
    for module in original.modules():
        if isinstance(module, Norm):
            module.running_mean.zero_()
            module.running_var.fill_(1 - 1e-5)
    state = {name: tensor for name, tensor in original.state_dict().items() if "running" not in name}
    norms = {"weight": "s", "bias": "b"}
    read = read_weights(pickled(tmp_path, numpy_state(caffe2_names(state, norms))), "resnet26")
    assert any("lacks running_var of 29 batch norms" in note for note in read.notes)
    compare_with_detectron2(read, original, BGR, stride_in_1x1=True)


def test_a_detectron2_pickle_of_an_rgb_network_is_unchanged(tmp_path):
    original = detectron2_model(stride_in_1x1=False)
    content = {"model": numpy_state(original.state_dict()), "__author__": "torchvision", "matching_heuristics": True}
    read = read_weights(pickled(tmp_path, content), "resnet26")
    assert read.format == "detectron2" and not any("1x1" in note or "BGR" in note for note in read.notes)
    compare_with_detectron2(read, original, RGB, stride_in_1x1=False)


@pytest.mark.parametrize("kind", ["FPN", "C4"])
def test_the_backbone_of_a_trained_detector_is_read(tmp_path, kind):
    original = detectron2_model(stride_in_1x1=True)
    model = {"proposal_generator.rpn_head.conv.weight": np.ones(3, np.float32)}
    for name, array in numpy_state(original.state_dict()).items():
        c4 = "roi_heads." if name.startswith("res5") else "backbone."
        model[("backbone.bottom_up." if kind == "FPN" else c4) + name] = array
    model["backbone.fpn_lateral2.weight" if kind == "FPN" else "roi_heads.box_predictor.cls_score.weight"] = model[
        "proposal_generator.rpn_head.conv.weight"
    ]
    content = {"model": model, "__author__": "Detectron2 Model Zoo"}
    path = pickled(tmp_path, content)
    with pytest.raises(ZooError, match="does not state whether its network takes RGB or BGR images"):
        read_weights(path, "resnet26")
    read = read_weights(path, "resnet26", channel_order="BGR")
    assert len(read.unexpected) == 2
    compare_with_detectron2(read, original, BGR, stride_in_1x1=True)

    # older files have the pixel statistics as buffers; Detectron2's defaults also determine the order
    for (order, mean, std), channel_order in ((BGR, None), (("RGB", [120.0, 110.0, 100.0], [50.0, 51.0, 52.0]), "RGB")):
        model |= {"pixel_mean": np.array(mean, np.float32).reshape(3, 1, 1), "pixel_std": np.array(std, np.float32)}
        read = read_weights(pickled(tmp_path, content), "resnet26", channel_order=channel_order)
        compare_with_detectron2(read, original, (order, mean, std), stride_in_1x1=True)
    with pytest.raises(ZooError, match="does not state"):
        read_weights(path, "resnet26")  # the order of an unknown mean is not guessed
