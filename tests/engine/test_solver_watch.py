"""The warning of systems that are not being solved."""

import pytest

from bissl_zoo.engine.hooks import SolverWatch
from bissl_zoo.engine.runner import run
from bissl_zoo.engine.trainer import Trainer


class Solves(Trainer):
    """A stage of prescribed statuses, `per_step` of them at a step."""

    def __init__(self, statuses, per_step=8, residual=0.5):
        super().__init__("bissl", len(statuses) // per_step)
        self.statuses, self.per_step, self.residual = statuses, per_step, residual

    def run_step(self):
        first = self.step * self.per_step
        self.records = [{"solver/status": s, "solver/damping": 10.0} for s in self.statuses[first:][: self.per_step]]
        if self.residual is not None:
            for number, record in enumerate(self.records, start=first):
                record["solver/residual"] = self.residual * (1 + number % 3)
        return {}

    def levels(self):
        return {}


def warnings(capsys, statuses, **options):
    Solves(statuses, **options).train([SolverWatch("runs/a/config.yaml")])
    return capsys.readouterr().out.splitlines()


def test_a_solver_that_always_stops_early_is_warned_of_once(capsys):
    (warning,) = warnings(capsys, ["max_iterations"] * 96)
    assert warning.startswith("warning: 24 of the last 24 solves")
    for fact in ("max_iterations 24", "median residual 1", "damping 10"):
        assert fact in warning
    for advice in (
        "solver.iterations",
        "solver.damping=auto",
        "check_hypergradient.py --config-file runs/a/config.yaml",
    ):
        assert advice in warning


def test_statuses_are_counted_the_most_frequent_first(capsys):
    (warning,) = warnings(capsys, ["diverged", "max_iterations", "max_iterations", "converged"] * 6, residual=None)
    assert "18 of the last 24 solves" in warning and "(max_iterations 12, diverged 6, damping 10)" in warning


@pytest.mark.parametrize(
    ("statuses", "expected"),
    [
        (["converged"] * 96, 0),
        (["not_solved"] * 96, 0),  # of solvers that solve nothing
        (["max_iterations"] * 23, 0),  # less than the window
        (["max_iterations"] * 24, 1),
        (["diverged"] * 12 + ["converged"] * 12, 0),  # half of it
        (["diverged"] * 13 + ["converged"] * 11, 1),
        ((["singular"] * 12 + ["converged"] * 24) * 4, 0),  # long ago
    ],
)
def test_more_than_half_of_a_window_must_fail(capsys, statuses, expected):
    assert len(warnings(capsys, statuses, per_step=1)) == expected


@pytest.mark.slow
@pytest.mark.parametrize(("solver", "expected"), [("identity", 0), ("cg, iterations: 1, tolerance: 0.0", 1)])
def test_a_run_warns_about_its_solver(tiny_config, at_scenes, tmp_path, capsys, solver, expected):
    cfg = tiny_config(
        train__output_dir=tmp_path / "run",
        train__stages="[bissl]",
        train__publish__name="null",
        train__checkpoint__period=3,
        bilevel__alternations=3,
        bilevel__lower_steps=1,
        bilevel__upper_steps=8,
        solver=f"{{_target_: bissl_zoo.registry.build_solver, name: {solver}}}",
    )
    run(cfg, "test")
    lines = [line for line in capsys.readouterr().out.splitlines() if "solves for the hypergradient failed" in line]
    assert len(lines) == expected
    assert all(f"--config-file {tmp_path / 'run' / 'config.yaml'}" in line for line in lines)
    assert (tmp_path / "run" / "config.yaml").exists()
