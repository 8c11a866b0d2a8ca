"""Random search: what is drawn, which trial is best, which is given up, what is left, and what is refused."""

import csv
import json

import numpy as np
import pytest
from scipy import stats

from bissl_zoo.config import LazyConfig, load_config
from bissl_zoo.errors import BisslZooError, ConfigError
from bissl_zoo.studies import search as search_module
from bissl_zoo.studies.jobs import JobOutcome
from bissl_zoo.studies.search import search
from bissl_zoo.studies.search_pruning import MedianPruner
from bissl_zoo.studies.search_report import Trial, draw
from bissl_zoo.studies.search_space import Choice, LogUniform, SearchSettings, best_config, read_search, trial_config

LR, DECAY = "optimizer.finetune.lr", "optimizer.finetune.weight_decay"
SPACE = {LR: LogUniform(1e-4, 1.0), DECAY: LogUniform(1e-6, 1e-2)}


def settings(**changed):
    return SearchSettings(**dict(metric="AP50", trials=3, seed=0, space=SPACE, overrides=[]) | changed)


@pytest.mark.parametrize("key", list(SPACE))
def test_draws_are_log_uniform_between_their_bounds(key):
    drawn = [settings().draw(number)[key] for number in range(2000)]
    assert stats.kstest(drawn, stats.loguniform(SPACE[key].low, SPACE[key].high).cdf).pvalue > 0.01
    assert SPACE[key].low <= min(drawn) and max(drawn) <= SPACE[key].high


def test_the_parameters_of_a_trial_are_independent_of_each_other_and_of_the_trial_before():
    drawn = np.log([list(settings().draw(number).values()) for number in range(2000)])
    assert stats.pearsonr(drawn[:, 0], drawn[:, 1]).pvalue > 0.01
    assert stats.pearsonr(drawn[:-1, 0], drawn[1:, 0]).pvalue > 0.01


def test_a_draw_is_a_function_of_seed_number_and_key_alone():
    assert settings(seed=7).draw(3) == {LR: 0.0002753, DECAY: 4.44e-06}  # on every machine
    assert settings(seed=8).draw(3) != settings(seed=7).draw(3) != settings(seed=7).draw(4)
    alone = settings(seed=7, trials=100, space={LR: SPACE[LR]})
    assert alone.draw(3)[LR] == settings(seed=7).draw(3)[LR]


def test_choices_are_drawn_evenly():
    drawn = [settings(space={"train.amp": Choice((None, "bf16", "x"))}).draw(n)["train.amp"] for n in range(900)]
    counts = [drawn.count(value) for value in (None, "bf16", "x")]
    assert sum(counts) == 900 and stats.chisquare(counts).pvalue > 0.01


@pytest.mark.parametrize(
    ("config", "metric", "trials", "lr", "decay"),
    [
        ("quickstart/digit_scenes_det.py", "AP50", 50, (1e-4, 1e-1), (1e-6, 1e-2)),
        ("bissl/voc_det_detectron2.py", "AP50", 50, (1e-4, 1e-1), (1e-6, 1e-2)),
    ],
)
def test_without_a_section_the_ranges_are_those_of_the_paper(config, metric, trials, lr, decay):
    found = read_search(load_config(config), config)
    assert (found.metric, found.trials, found.seed) == (metric, trials, 0)
    assert found.space == {LR: LogUniform(*lr), DECAY: LogUniform(*decay)}


def test_of_classification_they_are_wider(tiny_config):
    cfg = tiny_config(task__name="classification")
    found = read_search(cfg, "test")
    assert (found.metric, found.trials) == ("top1", 100)
    assert found.space == {LR: LogUniform(1e-4, 1.0), DECAY: LogUniform(1e-5, 1e-2)}
    assert read_search(tiny_config(task__name="multilabel_classification"), "test").metric == "mAP11"


def test_what_a_section_leaves_out_is_the_usual_of_the_task(tiny_config):
    cfg = LazyConfig.apply_overrides(tiny_config(), ["+search={seed: 4}"])
    found = read_search(cfg, "test")
    assert (found.seed, found.metric, found.space[LR]) == (4, "AP50", LogUniform(1e-4, 1e-1))


