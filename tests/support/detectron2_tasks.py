"""Small Detectron2 tasks of each kind, and the same put together from Detectron2's own parts."""

import importlib.util

import numpy as np
import pytest
import torch
from PIL import Image

import bissl_zoo.downstream.detectron2  # noqa: F401  # registers the task, without Detectron2
from bissl_zoo.registry import build_backbone, build_task
from bissl_zoo.weights.export import export_backbone

needs_detectron2 = pytest.mark.skipif(
    importlib.util.find_spec("detectron2") is None,
    reason="Detectron2 is not installed; it has no wheel and must be compiled against the installed torch",
)
CLASSES = ["cat", "dog"]
PYRAMID = ("c2", "c3", "c4", "c5")
SMALL = dict(min_size=64, max_size=96, score_threshold=0.0, detections=20, roi_batch=64)
#: what each kind of network is built with, and the stages that it runs on
KINDS = {
    "res5": (dict(config="C4", anchor_sizes=[8, 16, 32]), ("c4",)),
    "two layers": (dict(config="C4", anchor_sizes=[8, 16, 32], box_head=32), ("c4",)),
    "FPN": (dict(config="FPN", fpn_channels=32, anchor_sizes=[8, 16, 24, 32, 64], box_head=32), PYRAMID),
}


def build(kind="two layers", name="test_resnet", **kwargs):
    torch.manual_seed(0)
    settings, stages = KINDS[kind]
    whole = build_backbone(name=name)
    trunk, _ = whole.split(stages[-1], stages)
    settings = {"backbone": trunk, "classes": CLASSES, **SMALL, **settings, **kwargs}
    return whole, trunk, build_task(name="detectron2_faster_rcnn", **settings)


def target(boxes, labels, difficult=None, image_id=0):
    return {
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        "labels": torch.tensor(labels, dtype=torch.int64),
        "difficult": torch.tensor(difficult or [False] * len(labels), dtype=torch.bool),
        "image_id": image_id,
    }


def samples(sizes=((48, 32), (32, 48))):
    """Noise in strips of red, green and blue, of these widths and heights, with two and one objects."""
    rng = np.random.default_rng(1)
    targets = [
        target([[4, 6, 30, 28], [20, 8, 44, 30]], [0, 1]),
        target([[6, 10, 28, 40]], [1], image_id=1),
    ]
    images = [rng.integers(0, 255, (height, width, 3), dtype=np.uint8) for width, height in sizes]
    for image in images:
        image[:, ::2, 1:] //= 4
    return [(Image.fromarray(image), found) for image, found in zip(images, targets, strict=True)]


def batch_of(task, pairs, train=True):
    transform = task.transform(train)
    return task.collate([transform(*pair) for pair in pairs])


def losses(trunk, task, batch, seed=3):
    torch.manual_seed(seed)  # proposals are sampled
    return task.losses(trunk, batch)


