import pytest
import torch
from PIL import Image
from torch.nn import functional
from torch.utils.data import Dataset

from bissl_zoo.downstream.multilabel import binary_cross_entropy, softmax_cross_entropy
from bissl_zoo.engine.build import Context, Weights
from bissl_zoo.engine.checks import check_parts, open_context
from bissl_zoo.engine.evaluate import evaluate
from bissl_zoo.engine.stages import Bissl
from bissl_zoo.errors import ConfigError, DatasetError, RegistryError
from bissl_zoo.registry import build_backbone, build_task

CLASSES = ["cat", "dog", "eel"]


def build(name="multilabel_classification", **kwargs):
    torch.manual_seed(0)
    trunk, _ = build_backbone(name="test_resnet").split("c4")
    return trunk, build_task(name=name, backbone=trunk, classes=CLASSES, **kwargs)


def random_logits_and_targets(lowest=0):
    generator = torch.Generator().manual_seed(0)
    logits = 5 * torch.randn(6, 4, generator=generator)
    return logits.requires_grad_(), torch.randint(lowest, 2, (6, 4), generator=generator).float()


def test_the_head_and_the_samples_are_those_of_single_label_classification():
    trunk, task = build()
    _, other = build("classification")
    images = torch.randn(2, 3, 32, 32)
    trunk.eval()
    assert torch.equal(task.predict(trunk, images), other.predict(trunk, images))
    assert not task.predict(trunk, images).requires_grad
    picture, target = Image.new("RGB", (50, 40), (255, 0, 51)), torch.tensor([1.0, 0.0, -1.0])
    image, same = task.transform(train=False)(picture, target)
    assert torch.equal(image, other.transform(train=False)(picture, 0)[0]) and torch.equal(same, target)


def test_ignored_labels_are_neither_in_the_loss_nor_in_its_mean():
    logits, targets = random_logits_and_targets(lowest=-1)
    counts = targets >= 0
    assert 0 < counts.sum() < counts.numel()
    loss = binary_cross_entropy(logits, targets)
    torch.testing.assert_close(loss, functional.binary_cross_entropy_with_logits(logits[counts], targets[counts]))
    (gradient,) = torch.autograd.grad(loss, logits)
    assert (gradient[~counts] == 0).all() and (gradient[counts] != 0).all()


def test_a_batch_of_nothing_but_ignored_labels_moves_nothing():
    logits, _ = random_logits_and_targets()
    loss = binary_cross_entropy(logits, -torch.ones(6, 4))
    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss == 0 and (gradient == 0).all()


def test_the_softmax_loss_adds_up_the_positives_of_an_image():
    logits, targets = random_logits_and_targets(lowest=-1)
    expected = -(logits.log_softmax(dim=1) * (targets == 1)).sum(dim=1).mean()
    torch.testing.assert_close(softmax_cross_entropy(logits, targets), expected)
    labels = torch.tensor([0, 1, 2, 3, 3, 0])
    single = softmax_cross_entropy(logits, functional.one_hot(labels).float())
    torch.testing.assert_close(single, functional.cross_entropy(logits, labels))


@pytest.mark.parametrize(("loss", "function"), [("bce", binary_cross_entropy), ("softmax", softmax_cross_entropy)])
def test_the_task_takes_the_loss_that_is_named(loss, function):
    trunk, task = build(loss=loss)
    images, targets = torch.randn(4, 3, 32, 32), torch.tensor([[1.0, 0, 1], [0, 0, -1], [1, 1, 0], [0, 1, 0]])
    losses = task.losses(trunk, (images, targets))
    again, same = build(loss=loss)
    assert list(losses) == [loss]
    torch.testing.assert_close(losses[loss], function(same._logits(again, images), targets))
    losses[loss].backward()
    assert all(p.grad is not None for p in [*trunk.parameters(), *task.parameters()])


def test_unknown_losses_and_arguments_are_refused_with_the_nearest():
    with pytest.raises(ConfigError, match="task.loss is 'sotfmax'; accepted are bce and softmax. Did you mean 'soft"):
        build(loss="sotfmax")
    with pytest.raises(RegistryError, match="does not take 'image_szie'. Did you mean 'image_size'"):
        build(image_szie=3)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (torch.zeros(4), r"shape \(4,\) and values \[0.0\]; expected 3 numbers"),
        (torch.tensor([0.0, 1.0, 2.0]), r"shape \(3,\) and values \[0.0, 1.0, 2.0\]"),
        (torch.tensor(1), r"shape \(\)"),
    ],
)
def test_targets_that_are_not_multilabel_are_refused(target, message):
    _, task = build()
    with pytest.raises(DatasetError, match=message):
        task.collate([(torch.zeros(3, 8, 8), target)])


class WhichDigits(Dataset):
    """The classes in the images of a detection set; the class of the last object is ignored."""

    def __init__(self, boxes):
        self.boxes, self.classes = boxes, boxes.classes

    def __len__(self):
        return len(self.boxes)

    def __getitem__(self, index):
        image, target = self.boxes[index]
        labels = torch.zeros(len(self.classes))
        labels[target["labels"]] = 1
        labels[target["labels"][-1:]] = -1
        return image, labels


@pytest.mark.slow
def test_it_goes_through_the_bilevel_stage_and_is_evaluated(tiny_config, at_scenes):
    call = "{_target_: bissl_zoo.registry.build_task, name: multilabel_classification, image_size: 32}"
    opened = open_context(tiny_config(task=call, bilevel__alternations=1), "test")
    data = {role: WhichDigits(opened.data[role]) for role in ("train", "test")} | {"pretext": opened.data["pretext"]}
    context = Context(opened.cfg, data, opened.device)
    check_parts(context, Weights())
    trainer = Bissl().build(context, Weights())
    before = {key: value.clone() for key, value in trainer.problem.upper.head.state_dict().items()}
    trainer.train()
    level = trainer.problem.upper
    assert all(not torch.equal(value, before[key]) for key, value in level.head.state_dict().items())
    metrics = evaluate(context, level.backbone, level.head)
    assert set(metrics) == {"mAP11", "mAP"} and all(0 <= value <= 1 for value in metrics.values())
