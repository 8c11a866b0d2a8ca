"""Pseudo-labels: a fine-tuned teacher labels the unlabelled images for the fine-tuning after it.

Pseudo-labels as in Lee (ICML 2013 workshop) and, for a teacher whose student starts again from the pretrained weights,
Xie et al., "Noisy Student" (arXiv 1911.04252).
"""

import logging
from dataclasses import replace
from typing import Any

import torch
from torch.utils.data import Dataset

from bissl_zoo.backbones import Backbone, evaluating
from bissl_zoo.data.samples import to_device
from bissl_zoo.distributed import on_main_process
from bissl_zoo.downstream import DownstreamTask
from bissl_zoo.engine.build import build_downstream, skips_undecodable
from bissl_zoo.engine.trainer import Context, Weights
from bissl_zoo.errors import DatasetError

logger = logging.getLogger(__name__)


class WithPseudoLabels(Dataset):
    """The labelled samples, repeated to the number of the pseudo-labelled ones if there are more of these.

    Args:
        labelled: data set of `(image, target)`.
        pile: data set of `(image, anything)`.
        targets: pseudo-labels of samples of the pile by their number.
    """

    def __init__(self, labelled: Dataset, pile: Dataset, targets: dict[int, Any]) -> None:
        self.labelled, self.pile, self.classes = labelled, pile, labelled.classes
        self.numbers, self.targets = list(targets), list(targets.values())

    def __len__(self) -> int:
        return len(self.numbers) + max(len(self.numbers), len(self.labelled))

    def __getitem__(self, index: int) -> Any:
        if index < len(self.numbers):
            return self.pile[self.numbers[index]][0], self.targets[index]
        return self.labelled[(index - len(self.numbers)) % len(self.labelled)]


def with_pseudo_labels(context: Context, teacher: Weights) -> Context:
    """Return the context with a training set that includes the images that the teacher labels.

    Raises:
        DatasetError: no prediction reaches `finetune.pseudo_threshold`, or the task has no pseudo-labels.
    """
    threshold, pile = context.cfg.finetune.pseudo_threshold, context.data["pretext"]
    backbone, task = build_downstream(context, teacher)
    with torch.random.fork_rng(), evaluating(backbone, task):
        targets = on_main_process(lambda: _pseudo_targets(context, backbone, task, pile, threshold))
    if not targets:
        raise DatasetError(
            f"The teacher labels none of the {len(pile)} unlabelled images with a score of {threshold} or more. Lower "
            "finetune.pseudo_threshold, or train the teacher longer."
        )
    logger.info(f"pseudo-labels: {len(targets)} of {len(pile)} images, threshold {threshold}")
    return replace(context, data={**context.data, "train": WithPseudoLabels(context.data["train"], pile, targets)})


def _pseudo_targets(
    context: Context, backbone: Backbone, task: DownstreamTask, pile: Dataset, threshold: float
) -> dict[int, Any]:
    transform, size = task.transform(train=False), context.cfg.dataloader.test.batch_size
    skips, targets = skips_undecodable(context.cfg, "pretext"), {}
    for start in range(0, len(pile), size):
        samples, numbers = [], []
        for number in range(start, min(start + size, len(pile))):
            try:
                image = pile[number][0]
            except DatasetError:
                if not skips:
                    raise
                continue
            samples.append(transform(image, task.blank_target(image.size)))
            numbers.append(number)
        if not samples:
            continue
        images, _ = task.collate(samples)
        predictions = to_device(task.predict(backbone, to_device(images, context.device)), torch.device("cpu"))
        for number, prediction in zip(numbers, predictions, strict=True):
            if (target := task.pseudo_target(prediction, threshold)) is not None:
                targets[number] = target
    return targets