def direct(kind, task, whole, folder):
    """Detectron2's own network, put together by hand, with our weights; the backbone's by way of a file of ours."""
    from detectron2.checkpoint import DetectionCheckpointer
    from detectron2.layers import ShapeSpec
    from detectron2.modeling import FPN, GeneralizedRCNN, ResNet
    from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
    from detectron2.modeling.backbone import BasicStem, BottleneckBlock
    from detectron2.modeling.backbone.fpn import LastLevelMaxPool
    from detectron2.modeling.box_regression import Box2BoxTransform
    from detectron2.modeling.matcher import Matcher
    from detectron2.modeling.poolers import ROIPooler
    from detectron2.modeling.proposal_generator import RPN, StandardRPNHead
    from detectron2.modeling.roi_heads import (
        FastRCNNConvFCHead,
        FastRCNNOutputLayers,
        Res5ROIHeads,
        StandardROIHeads,
    )

    stages = {"FPN": ["res2", "res3", "res4", "res5"]}.get(kind, ["res4"])
    blocks = ResNet.make_default_stages(depth=18, norm="FrozenBN")
    backbone = ResNet(BasicStem(norm="FrozenBN"), blocks, out_features=stages)
    path = folder / "resnet18.pkl"
    export_backbone(whole.state_dict(), "resnet18", "detectron2", path)
    DetectionCheckpointer(backbone).load(str(path))
    levels, strides, channels, sizes = ["res4"], [16], 256, [[8, 16, 32]]
    if kind == "FPN":
        backbone = FPN(backbone, stages, 32, top_block=LastLevelMaxPool())
        for name, child in task.model.backbone.named_children():  # one by one, as Detectron2 resets what is missing
            if name.startswith("fpn"):
                getattr(backbone, name).load_state_dict(child.state_dict())
        levels, strides, channels = ["p2", "p3", "p4", "p5", "p6"], [4, 8, 16, 32, 64], 32
        sizes = [[8], [16], [24], [32], [64]]
    rpn = RPN(
        in_features=levels,
        head=StandardRPNHead(in_channels=channels, num_anchors=3 * len(sizes[0])),
        anchor_generator=DefaultAnchorGenerator(
            sizes=sizes, aspect_ratios=[[0.5, 1.0, 2.0]], strides=strides, offset=0.0
        ),
        anchor_matcher=Matcher([0.3, 0.7], [0, -1, 1], allow_low_quality_matches=True),
        box2box_transform=Box2BoxTransform(weights=(1.0, 1.0, 1.0, 1.0)),
        batch_size_per_image=256,
        positive_fraction=0.5,
        pre_nms_topk=(2000, 1000) if kind == "FPN" else (12000, 6000),
        post_nms_topk=(100, 100),
        nms_thresh=0.7,
    )
    shared = levels[:4]
    size = 14 if kind == "res5" else 7
    pooler = ROIPooler(size, [1 / stride for stride in strides[: len(shared)]], 0, "ROIAlignV2")
    predictor = FastRCNNOutputLayers(
        ShapeSpec(channels=512) if kind == "res5" else ShapeSpec(channels=32),
        box2box_transform=Box2BoxTransform(weights=(10, 10, 5, 5)),
        num_classes=2,
        test_topk_per_image=20,
    )
    common = dict(
        num_classes=2,
        batch_size_per_image=4096,
        positive_fraction=0.25,
        proposal_matcher=Matcher([0.5], [0, 1], allow_low_quality_matches=False),
        box_predictor=predictor,
    )
    if kind == "res5":
        res5 = ResNet.make_stage(
            BottleneckBlock,
            3,
            stride_per_block=[2, 1, 1],
            in_channels=256,
            bottleneck_channels=128,
            out_channels=512,
            norm="FrozenBN",
            stride_in_1x1=True,
        )
        heads = Res5ROIHeads(in_features=shared, pooler=pooler, res5=res5, **common)
    else:
        head = FastRCNNConvFCHead(ShapeSpec(channels=channels, height=7, width=7), conv_dims=[], fc_dims=[32, 32])
        heads = StandardROIHeads(box_in_features=shared, box_pooler=pooler, box_head=head, **common)
    rpn.load_state_dict(task.model.proposal_generator.state_dict())
    heads.load_state_dict(task.model.roi_heads.state_dict())
    mean, std = ([255 * value for value in values] for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    return GeneralizedRCNN(
        backbone=backbone, proposal_generator=rpn, roi_heads=heads, pixel_mean=mean, pixel_std=std, input_format="RGB"
    )


def mapped_by_detectron2(pairs, folder, train, sizes=(64,), max_size=96, flip=0.5, seed=7):
    """What Detectron2's own mapper makes of the same images and objects, from files."""
    from detectron2.data import DatasetMapper
    from detectron2.data import transforms as T
    from detectron2.structures import BoxMode

    augmentations = [T.ResizeShortestEdge(list(sizes), max_size, "choice")]
    augmentations += [T.RandomFlip(flip)] if train else []
    mapper = DatasetMapper(train, augmentations=augmentations, image_format="RGB")
    np.random.seed(seed)
    records = []
    for number, (image, found) in enumerate(pairs):
        file = folder / f"{number}.png"
        image.save(file)
        annotations = [
            {"bbox": box, "bbox_mode": BoxMode.XYXY_ABS, "category_id": label, "iscrowd": int(difficult)}
            for box, label, difficult in zip(
                *(found[key].tolist() for key in ("boxes", "labels", "difficult")), strict=True
            )
        ]
        records.append(mapper({"file_name": str(file), "image_id": number, "annotations": annotations}))
    return records