def test_a_trial_is_the_config_with_its_draw_and_best_has_neither_the_search_nor_what_is_of_trials_only(tiny_config):
    section = "+search={seed: 1, overrides: [dataloader.test.dataset.split=val]}"
    cfg = LazyConfig.apply_overrides(tiny_config(), [section])
    found = read_search(cfg, "test")
    trial, drawn = trial_config(cfg, found, 2, "test"), found.draw(2)
    assert trial.optimizer.finetune.lr == drawn[LR] and trial.optimizer.finetune.weight_decay == drawn[DECAY]
    assert trial.dataloader.test.dataset.split == "val" and trial.train.publish.name is None
    assert "search" not in trial
    best = best_config(cfg, drawn, "test")
    unchanged = [f"{LR}={cfg.optimizer.finetune.lr}", f"{DECAY}={cfg.optimizer.finetune.weight_decay}"]
    assert LazyConfig.apply_overrides(best, unchanged) == tiny_config()


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("{metrics: AP50}", "no key 'search.metrics'.* Did you mean 'metric'"),
        (
            "{space: {optimizer.finetune.lrr: [1e-4, 1]}}",
            r"no key 'optimizer.finetune.lrr'.*Nearest: optimizer.finetune.lr",
        ),
        ("{space: {optimizer.finetune.lr: [1, 1e-4]}}", "the lower one first"),
        ("{space: {optimizer.finetune.lr: [0, 1]}}", "positive bounds"),
        ("{space: {optimizer.finetune.lr: [-1, 1]}}", "positive bounds"),
        ("{space: {optimizer.finetune.lr: [1e-3, 1e-3]}}", "the lower one first"),
        ("{space: {optimizer.finetune.lr: [1e-3, .inf]}}", "positive bounds"),
        ("{space: {optimizer.finetune.lr: [1e-4, 1e-3, 1e-2]}}", r"give \[least, most\], or \{choices"),
        ("{space: {optimizer.finetune.lr: {choices: []}}}", "give a list of values"),
        ("{space: {optimizer.finetune.lr: [true, 2]}}", r"give \[least, most\]"),
        ("{space: {}}", "names the keys to draw"),
        ("{overrides: finetune.steps=1}", "search.overrides is a list"),
        ("{overrides: [finetune.stepz=1]}", "no key 'finetune.stepz'"),
        ("{trials: 0}", "search.trials is 0"),
        ("{seed: 0.5}", "search.seed is 0.5"),
        ("{metric: 3}", "search.metric is 3"),
        ("[1]", "search is"),
        (
            "{metric: AP555}",
            "search.metric is 'AP555', which the task 'faster_rcnn' does not give. Did you mean 'AP75'",
        ),
    ],
)
def test_what_a_search_cannot_be_is_said_before_the_first_trial(tiny_config, at_scenes, tmp_path, section, message):
    cfg = LazyConfig.apply_overrides(tiny_config(train__stages="[finetune]"), [f"+search={section}"])
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        search(cfg, "my.py", tmp_path / "search", trials=2)
    assert not (tmp_path / "search").exists()


def test_a_task_without_usual_ranges_needs_a_section(tiny_config):
    cfg = tiny_config(task__name="mine")
    with pytest.raises(ConfigError, match="no usual one for the task 'mine'"):
        read_search(cfg, "my.py")
    with pytest.raises(ConfigError, match="needs both search.metric and search.space"):
        read_search(LazyConfig.apply_overrides(cfg, ["+search={metric: mine}"]), "my.py")


@pytest.mark.parametrize(
    ("changed", "options", "message"),
    [
        (dict(train__stages="[pretrain]"), {}, "train.stages has no finetune"),
        (dict(train__stages="[finetune]"), dict(prune=True), "--prune .*finetune.eval_period"),
        (dict(train__stages="[finetune]"), dict(trials=0), "0 trials"),
        (dict(train__stages="[finetune]", finetune__steps=0), {}, "finetune.steps is 0"),
    ],
)
def test_a_config_that_does_not_suit_a_search_is_refused(tiny_config, at_scenes, tmp_path, changed, options, message):
    with pytest.raises(ConfigError, match=message):
        search(tiny_config(**changed), "my.py", tmp_path / "search", **{"trials": 2, **options})


