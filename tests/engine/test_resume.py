"""A run that is killed anywhere, again and again, and resumed ends with the bits of one that was never killed.

Runs are forked from the test process, which has imported everything. They kill themselves at an event drawn with a seed
(an optimizer step, a product, a write, a rename, a sync), or are killed at a moment drawn likewise, as of a step's
middle; of two processes, either or both. BISSL_ZOO_KILLS and BISSL_ZOO_SEED ask for a longer soak and another one.
"""

import os
import random
import signal
import time
from itertools import count

import pytest
from forked_runs import start_run
from hostile_input import time_limit
from run_outcomes import assert_same, outcome

from bissl_zoo.bilevel.level import Level
from bissl_zoo.engine import hooks, publishing, runner
from bissl_zoo.hypergradient import GraphOperator
from bissl_zoo.runs import checkpoint
from bissl_zoo.zoo.stores import folder as folder_store

pytestmark = pytest.mark.slow

KILLS, SEED = int(os.environ.get("BISSL_ZOO_KILLS", 2)), os.environ.get("BISSL_ZOO_SEED", "")
#: workers of the loaders, and processes
RUNS = {"with workers": (2, 1), "two processes": (0, 2), "at any moment": (2, 1)}


class Bomb:
    """Counts events of this process, and kills it at one of them."""

    def __init__(self, fuse):
        self.fuse, self.count = fuse, 0

    def tick(self):
        self.count += 1
        if self.count == self.fuse:
            os.kill(os.getpid(), signal.SIGKILL)

    def around(self, function):
        def armed(*args, **kwargs):
            self.tick()
            result = function(*args, **kwargs)
            self.tick()
            return result

        return armed

    def plant(self):
        """In the child only: where a run computes and where it writes."""
        Level.optimize = self.around(Level.optimize)
        GraphOperator.hessian_product = self.around(GraphOperator.hessian_product)
        for module in (checkpoint, hooks, publishing, runner, folder_store):
            for name in ("write_atomically", "_write_state", "evaluate", "publish_entry"):
                if hasattr(module, name):
                    setattr(module, name, self.around(getattr(module, name)))
        for name in ("replace", "fsync", "link", "mkdir", "unlink"):
            setattr(os, name, self.around(getattr(os, name)))


def go(cfg, processes, folder, fuse=None, report=None, seconds=None, victims=(0,)):
    """Run until the end, the bomb, or a kill after so many seconds; whether it came to the end."""
    meeting, errors = folder / f"meeting-{random.getrandbits(64):x}", folder / "errors"
    bomb = Bomb(fuse)
    armed = victims if fuse is not None or report is not None else ()
    pids = [
        start_run(
            cfg,
            rank=rank,
            processes=processes,
            meeting=meeting,
            before=bomb.plant if rank in armed else None,
            after=(lambda: report.write_text(str(bomb.count))) if report and rank == 0 else None,
            errors=errors,
        )
        for rank in range(processes)
    ]
    with time_limit(600):
        if seconds is not None:
            time.sleep(seconds)
            for rank in victims:
                os.kill(pids[rank], signal.SIGKILL)
        statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    printed = errors.read_text()
    # a process that loses the other ends with status 1 and one message
    assert not {*statuses} - {0, -signal.SIGKILL, 1 if processes == 2 and (fuse or seconds) else 0}, printed
    assert "Traceback" not in printed and -signal.SIGKILL in statuses or statuses == [0] * processes, printed
    errors.unlink()
    return statuses == [0] * processes


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system cannot fork")
@pytest.mark.parametrize("kind", RUNS)
def test_a_run_that_was_killed_many_times_ends_bit_equal_to_one_that_was_not(tiny_config, at_scenes, tmp_path, kind):
    workers, processes = RUNS[kind]

    def config(name):
        return tiny_config(
            train__output_dir=tmp_path / name,
            train__publish__zoo=tmp_path / f"{name}-zoo",
            train__deterministic=True,
            train__checkpoint__period=2,
            pretrain__steps=5,
            bilevel__head_warmup__steps=3,
            bilevel__alternations=3,
            finetune__steps=3,
            finetune__eval_period=1,
            **{f"dataloader__{role}__num_workers": workers for role in ("pretext", "train")},
        )

    start = time.monotonic()
    go(config("whole"), processes, tmp_path, report=tmp_path / "events")
    duration = time.monotonic() - start
    events = int((tmp_path / "events").read_text())
    assert events > 100
    whole = outcome(tmp_path / "whole", tmp_path / "whole-zoo")
    rng, kills = random.Random(f"{kind}{SEED}"), 0
    for number in count():  # a run takes no more kills than it has events, so that a soak takes several
        cfg = config(f"killed-{number}")
        while kills < KILLS:
            # half of the fuses are long, so that all stages are reached
            part = rng.random() / (2 if rng.random() < 0.5 else 8)
            at_a_moment = kind == "at any moment" or (processes == 2 and rng.random() < 0.5)
            how = {"seconds": part * duration} if at_a_moment else {"fuse": 1 + int(part * events)}
            if go(cfg, processes, tmp_path, victims=rng.choice([(0,), (1,), (0, 1)][: 3 ** (processes - 1)]), **how):
                break
            kills += 1
        go(cfg, processes, tmp_path)
        killed = outcome(tmp_path / f"killed-{number}", tmp_path / f"killed-{number}-zoo")
        assert_same(killed, whole)
        assert len(killed["published"]) == 1
        if kills == KILLS:
            break
    print(f"{kind}: {kills} kills of {number + 1} runs, {events} events in a whole run")
