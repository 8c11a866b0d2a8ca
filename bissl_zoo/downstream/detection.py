"""Faster R-CNN (Ren et al., arXiv 1506.01497) on one map or a pyramid, with torchvision's RPN and RoI heads."""

import itertools
import math
from abc import ABC
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torch.nn import functional
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
from bissl_zoo.downstream.drawing import draw_boxes, show_image
from bissl_zoo.downstream.graph import DetectorGraph
from bissl_zoo.downstream.task import Batch, Box, DownstreamTask
from bissl_zoo.errors import ConfigError, DatasetError
from bissl_zoo.evaluation.detection import DetectionEvaluator, voc_average_precision
from bissl_zoo.registry import DOWNSTREAM_TASKS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Target = dict[str, Any]

#: sides of the anchors in pixels: all at each place of one map, or one for each map of a pyramid
ANCHOR_SIZES, PYRAMID_ANCHOR_SIZES = (16, 32, 64, 128, 256), (32, 64, 128, 256, 512)
#: boxes of the objects in an example image as fractions of its width and height; VOC has about three per image
_EXAMPLE_BOXES = ((0.04, 0.08, 0.44, 0.88), (0.48, 0.27, 0.96, 0.8), (0.3, 0.4, 0.42, 0.62))


class DetectionTask(DownstreamTask, ABC):
    """Base of detection tasks: drawing, example batches and scores of targets and predictions made of boxes.

    A target is a dict of `boxes` (N, 4) as x0, y0, x1, y1 in pixels, `labels` (N,), `difficult` (N,) and `image_id`; a
    prediction has `boxes` (M, 4), `scores` (M,) and `labels` (M,).
    """

    def example_batch(self, n: int, size: tuple[int, int]) -> Batch:
        """Return `n` images of noise with three boxes each."""
        height, width = size
        boxes = torch.tensor(_EXAMPLE_BOXES) * torch.tensor([width, height, width, height])

        def target(index: int) -> Target:
            labels = torch.full((len(boxes),), index % len(self.classes))
            difficult = torch.zeros(len(boxes), dtype=torch.bool)
            return {"boxes": boxes, "labels": labels, "difficult": difficult, "image_id": index}

        return self.random_batch(n, size, target)

    def blank_target(self, size: tuple[int, int]) -> Target:
        """Return a target without objects."""
        nothing = torch.zeros(0)
        return {"boxes": nothing.view(0, 4), "labels": nothing.long(), "difficult": nothing.bool(), "image_id": 0}

    def describe(self, prediction: Target, threshold: float = 0.5) -> dict[str, Any]:
        """Return `boxes` as x0, y0, x1, y1 in pixels of the image, `labels` as names, and `scores`, best first."""
        best = _best(prediction, threshold)
        labels = [self.classes[label] for label in best["labels"].tolist()]
        return {"boxes": best["boxes"].tolist(), "labels": labels, "scores": best["scores"].tolist()}

    def pseudo_target(self, prediction: Target, threshold: float) -> Target | None:
        """Return the boxes with at least this score as a target; None without any."""
        best = _best(prediction, threshold)
        if not len(best["boxes"]):
            return None
        difficult = torch.zeros(len(best["boxes"]), dtype=torch.bool)
        return {"boxes": best["boxes"], "labels": best["labels"], "difficult": difficult, "image_id": 0}

    def draw(self, axes: "Axes", image: Any, value: Target, predicted: bool = False, threshold: float = 0.5) -> None:
        """Draw boxes with class names and, of a prediction, scores; difficult objects are dashed."""
        if predicted:
            value = _best(value, threshold)
        boxes, labels = value["boxes"], value["labels"]
        dashed = None if predicted else value["difficult"].tolist()
        names = [self.classes[label] for label in labels.tolist()]
        counts = ", ".join(f"{count} {name}" for name, count in Counter(names).most_common())
        show_image(axes, image, counts or (f"no score ≥ {threshold:g}" if predicted else "no objects"))
        if predicted:
            names = [f"{name} {score:.2f}" for name, score in zip(names, value["scores"].tolist(), strict=True)]
        draw_boxes(axes, boxes, labels.tolist(), names, dashed)

    def score(self, prediction: Target, target: Target) -> float:
        """Return the VOC average precision at IoU 0.5 on this image; without objects, 1 minus the highest score."""
        precision = voc_average_precision([prediction], [target], len(self.classes))
        if np.isnan(precision).all():
            return 1.0 - max(prediction["scores"].tolist(), default=0.0)
        return float(np.nanmean(precision))

    def objects(self, target: Target) -> list[tuple[Box | None, int | None]]:
        """Return the boxes that are not difficult with their classes."""
        rows = zip(target["boxes"].tolist(), target["labels"].tolist(), target["difficult"].tolist(), strict=True)
        return [(tuple(box), label) for box, label, difficult in rows if not difficult]


