"""Hyperparameter search: draws, validation, pruning, resume and the files it writes."""

import csv
import json
import sys

import numpy as np
import pytest
from scipy import stats

from bissl_zoo.config import LazyConfig, load_config
from bissl_zoo.errors import BisslZooError, ConfigError
from bissl_zoo.studies import search as search_module
from bissl_zoo.studies.places import JobOutcome
from bissl_zoo.studies.search import SearchSettings, draw, read_search, search, trial_config

pytest.importorskip("optuna")

LR, DECAY = "optimizer.finetune.lr", "optimizer.finetune.weight_decay"
SPACE = {LR: [1e-4, 1.0], DECAY: [1e-6, 1e-2]}


def settings(**changed):
    default = dict(metric="AP50", trials=3, seed=0, sampler="random", space=SPACE, overrides=[])
    return SearchSettings(**default | changed)


def test_draws_are_log_uniform_and_independent():
    draws = [draw(settings(), number) for number in range(500)]
    for key, bounds in SPACE.items():
        values = [parameters[key] for parameters in draws]
        assert stats.kstest(values, stats.loguniform(*bounds).cdf).pvalue > 0.01
        assert bounds[0] <= min(values) and max(values) <= bounds[1]
    logs = np.log([list(parameters.values()) for parameters in draws])
    assert stats.pearsonr(logs[:, 0], logs[:, 1]).pvalue > 0.01
    assert stats.pearsonr(logs[:-1, 0], logs[1:, 0]).pvalue > 0.01


def test_a_draw_depends_on_the_seed_and_the_number_only():
    assert draw(settings(seed=7), 3) == draw(settings(seed=7), 3)
    assert draw(settings(seed=8), 3) != draw(settings(seed=7), 3) != draw(settings(seed=7), 4)
    assert all(value == float(f"{value:.4g}") for value in draw(settings(), 5).values())


def test_the_default_ranges_are_those_of_the_paper_and_a_section_changes_only_the_keys_it_names(tiny_config):
    for task, metric, trials, space in (
        ("faster_rcnn", "AP50", 50, {LR: [1e-4, 1e-1], DECAY: [1e-6, 1e-2]}),
        ("classification", "top1", 100, {LR: [1e-4, 1.0], DECAY: [1e-5, 1e-2]}),
        ("multilabel_classification", "mAP11", 100, {LR: [1e-4, 1.0], DECAY: [1e-5, 1e-2]}),
    ):
        cfg = tiny_config(task__name=task)
        assert read_search(cfg, "test") == SearchSettings(metric, trials, 0, "random", space, [])
        changed = read_search(LazyConfig.apply_overrides(cfg, ["+search={seed: 4, sampler: tpe}"]), "test")
        assert changed == SearchSettings(metric, trials, 4, "tpe", space, [])


def test_a_trial_is_the_config_with_its_parameters_and_overrides(tiny_config):
    section = "+search={seed: 1, overrides: [dataloader.test.dataset.split=val]}"
    cfg = LazyConfig.apply_overrides(tiny_config(), [section])
    parameters = draw(read_search(cfg, "test"), 2)
    trial = trial_config(cfg, read_search(cfg, "test"), parameters, "test")
    assert (trial.optimizer.finetune.lr, trial.optimizer.finetune.weight_decay) == tuple(parameters.values())
    assert trial.dataloader.test.dataset.split == "val" and trial.train.publish.name is None
    assert "search" not in trial


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("{metrics: AP50}", "no key 'search.metrics'.* Did you mean 'metric'"),
        (
            "{space: {optimizer.finetune.lrr: [1e-4, 1]}}",
            "no key 'optimizer.finetune.lrr'.*Nearest: optimizer.finetune.lr",
        ),
        ("{space: {optimizer.finetune.lr: [1, 1e-4]}}", "0 < low < high"),
        ("{space: {optimizer.finetune.lr: {choices: []}}}", "choices"),
        ("{overrides: [finetune.stepz=1]}", "no key 'finetune.stepz'"),
        ("{sampler: tpa}", "unknown search.sampler 'tpa'. Did you mean 'tpe'"),
        ("[1]", "it must be a section"),
    ],
)
def test_an_invalid_section_is_refused_before_the_first_trial(tiny_config, tmp_path, section, message):
    cfg = LazyConfig.apply_overrides(tiny_config(train__stages="[finetune]"), [f"+search={section}"])
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        search(cfg, "my.py", tmp_path / "search", trials=2)
    assert not (tmp_path / "search").exists()


