"""The runs of a comparison: which there are, what is wrong with them beforehand, and what they come to."""

import logging
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

import torch
from omegaconf import DictConfig

from bissl_zoo.config import LazyConfig
from bissl_zoo.engine.build import STAGE_DATA, Context, build_datasets
from bissl_zoo.engine.checks import check_config, check_parts
from bissl_zoo.engine.init import ZOO_PREFIX, load_init
from bissl_zoo.engine.stages.bissl import LEAST_COUPLING, coupling, pretext_head_is_new
from bissl_zoo.errors import BisslZooError, ConfigError, did_you_mean
from bissl_zoo.runs.listing import FINISHED as RUN_FINISHED
from bissl_zoo.runs.listing import is_run, look_at
from bissl_zoo.studies.compare_arms import ARMS, arm_config, base_config, pretrain_config, read_settings
from bissl_zoo.studies.compare_folder import record_of, samples_of, see_folder, take_folder
from bissl_zoo.studies.compare_report import Figures
from bissl_zoo.studies.compare_search import ArmSearch, found_before
from bissl_zoo.studies.jobs import FINISHED, Job, JobOutcome, progress_line, run_jobs

logger = logging.getLogger(__name__)


class Comparison:
    """The runs of one comparison in their order: pretraining, searches, what an arm's seeds share, and the seeds.

    Args:
        source: the config's name, for messages.
        folder: where the comparison is kept, each run in `folder/runs/NAME`.
        parallel, engine: see `run_jobs`.
    """

    def __init__(
        self,
        cfg: DictConfig,
        source: str,
        folder: Path,
        parallel: int | None = None,
        engine: Literal["local", "ray"] = "local",
    ) -> None:
        self.cfg, self.source, self.folder, self.parallel, self.engine = cfg, source, folder, parallel, engine
        self.settings, self.base = read_settings(cfg, source), base_config(cfg)
        self.pretrains = "pretrain" in self.base.train.stages
        self.search = None
        if self.settings.search_trials:
            self.search = ArmSearch(self.base, cfg.search, self.settings, source, folder)
        self.failed: dict[str, str] = {}
        self.origin: list[dict[str, str]] = []
        self.samples: dict[str, dict[str, str]] = {}

    def check(self) -> None:
        """See to what can be known to be wrong before the first of many runs: configs, data, weights, networks.

        Raises:
            BisslZooError: as for a single run.
        """
        base = LazyConfig.apply_overrides(self.base, ["train.device=cpu"])  # GPUs are for the runs
        init = base.train.init
        configs = {arm: arm_config(base, arm, 0, init, _stages(arm)) for arm in self.settings.arms}
        if self.pretrains:
            configs["pretrain"] = pretrain_config(base, 0)
        for cfg in configs.values():
            check_config(cfg, self.source)
        initial, ancestors = load_init(init, base)
        self.origin = ancestors[:1]
        if init and init.startswith(ZOO_PREFIX):  # seeds that are added later start from the same version
            self.base.train.init = f"{ZOO_PREFIX}{ancestors[0]['name']}"
        measured = ({"val"} if "val" in base.dataloader else set()) | {"test"}
        data = build_datasets(base, {"pretext", "train", *measured})
        self.samples = samples_of(base, data)
        if self.search:
            searched = self.search.searched
            self.samples |= samples_of(searched, build_datasets(searched, {"train", *measured}), "search ")
        for cfg in configs.values():
            roles = {role for stage in cfg.train.stages for role in STAGE_DATA[stage]}
            roles |= measured if "finetune" in cfg.train.stages else set()
            check_parts(Context(cfg, {role: data[role] for role in roles}, torch.device("cpu")), initial)
        if "bissl" in configs:
            value = coupling(Context(configs["bissl"], data, torch.device("cpu")))
            self._warn(value, not self.pretrains and pretext_head_is_new(configs["bissl"], initial))

    def _warn(self, value: float | None, head_is_new: bool) -> None:
        if value is not None and value < LEAST_COUPLING:
            logger.warning(
                f"lambda * lr_eff * lower steps = {value:.2g}, below {LEAST_COUPLING}: the BiSSL stage will "
                "do next to nothing, and there is nothing to compare. Raise bilevel.lambda."
            )
        if head_is_new and "longer_pretraining" in self.settings.arms:
            logger.warning(
                "train.init brings no pretext head. The BiSSL stage warms one up on the frozen backbone, "
                "longer pretraining trains it with the backbone, which is to its disadvantage."
            )

    def shared_jobs(self) -> list[Job]:
        """What comes before the seeds part ways: pretraining, and with `vary="finetune"` what follows it."""
        base, vary = self.base, self.settings.vary
        jobs = []
        if self.pretrains:
            seeds = self.settings.seeds if vary == "pretrain" else [base.train.seed]
            jobs += [Job(Path(self._pretrained(seed)).name, pretrain_config(base, seed)) for seed in seeds]
        if vary == "finetune":
            seed, init = base.train.seed, self._pretrained(base.train.seed)
            arms = [arm for arm in self.settings.arms if ARMS[arm].stage]
            jobs += [Job(arm, arm_config(base, arm, seed, init, [ARMS[arm].stage])) for arm in arms]
        return jobs

    def search_jobs(self) -> list[Job]:
        """What the searches start from, where there are any."""
        return self.search.jobs(self._pretrained(self.settings.seeds[0])) if self.search else []

    def seed_jobs(self, found: dict[str, list[str]]) -> dict[tuple[str, int], Job]:
        """The run of every arm and seed, which ends in a figure; seed by seed, so that all arms are seen early."""
        jobs = {}
        for arm, seed in self._cells():
            init, stages = self._pretrained(seed), _stages(arm)
            if self.settings.vary == "finetune" and ARMS[arm].stage:
                init, stages = str(self._run_dir(arm)), ["finetune"]
            jobs[arm, seed] = Job(
                f"{arm}-seed{seed}", arm_config(self.base, arm, seed, init, stages, found.get(arm, ()))
            )
        return jobs

    def run(self) -> Figures:
        """Run what is missing, and collect every figure; `check` goes before.

        Raises:
            BisslZooError: pretraining that all share failed; as `take_folder`, the search and `run_jobs` do.
        """
        take_folder(self.folder, self.record())
        self._share()
        figures = Figures({arm: {} for arm in self.settings.arms}, found=self._search())
        jobs = self.seed_jobs(figures.found)
        ready = {cell: job for cell, job in jobs.items() if job.cfg.train.init not in self.failed}
        for job in (job for cell, job in jobs.items() if cell not in ready):
            figures.failures[job.name] = f"what it starts from failed, {self.failed[job.cfg.train.init]}"
        for cell, outcome in zip(ready, self._run(list(ready.values()), self._told), strict=True):
            if outcome.status == FINISHED:
                self._take(figures, *cell, outcome.results)
            else:
                figures.failures[outcome.name] = outcome.message
        return figures

    def collect(self) -> Figures:
        """The figures of what has finished by now; nothing is run.

        Raises:
            ConfigError: the folder is not that of this comparison.
        """
        see_folder(self.folder, self.record())
        figures = Figures({arm: {} for arm in self.settings.arms}, found=found_before(self.folder))
        for arm, seed in self._cells():
            name = f"{arm}-seed{seed}"
            run = look_at(self._run_dir(name)) if is_run(self._run_dir(name)) else None
            if run is None or run.state != RUN_FINISHED:
                figures.failures[name] = "not finished yet" if run else "not begun yet"
            else:
                self._take(figures, arm, seed, run.results)
        return figures

    def record(self) -> dict[str, Any]:
        """What the folder's figures depend on."""
        search = self.cfg.search if self.search else None
        return record_of(self.base, search, self.settings, self.origin, self.samples)

    def _cells(self) -> Iterable[tuple[str, int]]:
        return ((arm, seed) for seed in self.settings.seeds for arm in self.settings.arms)

    def _run_dir(self, name: str) -> Path:
        return self.folder / "runs" / name

    def _pretrained(self, seed: int) -> str | None:
        """What the arms of a seed start from, as `train.init`."""
        if not self.pretrains:
            return self.base.train.init
        return str(self._run_dir(f"pretrain-seed{seed}" if self.settings.vary == "pretrain" else "pretrain"))

    def _share(self) -> None:
        """Pretraining first, since the others start from it."""
        jobs = self.shared_jobs()
        pretraining = [job for job in jobs if job.name not in ARMS]
        self._note_failures(self._run(pretraining))
        if pretraining and len(self.failed) == len(pretraining):
            raise BisslZooError(f"Pretraining failed. {next(iter(self.failed.values()))}")
        self._note_failures(self._run([job for job in jobs if job not in pretraining]))

    def _note_failures(self, outcomes: list[JobOutcome]) -> None:
        for outcome in outcomes:
            if outcome.status != FINISHED:
                self.failed[str(self._run_dir(outcome.name))] = f"{outcome.name}: {outcome.message}"

    def _search(self) -> dict[str, list[str]]:
        """The overrides that the same search finds for each arm."""
        if self.search is None:
            return {}
        init = self._pretrained(self.settings.seeds[0])
        if init in self.failed:
            raise BisslZooError(f"What the searches start from failed. {self.failed[init]}")
        for outcome in self._run(self.search_jobs()):
            if outcome.status != FINISHED:
                raise BisslZooError(f"What a search starts from failed. {outcome.name}: {outcome.message}")
        return self.search.find(init, self._run_dir, self.parallel, self.engine)

    def _run(self, jobs: list[Job], told: Callable[[JobOutcome], str] = lambda outcome: "") -> list[JobOutcome]:
        def tell(outcome: JobOutcome) -> None:
            figure = told(outcome)
            if outcome.ran:
                logger.info(progress_line(outcome, figure))

        return run_jobs(jobs, self.folder, self.parallel, tell, engine=self.engine) if jobs else []

    def _told(self, outcome: JobOutcome) -> str:
        """The figure, looked up with the first run that has it, so that a wrong name does not cost all of them."""
        return f"{self.settings.metric} {self._value(outcome.results):.4f}" if outcome.status == FINISHED else ""

    def _take(self, figures: Figures, arm: str, seed: int, results: dict[str, dict[str, float]]) -> None:
        value = self._value(results)
        if math.isfinite(value):
            figures.values[arm][seed] = value
        else:
            figures.failures[f"{arm}-seed{seed}"] = f"its {self.settings.metric} is {value}"

    def _value(self, results: dict[str, dict[str, float]]) -> float:
        """The compared figure of a run, which has fine-tuned once."""
        measured = next(iter(results.values()), {})
        if self.settings.metric not in measured:
            names = [name for name in measured if "/" not in name]
            raise ConfigError(
                f"{self.source}: the runs measure no '{self.settings.metric}' (compare.metric)."
                f"{did_you_mean(self.settings.metric, measured)} They measure {', '.join(names) or 'nothing'}."
            )
        return measured[self.settings.metric]


def _stages(arm: str) -> list[str]:
    return [*filter(None, [ARMS[arm].stage]), "finetune"]
