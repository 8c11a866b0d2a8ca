"""Features of images as a frozen network computes them: how images are shown, and the pass over a set."""

import contextlib
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2
from tqdm import tqdm

from bissl_zoo.data.views import IMAGENET_MEAN, IMAGENET_STD
from bissl_zoo.engine.build import seed_everything

#: the side of the crop over the shorter side of the image, 224 of 256
CROP = 0.875


class CentralCrops(Dataset):
    """`(central crop (3, S, S), target)`, normalised, of the labelled images `indices` of a data set.

    The shorter side is resized to S / 0.875 first, as 256 is to 224 (the usual test transform of ImageNet).
    """

    def __init__(
        self,
        dataset: Dataset,
        indices: Sequence[int],
        size: int,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
    ) -> None:
        self.dataset, self.indices = dataset, list(indices)
        self.transform = v2.Compose(
            [
                v2.PILToTensor(),
                v2.Resize(round(size / CROP), v2.InterpolationMode.BICUBIC, antialias=True),
                v2.CenterCrop(size),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(list(mean), list(std)),
            ]
        )

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> tuple[Tensor, int]:
        image, target = self.dataset[self.indices[position]]
        return self.transform(image), target


class FixedViews(Dataset):
    """`(view, view)` of the images `indices`, each the first view of a draw of its own; every pass sees the same two.

    Taking the first of what the augmentation returns serves methods whose views are many, of several sizes, or one and
    a mask. Draws depend on `seed` and the image only, not on the number of workers. They leave the random state
    changed: call this within :func:`own_randomness`.
    """

    def __init__(
        self, dataset: Dataset, indices: Sequence[int], views: Callable[[Image.Image], tuple[Tensor, ...]], seed: int
    ) -> None:
        self.dataset, self.indices, self.views, self.seed = dataset, list(indices), views, seed

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> tuple[Tensor, Tensor]:
        seed_everything(self.seed * 1_000_003 + self.indices[position])
        image = self.dataset[self.indices[position]][0]
        return self.views(image)[0], self.views(image)[0]


def drawn(size: int, limit: int, seed: int) -> list[int]:
    """At most `limit` of the numbers below `size`, drawn with a generator of their own, sorted."""
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed))[:limit].sort().values.tolist()


@torch.no_grad()
def extract_features(
    embed: Callable[[Tensor], Tensor],
    samples: Dataset,
    device: torch.device,
    batch_size: int,
    num_workers: int = 0,
    title: str | None = None,
) -> tuple[Tensor, ...]:
    """One pass over `samples`, tuples of images and labels: per place, all embeddings `(N, D)` or all labels `(N,)`.

    Args:
        embed: images `(B, 3, S, S)` on `device` -> `(B, D)`.
        title: of the progress bar; None for none.
    Returns:
        Tensors on the CPU, embeddings as float32.
    """
    # a loader without a generator of its own draws from the global one
    loader = DataLoader(samples, batch_size, num_workers=num_workers, generator=torch.Generator())
    batches = [
        [embed(part.to(device)).float().cpu() if part.is_floating_point() else part for part in batch]
        for batch in tqdm(loader, desc=title, unit="batch", disable=title is None, leave=False)
    ]
    return tuple(torch.cat(column) for column in zip(*batches, strict=True))


@contextlib.contextmanager
def own_randomness(device: torch.device) -> Iterator[None]:
    """Put the random states of Python, NumPy and torch (CPU and `device`) back on leaving."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def pretext_pixels(cfg: DictConfig) -> dict[str, Any]:
    """`mean` and `std` that a config's pretext images are normalised by, and `input_size`, as a zoo entry has them."""
    augmentation = cfg.pretext.get("augmentation") or {}
    size = augmentation.get("size", 96)
    return {
        "input_size": [3, size, size],
        "mean": list(augmentation.get("mean", IMAGENET_MEAN)),
        "std": list(augmentation.get("std", IMAGENET_STD)),
    }
