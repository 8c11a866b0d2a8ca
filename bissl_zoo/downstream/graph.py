"""Networks of fine-tuned models for export: one module from an image in [0, 1] to the final outputs, as tensors."""

import itertools
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models.detection.rpn import concat_box_prediction_layers
from torchvision.ops import clip_boxes_to_image, nms, roi_align

if TYPE_CHECKING:
    from bissl_zoo.backbones import Backbone
    from bissl_zoo.downstream.classification import PooledLinear
    from bissl_zoo.downstream.detection import FasterRCNN


class ClassifierGraph(nn.Module):
    """Map RGB images `(B, 3, S, S)` in [0, 1], S the size of the task's crop, to probabilities `(B, K)`."""

    outputs = ("probabilities",)
    any_batch = True

    def __init__(self, backbone: "Backbone", task: "PooledLinear") -> None:
        super().__init__()
        self.backbone, self.task = backbone, task
        self.size = (task.image_size, task.image_size)
        self.register_buffer("mean", torch.tensor(task.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(task.std).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Return the probabilities."""
        return self.task.probabilities(self.task._logits(self.backbone, (images - self.mean) / self.std))


class Logits(nn.Module):
    """Map normalised images to logits `(B, K)`, as classifiers of other libraries do."""

    def __init__(self, backbone: "Backbone", task: "PooledLinear") -> None:
        super().__init__()
        self.backbone, self.task = backbone, task

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits."""
        return self.task._logits(self.backbone, images)


class DetectorGraph(nn.Module):
    """Map one RGB image `(1, 3, H, W)` in [0, 1] to `boxes` (N, 4), `scores` (N,) and `labels` (N,) after suppression.

    The same as `FasterRCNN.predict`, without the branches on data of torchvision, which cannot be exported. H and W are
    those of the export; boxes are in its pixels.
    """

    outputs = ("boxes", "scores", "labels")
    any_batch = False

    def __init__(self, backbone: "Backbone", task: "FasterRCNN") -> None:
        super().__init__()
        self.backbone, self.task = backbone, task
        self.size = (task.resize.min_size[-1],) * 2

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return boxes, scores and labels, best first."""
        resized, _ = self.task.resize([images[0]])
        size = resized.image_sizes[0]
        features = self.task._features(self.backbone, resized.tensors)
        rois = self._proposals(resized, features, size)
        boxes, scores, labels = self._detections(features, rois, size)
        height, width = (original / new for original, new in zip(images.shape[-2:], size, strict=True))
        return boxes * torch.tensor([width, height, width, height], device=boxes.device), scores, labels

    def _proposals(self, resized, features: dict[str, Tensor], size: tuple[int, int]) -> Tensor:
        rpn = self.task.rpn
        maps = list(features.values())
        scores, deltas = rpn.head(maps)
        counts = [score[0].numel() for score in scores]
        scores, deltas = concat_box_prediction_layers(scores, deltas)
        boxes = rpn.box_coder.decode_single(deltas, rpn.anchor_generator(resized, maps)[0])
        best = []
        starts = itertools.accumulate([0, *counts[:-1]])
        for start, score in zip(starts, scores.flatten().split(counts), strict=True):
            best.append(start + score.topk(min(rpn.pre_nms_top_n(), len(score))).indices)
        level = torch.cat([torch.full_like(places, number) for number, places in enumerate(best)])
        best = torch.cat(best)
        boxes, scores = clip_boxes_to_image(boxes[best], size), scores.flatten()[best].sigmoid()
        boxes, scores, level = _large(rpn.min_size, boxes, scores, level)
        return boxes[_suppressed(boxes, scores, level, rpn.nms_thresh, size)[: rpn.post_nms_top_n()]]

    def _detections(
        self, features: dict[str, Tensor], rois: Tensor, size: tuple[int, int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        heads = self.task.roi_heads
        logits, deltas = heads.box_predictor(heads.box_head(self._pooled(features, rois)))
        classes = len(self.task.classes)
        boxes = heads.box_coder.decode_single(deltas, rois).view(-1, classes + 1, 4)
        boxes = clip_boxes_to_image(boxes, size)[:, 1:].reshape(-1, 4)  # 0 is the background
        scores = logits.softmax(dim=1)[:, 1:].flatten()
        labels = torch.arange(classes, device=rois.device).repeat(rois.shape[0])
        likely = torch.where(scores > heads.score_thresh)[0]
        boxes, scores, labels = _large(1e-2, boxes[likely], scores[likely], labels[likely])
        keep = _suppressed(boxes, scores, labels, heads.nms_thresh, size)[: heads.detections_per_img]
        return boxes[keep], scores[keep], labels[keep]

    def _pooled(self, features: dict[str, Tensor], rois: Tensor) -> Tensor:
        """Return RoIAlign of every box on the map for its size: of each map for all boxes, of which one is taken."""
        align = self.task.roi_heads.box_roi_pool
        indexed = functional.pad(rois, (1, 0))  # the number of the image, 0
        pooled = [
            roi_align(features[name], indexed, align.output_size, scale, align.sampling_ratio)
            for name, scale in zip(align.featmap_names, align.scales, strict=True)
        ]
        if len(pooled) == 1:
            return pooled[0]
        level = align.map_levels([rois]).view(-1, 1, 1, 1)
        return sum(torch.where(level == number, values, 0.0) for number, values in enumerate(pooled))


def _large(side: float, boxes: Tensor, *more: Tensor) -> tuple[Tensor, ...]:
    """Return the boxes whose sides have at least this length, and what belongs to them."""
    large = ((boxes[:, 2:] - boxes[:, :2]) >= side).all(dim=1)
    return tuple(values[large] for values in (boxes, *more))


def _suppressed(boxes: Tensor, scores: Tensor, groups: Tensor, threshold: float, size: tuple[int, int]) -> Tensor:
    """Return the places of the boxes that non-maximum suppression within each group leaves, best first."""
    apart = groups.to(boxes.dtype)[:, None] * (max(size) + 1)
    return nms(boxes + apart, scores, threshold)
