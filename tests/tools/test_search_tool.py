"""The command line of the search, with real runs."""

import csv

import pytest
from command_line import load_tool

from bissl_zoo.config import LazyConfig, load_config
from bissl_zoo.studies.search import draw, read_search

pytestmark = pytest.mark.slow
SPACE = "{optimizer.finetune.lr: {choices: [0.01, 1.0e+30]}, optimizer.finetune.weight_decay: [1e-6, 1e-2]}"


@pytest.fixture
def search(at_scenes, tiny, tmp_path, monkeypatch, capfd):
    """Call the command line: `search("--trials", 2)` -> (status, standard output, standard error)."""
    tool = load_tool("search")

    def call(*arguments, **changed):
        changed = dict(train__stages="[finetune]", **changed)
        options = ["--config-file", "quickstart/digit_scenes_det.py", "--output", tmp_path / "search", *arguments]
        status = tool.cli([*map(str, options), *tiny(**changed)])
        return status, *capfd.readouterr()

    return call


def rows(tmp_path):
    with open(tmp_path / "search" / "trials.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_a_search_runs_its_trials_survives_a_divergence_and_can_be_extended(search, tmp_path):
    def section(seed):
        return f"+search={{seed: {seed}, space: {SPACE}, overrides: [dataloader.test.dataset.split=val]}}"

    def draws(seed):
        cfg = LazyConfig.apply_overrides(load_config("quickstart/digit_scenes_det.py"), [section(seed)])
        return [draw(read_search(cfg, "test"), number) for number in range(3)]

    rates = [0.01, 1e30, 0.01]
    seed = next(seed for seed in range(100) if [p["optimizer.finetune.lr"] for p in draws(seed)] == rates)
    sgd = "{_target_: torch.optim.SGD, lr: 0.1, weight_decay: 0.0}"

    status, out, err = search("--trials", "2", "--parallel", "2", section(seed), optimizer__finetune=sgd)
    assert status == 0, err
    assert "test set" not in out  # the trials read another split
    first, second = rows(tmp_path)
    assert (first["state"], second["state"]) == ("finished", "failed") and second["AP50"] == ""
    assert "finetune" in second["message"] and float(first["AP50"]) >= 0 and float(first["seconds"]) > 0
    assert {key: float(first[key]) for key in draws(seed)[0]} == draws(seed)[0]
    assert "trial_000 finished" in out and "trial_001 failed" in out and "best" in out

    best = LazyConfig.load(tmp_path / "search" / "best.yaml")
    assert best.optimizer.finetune.lr == 0.01 and "search" not in best
    assert best.optimizer.finetune.weight_decay == float(first["optimizer.finetune.weight_decay"])
    assert best.dataloader.test.dataset.split == "test" and best.train.output_dir == "runs/quickstart"

    log = tmp_path / "search" / "logs" / "trial_000.log"
    text = log.read_text()
    status, out, err = search("--trials", "3", "--parallel", "2", section(seed), optimizer__finetune=sgd)
    assert status == 0, err
    assert [row["state"] for row in rows(tmp_path)] == ["finished", "failed", "finished"]
    assert rows(tmp_path)[0] == first and log.read_text() == text

    status, out, err = search("--trials", "3", section(seed).replace("1.0e+30", "0.5"), optimizer__finetune=sgd)
    assert status == 1 and "another configuration" in err and "optimizer.finetune.lr" in err


def test_a_search_on_the_test_set_is_warned_of(search, tmp_path):
    status, out, err = search("--parallel", "0")
    assert status == 1 and "--parallel is 0" in err
    assert "warning: the trials are evaluated on the test set" in out
