"""Equal budgets by measured seconds: the steps of fine-tuning with which every arm takes the time of the dearest."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from bissl_zoo.errors import ConfigError
from bissl_zoo.files import read_json, write_atomically
from bissl_zoo.registry import STAGES
from bissl_zoo.runs.listing import look_at

#: steps: every arm fine-tunes for the steps of the config; seconds: for longer, until all arms take the same time
BUDGETS = ("steps", "seconds")
#: the measured costs of the arms and their steps, in the folder of a comparison
BUDGET_FILE = "budget.json"


@dataclass(frozen=True)
class Cost:
    """The measured cost of an arm with the steps of the config.

    Attributes:
        seconds: wall time of the pilot, its stage included.
        seconds_per_step: of fine-tuning and, in self-training, of the teacher, which trains for as many steps.
        steps: steps of fine-tuning.
    """

    seconds: float
    seconds_per_step: float
    steps: int

    def steps_for(self, seconds: float) -> int:
        """Return the steps of fine-tuning with which the arm takes `seconds`."""
        return self.steps + round((seconds - self.seconds) / self.seconds_per_step)


def measured_cost(runs: Sequence[Path]) -> Cost:
    """Return the cost of an arm from its finished pilot.

    Args:
        runs: the run of the arm's stage, if that is separate, and the one that fine-tunes.
    """
    states = [look_at(run) for run in runs]
    stages = {stage.name: stage for stage in states[-1].stages}
    per_step = stages["finetune"].metrics["speed/seconds_per_step"]
    count = sum(name in STAGES and STAGES.get(name).section == "finetune" for name in stages)
    return Cost(sum(state.metadata["wall_time_s"] for state in states), count * per_step, stages["finetune"].step)


def read_costs(folder: Path) -> dict[str, Cost]:
    """Return the costs that a comparison has measured, by arm; empty before."""
    file = folder / BUDGET_FILE
    return {arm: Cost(**cost) for arm, cost in read_json(file)["arms"].items()} if file.exists() else {}


def settle_costs(folder: Path, costs: Mapping[str, Cost]) -> dict[str, Cost]:
    """Write the costs of the arms before their seeds run, together with those of arms measured before; return all.

    Raises:
        ConfigError: a new arm takes longer than those whose seeds have run.
    """
    before = read_costs(folder)
    limit = max((cost.seconds for cost in before.values()), default=None)
    for arm, cost in costs.items():
        if limit is not None and cost.seconds > limit:
            raise ConfigError(
                f"The arm {arm} takes {cost.seconds:.0f} s, more than the {limit:.0f} s that every arm of {folder} "
                "has. Compare it in another folder, or with compare.budget=steps."
            )
    merged = {**before, **costs}
    write_atomically(folder / BUDGET_FILE, json.dumps({"arms": {a: asdict(c) for a, c in merged.items()}}, indent=2))
    return merged


def equal_steps(costs: Mapping[str, Cost]) -> dict[str, int]:
    """Return the steps of fine-tuning of each arm, so that all take the time of the dearest; it keeps its own."""
    seconds = max((cost.seconds for cost in costs.values()), default=0.0)
    return {arm: cost.steps_for(seconds) for arm, cost in costs.items()}
