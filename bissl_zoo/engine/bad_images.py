"""Bad images, one among many: another is looked at in its place, and those of a stage are counted and told."""

import logging
from typing import Any

from omegaconf import DictConfig
from torch.utils.data import Dataset

from bissl_zoo.data.workers import NAMED
from bissl_zoo.distributed import all_gather_objects, any_rank
from bissl_zoo.engine.build import Context
from bissl_zoo.engine.trainer import HookBase
from bissl_zoo.errors import DatasetError
from bissl_zoo.progress.display import say

logger = logging.getLogger(__name__)

#: the metric: how many a stage has met so far
SKIPPED = "data/skipped"
#: neighbours that are looked at in place of one that cannot be used
TRIES = 5
#: the levels that read the pretext set; all others read `train`
_PRETEXT_LEVELS = ("pretrain", "pretext_warmup", "lower")


def skips(cfg: DictConfig, role: str) -> bool:
    """Whether the loader of that role goes on without an image that cannot be used, as those of training do."""
    return cfg.dataloader[role].get("on_bad", "skip" if role in ("pretext", "train") else "error") == "skip"


class Readable(Dataset):
    """A data set in which one of the `TRIES` samples that follow stands in for one that cannot be used, with a warning.

    Raises:
        DatasetError: none of them can be used; or the one that is asked for, where the role does not skip.
    """

    def __init__(self, dataset: Dataset, cfg: DictConfig, role: str) -> None:
        self.dataset, self.tries = dataset, TRIES if skips(cfg, role) else 0

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        for following in range(index, index + self.tries):
            try:
                return self.dataset[following % len(self)]
            except DatasetError as error:
                logger.warning("%s The one that follows is looked at in its place.", error)
        return self.dataset[(index + self.tries) % len(self)]


class BadImages(HookBase):
    """Keeps the names of the images that training could not use, of all processes; their number joins the metrics.

    They are part of the trainer's state, so that a resumed stage tells of all of them. The last line of a stage names
    the first of them.
    """

    def __init__(self, context: Context) -> None:
        self.context = context

    def after_step(self) -> None:
        """Gather what is new; placed before the writer."""
        trainer = self.trainer
        new = {name: self._new(name) for name in trainer.levels()}
        if any_rank(any(new.values()), self.context.device):
            for part in all_gather_objects(new):
                for name, found in part.items():
                    known = trainer.bad.setdefault(name, [])
                    known += [one for one in found if one not in known]
        count = sum(map(len, trainer.bad.values()))
        if count:
            trainer.metrics[SKIPPED] = count

    def after_train(self) -> None:
        """Tell of the stage's."""
        for name, found in self.trainer.bad.items():
            role = "pretext" if self.trainer.levels()[name].name in _PRETEXT_LEVELS else "train"
            more = f" and {len(found) - NAMED} more" if len(found) > NAMED else ""
            say(
                f"warning: [{self.trainer.name}] data: {len(found)} of {len(self.context.data[role])} images of {role} "
                f"could not be read and were replaced: {', '.join(found[:NAMED])}{more}"
            )

    def _new(self, name: str) -> list[str]:
        bad, known = getattr(self.trainer.levels()[name].data_iterator, "bad", {}), self.trainer.bad.get(name, ())
        return [one for one in bad if one not in known]
