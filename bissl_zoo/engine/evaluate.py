"""The figures of a task on a data set, and those that it gives at all."""

import json
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bissl_zoo.backbones import Backbone, evaluating
from bissl_zoo.data.batches import to_device
from bissl_zoo.distributed import all_gather_objects, any_rank, broadcast_module
from bissl_zoo.downstream import DownstreamTask, Evaluator
from bissl_zoo.engine.build import Context, Readable, test_loader
from bissl_zoo.errors import CheckpointError, DatasetError
from bissl_zoo.evaluation.ranking import MOST_RANKED
from bissl_zoo.runs.checkpoint import write_atomically
from bissl_zoo.runs.metadata import read_json

logger = logging.getLogger(__name__)

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
    left_out = sum(all_gather_objects(len(getattr(loader, "skipped", ()))))
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


DETAILS_FILE = "per_class.json"
#: points of a curve, at recalls 0, 0.01, ... 1
_POINTS = 101


@dataclass(frozen=True)
class Details:
    """The last evaluation of one fine-tuning.

    Attributes:
        figures: by class, then by name, fractions.
        classes, confusion: how many samples of class i were taken for class j; empty where it does not apply.
        curves: by class, the best precision at each recall of 0, 0.01, ... 1 or above; of detections at IoU 0.5, of
            single labels each class against the rest.
        seconds: that the evaluation took; 0 where nobody took the time.
    """

    figures: dict[str, dict[str, float]] = field(default_factory=dict)
    classes: list[str] = field(default_factory=list)
    confusion: list[list[int]] = field(default_factory=list)
    curves: dict[str, list[float]] = field(default_factory=dict)
    seconds: float = 0.0

    def plain(self) -> dict[str, Any]:
        """As it is written; what is empty is left out."""
        return {key: value for key, value in asdict(self).items() if value}


def details_of(evaluator: Evaluator) -> Details:
    """What an evaluator that has evaluated knows; one of the user's own may know none of it."""
    per_class, confusion, rankings = (getattr(evaluator, name, None) for name in ("per_class", "confusion", "rankings"))
    classes = list(getattr(evaluator, "classes", ()))
    few = len(classes) <= MOST_RANKED
    told = confusion().tolist() if confusion and few else []
    return Details(
        figures=_finite(per_class()) if per_class else {},
        classes=classes if told else [],
        confusion=told,
        curves={name: precision_at_recalls(*one) for name, one in rankings().items()} if rankings and few else {},
    )


def _finite(figures: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    return {
        name: {key: float(value) for key, value in one.items() if math.isfinite(value)} for name, one in figures.items()
    }


def precision_at_recalls(right: NDArray[np.bool_], positives: int) -> list[float]:
    """The best precision at each recall of 0, 0.01, ... 1 or above, of a ranking; 0 where it is not reached.

    Args:
        right: (M,), whether each detection is right, the best score first.
        positives: how many there are to find.
    """
    hits = np.cumsum(right)
    precision = hits / np.arange(1, len(hits) + 1)
    envelope = np.append(np.maximum.accumulate(precision[::-1])[::-1], 0.0)
    # recalls as whole numbers, so that 3 of 10 does reach 0.3
    places = np.searchsorted((_POINTS - 1) * hits, positives * np.arange(_POINTS))
    return [round(value, 5) for value in envelope[places].tolist()]


def read_details(folder: Path) -> dict[str, Details]:
    """The details that a run kept, by what was fine-tuned; empty where it kept none.

    Raises:
        CheckpointError: the file is damaged, or was never one of details.
    """
    try:
        return {name: _checked(one) for name, one in read_json(folder / DETAILS_FILE).items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder / DETAILS_FILE} holds other things than figures by class.") from error


def _checked(plain: dict[str, Any]) -> Details:
    details = Details(
        {name: {key: _number(value) for key, value in one.items()} for name, one in plain.get("figures", {}).items()},
        [_text(name) for name in plain.get("classes", [])],
        [[_count(value) for value in row] for row in plain.get("confusion", [])],
        {name: [_number(value) for value in curve] for name, curve in plain.get("curves", {}).items()},
        _number(plain.get("seconds", 0.0), 1e12),
    )
    sides = {len(details.confusion), *map(len, details.confusion)}
    curves = {len(curve) for curve in details.curves.values()}
    if sides != {len(details.classes)} or len(details.classes) > MOST_RANKED or not curves <= {_POINTS}:
        raise ValueError("a matrix or curve of another size")
    return details


def _number(value: object, most: float = 1.0) -> float:
    if type(value) not in (int, float) or not 0 <= value <= most:
        raise ValueError(f"{value!r:.40} is not a number from 0 to {most:g}")
    return float(value)


def _count(value: object) -> int:
    if type(value) is not int or not 0 <= value < 1 << 53:
        raise ValueError(f"{value!r:.40} is no count")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError("a class that is no text")
    return value


def write_details(folder: Path, details: dict[str, Details]) -> None:
    """Write `per_class.json`."""
    content = {name: one.plain() for name, one in details.items()}
    write_atomically(folder / DETAILS_FILE, json.dumps(content) + "\n")


def look_into(evaluator: Evaluator) -> Details:
    """The details of an evaluation; where an evaluator of the user's own gives none, a warning, since figures count."""
    try:
        return details_of(evaluator)
    except Exception as error:  # whatever such an evaluator raises
        logger.warning(f"no figures by class: {type(evaluator).__name__}: {type(error).__name__}: {error}")
        return Details()


def worst_confusions(details: Details, most: int = 10) -> Sequence[tuple[str, str, int]]:
    """True class, predicted class and how often, of the commonest mistakes."""
    pairs = [
        (details.classes[i], details.classes[j], count)
        for i, row in enumerate(details.confusion)
        for j, count in enumerate(row)
        if i != j and count
    ]
    return sorted(pairs, key=lambda pair: -pair[2])[:most]
