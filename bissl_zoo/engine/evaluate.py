"""The figures of a task on a data set, and those that it gives at all."""

from collections.abc import Callable

import torch

from bissl_zoo.backbones import Backbone, evaluating
from bissl_zoo.data.batches import to_device
from bissl_zoo.distributed import any_rank, broadcast_module
from bissl_zoo.downstream import DownstreamTask, Evaluator
from bissl_zoo.engine.build import Context, test_loader
from bissl_zoo.errors import DatasetError


def evaluate(
    context: Context,
    backbone: Backbone,
    task: DownstreamTask,
    role: str = "test",
    asked: Callable[[], bool] = lambda: False,
    look: Callable[[Evaluator], None] = lambda evaluator: None,
) -> dict[str, float] | None:
    """The task's figures over a whole data set, every rank's part included; modes of training are put back.

    Args:
        role: `test` or `val`.
        asked: after every batch, whether this process is to stop; where one is, the result is None on all of them.
        look: shown the evaluator that has the whole set, on every process.
    """
    for module in (backbone, task):
        broadcast_module(module)  # ranks hold their own batch-norm statistics
    evaluator = task.evaluator()
    evaluator.reset()
    with torch.random.fork_rng(), evaluating(backbone, task):
        for images, targets in test_loader(context, task, role):
            predictions = task.predict(backbone, to_device(images, context.device))
            evaluator.process(to_device(predictions, torch.device("cpu")), targets)
            if asked():
                break
    if any_rank(asked(), context.device):
        return None
    evaluator.synchronize()
    figures = evaluator.evaluate()
    look(evaluator)
    return figures


def figures_of(context: Context, backbone: Backbone, task: DownstreamTask, role: str) -> list[str]:
    """The names of the figures that the task gives, as the first images of a data set show, mostly one.

    Raises:
        DatasetError: none can be had of any of the images, as of a detection set without an object.
    """
    data, transform = context.data[role], task.transform(train=False)
    evaluator = task.evaluator()
    evaluator.reset()
    for index in range(len(data)):
        images, targets = task.collate([transform(*data[index])])
        with torch.random.fork_rng(), evaluating(backbone, task):
            predictions = task.predict(backbone, to_device(images, context.device))
        evaluator.process(to_device(predictions, torch.device("cpu")), targets)
        try:
            return list(evaluator.evaluate())
        except DatasetError as error:  # nothing to find so far
            problem = error
    raise problem
