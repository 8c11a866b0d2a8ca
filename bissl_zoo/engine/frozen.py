"""A backbone to be measured as it is: from the zoo, a file or a run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from bissl_zoo.backbones import Backbone, merge_split_states
from bissl_zoo.config import instantiate
from bissl_zoo.engine.features import CentralCrops, pretext_pixels
from bissl_zoo.engine.init import ZOO_PREFIX, load_init
from bissl_zoo.engine.trainer import load_state
from bissl_zoo.errors import CheckpointError
from bissl_zoo.registry import build_backbone
from bissl_zoo.runs.directory import CONFIG_FILE, load_run_config
from bissl_zoo.weights.backbone_file import read_backbone


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
