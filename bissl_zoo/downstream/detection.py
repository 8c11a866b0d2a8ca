"""Faster R-CNN (Ren et al., arXiv 1506.01497) on one feature map, with torchvision's RPN and RoI heads."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import MultiScaleRoIAlign
from torchvision.transforms.v2 import functional as tv

from bissl_zoo.backbones import Backbone
from bissl_zoo.data.views import IMAGENET_MEAN, IMAGENET_STD
from bissl_zoo.downstream.task import Batch, DownstreamTask
from bissl_zoo.evaluation.detection import DetectionEvaluator
from bissl_zoo.registry import DOWNSTREAM_TASKS

Target = dict[str, Any]


@DOWNSTREAM_TASKS.register("faster_rcnn")
class FasterRCNN(DownstreamTask):
    """RPN and a two-layer box head on the last shared map (C4 with a ResNet up to `layer3`).

    `difficult` objects are left out of training and ignored in evaluation. The defaults are BiSSL's (arXiv 2410.02387,
    appendix on detection); what they leave open is torchvision's.

    Args:
        min_size, max_size: shorter side the images are resized to, and the most the longer one may become, in pixels.
        anchor_sizes: sides of the square anchors in pixels; anchor_ratios: their height over width.
        roi_size: side of the RoIAlign grid; sampling_ratio: samples per bin and side.
        box_head: width of the two layers of the box head.
        rpn_proposals: proposals kept per image after suppression, in training and in testing.
        rpn_batch, roi_batch: anchors and proposals sampled per image for the losses.
        score_threshold, nms_threshold, detections: what of the predictions is kept per image.
        flip_probability: of mirroring a training image left to right.
        mean, std: normalisation of images in [0, 1], per RGB channel.
    """

    target_type = dict

    def __init__(
        self,
        backbone: Backbone,
        classes: Sequence[str],
        min_size: int = 196,
        max_size: int = 320,
        anchor_sizes: Sequence[int] = (16, 32, 64, 128, 256),
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
        channels = self.feature.channels
        self.flip_probability = flip_probability
        self.resize = GeneralizedRCNNTransform(min_size, max_size, list(mean), list(std))
        anchors = AnchorGenerator((tuple(anchor_sizes),), (tuple(anchor_ratios),))
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
            MultiScaleRoIAlign([self.stage], roi_size, sampling_ratio),
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
        return _DetectionTransform(self.flip_probability if train else 0.0)

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
        features = _in_dtype_of(resized.tensors, backbone(resized.tensors))
        proposals, rpn_losses = self.rpn(resized, features, kept)
        _, roi_losses = self.roi_heads(features, proposals, resized.image_sizes, kept)
        return {**rpn_losses, **roi_losses}

    @torch.no_grad()
    def predict(self, backbone: Backbone, images: list[Tensor]) -> list[Target]:
        """Per image `boxes` (M, 4) xyxy in its own pixels, `scores` (M,) and `labels` (M,) from 0; eval mode."""
        resized, _ = self.resize(images)
        features = _in_dtype_of(resized.tensors, backbone(resized.tensors))
        proposals, _ = self.rpn(resized, features)
        detections, _ = self.roi_heads(features, proposals, resized.image_sizes)
        sizes = [tuple(image.shape[-2:]) for image in images]
        detections = self.resize.postprocess(detections, resized.image_sizes, sizes)
        return [{**d, "labels": d["labels"] - 1} for d in detections]

    def evaluator(self) -> DetectionEvaluator:
        """COCO's AP, AP50 and AP75, and VOC's AP50 in both forms, as fractions."""
        return DetectionEvaluator(self.classes)


class _RPNHead(RPNHead):
    """RPN head whose outputs have the dtype of its maps, also under autocast.

    torchvision keeps anchors in the dtype of the maps, and boxes and targets in that of the deltas; with the eight bits
    of bfloat16, coordinates from 256 on would be even.
    """

    def forward(self, maps: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        scores, deltas = super().forward(maps)
        return [score.to(maps[0].dtype) for score in scores], [delta.to(maps[0].dtype) for delta in deltas]


def _in_dtype_of(images: Tensor, features: dict[str, Tensor]) -> dict[str, Tensor]:
    return {stage: feature.to(images.dtype) for stage, feature in features.items()}


class _DetectionTransform:
    """To float, and a flip with the boxes; a class, so that loader workers can be spawned."""

    def __init__(self, flip_probability: float) -> None:
        self.flip_probability = flip_probability

    def __call__(self, image: Any, target: Target) -> Batch:
        pixels = tv.to_dtype(tv.pil_to_tensor(image), torch.float32, scale=True)
        if torch.rand(()) < self.flip_probability:
            width = pixels.shape[-1]
            x0, y0, x1, y1 = target["boxes"].unbind(1)
            pixels = tv.horizontal_flip(pixels)
            target = {**target, "boxes": torch.stack([width - x1, y0, width - x0, y1], dim=1)}
        return pixels, target
