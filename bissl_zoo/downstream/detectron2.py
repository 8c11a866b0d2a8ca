"""Faster R-CNN of Detectron2: its networks, data mapper and evaluator, on backbones of this package.

This module imports without Detectron2. Building a task imports it, through `detectron2_model.py` and
`detectron2_data.py`.
"""

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bissl_zoo.backbones import Backbone
from bissl_zoo.data.views import IMAGENET_MEAN, IMAGENET_STD
from bissl_zoo.downstream.detection import DetectionTask
from bissl_zoo.downstream.task import Batch
from bissl_zoo.errors import ConfigError, did_you_mean
from bissl_zoo.evaluation.detection import DetectionEvaluator
from bissl_zoo.registry import DOWNSTREAM_TASKS

INSTALL_PAGE = "https://detectron2.readthedocs.io/en/latest/tutorials/install.html"
CONFIGS = ("C4", "FPN")
EVALUATORS = ("common", "detectron2")

Target = dict[str, Any]


@DOWNSTREAM_TASKS.register("detectron2_faster_rcnn")
class Detectron2FasterRCNN(DetectionTask):
    """Detectron2's `GeneralizedRCNN` (Wu et al., 2019) in its own configuration, on backbones of this package.

    Arguments have the names of :class:`bissl_zoo.downstream.detection.FasterRCNN`, so that a config can exchange the
    two tasks; None keeps Detectron2's value. Pixels are normalised in RGB, as timm's backbones expect. `difficult`
    objects are left out of training.

    C4 runs on the last map of the trunk, of any stride. Detectron2's own box head on it is a `res5`. It starts from
    random weights, since the trunk ends before it, and its batch norms are frozen at the identity; Detectron2 uses
    group norm for training from random weights: `overrides={"roi_heads.res5.norm": "GN"}`. The head of the BiSSL paper
    (arXiv 2410.02387) has two layers: `box_head=1024` selects the `StandardROIHeads` of Detectron2's FPN config.

    FPN (Lin et al., arXiv 1612.03144) needs several maps: `backbone.out_features=[c2, c3, c4, c5]` and a trunk up to
    the last of them (`bilevel.shared_stage=c5`). The layers of the pyramid belong to the head.

    Args:
        config: "C4" or "FPN", from Detectron2's `configs/common/models`.
        min_size: shorter side of the resized images in pixels; of several, training draws one and testing uses the
            largest.
        max_size: limit of the longer side in pixels.
        fpn_channels: channels of the pyramid's maps.
        anchor_sizes: sides of the square anchors in pixels; with FPN one per level (one more than there are maps).
        box_head: width of the two layers of the box head; None: `res5` with C4, 1024 with FPN.
        rpn_proposals: proposals kept per image after suppression, in training and in testing.
        evaluator: "common" for the metrics of :class:`DetectionEvaluator`; "detectron2" adds those of COCOEvaluator as
            `detectron2_AP` and so on; it treats difficult objects as crowds.
        overrides: further values by dotted key in Detectron2's model, such as {"proposal_generator.nms_thresh": 0.6}.
    Raises:
        ConfigError: Detectron2 cannot be imported, or it does not know a value, or a value does not fit the backbone.
    """

    def __init__(
        self,
        backbone: Backbone,
        classes: Sequence[str],
        config: str = "C4",
        min_size: int | Sequence[int] = (640, 672, 704, 736, 768, 800),
        max_size: int = 1333,
        fpn_channels: int | None = None,
        anchor_sizes: Sequence[int] | None = None,
        anchor_ratios: Sequence[float] | None = None,
        roi_size: int | None = None,
        sampling_ratio: int | None = None,
        box_head: int | None = None,
        rpn_proposals: tuple[int, int] | None = None,
        rpn_batch: int | None = None,
        roi_batch: int | None = None,
        score_threshold: float | None = None,
        nms_threshold: float | None = None,
        detections: int | None = None,
        flip_probability: float = 0.5,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        evaluator: str = "detectron2",
        overrides: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(backbone, classes)
        for name, value, choices in (("config", config, CONFIGS), ("evaluator", evaluator, EVALUATORS)):
            if value not in choices:
                hint = did_you_mean(str(value), choices)
                raise ConfigError(f"task.{name} is {value!r}; accepted are {' and '.join(choices)}.{hint}")
        if fpn_channels is not None and config != "FPN":
            raise ConfigError(
                f"task.fpn_channels={fpn_channels} needs a pyramid, but task.config is {config}, not FPN."
            )
        self.sizes = [min_size] if isinstance(min_size, int) else list(min_size)
        self.max_size, self.flip_probability, self.metrics = max_size, flip_probability, evaluator
        _require_detectron2()
        from bissl_zoo.downstream.detectron2_model import TrunkSlot, build, change, describe

        self.trunk_slot = TrunkSlot(backbone)
        described = describe(
            config,
            self.trunk_slot,
            len(classes),
            fpn_channels=fpn_channels,
            anchor_sizes=anchor_sizes,
            anchor_ratios=anchor_ratios,
            roi_size=roi_size,
            sampling_ratio=sampling_ratio,
            box_head=box_head,
        )
        given = {
            "proposal_generator.post_nms_topk": rpn_proposals,
            "proposal_generator.batch_size_per_image": rpn_batch,
            "roi_heads.batch_size_per_image": roi_batch,
            "roi_heads.box_predictor.test_score_thresh": score_threshold,
            "roi_heads.box_predictor.test_nms_thresh": nms_threshold,
            "roi_heads.box_predictor.test_topk_per_image": detections,
            "pixel_mean": [255 * value for value in mean],
            "pixel_std": [255 * value for value in std],
        }
        change(described, {key: value for key, value in given.items() if value is not None})
        change(described, overrides or {})
        self.model = build(described)
        self.mean, self.std = list(mean), list(std)

    def preprocessing(self) -> dict[str, Any]:
        """Return the sizes that an image is resized to, and the normalisation."""
        sizes = {"min_size": max(self.sizes), "max_size": self.max_size, "interpolation": "bilinear"}
        return {**sizes, "mean": self.mean, "std": self.std}

    def transform(self, train: bool) -> Callable[[Any, Target], Batch]:
        """Return a mapper to Detectron2's dicts (uint8 RGB, resized), with random flips of image and boxes to train."""
        sizes, flip = (self.sizes, self.flip_probability) if train else ([max(self.sizes)], 0.0)
        from bissl_zoo.downstream.detectron2_data import Mapper

        return Mapper(train, sizes, self.max_size, flip)

    def collate(self, samples: list[Batch]) -> Batch:
        """Return a list of Detectron2's dicts and a list of targets."""
        images, targets = zip(*samples, strict=True)
        return list(images), list(targets)

    def losses(self, backbone: Backbone, batch: Batch) -> dict[str, Tensor]:
        """Return Detectron2's losses under its own names; needs train mode.

        Proposals that are not finite give a single NaN loss, so that all ranks see it.
        """
        from detectron2.utils.events import EventStorage

        from bissl_zoo.downstream.detectron2_data import with_instances

        inputs = [with_instances(image, target) for image, target in zip(*batch, strict=True)]
        try:
            with self.trunk_slot.holding(backbone), EventStorage():  # Detectron2's losses log to it
                return self.model(inputs)
        except FloatingPointError:  # the trainer reports a NaN loss on all ranks, with level and step
            return {"loss_proposals": torch.full((), torch.nan, device=self.model.device)}

    @torch.no_grad()
    def predict(self, backbone: Backbone, images: list[dict[str, Any]]) -> list[Target]:
        """Return per image `boxes` (M, 4) xyxy in its own pixels, `scores` (M,) and `labels` (M,) from 0; eval mode."""
        with self.trunk_slot.holding(backbone):
            instances = [output["instances"] for output in self.model(images)]
        return [{"boxes": i.pred_boxes.tensor, "scores": i.scores, "labels": i.pred_classes} for i in instances]

    def evaluator(self) -> DetectionEvaluator:
        """Return an evaluator of the common detection metrics, by default with Detectron2's in addition."""
        if self.metrics == "common":
            return DetectionEvaluator(self.classes)
        from bissl_zoo.downstream.detectron2_data import Detectron2Evaluator

        return Detectron2Evaluator(self.classes)


def _require_detectron2() -> None:
    try:
        importlib.import_module("bissl_zoo.downstream.detectron2_model")
        importlib.import_module("bissl_zoo.downstream.detectron2_data")
    except ImportError as error:
        raise ConfigError(
            f"The task 'detectron2_faster_rcnn' needs Detectron2, which cannot be imported: {error}. It must be "
            f"compiled against the installed torch ({torch.__version__}) with pip's --no-build-isolation, see "
            f"{INSTALL_PAGE}. The task 'faster_rcnn' (bissl/voc_det.py) does the same with torchvision."
        ) from error
