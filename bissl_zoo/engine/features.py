"""Features of images as a frozen network computes them: how images are shown, and the pass over a set."""

import contextlib
import logging
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2
from tqdm import tqdm

from bissl_zoo.backbones import Backbone, evaluating, merge_split_states
from bissl_zoo.bilevel.level import Level
from bissl_zoo.config import instantiate
from bissl_zoo.data.views import IMAGENET_MEAN, IMAGENET_STD
from bissl_zoo.distributed import get_world_size, on_main_process
from bissl_zoo.engine.build import Context, Readable, build_datasets, seed_everything
from bissl_zoo.engine.init import ZOO_PREFIX, load_init
from bissl_zoo.engine.trainer import HookBase, Trainer, load_state
from bissl_zoo.errors import CheckpointError, DatasetError
from bissl_zoo.evaluation import collapse_figures, knn_accuracy, linear_probe
from bissl_zoo.progress.display import show
from bissl_zoo.registry import DOWNSTREAM_TASKS, build_backbone
from bissl_zoo.runs.directory import CONFIG_FILE, load_run_config
from bissl_zoo.weights.backbone_file import read_backbone

logger = logging.getLogger(__name__)

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


@dataclass(frozen=True)
class FrozenBackbone:
    """A whole backbone in eval mode.

    Attributes:
        model: images `(B, 3, S, S)` -> pooled embeddings `(B, D)`.
        source: where it is from, in words.
        pixels: what is known of its images: `mean` and `std` of RGB in [0, 1], `input_size`.
    """

    model: nn.Module
    architecture: str
    source: str
    pixels: Mapping[str, Any]

    @torch.no_grad()
    def width(self, size: int) -> int:
        """D, from embedding an empty image of this side.

        Raises:
            CheckpointError: the network takes no such images, as a ViT that was built for one size.
        """
        try:
            return self.model(torch.zeros(1, 3, size, size, device=next(self.model.parameters()).device)).shape[1]
        except (RuntimeError, AssertionError, ValueError) as error:
            raise CheckpointError(
                f"{self.source}: this {self.architecture} does not take images of {size} pixels ({error}). "
                "Give the size that it was built for, as in --size 224."
            ) from error

    def central_crops(
        self,
        dataset: Dataset,
        indices: Sequence[int],
        size: int,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> CentralCrops:
        """Images of a labelled data set, normalised by `mean` and `std`, or else as the backbone's own were.

        Raises:
            CheckpointError: how they were is not known.
        """
        pixels = {"mean": mean, "std": std} if mean else self.pixels
        if "mean" not in pixels or "std" not in pixels:
            raise CheckpointError(
                f"{self.source} does not say how its images were normalised. Give --mean and --std, of RGB in [0, 1]; "
                "ImageNet's are --mean 0.485 0.456 0.406 --std 0.229 0.224 0.225."
            )
        return CentralCrops(dataset, indices, size, pixels["mean"], pixels["std"])


def load_frozen(source: str, architecture: str | None = None) -> FrozenBackbone:
    """A backbone by what names it on a command line.

    Args:
        source: `zoo:NAME` or the plain NAME of an entry; a `.safetensors` file under timm's names; a run directory, of
            which the backbone is taken that its last pretext stage left.
        architecture: of a file that does not say it.
    Raises:
        ZooError: there is no such entry or file.
        CheckpointError: weights that do not fit, or a run without a whole backbone.
    """
    if Path(source).is_dir():
        return _from_run(Path(source))
    stored = read_backbone(source.removeprefix(ZOO_PREFIX), architecture)
    backbone = build_backbone(name=stored.architecture, **stored.model_args)
    return _frozen(backbone, dict(stored.state), source, stored.pixels or {})


def _from_run(folder: Path) -> FrozenBackbone:
    if not (folder / CONFIG_FILE).is_file():
        raise CheckpointError(
            f"There is no run in {folder} (no {CONFIG_FILE}). An entry of the zoo is written zoo:NAME."
        )
    cfg = load_run_config(folder)
    weights, ancestors = load_init(str(folder), cfg)
    if weights.tail is None:
        raise CheckpointError(
            f"{folder} holds the backbone up to {cfg.bilevel.shared_stage} only, since it has no pretext stage. Probe "
            "what it started from, or a run with the stage pretrain or bissl."
        )
    state = merge_split_states(weights.backbone, weights.tail)
    return _frozen(instantiate(cfg.backbone), state, ancestors[0]["name"], pretext_pixels(cfg))


def _frozen(backbone: Backbone, state: dict[str, Tensor], source: str, pixels: Mapping[str, Any]) -> FrozenBackbone:
    load_state(backbone, state, f"backbone of '{source}'")
    return FrozenBackbone(backbone.model.eval().requires_grad_(False), backbone.name, source, pixels)


#: the stages that train a pretext method, and which of their levels does
PROBED = {"pretrain": "level", "bissl": "lower"}

#: passes over the features, enough for a few thousand of them
LINEAR_EPOCHS = 30


class _Asked(Exception):
    """The run is to stop while it measures."""


class Probe(HookBase):
    """Every `period` steps and after the last, figures of the pretext embedding; they join the metrics as `probe/...`.

    The seconds that this takes join them as `time/probe`.

    The embedding is the whole backbone's, trunk and tail, as the pretext method embeds, in eval mode and float32.
    Collapse monitors compare two fixed views of pretext images. Where there are labelled sets, a kNN classifier has
    images of `train` as neighbours and is asked about images of `test`; so is a linear one, which is trained on them.

    The run goes on as if nothing had been measured: random states, modes and batch-norm statistics are as before. Of
    several processes rank 0 measures while the others wait, since it is rank 0's batch-norm statistics that
    checkpoints hold, and no collective runs within.

    Args:
        images: most images of each set, drawn with `seed`; see :class:`Readable` for those that cannot be read.
        labelled: `train` and `test`; None for the monitors alone.
        asked: after every batch, whether this process is to stop, and to measure when it goes on.
    """

    def __init__(
        self,
        level: Level,
        context: Context,
        labelled: dict[str, Dataset] | None,
        period: int,
        images: int,
        k: int,
        linear: bool,
        seed: int,
        asked: Callable[[], bool] = lambda: False,
    ) -> None:
        self.level, self.context, self.labelled = level, context, labelled
        self.period, self.images, self.k, self.linear, self.seed = period, images, k, linear, seed
        self.asked = asked

    def after_step(self) -> None:
        """Measure when it is due; placed before the writer, so that the figures are written with this step."""
        trainer = self.trainer
        if trainer.step % self.period and not trainer.done:
            return
        start = time.perf_counter()
        measured = on_main_process(self._measure_unless_asked)
        if measured is None:
            return trainer.postpone()
        figures, line = measured
        trainer.metrics.update({f"probe/{name}": value for name, value in figures.items()})
        trainer.metrics["time/probe"] = time.perf_counter() - start
        line = f"[{trainer.name} {trainer.step}/{trainer.total_steps}] probe  {line}"
        logger.info(line)
        show(evaluation=line)

    def _measure_unless_asked(self) -> tuple[dict[str, float], str] | None:
        try:
            return self._measure()
        except _Asked:
            return None

    def _measure(self) -> tuple[dict[str, float], str]:
        """The figures, and the line that tells of them."""
        level = self.level
        with own_randomness(self.context.device), evaluating(level.backbone, level.head):
            samples = FixedViews(*self._drawn(self.context.data["pretext"], "pretext"), level.head.views(), self.seed)
            size = samples[0][0].shape[-1]
            first, second = self._features(samples, "pretext")
            if not (torch.isfinite(first).all() and torch.isfinite(second).all()):
                return {"effective_rank": math.nan}, "the embedding is not finite in eval mode"
            figures = collapse_figures(first, second)
            rank = f"effective rank {figures['effective_rank']:.1f}/{min(first.shape)}  std {figures['std']:.2f}"
            if self.labelled is None:
                return figures, rank
            parts = self._labelled_features(size)
        top1 = {"knn": knn_accuracy(*parts, k=self.k)["top1"]}
        line = f"kNN top-1 {top1['knn']:.3f} (k={self.k}, {len(parts[0])} images)"
        if self.linear:
            top1["linear"] = linear_probe(*parts, epochs=LINEAR_EPOCHS, seed=self.seed).metrics["top1"]
            line += f"  linear top-1 {top1['linear']:.3f}"
        return {**{f"{name}_top1": value for name, value in top1.items()}, **figures}, f"{line}  {rank}"

    def _labelled_features(self, size: int) -> list[torch.Tensor]:
        pixels = pretext_pixels(self.context.cfg)
        parts = []
        for role, dataset in self.labelled.items():
            samples = CentralCrops(*self._drawn(dataset, role), size, pixels["mean"], pixels["std"])
            parts += self._features(samples, role)
        return parts

    def _drawn(self, dataset: Dataset, role: str) -> tuple[Dataset, list[int]]:
        return Readable(dataset, self.context.cfg, role), drawn(len(dataset), self.images, self.seed)

    def _features(self, samples: Dataset, role: str) -> tuple[torch.Tensor, ...]:
        def embed(images: Tensor) -> Tensor:
            if self.asked():
                raise _Asked
            return self.level.head.embed(self.level.backbone, images)

        loaders = self.context.cfg.dataloader
        return extract_features(
            embed,
            samples,
            self.context.device,
            max(1, loaders.pretext.batch_size // get_world_size()),  # what training, which needs more memory, takes
            loaders[role].get("num_workers", 0),
        )


def build_probe(context: Context, trainer: Trainer, asked: Callable[[], bool] = lambda: False) -> Probe | None:
    """The hook as `train.probe` describes it; None where it is off, or the stage trains no pretext method.

    Raises:
        DatasetError: labels are to be had, and their sets, which this stage alone would not read, are missing.
    """
    settings = context.cfg.train.probe
    if not settings.period or trainer.name not in PROBED:
        return None
    level = trainer.levels()[PROBED[trainer.name]]
    labelled = _labelled(context) if settings.k else None
    figures = (settings.period, settings.images, settings.k, settings.linear)
    return Probe(level, context, labelled, *figures, seed=context.cfg.train.seed, asked=asked)


def _labelled(context: Context) -> dict[str, Dataset] | None:
    """The sets `train` and `test` where the config's task is of classes, opened where the run has not."""
    cfg, roles = context.cfg, ("train", "test")
    classes = getattr(DOWNSTREAM_TASKS.get(cfg.task.name), "single_label", False)
    if not classes or not all(role in cfg.dataloader for role in roles):
        return None
    try:
        data = context.data if set(roles) <= context.data.keys() else build_datasets(cfg, set(roles))
    except DatasetError as error:
        raise DatasetError(
            f"{error}\nIt is train.probe that asks for it, to measure kNN; train.probe.k=0 leaves that out."
        ) from error
    if not all(isinstance(Readable(data[role], cfg, role)[0][1], int) for role in roles):
        return None
    return {role: data[role] for role in roles}
