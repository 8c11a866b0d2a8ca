"""The same search of fine-tuning's settings for every arm of a comparison, before its seeds are run."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from omegaconf import DictConfig

from bissl_zoo.config import LazyConfig
from bissl_zoo.runs.checkpoint import write_atomically
from bissl_zoo.runs.metadata import read_json
from bissl_zoo.studies.compare_arms import ARMS, Settings, arm_config
from bissl_zoo.studies.jobs import Job
from bissl_zoo.studies.search import search
from bissl_zoo.studies.search_space import SearchSettings, read_search, trial_config

logger = logging.getLogger(__name__)

#: what the searches of a comparison have found
FOUND_FILE = "searched.json"


class ArmSearch:
    """A search per arm: the same draws, fine-tuned from what the arm comes to on the search's own data.

    Args:
        base: the config of the arms, without the sections of a comparison.
        section: the section `search`.
        folder: that of the comparison.
    """

    def __init__(self, base: DictConfig, section: DictConfig, settings: Settings, source: str, folder: Path) -> None:
        self.section, self.settings, self.source, self.folder = section, settings, source, folder
        self.base, self.space = base, self._read(base)
        # a stage that trains on labels must not have seen those that the trials are measured on
        self.searched = LazyConfig.apply_overrides(base, self.space.overrides, source)

    def _read(self, base: DictConfig) -> SearchSettings:
        """The section, checked with a first draw, so that a wrong key is told before hours of pretraining."""
        space = read_search(self._with_section(base), self.source)
        trial_config(base, space, 0, self.source)
        return space

    def _with_section(self, cfg: DictConfig) -> DictConfig:
        cfg = LazyConfig.apply_overrides(cfg, [])
        cfg.search = self.section
        return cfg

    def jobs(self, init: str | None) -> list[Job]:
        """The stage of each arm that has one, on the search's data."""
        base, seed = self.searched, self.base.train.seed
        arms = [arm for arm in self.settings.arms if ARMS[arm].stage]
        return [Job(f"{arm}-search", arm_config(base, arm, seed, init, [ARMS[arm].stage])) for arm in arms]

    def find(
        self,
        init: str | None,
        run_dir: Callable[[str], Path],
        parallel: int | None,
        engine: Literal["local", "ray"] = "local",
    ) -> dict[str, list[str]]:
        """The best draw of each arm, as overrides; `jobs` have been run in `run_dir(name)`."""
        found = {}
        for arm in self.settings.arms:
            start = str(run_dir(f"{arm}-search")) if ARMS[arm].stage else init
            cfg = self._with_section(arm_config(self.base, arm, self.base.train.seed, start, ["finetune"]))
            source, folder = f"{self.source}, arm {arm}", self.folder / "search" / arm
            result = search(cfg, source, folder, self.settings.search_trials, parallel, engine=engine)
            logger.info(f"{result.table}\nbest of {ARMS[arm].words}: {' '.join(result.best_overrides)}")
            found[arm] = result.best_overrides
        write_atomically(self.folder / FOUND_FILE, json.dumps(found, indent=2) + "\n")
        return found


def found_before(folder: Path) -> dict[str, list[str]]:
    """What the searches of the comparison in `folder` have found; empty where it has searched nothing, or not yet."""
    return read_json(folder / FOUND_FILE)
