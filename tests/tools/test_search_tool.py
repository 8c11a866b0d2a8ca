"""The command line of the search, with real runs."""

import csv

import pytest
from command_line import load_tool

from bissl_zoo.config import LazyConfig, load_config
from bissl_zoo.studies.search_space import read_search

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


def test_a_search_runs_its_trials_survives_one_that_diverges_and_is_extended_by_what_is_missing(search, tmp_path):
    def settings(seed):
        return f"{{seed: {seed}, space: {SPACE}, overrides: [dataloader.test.dataset.split=val]}}"

    def draws(seed):
        cfg = LazyConfig.apply_overrides(load_config("quickstart/digit_scenes_det.py"), [f"+search={settings(seed)}"])
        return [read_search(cfg, "test").draw(number) for number in range(3)]

    rates = [0.01, 1e30, 0.01]
    seed = next(seed for seed in range(100) if [one["optimizer.finetune.lr"] for one in draws(seed)] == rates)
    section = f"+search={settings(seed)}"
    sgd = "{_target_: torch.optim.SGD, lr: 0.1, weight_decay: 0.0}"

    status, out, err = search("--trials", "2", "--parallel", "2", section, optimizer__finetune=sgd)
    assert status == 0, err
    assert "too good" not in out  # the trials read another split
    first, second = rows(tmp_path)
    assert (first["state"], second["state"]) == ("finished", "failed") and second["AP50"] == ""
    assert "finetune" in second["message"] and float(first["AP50"]) >= 0 and float(first["seconds"]) > 0
    assert float(first["optimizer.finetune.weight_decay"]) == draws(seed)[0]["optimizer.finetune.weight_decay"]
    assert "trial_000 finished" in out and "trial_001 failed" in out and "best" in out

    best = LazyConfig.load(tmp_path / "search" / "best.yaml")
    assert {key: float(first[key]) for key in draws(seed)[0]} == draws(seed)[0]
    assert best.optimizer.finetune.lr == 0.01 and "search" not in best
    assert best.optimizer.finetune.weight_decay == float(first["optimizer.finetune.weight_decay"])
    assert best.dataloader.test.dataset.split == "test" and best.train.output_dir == "runs/quickstart"
    assert (tmp_path / "search" / "search.png").read_bytes().startswith(b"\x89PNG")

    log = tmp_path / "search" / "logs" / "trial_000.log"
    said = log.read_text()
    status, out, err = search("--trials", "3", "--parallel", "2", section, optimizer__finetune=sgd)
    assert status == 0, err
    assert [row["state"] for row in rows(tmp_path)] == ["finished", "failed", "finished"]
    assert rows(tmp_path)[0] == first and log.read_text() == said

    status, out, err = search("--trials", "3", section.replace("1.0e+30", "0.5"), optimizer__finetune=sgd)
    assert status == 1 and "another configuration" in err and "optimizer.finetune.lr" in err


def test_what_cannot_be_is_refused_in_a_message(search, tmp_path):
    status, _, err = search("--trials", "2", "+search={metric: top1}")
    assert status == 1 and err.startswith("error: search.metric is 'top1'") and "AP50" in err
    assert not (tmp_path / "search").exists()


def test_a_search_on_the_test_set_is_warned_of(search, tmp_path):
    status, out, err = search("--parallel", "0")
    assert status == 1 and "0 jobs at a time" in err
    assert "warning: the trials are measured on dataloader.test" in out
