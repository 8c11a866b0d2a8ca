import torch
from torch import nn

from bissl_zoo.pretext.heads import mlp


def test_norm_and_relu_come_between_and_the_last_layer_has_no_bias():
    head = mlp([512, 256, 256, 128])
    kinds = [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear]
    assert [type(layer) for layer in head] == kinds
    assert [(m.in_features, m.out_features) for m in head if isinstance(m, nn.Linear)] == [
        (512, 256),
        (256, 256),
        (256, 128),
    ]
    assert head[0].bias is not None and head[3].bias is not None and head[-1].bias is None
    assert head(torch.randn(4, 512)).shape == (4, 128)


def test_two_widths_are_one_linear_layer():
    assert [type(layer) for layer in mlp([5, 3])] == [nn.Linear]


def test_norms_and_the_last_bias_are_a_choice():
    plain = mlp([5, 4, 3], norm=False, output_bias=True)
    assert [type(layer) for layer in plain] == [nn.Linear, nn.ReLU, nn.Linear] and plain[-1].bias is not None
    normed = mlp([5, 4, 3], output_norm=True)
    assert [type(layer) for layer in normed[-2:]] == [nn.Linear, nn.BatchNorm1d]
    assert normed[-2].bias is None and not list(normed[-1].parameters())
