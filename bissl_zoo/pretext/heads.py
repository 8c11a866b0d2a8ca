"""Projectors and predictors."""

from collections.abc import Sequence

from torch import nn


def mlp(
    widths: Sequence[int], norm: bool = True, output_bias: bool = False, output_norm: bool = False
) -> nn.Sequential:
    """Perceptron through `widths` (input first): Linear, batch norm, ReLU between; the last Linear without bias.

    This is the projector and the predictor of BiSSL's SimCLR and BYOL (arXiv 2410.02387, appendix on pretraining). A
    bias before a batch norm changes nothing, so methods that leave it out have the same head.

    Args:
        norm: batch norm between the layers.
        output_bias: of the last Linear.
        output_norm: batch norm without parameters after the last Linear.
    """
    layers: list[nn.Module] = []
    for wide, narrow in zip(widths[:-2], widths[1:-1], strict=True):
        layers += [nn.Linear(wide, narrow), *([nn.BatchNorm1d(narrow)] if norm else []), nn.ReLU(inplace=True)]
    layers.append(nn.Linear(widths[-2], widths[-1], bias=output_bias))
    if output_norm:
        layers.append(nn.BatchNorm1d(widths[-1], affine=False))
    return nn.Sequential(*layers)
