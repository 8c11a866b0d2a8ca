"""Faster R-CNN of Detectron2: its networks, data mapper and evaluator, trained by our trainers.

Detectron2 is imported when a task is built, by `detectron2_model.py` and `detectron2_data.py`: this file must import
without it.
"""

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bissl_zoo.backbones import Backbone
from bissl_zoo.data.views import IMAGENET_MEAN, IMAGENET_STD
from bissl_zoo.downstream.task import Batch, DownstreamTask
from bissl_zoo.errors import ConfigError, did_you_mean
from bissl_zoo.evaluation.detection import DetectionEvaluator
from bissl_zoo.registry import DOWNSTREAM_TASKS

INSTALL_PAGE = "https://detectron2.readthedocs.io/en/latest/tutorials/install.html"
CONFIGS = ("C4", "FPN")
EVALUATORS = ("common", "detectron2")

Target = dict[str, Any]


@DOWNSTREAM_TASKS.register("detectron2_faster_rcnn")
class Detectron2FasterRCNN(DownstreamTask):
    """Detectron2's `GeneralizedRCNN` (Wu et al., 2019), as its own configs describe it, on our backbones.

    Arguments have the names they have in :class:`bissl_zoo.downstream.detection.FasterRCNN`, so that the two change
    places in a config; None leaves a value to Detectron2. Its normalisation of pixels is in RGB, which backbones of
    timm take. `difficult` objects are left out of training.

    C4 runs on the last map of the trunk, of any stride. Detectron2's own box head on it is a `res5`, here with random
    weights, since the trunk ends before it, and with frozen batch norms, which normalise nothing as they begin; from
    random weights Detectron2 itself trains with group norm, `overrides={"roi_heads.res5.norm": "GN"}`. The head of the
    BiSSL paper (arXiv 2410.02387) has two layers: `box_head=1024`, for which the `StandardROIHeads` of Detectron2's FPN
    config are taken.

    FPN (Lin et al., arXiv 1612.03144) takes several maps: `backbone.out_features=[c2, c3, c4, c5]` and a trunk up to
    the last of them (`bilevel.shared_stage=c5`). The pyramid's own layers belong to the head.

    Args:
        config: "C4" or "FPN", of Detectron2's `configs/common/models`.
        min_size: shorter side the images are resized to; of several, one is drawn to train and the largest tests.
        max_size: the most the longer side may become, in pixels.
        fpn_channels: of the maps of the pyramid.
        anchor_sizes: sides of the square anchors in pixels; with FPN one per level, of which there is one above the
            maps.
        box_head: width of the two layers of the box head; None for a `res5` with C4 and 1024 with FPN.
        rpn_proposals: kept per image after suppression, in training and in testing.
        evaluator: "common" for the figures of :class:`DetectionEvaluator`; "detectron2" for those and, as
            `detectron2_AP` and so on, of its COCOEvaluator, to which difficult objects are crowds.
        overrides: further values by their dotted key in Detectron2's model, as {"proposal_generator.nms_thresh": 0.6}.
    Raises:
        ConfigError: Detectron2 cannot be imported; or a value that it does not know or that does not fit the backbone.
    """

    target_type = dict

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
                f"task.fpn_channels={fpn_channels} is of a pyramid, but task.config is {config}, not FPN."
            )
        self.sizes = [min_size] if isinstance(min_size, int) else list(min_size)
        self.max_size, self.flip_probability, self.figures = max_size, flip_probability, evaluator
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

    def transform(self, train: bool) -> Callable[[Any, Target], Batch]:
        """Detectron2's dicts, uint8 RGB and resized; to train, flipped at random, with the boxes in the target."""
        sizes, flip = (self.sizes, self.flip_probability) if train else ([max(self.sizes)], 0.0)
        from bissl_zoo.downstream.detectron2_data import Mapper

        return Mapper(train, sizes, self.max_size, flip)

    def collate(self, samples: list[Batch]) -> Batch:
        """A list of Detectron2's dicts and a list of targets."""
        images, targets = zip(*samples, strict=True)
        return list(images), list(targets)

    def losses(self, backbone: Backbone, batch: Batch) -> dict[str, Tensor]:
        """Detectron2's losses by its own names; train mode. One that is NaN tells of proposals that are not finite."""
        from detectron2.utils.events import EventStorage

        from bissl_zoo.downstream.detectron2_data import with_instances

        inputs = [with_instances(image, target) for image, target in zip(*batch, strict=True)]
        try:
            with self.trunk_slot.holding(backbone), EventStorage():  # to which Detectron2's losses log
                return self.model(inputs)
        except FloatingPointError:  # as a loss, the trainer tells all ranks of it, with level and step
            return {"loss_proposals": torch.full((), torch.nan, device=self.model.device)}

    @torch.no_grad()
    def predict(self, backbone: Backbone, images: list[dict[str, Any]]) -> list[Target]:
        """Per image `boxes` (M, 4) xyxy in its own pixels, `scores` (M,) and `labels` (M,) from 0; eval mode."""
        with self.trunk_slot.holding(backbone):
            found = [output["instances"] for output in self.model(images)]
        return [{"boxes": f.pred_boxes.tensor, "scores": f.scores, "labels": f.pred_classes} for f in found]

    def evaluator(self) -> DetectionEvaluator:
        """The common figures of detection as fractions, and Detectron2's beside them where `evaluator` says so."""
        if self.figures == "common":
            return DetectionEvaluator(self.classes)
        from bissl_zoo.downstream.detectron2_data import Detectron2Evaluator

        return Detectron2Evaluator(self.classes)


def _require_detectron2() -> None:
    try:
        importlib.import_module("bissl_zoo.downstream.detectron2_model")
        importlib.import_module("bissl_zoo.downstream.detectron2_data")
    except ImportError as error:
        raise ConfigError(
            f"The task 'detectron2_faster_rcnn' needs Detectron2, which cannot be imported: {error}. It has no wheel "
            f"on the package index: it must be compiled against the installed torch ({torch.__version__}), as "
            f"{INSTALL_PAGE} says, with pip's --no-build-isolation so that the build sees that torch. Without it, the "
            "task 'faster_rcnn' does the same with torchvision; bissl/voc_det.py has it."
        ) from error
