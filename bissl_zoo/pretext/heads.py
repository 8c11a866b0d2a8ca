"""Projectors and predictors."""

from collections.abc import Sequence

from torch import nn


def mlp(widths: Sequence[int]) -> nn.Sequential:
    """Perceptron through `widths` (input first): Linear, batch norm, ReLU between; the last Linear without bias.

    This is the projector and the predictor of BiSSL's SimCLR and BYOL (arXiv 2410.02387, appendix on pretraining).
    """
    layers: list[nn.Module] = []
    for wide, narrow in zip(widths[:-2], widths[1:-1], strict=True):
        layers += [nn.Linear(wide, narrow), nn.BatchNorm1d(narrow), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.Linear(widths[-2], widths[-1], bias=False))
