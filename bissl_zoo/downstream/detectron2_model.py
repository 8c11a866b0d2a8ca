"""Build the network of the Detectron2 task from Detectron2's own LazyConfigs; imports Detectron2.

The configs are read as files: `detectron2.model_zoo` needs `pkg_resources`, which setuptools no longer has.
"""

import contextlib
import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import detectron2
from detectron2.config import LazyCall as L
from detectron2.config import LazyConfig, instantiate
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone as Detectron2Backbone
from detectron2.modeling import GeneralizedRCNN
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from bissl_zoo.backbones import Backbone
from bissl_zoo.errors import ConfigError, did_you_mean


class TrunkSlot(Detectron2Backbone):
    """Stand in for the backbone in Detectron2's networks; hold a trunk during one call, never as a submodule."""

    def __init__(self, trunk: Backbone) -> None:
        super().__init__()
        self.shapes = {
            name: ShapeSpec(channels=trunk.feature_info[name].channels, stride=trunk.feature_info[name].stride)
            for name in trunk.out_features
        }
        self.trunk: tuple[Backbone, ...] = ()

    @contextlib.contextmanager
    def holding(self, trunk: Backbone) -> Iterator[None]:
        """Run on `trunk` within the block."""
        self.trunk = (trunk,)  # torch does not register a tuple as submodule
        try:
            yield
        finally:
            self.trunk = ()

    @property
    def size_divisibility(self) -> int:
        """Return the coarsest stride, since patch-based backbones need whole patches."""
        return max(shape.stride for shape in self.shapes.values())

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Return the channels and strides of the maps."""
        return self.shapes

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return the maps of the held trunk."""
        (trunk,) = self.trunk
        return trunk(images)


class TopLevel(LastLevelMaxPool):
    """Detectron2's coarsest pyramid level, on top of any level instead of p5."""

    def __init__(self, in_feature: str) -> None:
        super().__init__()
        self.in_feature = in_feature


def describe(
    config: str,
    slot: TrunkSlot,
    classes: int,
    *,
    fpn_channels: int | None,
    anchor_sizes: Sequence[int] | None,
    anchor_ratios: Sequence[float] | None,
    roi_size: int | None,
    sampling_ratio: int | None,
    box_head: int | None,
) -> DictConfig:
    """Return the `model` of Detectron2's LazyConfig for C4 or FPN, without masks, fitted to the maps of a trunk.

    Raises:
        ConfigError: a pyramid cannot be built on the maps, or the anchors do not match its levels.
    """
    model = _load(config)
    if config == "FPN":
        shared, proposed, channels = _fit_pyramid(model, slot, fpn_channels)
        sizes = None if anchor_sizes is None else [[size] for size in anchor_sizes]
    else:
        stage, shape = list(slot.shapes.items())[-1]
        model.backbone, channels = slot, shape.channels
        shared = proposed = {stage: shape.stride}
        sizes = None if anchor_sizes is None else [list(anchor_sizes)]
        if box_head is not None:
            model.roi_heads = _load("FPN").roi_heads
    _fit_proposals(model.proposal_generator, proposed, channels, sizes, anchor_ratios)
    _fit_heads(model.roi_heads, shared, channels, classes, roi_size, sampling_ratio, box_head)
    model.input_format = "RGB"
    return model


def change(model: DictConfig, values: Mapping[str, Any]) -> None:
    """Set values by dotted key, including arguments that the config does not mention.

    Raises:
        ConfigError: unknown section or argument (the message has the nearest name), or `input_format` is not RGB.
    """
    if values.get("input_format", "RGB") != "RGB":
        raise ConfigError(
            f"task.overrides: input_format is {values['input_format']!r}, but images are always RGB. For weights "
            "trained on BGR, bissl convert --channel-order BGR swaps the channels of the first layer."
        )
    for key, value in values.items():
        place, _, name = key.rpartition(".")
        section = OmegaConf.select(model, place) if place else model
        if not isinstance(section, DictConfig):
            sections = [path for path, item in model.items() if isinstance(item, DictConfig)]
            raise ConfigError(
                f"task.overrides: Detectron2's model has no section '{place}' (of '{key}')."
                f"{did_you_mean(place, sections)} Its sections are {', '.join(sections)}."
            )
        accepted = {*map(str, section), *_parameters(section.get("_target_"))} - {"_target_"}
        if name not in accepted:
            raise ConfigError(
                f"task.overrides: there is no '{key}' in Detectron2's model.{did_you_mean(name, accepted)} "
                f"Arguments of '{place}': {', '.join(sorted(accepted))}."
            )
        section[name] = value