def test_a_metric_that_the_task_does_not_compute_is_refused_before_the_first_trial(tiny_config, at_scenes, tmp_path):
    cfg = LazyConfig.apply_overrides(tiny_config(train__stages="[finetune]"), ["+search={metric: AP555}"])
    with pytest.raises(ConfigError, match="'AP555', which the task does not compute. Did you mean 'AP75'"):
        search(cfg, "my.py", tmp_path / "search", trials=2)
    assert not (tmp_path / "search").exists()


def test_a_task_without_default_ranges_needs_a_section(tiny_config):
    for overrides in ([], ["+search={metric: mine}"]):
        with pytest.raises(ConfigError, match="'mine' has no default search.*metric and space"):
            read_search(LazyConfig.apply_overrides(tiny_config(task__name="mine"), overrides), "my.py")


def test_a_config_or_folder_that_cannot_be_searched_is_refused(tiny_config, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("train: {}\n")
    for changed, options, folder, message in (
        (dict(train__stages="[pretrain]"), {}, "search", "train.stages has none that fine-tunes"),
        (dict(train__stages="[finetune]"), dict(prune=True), "search", "--prune needs finetune.eval_period"),
        ({}, {}, "run", "holds a run"),
    ):
        with pytest.raises(ConfigError, match=message):
            search(tiny_config(**changed), "my.py", tmp_path / folder, **{"trials": 2, **options})


def test_without_optuna_the_extra_is_named(tiny_config, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ConfigError, match=r'pip install "bissl_zoo\[search\]"'):
        search(tiny_config(train__stages="[finetune]"), "my.py", tmp_path / "search")


# ------------------------------------------------------------------------------------------------ searches


@pytest.fixture
def faked(monkeypatch, tiny_config, tmp_path):
    """Search without training: `faked({0: 0.5, 1: "an error"}, trials=2)`; `faked.ran` lists the trials that ran."""
    ran = []

    def call(outcomes, changed=(), **options):
        def run_jobs(jobs, folder, parallel, on_done, stop_if, engine):
            for done, job in enumerate(jobs, start=1):
                ran.append(job.name)
                cfg = job.cfg() if callable(job.cfg) else job.cfg
                call.rates[job.name] = cfg.optimizer.finetune.lr
                run_dir = folder / "runs" / job.name
                run_dir.mkdir(parents=True, exist_ok=True)
                value = outcomes[int(job.name[-3:])]
                if isinstance(value, BaseException):
                    raise value
                common = dict(folder=run_dir, seconds=1.0, done=done, total=len(jobs), eta=9.0)
                reason = None
                for step, height in enumerate(value if isinstance(value, list) else [], start=1):
                    with open(run_dir / "metrics.jsonl", "a") as file:
                        file.write(json.dumps({"stage": "finetune", "step": step, "test/AP50": height}) + "\n")
                        file.write('{"stage": "finetune", "st')  # a line that is still being written
                        file.flush()
                        reason = stop_if(job)
                        file.truncate(file.tell() - len('{"stage": "finetune", "st'))
                    if reason:
                        break
                value = value[-1] if isinstance(value, list) else value
                if reason:
                    on_done(JobOutcome(job.name, status="stopped", message=reason, **common))
                elif isinstance(value, str):
                    on_done(JobOutcome(job.name, status="failed", message=value, **common))
                else:
                    results = {"pretrained": {"AP50": 1.0, "AP": 1.0}, "bissl": {"AP50": value, "AP": value / 2}}
                    on_done(JobOutcome(job.name, status="finished", results=results, **common))

        monkeypatch.setattr(search_module, "run_jobs", run_jobs)
        monkeypatch.setattr(search_module, "check_trials", lambda *_: None)
        cfg = tiny_config(train__stages="[finetune]", finetune__eval_period=1)
        return search(LazyConfig.apply_overrides(cfg, changed), "my.py", tmp_path / "search", **options)

    call.ran, call.rates = ran, {}
    return call


def rows(tmp_path):
    with open(tmp_path / "search" / "trials.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_the_best_trial_has_the_highest_metric_of_the_last_fine_tuning(faked, tmp_path, capsys):
    result = faked({0: 0.25, 1: 0.75, 2: float("nan"), 3: "error with\na second line", 4: 0.75}, trials=5)
    assert [row["state"] for row in rows(tmp_path)] == ["finished"] * 2 + ["failed"] * 2 + ["finished"]
    assert [row["AP50"] for row in rows(tmp_path)] == ["0.25", "0.75", "", "", "0.75"]
    assert [row["message"] for row in rows(tmp_path)][2:4] == ["AP50 is nan", "error with a second line"]
    best = LazyConfig.load(tmp_path / "search" / "best.yaml")
    assert result.best_overrides == [
        f"{LR}={faked.rates['trial_001']}",
        f"{DECAY}={best.optimizer.finetune.weight_decay}",
    ]
    assert best.optimizer.finetune.lr == faked.rates["trial_001"] and best.train.output_dir == "runs/quickstart"
    assert result.table.splitlines()[2].split()[:2] == ["trial_001", "0.7500"] and "trial_002" not in result.table
    assert result.study.best_value == 0.75
    output = capsys.readouterr().out
    assert "[2/5] trial_001 finished  AP50 0.7500  best 0.7500 (trial_001)  0:00:01  ETA 0:00:09" in output
    assert "trial_003 failed  error with a second line  best 0.7500 (trial_001)" in output


def test_a_killed_search_resumes_with_the_same_draws_and_repeats_none(faked, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        faked({0: 0.25, 1: "out of memory", 2: KeyboardInterrupt()}, trials=4)
    before = dict(faked.rates)
    faked.ran.clear()
    faked({1: 0.5, 2: 0.75, 3: 0.1}, trials=4)
    assert faked.ran == ["trial_001", "trial_002", "trial_003"]  # the finished one is not run again
    assert {name: faked.rates[name] for name in before} == before
    faked.ran.clear()
    faked({4: 0.2, 5: 0.3}, trials=6)
    assert faked.ran == ["trial_004", "trial_005"]
    assert len(set(faked.rates.values())) == 6
    reference = [draw(read_search(load_config("quickstart/digit_scenes_det.py"), ""), n)[LR] for n in range(6)]
    assert [faked.rates[f"trial_{n:03d}"] for n in range(6)] == reference


def test_tpe_uses_the_results_of_the_first_ten_trials(faked):
    section = f"+search={{sampler: tpe, space: {{{LR}: [1.0e-4, 1.0]}}}}"
    faked({number: number / 100 for number in range(11)}, [section], trials=11)
    cfg = LazyConfig.apply_overrides(load_config("quickstart/digit_scenes_det.py"), [section])
    alone = [draw(read_search(cfg, ""), number)[LR] for number in range(11)]  # without earlier results
    rates = [faked.rates[f"trial_{number:03d}"] for number in range(11)]
    assert rates[:10] == alone[:10] and rates[10] != alone[10]


def test_a_search_without_a_finished_trial_reports_the_first_error(faked, tmp_path):
    with pytest.raises(BisslZooError, match="No trial has finished. trial_000: loss is NaN"):
        faked({0: "loss is NaN", 1: "another"}, trials=2)
    assert [row["state"] for row in rows(tmp_path)] == ["failed"] * 2
    assert not (tmp_path / "search" / "best.yaml").exists()


def test_another_configuration_in_the_same_folder_is_refused_with_its_keys(faked):
    faked({0: 0.5}, trials=1)
    for changed, key in {
        "finetune.steps=3": "config.finetune.steps",
        "+search={seed: 3}": "search.seed",
    }.items():
        with pytest.raises(ConfigError, match=f"(?s)another configuration.*{key}"):
            faked({}, [changed], trials=1)
    faked({}, ["train.log_period=7", "dataloader.train.num_workers=3"], trials=1)


def test_a_trial_below_the_median_is_pruned_and_not_run_again(faked, tmp_path, capsys):
    good = {number: [0.5 + number / 100, 0.6, 0.7] for number in range(5)}
    outcomes = {**good, 5: [0.55, 0.1, 0.9], 6: [0.8, 0.1, 0.9], 7: [0.1, 0.95, 0.95]}
    faked(outcomes, trials=8, prune=True)
    states = [row["state"] for row in rows(tmp_path)]
    # the median at step 1 is 0.52, at step 2 it is 0.6; a trial is judged by its best value so far
    assert states == ["finished"] * 5 + ["pruned", "finished", "pruned"]
    assert rows(tmp_path)[5]["AP50"] == "0.55" and "0.5500 at step 2" in rows(tmp_path)[5]["message"]
    assert rows(tmp_path)[7]["AP50"] == "0.1" and "at step 1" in rows(tmp_path)[7]["message"]
    assert "[6/8] trial_005 pruned  test/AP50 0.5500" in capsys.readouterr().out
    faked.ran.clear()
    faked({**outcomes, 8: [0.9, 0.9, 0.9]}, trials=9, prune=True)
    assert faked.ran == ["trial_008"]
    assert [row["state"] for row in rows(tmp_path)] == [*states, "finished"]
