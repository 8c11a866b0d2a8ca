"""Projection and prediction heads."""

from collections.abc import Sequence

from torch import nn


def mlp(
    widths: Sequence[int], norm: bool = True, output_bias: bool = False, output_norm: bool = False
) -> nn.Sequential:
    """Build an MLP with the given widths (input first): Linear, batch norm and ReLU; the last Linear has no bias.

    It is the projector and predictor of SimCLR and BYOL in BiSSL (arXiv 2410.02387, appendix on pretraining). A bias
    before batch norm has no effect, so methods without that bias have the same head.

    Args:
        widths: input width, hidden widths and output width.
        norm: use batch norm between the layers.
        output_bias: use a bias in the last Linear.
        output_norm: add batch norm without parameters after the last Linear.
    """
    layers: list[nn.Module] = []
    for wide, narrow in zip(widths[:-2], widths[1:-1], strict=True):
        layers += [nn.Linear(wide, narrow), *([nn.BatchNorm1d(narrow)] if norm else []), nn.ReLU(inplace=True)]
    layers.append(nn.Linear(widths[-2], widths[-1], bias=output_bias))
    if output_norm:
        layers.append(nn.BatchNorm1d(widths[-1], affine=False))
    return nn.Sequential(*layers)