def _best(prediction: Target, threshold: float) -> Target:
    """Return the boxes with at least this score, in descending order of their scores."""
    order = prediction["scores"].argsort(descending=True)
    order = order[prediction["scores"][order] >= threshold]
    return {key: prediction[key][order] for key in ("boxes", "labels", "scores")}


def require_boxes(target: Any) -> None:
    """Check the type of a detection target.

    Raises:
        DatasetError: not a dict of boxes.
    """
    if not isinstance(target, dict) or "boxes" not in target:
        raise DatasetError(
            f"Detection needs targets as dict of boxes, labels, difficult and image_id, not {type(target).__name__}."
        )


@DOWNSTREAM_TASKS.register("faster_rcnn")
class FasterRCNN(DetectionTask):
    """RPN and a two-layer box head on the last shared map (C4 with a ResNet up to `layer3`), or on a feature pyramid.

    The pyramid (Lin et al., arXiv 1612.03144) uses all maps in the backbone's `out_features` (for example c2 to c5).
    Its layers belong to the head. It has one more map for the largest anchors: its last map subsampled by 2. From a
    single map of stride 16, as of a ViT, ViTDet's simple pyramid is built (:class:`SimplePyramid`).

    `difficult` objects are left out of training and ignored in evaluation. The defaults are those of BiSSL (arXiv
    2410.02387, appendix on detection), otherwise torchvision's.

    Args:
        min_size, max_size: shorter side of the resized images and the limit of the longer side, in pixels.
        fpn_channels: channels of the pyramid's maps, 256 in its paper; None detects on the last map alone.
        anchor_sizes: sides of the square anchors in pixels, with a pyramid one for each of its maps; by default
            :data:`ANCHOR_SIZES` or :data:`PYRAMID_ANCHOR_SIZES`.
        anchor_ratios: height over width of the anchors.
        roi_size: side of the RoIAlign grid; sampling_ratio: samples per bin and side.
        box_head: width of the two layers of the box head.
        rpn_proposals: proposals kept per image after suppression, in training and in testing.
        rpn_batch, roi_batch: anchors and proposals sampled per image for the losses.
        score_threshold, nms_threshold, detections: limits on the predictions of an image.
        flip_probability: probability of flipping a training image left to right.
        mean, std: normalisation of images in [0, 1], per RGB channel.
    Raises:
        ConfigError: the backbone's maps do not form a pyramid, or the number of anchor sizes does not match the maps.
    """

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
        self.strides = [self.feature.stride]
        if fpn_channels is not None:
            self.maps, channels = _pyramid_stages(backbone), fpn_channels
            self.strides = [backbone.feature_info[stage].stride for stage in self.maps]
            if len(self.maps) > 1:
                given = [backbone.feature_info[stage].channels for stage in self.maps]
                self.fpn = FeaturePyramidNetwork(given, channels, LastLevelMaxPool())
            else:
                self.fpn = SimplePyramid(self.maps[0], self.feature.channels, channels)
                self.strides = [round(self.strides[0] / scale) for scale in SimplePyramid.scales]
        self.flip_probability = flip_probability
        stride = self.feature.stride
        padded = 32 if 32 % stride == 0 or stride > 32 else 2 * stride  # patches of 14 pixels
        self.resize = GeneralizedRCNNTransform(min_size, max_size, list(mean), list(std), padded)
        sizes = self._anchor_sizes(anchor_sizes)
        anchors = AnchorGenerator(sizes, (tuple(anchor_ratios),) * len(sizes))
        proposals = dict(zip(("training", "testing"), rpn_proposals, strict=True))
        self.rpn = RegionProposalNetwork(
            anchors,
            _RPNHead(channels, anchors.num_anchors_per_location()[0]),
            fg_iou_thresh=0.7,
            bg_iou_thresh=0.3,
            batch_size_per_image=rpn_batch,
            positive_fraction=0.5,
            pre_nms_top_n=proposals,
            post_nms_top_n=proposals,
            nms_thresh=0.7,
        )
        self.roi_heads = RoIHeads(
            self._roi_align(roi_size, sampling_ratio),
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

    def preprocessing(self) -> dict[str, Any]:
        """Return the sizes that an image is resized to, and the normalisation."""
        sizes = {"min_size": self.resize.min_size[0], "max_size": self.resize.max_size, "interpolation": "bilinear"}
        return {**sizes, "mean": list(self.resize.image_mean), "std": list(self.resize.image_std)}

    def transform(self, train: bool) -> Callable[[Any, Target], Batch]:
        """Return a conversion to float images in [0, 1] at their own size, with random flips for training."""
        return _DetectionTransform(self.flip_probability if train else 0.0, self.resize.max_size)

    def collate(self, samples: list[Batch]) -> Batch:
        """Return a list of images `(3, H, W)` and a list of targets."""
        images, targets = zip(*samples, strict=True)
        return list(images), list(targets)

    def losses(self, backbone: Backbone, batch: Batch) -> dict[str, Tensor]:
        """Return the RPN's and the box head's classification and box regression losses; needs train mode."""
        images, targets = batch
        objects = [
            {"boxes": t["boxes"][~t["difficult"]], "labels": t["labels"][~t["difficult"]] + 1}  # 0 is the background
            for t in targets
        ]
        resized, objects = self.resize(images, objects)
        features = self._features(backbone, resized.tensors)
        proposals, rpn_losses = self.rpn(resized, features, objects)
        _, roi_losses = self.roi_heads(features, proposals, resized.image_sizes, objects)
        return {**rpn_losses, **roi_losses}

    @torch.no_grad()
    def predict(self, backbone: Backbone, images: list[Tensor]) -> list[Target]:
        """Return per image `boxes` (M, 4) xyxy in its own pixels, `scores` (M,) and `labels` (M,) from 0; eval mode."""
        resized, _ = self.resize(images)
        features = self._features(backbone, resized.tensors)
        proposals, _ = self.rpn(resized, features)
        detections, _ = self.roi_heads(features, proposals, resized.image_sizes)
        sizes = [tuple(image.shape[-2:]) for image in images]
        detections = self.resize.postprocess(detections, resized.image_sizes, sizes)
        return [{**d, "labels": d["labels"] - 1} for d in detections]

    def graph(self, backbone: Backbone) -> DetectorGraph:
        """Return the network from one image in [0, 1] to boxes, scores and labels."""
        return DetectorGraph(backbone, self)

    def evaluator(self) -> DetectionEvaluator:
        """Return an evaluator of COCO's AP, AP50 and AP75, and VOC's AP50 in both forms, as fractions."""
        return DetectionEvaluator(self.classes)

    def _anchor_sizes(self, given: Sequence[int] | None) -> tuple[tuple[int, ...], ...]:
        """Return the anchor sizes of each map."""
        if self.fpn is None:
            return (tuple(ANCHOR_SIZES if given is None else given),)
        sizes = tuple((size,) for size in (PYRAMID_ANCHOR_SIZES if given is None else given))
        if len(sizes) != len(self.strides) + 1:
            raise ConfigError(
                f"task.anchor_sizes has {len(sizes)} sizes; the pyramid has {len(self.strides) + 1} maps (strides "
                f"{', '.join(map(str, self.strides))} and one more) and needs one size per map."
            )
        return sizes

    def _roi_align(self, roi_size: int, sampling_ratio: int) -> MultiScaleRoIAlign:
        """Return RoIAlign that reads a box from the map for its size (arXiv 1612.03144, equation 1)."""
        names = [str(level) for level in range(4)] if isinstance(self.fpn, SimplePyramid) else self.maps
        align = MultiScaleRoIAlign(names, roi_size, sampling_ratio)
        # torchvision guesses the scales from its first batch, wrongly if half of an image is padding
        align.scales = [1 / stride for stride in self.strides]
        align.map_levels = LevelMapper(*(int(math.log2(stride)) for stride in (self.strides[0], self.strides[-1])))
        return align

    def _features(self, backbone: Backbone, images: Tensor) -> dict[str, Tensor]:
        """Return the maps for detection, fine to coarse, in the dtype of the images."""
        features = backbone(images)
        features = {stage: features[stage] for stage in self.maps}
        if self.fpn is not None:
            features = self.fpn(features)
        return {name: feature.to(images.dtype) for name, feature in features.items()}


def _pyramid_stages(backbone: Backbone) -> list[str]:
    """Return the stages that the backbone returns; each must have half the resolution of the one before.

    A single map of stride 16, as of a plain ViT, becomes a :class:`SimplePyramid`.
    """
    stages = [stage for stage in backbone.stages if stage in backbone.out_features]
    strides = [backbone.feature_info[stage].stride for stage in stages]
    if strides == [16]:
        return stages
    if len(strides) < 2 or any(later != 2 * earlier for earlier, later in itertools.pairwise(strides)):
        returned = ", ".join(f"{stage} (stride {stride})" for stage, stride in zip(stages, strides, strict=True))
        raise ConfigError(
            f"task.fpn_channels: a pyramid needs two or more maps with doubling strides; '{backbone.name}' returns "
            f"{returned}. Set backbone.out_features, for example to [c2, c3, c4, c5], or task.fpn_channels=null to "
            "detect on the last map alone. A ViT needs patches of 16 pixels."
        )
    return stages


class SimplePyramid(nn.Module):
    """ViTDet's pyramid on the last map of a plain ViT (Li et al., arXiv 2203.16527, section 3).

    From the map of stride 16, maps of stride 4 and 8 come from transposed convolutions, one of 32 from max pooling;
    each passes a 1x1 and a 3x3 convolution with layer norm. The map of stride 64 subsamples the last one.

    Args:
        stage: name of the map.
        in_channels, out_channels: channels of the map, and of those that are returned.
    """

    #: resolution of the maps, relative to the given one
    scales = (4.0, 2.0, 1.0, 0.5)

    def __init__(self, stage: str, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.stage = stage
        half, quarter = in_channels // 2, in_channels // 4
        to_quarter: list[nn.Module] = [nn.ConvTranspose2d(in_channels, half, 2, 2), LayerNorm2d(half), nn.GELU()]
        resize = (
            [*to_quarter, nn.ConvTranspose2d(half, quarter, 2, 2)],
            [nn.ConvTranspose2d(in_channels, half, 2, 2)],
            [],
            [nn.MaxPool2d(2, 2)],
        )
        self.levels = nn.ModuleList()
        for layers, channels in zip(resize, (quarter, half, in_channels, in_channels), strict=True):
            lateral = nn.Conv2d(channels, out_channels, 1, bias=False), LayerNorm2d(out_channels)
            output = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False), LayerNorm2d(out_channels)
            self.levels.append(nn.Sequential(*layers, *lateral, *output))

    def forward(self, maps: dict[str, Tensor]) -> dict[str, Tensor]:
        """Map `{stage: (B, C, h, w)}` to five maps `(B, out_channels, ...)`, fine to coarse."""
        levels = [level(maps[self.stage]) for level in self.levels]
        levels.append(functional.max_pool2d(levels[-1], 1, 2))
        return {str(number): level for number, level in enumerate(levels)}


class _RPNHead(RPNHead):
    """RPN head whose outputs have the dtype of its maps, also under autocast.

    torchvision computes boxes in the dtype of the deltas; bfloat16 has 8 bits, so coordinates above 256 would be even.
    """

    def forward(self, maps: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        scores, deltas = super().forward(maps)
        return [score.to(maps[0].dtype) for score in scores], [delta.to(maps[0].dtype) for delta in deltas]


class _DetectionTransform:
    """Convert to float and flip image and boxes; a class, so that it can be pickled for spawned workers.

    torchvision cannot resize an image whose shorter side would round to 0 pixels. Such an image is first padded with
    black at its bottom or right until one pixel remains.
    """

    def __init__(self, flip_probability: float, max_size: int) -> None:
        self.flip_probability, self.max_size = flip_probability, max_size

    def __call__(self, image: Any, target: Target) -> Batch:
        require_boxes(target)
        pixels = tv.to_dtype(tv.pil_to_tensor(image), torch.float32, scale=True)
        if min(image.size) * self.max_size <= max(image.size):
            pixels = self._pad(pixels)
        if torch.rand(()) < self.flip_probability:
            width = pixels.shape[-1]
            x0, y0, x1, y1 = target["boxes"].unbind(1)
            pixels = tv.horizontal_flip(pixels)
            target = {**target, "boxes": torch.stack([width - x1, y0, width - x0, y1], dim=1)}
        return pixels, target

    def _pad(self, pixels: Tensor) -> Tensor:
        height, width = pixels.shape[-2:]
        shortest = max(height, width) // self.max_size + 1
        return tv.pad(pixels, [0, 0, max(0, shortest - width), max(0, shortest - height)])