def test_the_folder_of_a_run_is_refused(tiny_config, tmp_path):
    (tmp_path / "config.yaml").write_text("train: {}\n")
    with pytest.raises(ConfigError, match="holds a run"):
        search(tiny_config(), "my.py", tmp_path)


@pytest.fixture
def faked(monkeypatch, tiny_config, tmp_path):
    """Search with runs that are not run: `faked({0: 0.5, 1: "an error"}, trials=2)`; what was started joins `ran`."""
    ran = []

    def call(outcomes, **options):
        def run_jobs(jobs, folder, parallel, on_done, stop_if, engine):
            for done, job in enumerate(jobs, start=1):
                ran.append(job.name)
                run_dir = folder / "runs" / job.name
                run_dir.mkdir(parents=True, exist_ok=True)
                value = outcomes[int(job.name[-3:])]
                common = dict(folder=run_dir, seconds=1.0, done=done, total=len(jobs), eta=9.0)
                if isinstance(value, list):  # a curve; the last is what it ends with, if it may
                    lines = [
                        json.dumps({"stage": "finetune", "step": step, "test/AP50": height}) + "\n"
                        for step, height in enumerate(value, start=1)
                    ]
                    for count in range(1, len(lines) + 1):
                        (run_dir / "metrics.jsonl").write_text("".join(lines[:count]))
                        reason = stop_if(job) if stop_if else None
                        if reason:
                            break
                    value = value[-1]
                    if reason:
                        on_done(JobOutcome(job.name, status="stopped", message=reason, **common))
                        continue
                if isinstance(value, str):
                    on_done(JobOutcome(job.name, status="failed", message=value, **common))
                else:
                    results = {"pretrained": {"AP50": 1.0, "AP": 1.0}, "bissl": {"AP50": value, "AP": value / 2}}
                    on_done(JobOutcome(job.name, status="finished", results=results, **common))

        monkeypatch.setattr(search_module, "run_jobs", run_jobs)
        monkeypatch.setattr(search_module, "check_trials", lambda *_: None)
        cfg = tiny_config(train__stages="[finetune]", finetune__eval_period=1)
        return search(cfg, "my.py", tmp_path / "search", **options)

    call.ran = ran
    return call


