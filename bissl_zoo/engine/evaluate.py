"""Evaluate a task on a data set: its metrics, and the details per class that a report shows."""

import json
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from bissl_zoo.backbones import Backbone, evaluating
from bissl_zoo.data.samples import to_device
from bissl_zoo.distributed import all_gather_objects, any_rank, broadcast_module
from bissl_zoo.downstream import DownstreamTask, Evaluator
from bissl_zoo.engine.build import Context, Decodable, test_loader
from bissl_zoo.errors import CheckpointError, DatasetError
from bissl_zoo.files import write_atomically
from bissl_zoo.runs.directory import read_json

logger = logging.getLogger(__name__)

#: the metric that counts images which could not be decoded and were left out; absent if it is 0
LEFT_OUT = "left_out"
DETAILS_FILE = "per_class.json"
#: number of classes up to which the confusion matrix is kept
MOST_CLASSES = 200


def evaluate(
    context: Context,
    backbone: Backbone,
    task: DownstreamTask,
    role: str = "test",
    stop: Callable[[], bool] = lambda: False,
    inspect: Callable[[Evaluator], None] = lambda evaluator: None,
) -> dict[str, float] | None:
    """Return the task's metrics over a whole data set, every rank's part included; train modes are restored.

    Args:
        role: `test` or `val`.
        stop: called after each batch; if it is True in any process, the result is None in all of them.
        inspect: called with the evaluator of the whole set, in every process.
    Returns:
        The task's metrics, and the number of images that could not be decoded as `left_out`, if it is not 0.
    Raises:
        DatasetError: an image cannot be decoded and `on_bad` is "error", or no image can be decoded.
    """
    for module in (backbone, task):
        broadcast_module(module)  # ranks have different batch-norm statistics
    evaluator = task.evaluator()
    evaluator.reset()
    with torch.random.fork_rng(), evaluating(backbone, task):
        loader = test_loader(context, task, role)
        for images, targets in loader:
            predictions = task.predict(backbone, to_device(images, context.device))
            evaluator.process(to_device(predictions, torch.device("cpu")), targets)
            if stop():
                break
    if any_rank(stop(), context.device):
        return None
    left_out = sum(all_gather_objects(len(getattr(loader, "skipped", ()))))
    if left_out == len(context.data[role]):
        raise DatasetError(f"None of the {left_out} images of dataloader.{role} can be decoded; see the log for names.")
    evaluator.synchronize()
    metrics = evaluator.evaluate()
    inspect(evaluator)
    return {**metrics, **({LEFT_OUT: left_out} if left_out else {})}


def metric_names(context: Context, backbone: Backbone, task: DownstreamTask, role: str) -> list[str]:
    """Return the names of the task's metrics, from an evaluation of as few images as give any.

    Raises:
        DatasetError: no image gives metrics, as in a detection set without objects.
    """
    data, transform = Decodable(context.data[role], context.cfg, role), task.transform(train=False)
    evaluator = task.evaluator()
    evaluator.reset()
    for index in range(len(data)):
        images, targets = task.collate([transform(*data[index])])
        with torch.random.fork_rng(), evaluating(backbone, task):
            predictions = task.predict(backbone, to_device(images, context.device))
        evaluator.process(to_device(predictions, torch.device("cpu")), targets)
        try:
            return list(evaluator.evaluate())
        except DatasetError as error:  # no object so far
            problem = error
    raise problem


def format_metrics(metrics: dict[str, Any]) -> str:
    """Return metrics on one line, without those of single classes."""
    texts = {name: value if isinstance(value, int) else f"{value:.4f}" for name, value in metrics.items()}
    return "  ".join(f"{name} {value}" for name, value in texts.items() if "/" not in name)


@dataclass(frozen=True)
class Details:
    """Details of the last evaluation of one fine-tuning, as in `per_class.json`.

    Attributes:
        per_class: metrics in [0, 1] by class, then by name.
        classes, confusion: number of samples of class i that were predicted as class j; empty for detection.
        seconds: duration of the evaluation; 0 if it was not measured.
    """

    per_class: dict[str, dict[str, float]] = field(default_factory=dict)
    classes: list[str] = field(default_factory=list)
    confusion: list[list[int]] = field(default_factory=list)
    seconds: float = 0.0


def details_of(evaluator: Evaluator) -> Details:
    """Return the details of a finished evaluation; a custom evaluator need not have any."""
    per_class, confusion = (getattr(evaluator, name, None) for name in ("per_class", "confusion"))
    classes = list(getattr(evaluator, "classes", ()))
    matrix = confusion().tolist() if confusion and len(classes) <= MOST_CLASSES else []
    return Details(
        per_class={
            label: {name: float(value) for name, value in metrics.items() if math.isfinite(value)}
            for label, metrics in (per_class() if per_class else {}).items()
        },
        classes=classes if matrix else [],
        confusion=matrix,
    )


def safe_details(evaluator: Evaluator, seconds: float) -> Details:
    """Return the details of an evaluation; log a warning if a custom evaluator raises, since the metrics are valid."""
    try:
        return Details(**{**vars(details_of(evaluator)), "seconds": round(seconds, 3)})
    except Exception as error:  # any exception of user code
        logger.warning(f"no metrics per class: {type(evaluator).__name__}: {type(error).__name__}: {error}")
        return Details(seconds=round(seconds, 3))


def write_details(folder: Path, details: dict[str, Details]) -> None:
    """Write `per_class.json`; empty fields are left out."""
    content = {name: {k: v for k, v in asdict(each).items() if v} for name, each in details.items()}
    write_atomically(folder / DETAILS_FILE, json.dumps(content) + "\n")


def read_details(folder: Path) -> dict[str, Details]:
    """Read `per_class.json` of a run, by what was fine-tuned from; empty if the run has none.

    Raises:
        CheckpointError: the file is damaged or holds something else.
    """
    try:
        return {name: _checked(each) for name, each in read_json(folder / DETAILS_FILE).items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder / DETAILS_FILE} does not hold metrics by class.") from error


def _checked(plain: dict[str, Any]) -> Details:
    per_class = plain.get("per_class", plain.get("figures", {}))  # the name in runs of earlier versions
    details = Details(
        {label: {key: _number(value) for key, value in metrics.items()} for label, metrics in per_class.items()},
        list(plain.get("classes", [])),
        [[_count(value) for value in row] for row in plain.get("confusion", [])],
        _number(plain.get("seconds", 0.0), 1e12),
    )
    sides = {len(details.confusion), *map(len, details.confusion)}
    texts = all(isinstance(name, str) for name in details.classes)
    if not texts or sides != {len(details.classes)} or len(details.classes) > MOST_CLASSES:
        raise ValueError("a class that is no text, or a matrix of another size")
    return details


def _number(value: object, most: float = 1.0) -> float:
    if type(value) not in (int, float) or not 0 <= value <= most:
        raise ValueError(f"{value!r:.40} is not a number from 0 to {most:g}")
    return float(value)


def _count(value: object) -> int:
    if type(value) is not int or not 0 <= value < 1 << 53:
        raise ValueError(f"{value!r:.40} is not a count")
    return value


def worst_confusions(details: Details, limit: int = 10) -> Sequence[tuple[str, str, int]]:
    """Return true class, predicted class and count of the most common errors."""
    pairs = [
        (details.classes[i], details.classes[j], count)
        for i, row in enumerate(details.confusion)
        for j, count in enumerate(row)
        if i != j and count
    ]
    return sorted(pairs, key=lambda pair: -pair[2])[:limit]