def _parameters(target: Any) -> list[str]:
    parameters = inspect.signature(target).parameters.values() if callable(target) else ()
    return [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name != "self"]


def build(model: DictConfig) -> GeneralizedRCNN:
    """Return the network of a config, with feature maps in the dtype of the images.

    Under autocast the maps would be bfloat16, and RoIAlign rounds boxes to their dtype: 8 bits resolve coordinates
    above 256 to two pixels only.
    """
    network = instantiate(model)
    network.backbone.register_forward_hook(_in_dtype_of_images)
    return network


def _in_dtype_of_images(module: nn.Module, inputs: tuple[Tensor], maps: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: features.to(inputs[0].dtype) for name, features in maps.items()}


def _load(config: str) -> DictConfig:
    folder = Path(detectron2.__file__).parent / "model_zoo" / "configs" / "common" / "models"
    file = folder / f"mask_rcnn_{config.lower()}.py"
    if not file.is_file():
        raise ConfigError(f"The installed Detectron2 has no config file {file}. Install it from source.")
    model = LazyConfig.load(str(file)).model
    for key in [key for key in model.roi_heads if key.startswith("mask")]:
        del model.roi_heads[key]
    return model


def _fit_pyramid(
    model: DictConfig, slot: TrunkSlot, channels: int | None
) -> tuple[dict[str, int], dict[str, int], int]:
    """Return the levels for boxes and for proposals with their strides, and the channels of both."""
    stages, strides = list(slot.shapes), [shape.stride for shape in slot.shapes.values()]
    if len(strides) < 2 or any(2 * fine != coarse for fine, coarse in zip(strides, strides[1:], strict=False)):
        raise ConfigError(
            f"task.config=FPN needs maps with doubling strides; the trunk's maps {', '.join(stages)} have strides "
            f"{', '.join(map(str, strides))}. Set backbone.out_features=[c2, c3, c4, c5] and bilevel.shared_stage=c5."
        )
    levels = {f"p{int(math.log2(stride))}": stride for stride in strides}
    coarsest, above = (f"p{int(math.log2(factor * strides[-1]))}" for factor in (1, 2))
    pyramid = model.backbone
    pyramid.bottom_up, pyramid.in_features = slot, stages
    pyramid.top_block = L(TopLevel)(in_feature=coarsest)
    pyramid.out_channels = pyramid.out_channels if channels is None else channels
    return levels, {**levels, above: 2 * strides[-1]}, pyramid.out_channels


def _fit_proposals(
    proposals: DictConfig,
    levels: Mapping[str, int],
    channels: int,
    anchor_sizes: list[list[int]] | None,
    anchor_ratios: Sequence[float] | None,
) -> None:
    anchors = proposals.anchor_generator
    anchors.sizes = anchors.sizes if anchor_sizes is None else anchor_sizes
    anchors.aspect_ratios = anchors.aspect_ratios if anchor_ratios is None else list(anchor_ratios)
    if len(anchors.sizes) != len(levels):
        raise ConfigError(
            f"task.anchor_sizes has {len(anchors.sizes)} sizes; FPN needs one for each of its levels "
            f"{', '.join(levels)}."
        )
    anchors.strides = list(levels.values())
    proposals.in_features = list(levels)
    proposals.head.in_channels = channels
    proposals.head.num_anchors = len(anchors.sizes[0]) * len(anchors.aspect_ratios)


def _fit_heads(
    heads: DictConfig,
    levels: Mapping[str, int],
    channels: int,
    classes: int,
    roi_size: int | None,
    sampling_ratio: int | None,
    box_head: int | None,
) -> None:
    heads.num_classes = classes
    pooler = heads.pooler if "res5" in heads else heads.box_pooler
    pooler.scales = [1 / stride for stride in levels.values()]
    pooler.output_size = pooler.output_size if roi_size is None else roi_size
    pooler.sampling_ratio = pooler.sampling_ratio if sampling_ratio is None else sampling_ratio
    if "res5" in heads:
        heads.in_features = list(levels)
        heads.res5.update(in_channels=channels, bottleneck_channels=channels // 2, out_channels=2 * channels)
        return
    heads.box_in_features = list(levels)
    side = pooler.output_size
    heads.box_head.input_shape = L(ShapeSpec)(channels=channels, height=side, width=side)
    if box_head is not None:
        heads.box_head.fc_dims = [box_head, box_head]
        heads.box_predictor.input_shape = L(ShapeSpec)(channels=box_head)