def rows(tmp_path):
    with open(tmp_path / "search" / "trials.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_the_best_trial_is_that_of_the_highest_figure_of_the_last_fine_tuning(faked, tmp_path, capsys):
    result = faked({0: 0.25, 1: 0.75, 2: float("nan"), 3: "error with\na second line", 4: 0.75}, trials=5)
    assert [row["state"] for row in rows(tmp_path)] == ["finished"] * 3 + ["failed", "finished"]
    assert [row["AP50"] for row in rows(tmp_path)] == ["0.25", "0.75", "nan", "", "0.75"]
    assert rows(tmp_path)[3]["message"] == "error with a second line"
    drawn = result.trials[1].parameters  # the first of two equal ones
    assert result.best_overrides == [f"{LR}={drawn[LR]}", f"{DECAY}={drawn[DECAY]}"]
    best = LazyConfig.load(tmp_path / "search" / "best.yaml")
    assert {LR: best.optimizer.finetune.lr, DECAY: best.optimizer.finetune.weight_decay} == drawn
    assert result.table.splitlines()[2].split()[:2] == ["trial_001", "0.7500"]
    assert "trial_002" not in result.table and "trial_003" not in result.table
    said = capsys.readouterr().out
    assert "[2/5] trial_001 finished  AP50 0.7500  best 0.7500 (trial_001)  0:00:01  ETA 0:00:09" in said
    assert "trial_003 failed  error with a second line  best 0.7500 (trial_001)" in said


def test_a_search_without_a_finished_trial_tells_the_first_error(faked, tmp_path):
    with pytest.raises(BisslZooError, match="None of the 2 trials .*trial_000: loss is NaN"):
        faked({0: "loss is NaN", 1: "another"}, trials=2)
    assert [row["state"] for row in rows(tmp_path)] == ["failed"] * 2
    assert not (tmp_path / "search" / "best.yaml").exists()


def test_a_trial_below_the_median_is_given_up_and_stays_so_when_the_search_goes_on(faked, tmp_path, capsys):
    good = {number: [0.5 + number / 100, 0.6, 0.7] for number in range(5)}
    outcomes = {**good, 5: [0.55, 0.1, 0.9], 6: [0.8, 0.1, 0.9], 7: [0.1, 0.95, 0.95]}
    faked(outcomes, trials=8, prune=True)
    states = [row["state"] for row in rows(tmp_path)]
    # the median at step 1 is 0.52, at step 2 it is 0.6; what counts of a trial is its best so far
    assert states == ["finished"] * 5 + ["pruned", "finished", "pruned"]
    assert rows(tmp_path)[5]["AP50"] == "0.55" and "below 0.6000, the median at step 2" in rows(tmp_path)[5]["message"]
    assert rows(tmp_path)[7]["AP50"] == "0.1" and "at step 1" in rows(tmp_path)[7]["message"]
    assert "[6/8] trial_005 pruned  test/AP50 0.5500 is below" in capsys.readouterr().out
    faked.ran.clear()
    result = faked({**outcomes, 8: [0.9, 0.9, 0.9]}, trials=9, prune=True)
    assert "trial_005" not in faked.ran and "trial_008" in faked.ran
    assert [trial.state for trial in result.trials] == [*states, "finished"]


def test_trials_are_given_up_as_optuna_does(tmp_path):
    optuna = pytest.importorskip("optuna", reason="Optuna is not installed")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    generator = np.random.default_rng(0)
    study = optuna.create_study(direction="maximize", pruner=optuna.pruners.MedianPruner(n_startup_trials=5))
    pruner, given_up = MedianPruner(tmp_path, "test/AP50"), 0
    for number in range(40):
        theirs, name = study.ask(), f"trial_{number}"
        (tmp_path / name).mkdir()
        for step, value in enumerate(generator.random(6) / 4 + generator.random(), start=1):
            theirs.report(value, step)
            with open(tmp_path / name / "metrics.jsonl", "a") as file:
                file.write(json.dumps({"stage": "finetune", "step": step, "test/AP50": value}) + "\n")
            assert (pruner.reason(name) is not None) == theirs.should_prune(), (number, step)
            if theirs.should_prune():
                study.tell(theirs, state=optuna.trial.TrialState.PRUNED)
                given_up += 1
                break
        else:
            study.tell(theirs, value)
            pruner.finished.add(name)
    assert 5 < given_up < 30


def test_a_curve_is_read_while_it_is_written_and_after_lines_were_dropped(tmp_path):
    path = tmp_path / "trial_000" / "metrics.jsonl"
    pruner = MedianPruner(tmp_path, "test/AP50")
    assert pruner.curve("trial_000") == {}
    path.parent.mkdir()
    lines = [json.dumps({"stage": "finetune", "step": step, "test/AP50": step / 10}) + "\n" for step in (1, 2, 3)]
    other = json.dumps({"stage": "finetune_pretrained", "step": 9, "test/AP50": 0.9}) + "\n"
    path.write_text(other + lines[0] + lines[1][:20])
    assert pruner.curve("trial_000") == {1: 0.1}
    path.write_text(other + "".join(lines))
    assert pruner.curve("trial_000") == {1: 0.1, 2: 0.2, 3: 0.3}
    path.write_text(other + lines[0])
    assert pruner.curve("trial_000") == {1: 0.1}


def test_the_picture_shows_every_trial_over_every_parameter_and_marks_the_best():
    chosen = settings(space={**SPACE, "train.amp": Choice((None, "bf16"))})
    trials = [
        Trial(number, chosen.draw(number), state, {} if state == "failed" else {"AP50": number / 10})
        for number, state in enumerate(["finished", "failed", "pruned", "finished"])
    ]
    figure = draw(trials, chosen)
    assert [axes.get_xlabel() for axes in figure.axes] == list(chosen.space)
    assert [axes.get_xscale() for axes in figure.axes] == ["log", "log", "linear"]
    first, best = figure.axes[0], trials[3]
    stars = [one for one in first.collections if one.get_label() == "best, trial_003"]
    assert stars[0].get_offsets().tolist() == [[best.parameters[LR], best.figures["AP50"]]]
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["finished (2)", "pruned (1)", "failed (1)", "best, trial_003"]
