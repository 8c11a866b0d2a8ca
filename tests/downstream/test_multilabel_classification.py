import pytest
import torch
from PIL import Image
from torch.nn import functional

from bissl_zoo.downstream.multilabel import binary_cross_entropy, softmax_cross_entropy
from bissl_zoo.errors import DatasetError
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
