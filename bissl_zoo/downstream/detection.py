"""Faster R-CNN (Ren et al., arXiv 1506.01497) on one map or a pyramid, with torchvision's RPN and RoI heads."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool
from torchvision.ops.poolers import LevelMapper
from torchvision.transforms.v2 import functional as tv

from bissl_zoo.backbones import Backbone
from bissl_zoo.data.views import IMAGENET_MEAN, IMAGENET_STD
from bissl_zoo.downstream.task import Batch, DownstreamTask
from bissl_zoo.errors import ConfigError
from bissl_zoo.evaluation.detection import DetectionEvaluator
from bissl_zoo.registry import DOWNSTREAM_TASKS

Target = dict[str, Any]

#: sides of the anchors: all of them at each place of one map, or one for each map of a pyramid
ANCHOR_SIZES, PYRAMID_ANCHOR_SIZES = (16, 32, 64, 128, 256), (32, 64, 128, 256, 512)


@DOWNSTREAM_TASKS.register("faster_rcnn")
class FasterRCNN(DownstreamTask):
    """RPN and a two-layer box head on the last shared map (C4 with a ResNet up to `layer3`), or on a feature pyramid.

    The pyramid (Lin et al., arXiv 1612.03144) takes all maps that the backbone returns (c2 to c5 where those are its
    `out_features`), belongs to the head, and has one more map for the largest anchors: every second place of its last.

    `difficult` objects are left out of training and ignored in evaluation. The defaults are BiSSL's (arXiv 2410.02387,
    appendix on detection); what they leave open is torchvision's.

    Args:
        min_size, max_size: shorter side the images are resized to, and the most the longer one may become, in pixels.
        fpn_channels: of the maps of the pyramid, 256 in its paper; None to detect on the last map alone.
        anchor_sizes: sides of the square anchors in pixels, with a pyramid one for each of its maps; by default
            :data:`ANCHOR_SIZES` or :data:`PYRAMID_ANCHOR_SIZES`.
        anchor_ratios: height of the anchors over their width.
        roi_size: side of the RoIAlign grid; sampling_ratio: samples per bin and side.
        box_head: width of the two layers of the box head.
        rpn_proposals: proposals kept per image after suppression, in training and in testing.
        rpn_batch, roi_batch: anchors and proposals sampled per image for the losses.
        score_threshold, nms_threshold, detections: what of the predictions is kept per image.
        flip_probability: of mirroring a training image left to right.
        mean, std: normalisation of images in [0, 1], per RGB channel.
    Raises:
        ConfigError: there are no maps to make a pyramid of, or not an anchor size for each of its maps.
    """

    target_type = dict

    def __init__(
        self,
        backbone: Backbone,
        classes: Sequence[str],
        min_size: int = 196,
        max_size: int = 320,
        fpn_channels: int | None = None,
        anchor_sizes: Sequence[int] | None = None,
        anchor_ratios: Sequence[float] = (0.5, 1.0, 2.0),
        roi_size: int = 7,
        sampling_ratio: int = 2,
        box_head: int = 1024,
        rpn_proposals: tuple[int, int] = (2000, 1000),
        rpn_batch: int = 256,
        roi_batch: int = 512,
        score_threshold: float = 0.05,
        nms_threshold: float = 0.5,
        detections: int = 100,
        flip_probability: float = 0.5,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
    ) -> None:
        super().__init__(backbone, classes)
        self.maps, self.fpn, channels = [self.stage], None, self.feature.channels
        if fpn_channels is not None:
            self.maps, channels = _pyramid_stages(backbone), fpn_channels
            given = [backbone.feature_info[stage].channels for stage in self.maps]
            self.fpn = FeaturePyramidNetwork(given, channels, LastLevelMaxPool())
        self.flip_probability = flip_probability
        self.resize = GeneralizedRCNNTransform(min_size, max_size, list(mean), list(std))
        sizes = self._anchor_sizes(anchor_sizes)
        anchors = AnchorGenerator(sizes, (tuple(anchor_ratios),) * len(sizes))
        kept = dict(zip(("training", "testing"), rpn_proposals, strict=True))
        self.rpn = RegionProposalNetwork(
            anchors,
            _RPNHead(channels, anchors.num_anchors_per_location()[0]),
            fg_iou_thresh=0.7,
            bg_iou_thresh=0.3,
            batch_size_per_image=rpn_batch,
            positive_fraction=0.5,
            pre_nms_top_n=kept,
            post_nms_top_n=kept,
            nms_thresh=0.7,
        )
        self.roi_heads = RoIHeads(
            self._roi_align(backbone, roi_size, sampling_ratio),
            TwoMLPHead(channels * roi_size**2, box_head),
            FastRCNNPredictor(box_head, 1 + len(self.classes)),
            fg_iou_thresh=0.5,
            bg_iou_thresh=0.5,
            batch_size_per_image=roi_batch,
            positive_fraction=0.25,
            bbox_reg_weights=None,
            score_thresh=score_threshold,
            nms_thresh=nms_threshold,
            detections_per_img=detections,
        )

    def transform(self, train: bool) -> Callable[[Any, Target], Batch]:
        """Float images in [0, 1] at their own size; flipped left to right at random to train."""
        return _DetectionTransform(self.flip_probability if train else 0.0, self.resize.max_size)

    def collate(self, samples: list[Batch]) -> Batch:
        """A list of images `(3, H, W)` and a list of targets."""
        images, targets = zip(*samples, strict=True)
        return list(images), list(targets)

    def losses(self, backbone: Backbone, batch: Batch) -> dict[str, Tensor]:
        """RPN objectness and box regression, classification and box regression of the proposals; train mode."""
        images, targets = batch
        kept = [
            {"boxes": t["boxes"][~t["difficult"]], "labels": t["labels"][~t["difficult"]] + 1}  # 0 is the background
            for t in targets
        ]
        resized, kept = self.resize(images, kept)
        features = self._features(backbone, resized.tensors)
        proposals, rpn_losses = self.rpn(resized, features, kept)
        _, roi_losses = self.roi_heads(features, proposals, resized.image_sizes, kept)
        return {**rpn_losses, **roi_losses}

    @torch.no_grad()
    def predict(self, backbone: Backbone, images: list[Tensor]) -> list[Target]:
        """Per image `boxes` (M, 4) xyxy in its own pixels, `scores` (M,) and `labels` (M,) from 0; eval mode."""
        resized, _ = self.resize(images)
        features = self._features(backbone, resized.tensors)
        proposals, _ = self.rpn(resized, features)
        detections, _ = self.roi_heads(features, proposals, resized.image_sizes)
        sizes = [tuple(image.shape[-2:]) for image in images]
        detections = self.resize.postprocess(detections, resized.image_sizes, sizes)
        return [{**d, "labels": d["labels"] - 1} for d in detections]

    def evaluator(self) -> DetectionEvaluator:
        """COCO's AP, AP50 and AP75, and VOC's AP50 in both forms, as fractions."""
        return DetectionEvaluator(self.classes)

    def _anchor_sizes(self, given: Sequence[int] | None) -> tuple[tuple[int, ...], ...]:
        """Sizes by map."""
        if self.fpn is None:
            return (tuple(ANCHOR_SIZES if given is None else given),)
        sizes = tuple((size,) for size in (PYRAMID_ANCHOR_SIZES if given is None else given))
        if len(sizes) != len(self.maps) + 1:
            raise ConfigError(
                f"task.anchor_sizes gives {len(sizes)} sizes; the pyramid has {len(self.maps) + 1} maps (those of "
                f"{', '.join(self.maps)} and one more) and needs a size for each."
            )
        return sizes

    def _roi_align(self, backbone: Backbone, roi_size: int, sampling_ratio: int) -> MultiScaleRoIAlign:
        """RoIAlign that takes a box from the map for its size (arXiv 1612.03144, equation 1)."""
        align = MultiScaleRoIAlign(self.maps, roi_size, sampling_ratio)
        strides = [backbone.feature_info[stage].stride for stage in self.maps]
        # torchvision would guess them from its first batch, and wrongly where half an image is padding
        align.scales = [1 / stride for stride in strides]
        align.map_levels = LevelMapper(*(int(math.log2(stride)) for stride in (strides[0], strides[-1])))
        return align

    def _features(self, backbone: Backbone, images: Tensor) -> dict[str, Tensor]:
        """The maps that boxes are found on, fine to coarse, in the dtype of the images."""
        features = backbone(images)
        features = {stage: features[stage] for stage in self.maps}
        if self.fpn is not None:
            features = self.fpn(features)
        return {name: feature.to(images.dtype) for name, feature in features.items()}


def _pyramid_stages(backbone: Backbone) -> list[str]:
    """The stages that the backbone returns, if each has half the resolution of the one before."""
    stages = [stage for stage in backbone.stages if stage in backbone.out_features]
    strides = [backbone.feature_info[stage].stride for stage in stages]
    if len(strides) < 2 or any(later != 2 * earlier for earlier, later in itertools.pairwise(strides)):
        returned = ", ".join(f"{stage} (stride {stride})" for stage, stride in zip(stages, strides, strict=True))
        raise ConfigError(
            "task.fpn_channels: a pyramid takes two maps or more whose strides double from one to the next; "
            f"'{backbone.name}' returns {returned}. Name the stages in backbone.out_features, such as "
            "[c2, c3, c4, c5]; or set task.fpn_channels=null, which detects on the last map alone."
        )
    return stages


class _RPNHead(RPNHead):
    """RPN head whose outputs have the dtype of its maps, also under autocast.

    torchvision keeps anchors in the dtype of the maps, and boxes and targets in that of the deltas; with the eight bits
    of bfloat16, coordinates from 256 on would be even.
    """

    def forward(self, maps: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        scores, deltas = super().forward(maps)
        return [score.to(maps[0].dtype) for score in scores], [delta.to(maps[0].dtype) for delta in deltas]


class _DetectionTransform:
    """To float, and a flip with the boxes; a class, so that loader workers can be spawned.

    An image so thin that not a row or column of it would be left when its longer side becomes `max_size` (torchvision
    fails there) is first padded, below or at its right, by the least number of black ones that leaves one.
    """

    def __init__(self, flip_probability: float, max_size: int) -> None:
        self.flip_probability, self.max_size = flip_probability, max_size

    def __call__(self, image: Any, target: Target) -> Batch:
        pixels = tv.to_dtype(tv.pil_to_tensor(image), torch.float32, scale=True)
        if min(image.size) * self.max_size <= max(image.size):
            pixels = self._thickened(pixels)
        if torch.rand(()) < self.flip_probability:
            width = pixels.shape[-1]
            x0, y0, x1, y1 = target["boxes"].unbind(1)
            pixels = tv.horizontal_flip(pixels)
            target = {**target, "boxes": torch.stack([width - x1, y0, width - x0, y1], dim=1)}
        return pixels, target

    def _thickened(self, pixels: Tensor) -> Tensor:
        height, width = pixels.shape[-2:]
        least = max(height, width) // self.max_size + 1
        return tv.pad(pixels, [0, 0, max(0, least - width), max(0, least - height)])
