"""The runs of a comparison: their names, their configs, and which of them start from which."""

from collections.abc import Iterable
from pathlib import Path

from omegaconf import DictConfig

from bissl_zoo.studies.arms import (
    FINETUNE_SEED_OFFSET,
    Settings,
    arm_config,
    find_arm,
    folder_name,
    pretrain_config,
    pretrains,
    run_name,
)
from bissl_zoo.studies.places import Job


class Plan:
    """The runs of a comparison by kind, in the order in which they run.

    Args:
        base: config that all arms derive from.
        folder: the runs are in `folder/runs/NAME`.
        search_base: base config with the data of the search, if there is one.
    """

    def __init__(self, base: DictConfig, settings: Settings, folder: Path, search_base: DictConfig | None) -> None:
        self.base, self.settings, self.folder, self.search_base = base, settings, folder, search_base
        self.pretrains = pretrains(base)

    def pretraining_jobs(self) -> list[Job]:
        """Return the runs of pretraining that the arms share, if `train.stages` begins with it."""
        if not self.pretrains:
            return []
        seeds = self.settings.seeds if self.settings.vary == "pretrain" else [self.base.train.seed]
        return [Job(Path(self.pretrained(seed)).name, pretrain_config(self.base, seed)) for seed in seeds]

    def stage_jobs(self) -> list[Job]:
        """Return the runs of the arms' stages from which several fine-tunings start."""
        if self.settings.vary == "finetune":
            return self._stage_jobs(self.base, self.pretrained(self.base.train.seed), "")
        if self.settings.finetune_seeds == 1:
            return []
        cells = [(find_arm(arm), arm, seed) for arm, seed in self._cells() if find_arm(arm).leaves_backbone]
        return [
            Job(self._stage_run(name, seed), arm_config(self.base, name, seed, self.pretrained(seed), [arm.stage]))
            for arm, name, seed in cells
        ]

    def pilot_jobs(self) -> dict[str, Job]:
        """Return the run that measures each arm, with the first seed, if budgets are equal in seconds."""
        if self.settings.budget == "steps":
            return {}
        jobs, first = self.seed_jobs({}), self.settings.seeds[0]
        return {arm: Job(f"{folder_name(arm)}-pilot", jobs[arm, first, 0].cfg) for arm in self.settings.arms}

    def search_jobs(self) -> list[Job]:
        """Return the runs that the searches start from: the stage of each arm on the data of the search."""
        if self.search_base is None:
            return []
        return self._stage_jobs(self.search_base, self.pretrained(self.settings.seeds[0]), "-search")

    def trial_config(self, arm: str, overrides: Iterable[str]) -> DictConfig:
        """Return the config of the trials of an arm's search: fine-tuning, after its stage if that is no run before."""
        init, stages = self.pretrained(self.settings.seeds[0]), find_arm(arm).stages
        if find_arm(arm).leaves_backbone:
            init, stages = str(self.run_dir(f"{folder_name(arm)}-search")), ["finetune"]
        return arm_config(self.base, arm, self.base.train.seed, init, stages, overrides)

    def seed_jobs(self, changes: dict[str, list[str]]) -> dict[tuple[str, int, int], Job]:
        """Return the run of every arm, seed and further fine-tuning of that seed, ordered by seed.

        Args:
            changes: overrides of each arm: its budget, and the best of its search.
        """
        jobs = {}
        for arm, seed, repeat in self.runs():
            init, stages, overrides = self.pretrained(seed), find_arm(arm).stages, [*changes.get(arm, ())]
            if find_arm(arm).leaves_backbone and (run := self._stage_run(arm, seed)):
                init, stages = str(self.run_dir(run)), ["finetune"]
            if self.settings.finetune_seeds > 1:
                overrides.append(f"train.label_seed={seed}")
            cfg = arm_config(self.base, arm, seed + repeat * FINETUNE_SEED_OFFSET, init, stages, overrides)
            jobs[arm, seed, repeat] = Job(run_name(arm, seed, repeat), cfg)
        return jobs

    def all_jobs(self) -> list[Job]:
        """Return all runs in their order, those of the seeds with the settings of the config."""
        before = [*self.pretraining_jobs(), *self.stage_jobs(), *self.pilot_jobs().values(), *self.search_jobs()]
        return [*before, *self.seed_jobs({}).values()]

    def parts(self, arm: str, seed: int, name: str) -> list[Path]:
        """Return the run directories of a result: that of the arm's stage, if that is separate, and `name`."""
        stage = self._stage_run(arm, seed) if find_arm(arm).leaves_backbone else None
        return [self.run_dir(run) for run in (stage, name) if run]

    def runs(self) -> Iterable[tuple[str, int, int]]:
        """Yield arm, seed and number of the fine-tuning of each run of the seeds."""
        return ((*cell, repeat) for cell in self._cells() for repeat in range(self.settings.finetune_seeds))

    def _cells(self) -> Iterable[tuple[str, int]]:
        return ((arm, seed) for seed in self.settings.seeds for arm in self.settings.arms)

    def _stage_run(self, arm: str, seed: int) -> str | None:
        """Return the name of the run of the arm's stage that several fine-tunings start from; None without one."""
        if self.settings.vary == "finetune":
            return folder_name(arm)
        return f"{folder_name(arm)}-stage{seed}" if self.settings.finetune_seeds > 1 else None

    def run_dir(self, name: str) -> Path:
        """Return the directory of a run."""
        return self.folder / "runs" / name

    def pretrained(self, seed: int) -> str | None:
        """Return `train.init` of the arms for a seed."""
        if not self.pretrains:
            return self.base.train.init
        return str(self.run_dir(f"pretrain-seed{seed}" if self.settings.vary == "pretrain" else "pretrain"))

    def _stage_jobs(self, base: DictConfig, init: str | None, suffix: str) -> list[Job]:
        """Return the run of each arm's stage without fine-tuning."""
        seed, arms = self.base.train.seed, [arm for arm in self.settings.arms if find_arm(arm).leaves_backbone]
        return [
            Job(f"{folder_name(arm)}{suffix}", arm_config(base, arm, seed, init, [find_arm(arm).stage])) for arm in arms
        ]
