"""The figures of a task on a data set, and those that it gives at all."""

from collections.abc import Callable

import torch

from bissl_zoo.backbones import Backbone, evaluating
from bissl_zoo.data.batches import to_device
from bissl_zoo.distributed import all_gather_objects, any_rank, broadcast_module
from bissl_zoo.downstream import DownstreamTask, Evaluator
from bissl_zoo.engine.bad_images import Readable
from bissl_zoo.engine.build import Context, test_loader
from bissl_zoo.errors import DatasetError

#: the figure that counts images without which the others were measured; it is there where it is not 0
LEFT_OUT = "left_out"


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
    Returns:
        The task's figures, and how many images were left out as `left_out` where some were.
    Raises:
        DatasetError: an image cannot be used and is not to be left out, or none can.
    """
    for module in (backbone, task):
        broadcast_module(module)  # ranks hold their own batch-norm statistics
    evaluator = task.evaluator()
    evaluator.reset()
    with torch.random.fork_rng(), evaluating(backbone, task):
        loader = test_loader(context, task, role)
        for images, targets in loader:
            predictions = task.predict(backbone, to_device(images, context.device))
            evaluator.process(to_device(predictions, torch.device("cpu")), targets)
            if asked():
                break
    if any_rank(asked(), context.device):
        return None
    left_out = sum(all_gather_objects(len(getattr(loader, "bad", ()))))
    if left_out == len(context.data[role]):
        raise DatasetError(f"None of the {left_out} images of dataloader.{role} can be used; they were named.")
    evaluator.synchronize()
    figures = evaluator.evaluate()
    look(evaluator)
    return {**figures, **({LEFT_OUT: left_out} if left_out else {})}


def figures_of(context: Context, backbone: Backbone, task: DownstreamTask, role: str) -> list[str]:
    """The names of the figures that the task gives, as the first images of a data set show, mostly one.

    Raises:
        DatasetError: none can be had of any of the images, as of a detection set without an object.
    """
    data, transform = Readable(context.data[role], context.cfg, role), task.transform(train=False)
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
