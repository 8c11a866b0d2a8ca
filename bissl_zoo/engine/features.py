"""Features of a frozen backbone: loading it, a pass over images, and the hook that probes a training network."""

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2
from tqdm import tqdm

from bissl_zoo.backbones import Backbone, evaluating, share, tail_input
from bissl_zoo.bilevel.level import Level
from bissl_zoo.data.views import IMAGENET_MEAN, IMAGENET_STD
from bissl_zoo.distributed import get_world_size, on_main_process
from bissl_zoo.engine.build import Decodable, build_datasets
from bissl_zoo.engine.init import pretext_pixels
from bissl_zoo.engine.resume import preserved_randomness, seed_everything
from bissl_zoo.engine.trainer import Context, Hook, Stage
from bissl_zoo.errors import CheckpointError, DatasetError
from bissl_zoo.evaluation import collapse_metrics, knn_accuracy, linear_probe
from bissl_zoo.progress.display import show
from bissl_zoo.registry import DOWNSTREAM_TASKS, build_backbone
from bissl_zoo.weights.load import entry_or_source, read_weights

logger = logging.getLogger(__name__)

#: side of the crop relative to the shorter side of the image, 224 / 256
CROP = 0.875


class CentralCrops(Dataset):
    """Items `(central crop (3, S, S), target)`, normalised, of the labelled images `indices` of a data set.

    The shorter side is resized to S / 0.875 first, the usual test transform of ImageNet.
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
    """Items `(view,)`, the first view of each of the images `indices`, which is the same in every pass.

    Draws depend on `seed` and the image only, not on the number of workers. They change the random state: iterate
    within :func:`preserved_randomness`.
    """

    def __init__(
        self, dataset: Dataset, indices: Sequence[int], views: Callable[[Image.Image], tuple[Tensor, ...]], seed: int
    ) -> None:
        self.dataset, self.indices, self.views, self.seed = dataset, list(indices), views, seed

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> tuple[Tensor]:
        seed_everything(self.seed * 1_000_003 + self.indices[position])
        return (self.views(self.dataset[self.indices[position]][0])[0],)


def sample_indices(size: int, limit: int, seed: int) -> list[int]:
    """Return at most `limit` of the numbers below `size`, drawn with `seed` and sorted."""
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
    """Return the embeddings `(N, D)` or labels `(N,)` of each position in the tuples of images and labels `samples`.

    Args:
        embed: maps images `(B, 3, S, S)` on `device` to `(B, D)`.
        title: of the progress bar; None for no bar.
    Returns:
        Tensors on the CPU, embeddings as float32.
    """
    # a loader without a generator draws from the global one
    loader = DataLoader(samples, batch_size, num_workers=num_workers, generator=torch.Generator())
    batches = [
        [embed(part.to(device)).float().cpu() if part.is_floating_point() else part for part in batch]
        for batch in tqdm(loader, desc=title, unit="batch", disable=title is None, leave=False)
    ]
    return tuple(torch.cat(column) for column in zip(*batches, strict=True))


@dataclass(frozen=True)
class FrozenBackbone:
    """A whole backbone in eval mode.

    Attributes:
        model: maps images `(B, 3, S, S)` to pooled embeddings `(B, D)`.
        source: its origin, for messages.
        pixels: `mean` and `std` of RGB in [0, 1], and `input_size`, as far as they are known.
    """

    model: nn.Module
    architecture: str
    source: str
    pixels: Mapping[str, Any]

    @torch.no_grad()
    def width(self, size: int) -> int:
        """Return D, from a pass over a blank image of this size.

        Raises:
            CheckpointError: the network does not accept such images, as a ViT for another size.
        """
        try:
            return self.model(torch.zeros(1, 3, size, size, device=next(self.model.parameters()).device)).shape[1]
        except (RuntimeError, AssertionError, ValueError) as error:
            raise CheckpointError(
                f"{self.source}: this {self.architecture} does not accept images of {size} pixels ({error}). "
                "Give the size it was built for, as in --size 224."
            ) from error

    def central_crops(
        self,
        dataset: Dataset,
        indices: Sequence[int],
        size: int,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> CentralCrops:
        """Return crops of a labelled data set, normalised by `mean` and `std`, by default those of the backbone.

        Raises:
            CheckpointError: the backbone's are unknown.
        """
        pixels = {"mean": mean, "std": std} if mean else self.pixels
        if "mean" not in pixels or "std" not in pixels:
            raise CheckpointError(
                f"{self.source} does not contain the mean and std of its images. Give --mean and --std, of RGB in "
                "[0, 1]; ImageNet's are --mean 0.485 0.456 0.406 --std 0.229 0.224 0.225."
            )
        return CentralCrops(dataset, indices, size, pixels["mean"], pixels["std"])


def load_frozen(source: str, architecture: str | None = None) -> FrozenBackbone:
    """Load a backbone by its name on a command line.

    Args:
        source: the plain NAME of a zoo entry, or a source of :func:`bissl_zoo.weights.load.read_weights`; a run
            directory stands for the backbone of its last pretext stage.
        architecture: of a source that does not state it.
    Raises:
        ZooError: the source is not found, or the weights do not fit.
        CheckpointError: the run has no whole backbone.
    """
    stored = read_weights(entry_or_source(source), architecture)
    backbone = build_backbone(name=stored.architecture, **stored.model_args)
    backbone.load_state_dict(stored.state)
    name = stored.source if Path(source).is_dir() else source
    return FrozenBackbone(whole_embedding(backbone), backbone.name, name, stored.pixels or {})


def whole_embedding(backbone: nn.Module) -> nn.Module:
    """Return a frozen network in eval mode from images `(B, 3, S, S)` to the pooled embeddings of a whole backbone."""
    network = backbone.model if isinstance(backbone, Backbone) else Embedding(*share(backbone))
    return network.eval().requires_grad_(False)


class Embedding(nn.Module):
    """Map images to embeddings by a trunk and its tail."""

    def __init__(self, trunk: nn.Module, tail: nn.Module) -> None:
        super().__init__()
        self.trunk, self.tail = trunk, tail

    def forward(self, images: Tensor) -> Tensor:
        """Map `(B, 3, S, S)` to `(B, D)`."""
        return self.tail(tail_input(self.trunk(images), self.trunk.out_features[-1]))


#: passes over the features of a linear probe, enough for a few thousand of them
LINEAR_EPOCHS = 30


class _StopRequested(Exception):
    """The run is to stop during a measurement."""


class Probe(Hook):
    """Measure the pretext embedding every `period` steps and after the last; metrics are added as `probe/...`.

    The duration is added as `time/probe`. The embedding is that of the whole backbone, trunk and tail, as the pretext
    method embeds, in eval mode and float32. Collapse monitors compare two fixed views of pretext images. With labelled
    sets, a kNN and a linear classifier are fitted to images of `train` and tested on images of `test`.

    Training continues unchanged: random states, modes and batch-norm statistics are restored. Rank 0 measures alone,
    since checkpoints hold its batch-norm statistics, and no collective runs meanwhile.

    Args:
        level: key of the level in the trainer.
        images: largest number of images of each set, drawn with `seed`.
        k: neighbours; 0 for the collapse monitors only.
        linear: fit the linear classifier as well.
    """

    def __init__(
        self, context: Context, level: str, period: int, images: int, k: int, linear: bool, seed: int = 0
    ) -> None:
        self.context, self.level_name, self.period = context, level, period
        self.images, self.k, self.linear, self.seed = images, k, linear, seed
        self.labelled = _labelled(context) if k else None

    @property
    def level(self) -> Level:
        """The level whose embedding is measured."""
        return self.trainer.levels()[self.level_name]

    def after_step(self) -> None:
        """Measure if it is due; runs before the writer, so that the metrics belong to this step."""
        trainer = self.trainer
        if trainer.step % self.period and not trainer.done:
            return
        start = time.perf_counter()
        measured = on_main_process(self._measure_unless_stopped)
        seconds = time.perf_counter() - start
        trainer.timings["probe"] += seconds
        if measured is None:
            return trainer.postpone()
        metrics, line = measured
        trainer.metrics.update({f"probe/{name}": value for name, value in metrics.items()})
        trainer.metrics["time/probe"] = seconds
        line = f"[{trainer.name} {trainer.step}/{trainer.total_steps}] probe  {line}"
        logger.info(line)
        show(evaluation=line)

    def _measure_unless_stopped(self) -> tuple[dict[str, float], str] | None:
        try:
            return self._measure()
        except _StopRequested:
            return None

    def _measure(self) -> tuple[dict[str, float], str]:
        """Return the metrics, and a line that shows them."""
        level = self.level
        with preserved_randomness(self.context.device), evaluating(level.backbone, level.head):
            samples = FixedViews(*self._sample(self.context.data["pretext"], "pretext"), level.head.views(), self.seed)
            size = samples[0][0].shape[-1]
            (embeddings,) = self._features(samples, "pretext")
            if not torch.isfinite(embeddings).all():
                return {"effective_rank": math.nan}, "the embedding is not finite in eval mode"
            metrics = collapse_metrics(embeddings)
            rank = f"effective rank {metrics['effective_rank']:.1f}/{min(embeddings.shape)}  std {metrics['std']:.2f}"
            if self.labelled is None:
                return metrics, rank
            parts = self._labelled_features(size)
        top1 = {"knn": knn_accuracy(*parts, k=self.k)["top1"]}
        line = f"kNN top-1 {top1['knn']:.3f} (k={self.k}, {len(parts[0])} images)"
        if self.linear:
            top1["linear"] = linear_probe(*parts, epochs=LINEAR_EPOCHS, seed=self.seed).metrics["top1"]
            line += f"  linear top-1 {top1['linear']:.3f}"
        return {**{f"{name}_top1": value for name, value in top1.items()}, **metrics}, f"{line}  {rank}"

    def _labelled_features(self, size: int) -> list[Tensor]:
        pixels = pretext_pixels(self.context.cfg)
        parts = []
        for role, dataset in self.labelled.items():
            samples = CentralCrops(*self._sample(dataset, role), size, pixels["mean"], pixels["std"])
            parts += self._features(samples, role)
        return parts

    def _sample(self, dataset: Dataset, role: str) -> tuple[Dataset, list[int]]:
        return Decodable(dataset, self.context.cfg, role), sample_indices(len(dataset), self.images, self.seed)

    def _features(self, samples: Dataset, role: str) -> tuple[Tensor, ...]:
        def embed(images: Tensor) -> Tensor:
            if self.context.stop.asked():
                raise _StopRequested
            return self.level.head.embed(self.level.backbone, images)

        loaders = self.context.cfg.dataloader
        return extract_features(
            embed,
            samples,
            self.context.device,
            max(1, loaders.pretext.batch_size // get_world_size()),  # training, which needs more memory, uses it too
            loaders[role].get("num_workers", 0),
        )


def build_probe(context: Context, stage: Stage) -> Probe | None:
    """Return the hook that `train.probe` describes; None if it is off or the stage trains no pretext method.

    Raises:
        DatasetError: the labelled data sets, which this stage alone would not read, are missing.
    """
    settings = context.cfg.train.probe
    if not settings.period or not stage.probed:
        return None
    return Probe(context, stage.probed, **settings, seed=context.cfg.train.seed)


def _labelled(context: Context) -> dict[str, Dataset] | None:
    """Return the data sets `train` and `test` if the config's task has class targets, opened if the run has not."""
    cfg, roles = context.cfg, ("train", "test")
    classes = getattr(DOWNSTREAM_TASKS.get(cfg.task.name), "single_label", False)
    if not classes or not all(role in cfg.dataloader for role in roles):
        return None
    try:
        data = context.data if set(roles) <= context.data.keys() else build_datasets(cfg, set(roles))
    except DatasetError as error:
        raise DatasetError(
            f"{error}\ntrain.probe needs this data set to measure kNN; train.probe.k=0 switches that off."
        ) from error
    if not all(isinstance(Decodable(data[role], cfg, role)[0][1], int) for role in roles):
        return None
    return {role: data[role] for role in roles}
