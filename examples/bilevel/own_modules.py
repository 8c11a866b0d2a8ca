"""BiSSL on plain modules, without configs: torchvision's ResNet-18, lightly's NT-Xent loss, scikit-learn's digits.

    python examples/bilevel/own_modules.py

No config, no registry and no run directory: two levels, a solver and a loop. It needs `pip install lightly`.
"""

import argparse
import copy

import torch
from fvcore.common.param_scheduler import ConstantParamScheduler
from lightly.loss import NTXentLoss
from lightly.models.modules import SimCLRProjectionHead
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional
from torchvision.models import resnet18

from bissl_zoo.bilevel import BiLevel, Level
from bissl_zoo.hypergradient import MinRes
from bissl_zoo.optim import LRMultiplier


class Contrast(nn.Module):
    """The lower head: lightly's loss on two views of a batch."""

    def __init__(self):
        super().__init__()
        self.projection = SimCLRProjectionHead(512, 128, 64)
        self.loss = NTXentLoss(temperature=0.5)

    def losses(self, backbone, views):
        return {"nt_xent": self.loss(*(self.projection(backbone(view)) for view in views))}


class Classify(nn.Module):
    """The upper head: a linear classifier."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(512, 10)

    def losses(self, backbone, batch):
        images, labels = batch
        return {"cross_entropy": functional.cross_entropy(self.linear(backbone(images)), labels)}


def level(name, backbone, head, batches, lr=0.02):
    """Return a level with SGD at a constant rate; `batches` is an endless iterator of what `head.losses` takes."""
    optimizer = torch.optim.SGD([*backbone.parameters(), *head.parameters()], lr=lr, momentum=0.9)
    return Level(name, backbone, head, optimizer, batches, LRMultiplier(ConstantParamScheduler(1.0)), total_steps=1)


def bissl(backbone, views, labelled, alternations):
    """Align a backbone with a classification task; return it and the upper level's head."""
    lower = level("lower", backbone, Contrast(), views)
    upper = level("upper", copy.deepcopy(backbone), Classify(), labelled)
    problem = BiLevel(lower, upper, MinRes(iterations=4), lam=0.1, lower_steps=4, upper_steps=2, curvature="hessian")
    for number in range(alternations):
        metrics = problem.alternate(number)
        print(
            f"alternation {number + 1}: pretext {metrics['lower/nt_xent']:.3f}, downstream "
            f"{metrics['upper/cross_entropy']:.3f}, cos(x, v) {metrics['solver/cos_xv']:.3f}"
        )
    return lower.backbone, upper.head


# the rest is data


def batches(images, labels=None, size=32, seed=0):
    """Yield random batches: labelled ones, or without labels two views, shifted by up to 2 pixels and with noise."""
    generator = torch.Generator().manual_seed(seed)

    def view(chosen):
        shift = torch.randint(-2, 3, (2,), generator=generator).tolist()
        return chosen.roll(shift, dims=(2, 3)) + 0.1 * torch.randn(chosen.shape, generator=generator)

    while True:
        rows = torch.randint(len(images), (size,), generator=generator)
        chosen = images[rows]
        yield (view(chosen), view(chosen)) if labels is None else (chosen, labels[rows])


def main():
    """Train, and print the accuracy of the upper level's head on the aligned backbone."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--alternations", type=int, default=8)
    args = parser.parse_args()
    torch.manual_seed(0)
    digits = load_digits()
    pixels = torch.from_numpy(digits.images).float()[:, None] / 16
    images, labels = functional.interpolate(pixels, (32, 32)).repeat(1, 3, 1, 1), torch.from_numpy(digits.target)
    network = resnet18()
    network.fc = nn.Identity()
    views, labelled = batches(images[:1200]), batches(images[:1200], labels[:1200], seed=1)
    backbone, head = bissl(network, views, labelled, args.alternations)
    with torch.no_grad():
        predicted = head.linear(backbone.eval()(images[1200:])).argmax(dim=1)
    print(f"accuracy {(predicted == labels[1200:]).float().mean():.3f} on {len(predicted)} images")


if __name__ == "__main__":
    main()
