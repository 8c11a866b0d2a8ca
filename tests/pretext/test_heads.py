import pytest
import torch
from torch import nn

from bissl_zoo.pretext.heads import mlp
from bissl_zoo.registry import build_backbone, build_pretext

HIDDEN = [nn.Linear, nn.BatchNorm1d, nn.ReLU]
#: method -> layers of its projector and predictor with default widths
HEADS = {
    "simclr": ([*HIDDEN, *HIDDEN, nn.Linear], None),
    "byol": ([*HIDDEN, *HIDDEN, nn.Linear], [*HIDDEN, *HIDDEN, nn.Linear]),
    "simsiam": ([*HIDDEN, *HIDDEN, nn.Linear, nn.BatchNorm1d], [*HIDDEN, nn.Linear]),
    "moco_v2": ([nn.Linear, nn.ReLU, nn.Linear], None),
    "moco_v3": ([*HIDDEN, *HIDDEN, nn.Linear, nn.BatchNorm1d], [*HIDDEN, nn.Linear, nn.BatchNorm1d]),
    "barlow_twins": ([*HIDDEN, *HIDDEN, nn.Linear], None),
    "vicreg": ([*HIDDEN, *HIDDEN, nn.Linear], None),
}
#: methods whose last Linear of the projector or predictor has a bias
BIASES = {("moco_v2", "projector"), ("simsiam", "predictor")}


def test_the_last_layer_has_no_bias_and_the_others_have_batch_norm_and_relu():
    head = mlp([512, 256, 256, 128])
    assert [type(layer) for layer in head] == [*HIDDEN, *HIDDEN, nn.Linear]
    widths = [(layer.in_features, layer.out_features) for layer in head if isinstance(layer, nn.Linear)]
    assert widths == [(512, 256), (256, 256), (256, 128)]
    assert head[0].bias is not None and head[3].bias is not None and head[-1].bias is None
    assert head(torch.randn(4, 512)).shape == (4, 128)
    assert [type(layer) for layer in mlp([5, 3])] == [nn.Linear]


@pytest.mark.parametrize("method", HEADS)
def test_heads_have_the_layers_of_the_papers(method):
    trunk, tail = build_backbone(name="test_resnet").split("c3")
    narrow = {"projector": [16, 16, 8]} if method in ("barlow_twins", "vicreg") else {}  # 8192 by default
    pretext = build_pretext(name=method, backbone=trunk, tail=tail, **narrow)
    for name, expected in zip(("projector", "predictor"), HEADS[method], strict=True):
        layers = list(getattr(pretext, name, None) or [])
        assert [type(layer) for layer in layers] == (expected or [])
        if expected:
            *_, last = (layer for layer in layers if isinstance(layer, nn.Linear))
            assert (last.bias is not None) == ((method, name) in BIASES)
            assert not isinstance(layers[-1], nn.BatchNorm1d) or not layers[-1].affine
