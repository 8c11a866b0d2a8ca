"""The contract of every registered downstream task, whatever its targets are."""

import pytest
import torch
from detectron2_tasks import needs_detectron2
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from bissl_zoo.backbones import evaluating
from bissl_zoo.errors import DatasetError
from bissl_zoo.registry import build_backbone, build_task

CLASSES = ["cat", "dog", "eel"]
DETECTION = dict(min_size=32, max_size=64, anchor_sizes=(8, 16), box_head=8, score_threshold=0.0)
ARGUMENTS = {
    "classification": dict(image_size=32),
    "multilabel_classification": dict(image_size=32),
    "faster_rcnn": DETECTION,
    "detectron2_faster_rcnn": DETECTION,
}
#: a target of each task as a data set has it, and the names of its classes
TARGETS = {
    "classification": (1, "dog"),
    "multilabel_classification": (torch.tensor([1.0, 0.0, 1.0]), "cat, eel"),
    "faster_rcnn": (
        {
            "boxes": torch.tensor([[2.0, 3.0, 20.0, 18.0], [5.0, 5.0, 9.0, 9.0]]),
            "labels": torch.tensor([2, 0]),
            "difficult": torch.tensor([False, True]),
            "image_id": 0,
        },
        "1 eel, 1 cat",
    ),
}
TARGETS["detectron2_faster_rcnn"] = TARGETS["faster_rcnn"]
NAMES = [pytest.param(name, marks=[needs_detectron2] if "detectron2" in name else []) for name in ARGUMENTS]


@pytest.fixture(params=NAMES)
def built(request):
    torch.manual_seed(0)
    trunk, _ = build_backbone(name="test_resnet").split("c3")
    return (
        request.param,
        trunk,
        build_task(name=request.param, backbone=trunk, classes=CLASSES, **ARGUMENTS[request.param]),
    )


def first_prediction(trunk, task):
    images, targets = task.example_batch(2, (24, 40))
    with evaluating(trunk, task):
        predictions = task.predict(trunk, images)
    return predictions[0], targets[0]


def test_an_example_batch_is_what_the_losses_take(built):
    _, trunk, task = built
    images, targets = task.example_batch(9, (24, 40))
    losses = task.losses(trunk, (images, targets))
    assert len(images) == len(targets) == 9
    assert losses and all(torch.isfinite(loss) and loss.ndim == 0 for loss in losses.values())


def test_the_evaluator_takes_the_predictions(built):
    _, trunk, task = built
    images, targets = task.example_batch(2, (24, 40))
    evaluator = task.evaluator()
    with evaluating(trunk, task):
        evaluator.process(task.predict(trunk, images), targets)
    assert all(0 <= value <= 1 for value in evaluator.evaluate().values())


def test_targets_and_predictions_are_drawn_on_axes_over_their_image(built):
    name, trunk, task = built
    target, names = TARGETS[name]
    image = Image.new("RGB", (40, 24))
    left, right = Figure(figsize=(6, 3)).subplots(1, 2)
    task.draw(left, image, target)
    task.draw(right, image, first_prediction(trunk, task)[0], predicted=True, threshold=0.0)
    assert left.get_title() == names and right.get_title()
    for axes in (left, right):
        assert axes.images[0].get_array().shape[:2] == (24, 40)
        assert axes.get_xlim() == (0, 40) and axes.get_ylim() == (24, 0)
    if isinstance(target, dict):
        boxes = [(patch.get_xy(), patch.get_width(), patch.get_height()) for patch in left.patches]
        assert boxes == [((2, 3), 18, 15), ((5, 5), 4, 4)]
        assert [patch.get_linestyle() for patch in left.patches] == ["-", "--"]
        assert [text.get_text() for text in left.texts] == ["eel", "cat"]


def test_a_prediction_has_a_score_and_the_truth_has_the_best_one(built):
    name, trunk, task = built
    prediction, target = first_prediction(trunk, task)
    perfect = {
        "classification": lambda: torch.where(torch.arange(3) == target, 100.0, -100.0),
        "multilabel_classification": lambda: torch.where(target == 1, 100.0, -100.0),
    }.get(name, lambda: {**target, "scores": torch.ones(len(target["labels"]))})()
    assert -1 <= task.score(prediction, target) <= task.score(perfect, target) == 1


def test_boxes_below_the_threshold_are_not_drawn():
    trunk, _ = build_backbone(name="test_resnet").split("c3")
    task = build_task(name="faster_rcnn", backbone=trunk, classes=CLASSES, **DETECTION)
    boxes = torch.tensor([[0.0, 0, 9, 9], [1, 1, 5, 5]])
    prediction = {"boxes": boxes, "scores": torch.tensor([0.3, 0.7]), "labels": torch.tensor([0, 1])}
    axes = Figure().subplots()
    task.draw(axes, Image.new("RGB", (10, 10)), prediction, predicted=True, threshold=0.5)
    assert axes.get_title() == "1 dog" and [text.get_text() for text in axes.texts] == ["dog 0.70"]


@pytest.mark.parametrize(
    ("name", "target", "expected"),
    [
        ("classification", 2, [(None, 2)]),
        ("multilabel_classification", torch.tensor([0.0, 1.0, -1.0]), [(None, 1)]),
        ("multilabel_classification", torch.tensor([1.0, 1.0, 0.0]), [(None, None)]),
        ("multilabel_classification", torch.tensor([0.0, -1.0, 0.0]), [(None, None)]),
        ("faster_rcnn", TARGETS["faster_rcnn"][0], [((2.0, 3.0, 20.0, 18.0), 2)]),
    ],
)
def test_objects_are_the_parts_of_an_image_with_exactly_one_class(name, target, expected):
    trunk, _ = build_backbone(name="test_resnet").split("c3")
    task = build_task(name=name, backbone=trunk, classes=CLASSES, **ARGUMENTS[name])
    assert task.objects(target) == expected


def test_targets_of_another_task_are_refused_by_collate_or_transform(built):
    name, _, task = built
    image = Image.new("RGB", (40, 24))
    for other, (target, _) in TARGETS.items():
        if type(target) is not type(TARGETS[name][0]):
            with pytest.raises(DatasetError, match="not (int|Tensor|dict)"):
                task.collate([task.transform(train=True)(image, target)])
        elif other == name:
            assert isinstance(task.collate([task.transform(train=True)(image, target)])[0], list | Tensor)
