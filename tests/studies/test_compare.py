"""Comparisons: what the arms run, what a folder belongs to, what is said of figures, and one for real."""

import csv
import json
import re
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from original_layouts import picture
from PIL import Image
from safetensors.torch import save_file

from bissl_zoo.config import LazyConfig, instantiate, load_config
from bissl_zoo.errors import BisslZooError, ConfigError
from bissl_zoo.studies import compare_runs, compare_search
from bissl_zoo.studies.compare import compare, compare_datasets
from bissl_zoo.studies.compare_arms import ARMS, Settings, arm_config, base_config, pretrain_config, read_settings
from bissl_zoo.studies.compare_folder import leaves, see_folder, take_folder
from bissl_zoo.studies.compare_report import (
    Figures,
    datasets_table,
    make_report,
    page,
    save_datasets,
    save_report,
    table,
)
from bissl_zoo.studies.compare_runs import Comparison
from bissl_zoo.studies.jobs import JobOutcome
from bissl_zoo.studies.search import SearchResult
from bissl_zoo.zoo.names import is_sha256

PAIR = ["pretrained", "bissl"]


@pytest.fixture
def config(tiny_config):
    """The tiny quickstart as a comparison's config: `config(seeds=3, changed=["bilevel.lower_steps=3"])`."""

    def build(changed=(), search=None, **compare):
        cfg = tiny_config()
        cfg.compare = {"metric": "AP50", **compare}
        if search is not None:
            cfg.search = search
        return LazyConfig.apply_overrides(cfg, changed)

    return build


def plain(cfg):
    return leaves(OmegaConf.to_container(cfg, resolve=True))


def differing(one, other):
    one, other = plain(one), plain(other)
    return {key for key in one.keys() | other.keys() if one.get(key) != other.get(key)}


# ------------------------------------------------------------------------------------------------ settings


def test_keys_that_are_left_out_have_their_defaults(config):
    settings = read_settings(config(), "test")
    assert settings.seeds == tuple(range(10)) and settings.vary == "bissl" and settings.search_trials == 0
    assert set(settings.arms) == set(ARMS)


@pytest.mark.parametrize(
    ("compare", "words"),
    [
        ({"seed": 3}, "no key 'compare.seed'. Did you mean 'seeds'"),
        ({"metric": None}, "compare.metric is None"),
        ({"arms": ["pretrained", "bisl"]}, "Did you mean 'bissl'"),
        ({"arms": ["bissl", "joint"]}, "name 'pretrained'"),
        ({"arms": ["pretrained"]}, "one or more of bissl, longer_pretraining, joint"),
        ({"arms": ["pretrained", "bissl", "bissl"]}, "name 'pretrained'"),
        ({"seeds": 0}, "how many, such as 10"),
        ({"seeds": [1, 1]}, "different numbers"),
        ({"seeds": [1, -2]}, "different numbers"),
        ({"seeds": True}, "how many"),
        ({"vary": "seed"}, "compare.vary has 'seed'"),
        ({"search_trials": -1}, "0 for no search"),
        ({"search_trials": 3}, "needs a section 'search'"),
        ({"search_trials": 3, "search": {"overrides": ["a=1"]}, "higher_is_better": False}, "search_trials=0 for err"),
        ({"higher_is_better": "yes"}, "true or false"),
        ({"datasets": ["a"]}, "a mapping of names to lists"),
    ],
)
def test_a_setting_that_cannot_be_is_refused_with_what_is_accepted(config, compare, words):
    with pytest.raises(ConfigError, match=re.escape(words)):
        read_settings(config(**compare), "test")


def test_a_search_draws_nothing_that_an_earlier_stage_reads(config):
    search = {**SEARCH, "space": {"optimizer.upper.lr": [0.1, 1.0]}}
    with pytest.raises(ConfigError, match="optimizer.upper.lr.*before fine-tuning"):
        read_settings(config(search_trials=2, search=search), "test")


def test_a_comparison_without_a_pretrained_backbone_is_refused(config):
    with pytest.raises(ConfigError, match="no pretrained backbone"):
        read_settings(config(["train.stages=[bissl,finetune]"]), "test")
    given = ["train.stages=[bissl,finetune]", "train.init=some.safetensors"]
    with pytest.raises(ConfigError, match="vary is 'pretrain'"):
        read_settings(config(given, vary="pretrain"), "test")
    assert read_settings(config(given), "test").vary == "bissl"


def test_a_config_without_the_section_is_refused(tiny_config):
    with pytest.raises(ConfigError, match="the section 'compare' is missing"):
        read_settings(tiny_config(), "test")


# ------------------------------------------------------------------------------------------------ arms


def runs_of(config, **compare):
    comparison = Comparison(config(**compare), "test", Path("folder"))
    return {job.name: job.cfg for job in [*comparison.shared_jobs(), *comparison.seed_jobs({}).values()]}


def test_every_arm_starts_from_one_pretraining_and_has_the_same_seed(config):
    runs = runs_of(config, seeds=[4, 7])
    assert list(runs)[0] == "pretrain" and runs.pop("pretrain").train.stages == ["pretrain"]
    assert len(runs) == 8
    for name, cfg in runs.items():
        assert cfg.train.init == "folder/runs/pretrain"
        assert cfg.train.seed == int(name[-1]) and cfg.train.seed in (4, 7)
        assert cfg.train.stages[-1] == "finetune" and not cfg.finetune.baseline and cfg.train.publish.name is None


def test_arms_differ_in_what_they_are_for_and_in_nothing_else(config):
    runs = runs_of(config, seeds=1)
    pretrained, bissl, joint = (runs[f"{arm}-seed0"] for arm in ("pretrained", "bissl", "joint"))
    assert differing(pretrained, bissl) == {"train.stages.0", "train.stages.1"}
    solver = {f"solver.{key}" for key in bissl.solver.keys() | joint.solver.keys()}
    assert differing(bissl, joint) == solver - {"solver._target_"} and joint.solver.name == "identity"


def test_longer_pretraining_takes_the_lower_levels_steps_as_it_takes_them(config):
    changed = ["bilevel.lower_steps=3", "bilevel.alternations=5", "clip_grad.lower=7.0", "pretrain.ema=0.9"]
    runs = runs_of(lambda **compare: config(changed, **compare), seeds=1)
    pretrained, longer = runs["pretrained-seed0"], runs["longer_pretraining-seed0"]
    assert longer.train.stages == ["pretrain", "finetune"]
    assert (longer.pretrain.steps, longer.pretrain.epochs, longer.pretrain.ema) == (15, None, None)
    for section in ("optimizer", "lr_multiplier", "clip_grad"):
        assert longer[section].pretrain == longer[section].lower == pretrained[section].lower
    allowed = ("train.stages", "pretrain.", "optimizer.pretrain.", "lr_multiplier.pretrain.", "clip_grad.pretrain")
    differences = differing(pretrained, longer)
    assert differences and all(key.startswith(allowed) for key in differences)


def test_pretraining_draws_from_seeds_that_no_arm_has(config):
    base = base_config(config())
    seed = pretrain_config(base, 0).train.seed
    # the BiSSL stage adds 1 to the seed of a run, fine-tuning 2
    assert seed not in range(0, 1000)
    assert differing(pretrain_config(base, 0), pretrain_config(base, 1)) == {"train.seed"}


def test_what_a_seed_changes_is_chosen_by_vary(config):
    shared = runs_of(config, seeds=2, vary="finetune")
    assert {"pretrain", "bissl", "longer_pretraining", "joint"} < shared.keys()
    assert shared["bissl"].train.stages == ["bissl"] and shared["joint"].solver.name == "identity"
    assert shared["bissl-seed1"].train.init == "folder/runs/bissl"
    assert shared["bissl-seed1"].train.stages == ["finetune"]
    assert shared["pretrained-seed1"].train.init == "folder/runs/pretrain"
    assert differing(shared["bissl-seed0"], shared["bissl-seed1"]) == {"train.seed"}
    own = runs_of(config, seeds=2, vary="pretrain")
    assert own["joint-seed1"].train.init == "folder/runs/pretrain-seed1"
    assert own["pretrain-seed0"].train.seed != own["pretrain-seed1"].train.seed


def test_what_a_search_has_found_reaches_the_runs_of_its_arm_alone(config):
    comparison = Comparison(config(seeds=1, arms=PAIR), "test", Path("folder"))
    jobs = comparison.seed_jobs({"bissl": ["optimizer.finetune.lr=0.5"]})
    assert jobs["bissl", 0].cfg.optimizer.finetune.lr == 0.5
    assert jobs["pretrained", 0].cfg.optimizer.finetune.lr != 0.5


def test_runs_know_nothing_of_the_comparison_so_that_it_may_grow(config):
    cfg = arm_config(base_config(config(seeds=2)), "bissl", 0, None, ["bissl"])
    assert "compare" not in cfg and "search" not in cfg


# ------------------------------------------------------------------------------------------------ the folder


def taken(folder, cfg):
    take_folder(folder, Comparison(cfg, "test", folder).record())


def test_a_folder_takes_the_same_comparison_again_and_more_seeds_and_arms(config, tmp_path):
    folder = tmp_path / "comparison"
    taken(folder, config(seeds=2, arms=PAIR))
    taken(folder, config(seeds=2, arms=PAIR))
    taken(folder, config(seeds=5, arms=[*PAIR, "joint"]))
    taken(folder, config(["train.log_period=7", "dataloader.train.num_workers=3"], seeds=5, arms=PAIR))
    taken(folder, config(seeds=5, arms=PAIR, metric="AP"))  # every run measures all figures
    assert set(LazyConfig.load(folder / "comparison.yaml").arms) == {*PAIR, "joint"}


def test_a_folder_refuses_another_configuration_with_the_keys_that_differ(config, tmp_path):
    taken(tmp_path, config(seeds=2))
    before = (tmp_path / "comparison.yaml").read_text()
    with pytest.raises(ConfigError) as refused:
        taken(tmp_path, config(["optimizer.finetune.lr=0.25"], seeds=2))
    message = str(refused.value)
    assert re.search(r"config\.optimizer\.finetune\.lr +0\.001 +0\.25", message) and "train.output_dir" in message
    with pytest.raises(ConfigError, match=r"vary +\"bissl\" +\"finetune\""):
        taken(tmp_path, config(seeds=2, vary="finetune"))
    with pytest.raises(ConfigError, match="config.bilevel.lower_steps"):
        taken(tmp_path, config(["bilevel.lower_steps=3"], seeds=2))
    assert (tmp_path / "comparison.yaml").read_text() == before


def test_a_report_is_made_of_the_comparisons_own_runs_alone(config, tmp_path):
    with pytest.raises(ConfigError, match="no comparison in"):
        compare(config(seeds=1), "test", tmp_path, only_report=True)
    taken(tmp_path, config(seeds=2))
    with pytest.raises(ConfigError, match="config.bilevel.lower_steps"):
        compare(config(["bilevel.lower_steps=3"], seeds=1), "test", tmp_path, only_report=True)
    with pytest.raises(BisslZooError, match="pretrained-seed0: not begun yet"):
        compare(config(seeds=1), "test", tmp_path, only_report=True)


def test_weights_that_have_changed_under_their_name_are_refused(config, at_scenes, tmp_path):
    init, given = tmp_path / "backbone.safetensors", ["train.stages=[bissl,finetune]"]
    cfg = config([*given, f"train.init={init}"], seeds=1, arms=PAIR)

    def check_and_take():
        comparison = Comparison(cfg, "test", tmp_path / "c")
        comparison.check()
        take_folder(tmp_path / "c", comparison.record())

    backbone = instantiate(cfg.backbone)
    save_file(backbone.state_dict(), init)
    check_and_take()
    check_and_take()
    save_file({key: value + 1 for key, value in backbone.state_dict().items()}, init)
    with pytest.raises(ConfigError, match="init.0.sha256"):
        check_and_take()


def test_images_that_have_changed_under_their_name_are_refused(config, tmp_path, monkeypatch):
    monkeypatch.setenv("BISSL_ZOO_DATASETS", str(tmp_path / "data"))
    for split, colours in {"train": 3, "val": 2, "test": 2}.items():
        for number in range(2 * colours):
            picture(tmp_path / "data" / split / f"{number % 2}" / f"{number}.jpg", number % 2, number, (40, 40))
    cfg = config(seeds=1, arms=PAIR, search_trials=2, search={"overrides": ["dataloader.test.dataset.root=val"]})
    cfg.task = {"_target_": "bissl_zoo.registry.build_task", "name": "classification", "image_size": 32}
    for role, split in {"pretext": "train", "train": "train", "test": "test"}.items():
        cfg.dataloader[role].dataset = {
            "_target_": "bissl_zoo.registry.build_dataset",
            "name": "image_folder",
            "root": split,
            "labelled": role != "pretext",
        }
    folder = tmp_path / "c"

    def check_and_take():
        comparison = Comparison(cfg, "test", folder)
        comparison.check()
        take_folder(folder, comparison.record())
        see_folder(folder, Comparison(cfg, "test", folder).record())  # a report does not look at the data
        return LazyConfig.load(folder / "comparison.yaml")

    kept = check_and_take()
    assert list(kept.samples) == ["pretext", "train", "test", "search train", "search test"]
    assert all(is_sha256(one.sample_list_sha256) for one in kept.samples.values())
    assert check_and_take() == kept
    (tmp_path / "data" / "val" / "0" / "0.jpg").unlink()
    with pytest.raises(ConfigError, match=r"the data set of search test \('image_folder'\) has not the samples"):
        check_and_take()
    LazyConfig.save(OmegaConf.create({k: v for k, v in kept.items() if k != "samples"}), folder / "comparison.yaml")
    assert check_and_take().samples.keys() == kept.samples.keys()  # one from before there were digests goes on
    picture(tmp_path / "data" / "test" / "1" / "new.jpg", 1)
    with pytest.raises(ConfigError, match=r"the data set of test \('image_folder'\)"):
        check_and_take()


def test_an_arm_that_has_come_to_mean_something_else_is_refused(config, tmp_path, monkeypatch):
    taken(tmp_path, config(arms=[*PAIR, "joint"]))
    monkeypatch.setitem(ARMS, "joint", ARMS["bissl"])
    with pytest.raises(ConfigError, match="arms.joint"):
        taken(tmp_path, config(arms=[*PAIR, "joint"]))
    taken(tmp_path, config(arms=PAIR))


def test_seeds_are_not_left_out(config, tmp_path):
    taken(tmp_path, config(seeds=3))
    with pytest.raises(ConfigError, match="missing are 2.*--report"):
        taken(tmp_path, config(seeds=2))


def test_a_folder_that_holds_something_else_is_refused(config, tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ConfigError, match="not empty, and no comparison"):
        taken(tmp_path, config())


# ------------------------------------------------------------------------------------------------ the report

VALUES = {
    "pretrained": [0.40, 0.44, 0.42, 0.46, 0.43],
    "bissl": [0.45, 0.48, 0.48, 0.50, 0.49],
    "longer_pretraining": [0.42, 0.44, 0.41, 0.47, 0.45],
    "joint": [0.44, 0.47, 0.46, 0.52, 0.47],
}


def report_of(failures=None, higher=True, vary="bissl", **values):
    values = values or VALUES
    count = max(map(len, values.values()))
    figures = Figures(
        {arm: {seed: v for seed, v in enumerate(one) if v is not None} for arm, one in values.items()}, failures or {}
    )
    return make_report(figures, Settings("AP50", higher, tuple(range(count)), tuple(values), vary, 0, {}))


def test_a_gain_over_both_controls_is_called_one():
    report = report_of()
    bissl = report["sentences"][0]
    assert bissl.startswith("BiSSL is better than fine-tuning alone by +0.0500 AP50 (95 % CI +0.0376 to +0.0624")
    assert "better than longer pretraining by +0.0420 AP50" in bissl and "5 seeds" in bissl
    assert report["conclusion"] == "So BiSSL helps here, and by more than its extra pretext steps do."


def test_a_gain_that_longer_pretraining_has_as_well_is_not_put_down_to_bissl():
    report = report_of(**{**VALUES, "longer_pretraining": [0.46, 0.47, 0.47, 0.51, 0.49]})
    assert "not told apart from longer pretraining" in report["sentences"][0]
    assert "extra pretext steps alone may be what helps" in report["conclusion"]


def test_no_difference_is_said_to_be_none_and_how_large_one_would_have_shown():
    report = report_of(pretrained=[0.40, 0.44, 0.42, 0.46, 0.43], bissl=[0.43, 0.42, 0.44, 0.45, 0.42])
    assert report["sentences"][0].startswith("BiSSL is not told apart from fine-tuning alone: +0.0020 AP50")
    half = report["differences"]["pretrained"]["bissl"]["half_width"]
    assert f"a difference below about {half:.4f} would not have shown" in report["conclusion"]


def test_harm_is_called_harm():
    report = report_of(pretrained=VALUES["bissl"], bissl=VALUES["pretrained"])
    assert "BiSSL is worse than fine-tuning alone by -0.0500" in report["sentences"][0]
    assert "does harm" in report["conclusion"]


def test_of_errors_the_lower_are_better():
    report = report_of(higher=False, pretrained=VALUES["bissl"], bissl=VALUES["pretrained"])
    assert "BiSSL is better than fine-tuning alone by -0.0500" in report["sentences"][0]
    assert "**0.4300" in datasets_table({"a": report}) and " ↓" in datasets_table({"a": report})


def test_one_seed_concludes_nothing():
    report = report_of(pretrained=[0.4], bissl=[0.5])
    assert "+0.1000 AP50 from fine-tuning alone in one seed, from which nothing can be concluded" in str(report)
    assert report["conclusion"] == "So nothing can be concluded yet; run more seeds."
    assert table(report).splitlines()[3].split()[-2:] == ["-", "-"]


def test_equal_differences_are_not_made_a_certainty():
    report = report_of(pretrained=[0.2, 0.3, 0.7], bissl=[0.3, 0.4, 0.8])
    assert "in each of 3 seeds, and where nothing spreads nothing can be tested" in report["sentences"][0]
    assert "nothing can be concluded" in report["conclusion"]


def test_few_seeds_shared_pretraining_and_tests_that_disagree_are_told():
    report = report_of(pretrained=[0.30, 0.50, 0.40], bissl=[0.33, 0.54, 0.435])
    noted = " ".join(report["notes"])
    assert "Few seeds (the fewest of an arm are 3)" in noted and "share one pretrained backbone" in noted
    assert "the paired test has p = 0.007, Welch's" in noted
    assert "Ten are usual" not in " ".join(report_of()["notes"])
    assert "repeated for every seed" in " ".join(report_of(vary="pretrain")["notes"])


def test_a_failed_run_is_named_and_its_seed_left_out_of_the_pairs(tmp_path):
    values = {**VALUES, "bissl": [0.45, None, 0.48, 0.50, 0.49]}
    report = report_of({"bissl-seed1": "The loss is NaN\nat step 3"}, **values)
    assert report["arms"]["bissl"]["count"] == 4 and report["arms"]["pretrained"]["count"] == 5
    found = report["differences"]["pretrained"]["bissl"]
    assert found["seeds"] == [0, 2, 3, 4] and found["mean"] == pytest.approx((0.05 + 0.06 + 0.04 + 0.06) / 4)
    assert "- bissl-seed1: The loss is NaN at step 3" in page(report)
    assert "(1 of 5 seeds missing)" in datasets_table({"a": report})
    save_report(report, tmp_path)


def test_an_arm_without_a_finished_run_is_said_to_have_none(tmp_path):
    report = report_of({"bissl-seed0": "killed"}, pretrained=[0.4], bissl=[None])
    assert "not compared with fine-tuning alone: no seed has both" in report["sentences"][0]
    save_report(report, tmp_path)
    assert json.loads((tmp_path / "comparison.json").read_text())["arms"]["bissl"]["mean"] is None


def test_the_report_is_written_as_json_csv_markdown_and_a_picture(tmp_path):
    report = report_of()
    save_report(report, tmp_path)
    assert json.loads((tmp_path / "comparison.json").read_text()) == report
    rows = list(csv.DictReader((tmp_path / "comparison.csv").open()))
    assert [row["arm"] for row in rows] == [ARMS[name].words for name in VALUES]
    assert float(rows[1]["AP50 mean"]) == pytest.approx(0.48) and rows[0]["less fine-tuning alone"] == ""
    assert float(rows[1]["paired p"]) == pytest.approx(report["differences"]["longer_pretraining"]["bissl"]["paired_p"])
    text = (tmp_path / "comparison.md").read_text()
    assert report["conclusion"] in text and "| BiSSL " in text and "(comparison.png)" in text
    with Image.open(tmp_path / "comparison.png") as picture:
        assert picture.width > 1000 and len(picture.convert("RGB").getcolors(maxcolors=1 << 20)) > 50


def test_the_table_of_data_sets_marks_the_best_and_what_is_significant(tmp_path):
    flat = {"pretrained": [0.50, 0.52, 0.54], "bissl": [0.51, 0.52, 0.53]}
    reports = {"cells": report_of(), "pets": report_of(**flat)}
    text = datasets_table(reports)
    cells, pets = text.splitlines()[2:4]
    assert "**0.4800 ± 0.0187** ↑" in cells and "0.4300 ± 0.0224 " in cells and "**0.4300" not in cells
    assert "↑" not in pets and "↓" not in pets and pets.split()[-1] == "-"  # it has no joint training
    save_datasets(reports, tmp_path)
    page = (tmp_path / "datasets.md").read_text()
    assert "significantly better than fine-tuning alone on 1 of 2, worse on 0" in page
    assert "- cells: BiSSL is better" in page and json.loads((tmp_path / "datasets.json").read_text()) == reports
    assert len(list(csv.reader((tmp_path / "datasets.csv").open()))) == 1 + 4 + 2


# ------------------------------------------------------------------------------------------------ the runs


class FakeJobs:
    """In the place of `run_jobs`: no run, a figure for each, or a failure where `broken` names one."""

    def __init__(self, monkeypatch, broken=(), value=None):
        self.broken, self.value, self.asked = broken, value, []
        monkeypatch.setattr(compare_runs, "run_jobs", self)
        monkeypatch.setattr(Comparison, "check", lambda self: None)

    def __call__(self, jobs, folder, parallel, on_done, engine):
        self.engine = engine
        self.asked += [job.name for job in jobs]
        outcomes = [self.outcome(job.name, folder, number) for number, job in enumerate(jobs)]
        for outcome in outcomes:
            on_done(outcome)
        return outcomes

    def outcome(self, name, folder, number):
        if name in self.broken:
            return JobOutcome(name, folder, "failed", message="the loss is NaN")
        value = 0.1 + 0.01 * number**2 if self.value is None else self.value
        return JobOutcome(name, folder, "finished", {"bissl": {"AP50": value}})


def test_a_run_that_failed_is_left_out_by_name(config, tmp_path, monkeypatch, capsys):
    FakeJobs(monkeypatch, broken=["bissl-seed1"])
    report = compare(config(seeds=3, arms=PAIR), "test", tmp_path / "c")
    assert report["failures"] == {"bissl-seed1": "the loss is NaN"}
    assert report["differences"]["pretrained"]["bissl"]["seeds"] == [0, 2]
    assert "bissl-seed1 failed  the loss is NaN" in capsys.readouterr().out


def test_without_pretraining_there_is_no_comparison(config, tmp_path, monkeypatch):
    jobs = FakeJobs(monkeypatch, broken=["pretrain"])
    with pytest.raises(BisslZooError, match="Pretraining failed. pretrain: the loss is NaN"):
        compare(config(seeds=2, arms=PAIR), "test", tmp_path / "c")
    assert jobs.asked == ["pretrain"]


def test_a_seed_whose_pretraining_failed_is_left_out_in_every_arm(config, tmp_path, monkeypatch):
    FakeJobs(monkeypatch, broken=["pretrain-seed1"])
    report = compare(config(seeds=3, arms=PAIR, vary="pretrain"), "test", tmp_path / "c")
    assert report["failures"].keys() == {"pretrained-seed1", "bissl-seed1"}
    assert "pretrain-seed1: the loss is NaN" in report["failures"]["bissl-seed1"]


def test_where_every_run_failed_the_reasons_are_told(config, tmp_path, monkeypatch):
    FakeJobs(monkeypatch, broken=["pretrained-seed0", "bissl-seed0"])
    with pytest.raises(BisslZooError, match="has come to a figure:\n  pretrained-seed0: the loss is NaN"):
        compare(config(seeds=1, arms=PAIR), "test", tmp_path / "c")


def test_a_figure_that_the_runs_do_not_measure_is_noticed_at_the_first(config, tmp_path, monkeypatch):
    FakeJobs(monkeypatch)
    with pytest.raises(ConfigError, match="measure no 'AP5'.*Did you mean 'AP50'.*They measure AP50"):
        compare(config(seeds=2, arms=PAIR, metric="AP5"), "test", tmp_path / "c")


def test_a_figure_that_is_not_a_number_is_a_failure(config, tmp_path, monkeypatch):
    FakeJobs(monkeypatch, value=float("nan"))
    with pytest.raises(BisslZooError, match="its AP50 is nan"):
        compare(config(seeds=1, arms=PAIR), "test", tmp_path / "c")


def test_data_sets_are_compared_each_in_its_folder_and_with_its_overrides(config, tmp_path, monkeypatch):
    jobs = FakeJobs(monkeypatch)
    known = {"small": ["finetune.steps=1"], "large": ["finetune.steps=9"]}
    cfg = config(seeds=2, arms=PAIR, datasets=known)
    reports = compare_datasets(cfg, "test", tmp_path, ["large", "small"], engine="ray")
    assert jobs.engine == "ray" and list(reports) == ["large", "small"] and len(jobs.asked) == 2 * 5
    assert LazyConfig.load(tmp_path / "large" / "comparison.yaml").config.finetune.steps == 9
    assert (tmp_path / "datasets.md").is_file() and (tmp_path / "small" / "comparison.md").is_file()
    with pytest.raises(ConfigError, match="no 'lage'. Did you mean 'large'"):
        compare_datasets(cfg, "test", tmp_path, ["lage"])


SEARCH = {
    "space": {"optimizer.finetune.lr": [1e-4, 1e-1]},
    "overrides": ["dataloader.train.dataset.split=unlabeled", "dataloader.test.dataset.split=val"],
}


def test_every_arm_has_the_same_search_and_its_seeds_run_at_what_it_found(config, tmp_path, monkeypatch):
    jobs, searched = FakeJobs(monkeypatch), {}

    def fake_search(cfg, source, folder, trials, parallel, engine):
        searched[folder.name] = (cfg, trials)
        assert engine == "ray"
        return SearchResult([f"optimizer.finetune.lr=0.{len(searched)}"], "the best trials", [])

    monkeypatch.setattr(compare_search, "search", fake_search)
    cfg = config(seeds=2, arms=PAIR, search_trials=4, search=SEARCH)
    report = compare(cfg, "test", tmp_path / "c", engine="ray")
    assert jobs.engine == "ray" and jobs.asked[:2] == ["pretrain", "bissl-search"] and list(searched) == PAIR
    (pretrained, trials), (bissl, others) = searched.values()
    assert trials == others == 4 and pretrained.search == bissl.search
    assert differing(pretrained, bissl) == {"train.init"}
    assert bissl.train.init.endswith("runs/bissl-search") and pretrained.train.init.endswith("runs/pretrain")
    assert pretrained.train.stages == ["finetune"]
    assert report["arms"]["bissl"]["overrides"] == ["optimizer.finetune.lr=0.2"]
    assert "searched: `optimizer.finetune.lr=0.2`" in (tmp_path / "c" / "comparison.md").read_text()
    comparison = Comparison(cfg, "test", tmp_path / "c")
    assert comparison.collect().found["pretrained"] == ["optimizer.finetune.lr=0.1"]
    # the stage before must not see the labels that the trials are measured on; the runs of the seeds may
    (stage,) = comparison.search_jobs()
    assert stage.cfg.dataloader.train.dataset.split == "unlabeled"
    assert comparison.seed_jobs({})["bissl", 0].cfg.dataloader.train.dataset.split == "train"


def test_a_search_that_would_choose_by_the_test_set_is_refused(config):
    with pytest.raises(ConfigError, match="by a validation split"):
        Comparison(config(search_trials=2, search={"space": SEARCH["space"]}), "test", Path("folder"))


def test_a_wrong_key_of_a_search_is_refused_before_pretraining(config):
    search = {**SEARCH, "space": {"optimizer.finetune.lrr": [0.1, 1.0]}}
    with pytest.raises(ConfigError, match="Nearest: optimizer.finetune.lr"):
        Comparison(config(search_trials=2, search=search), "test", Path("folder"))


def test_a_comparison_that_would_fail_hours_later_is_refused_at_once(config, at_scenes, tmp_path):
    cfg = config(["optimizer.lower.lr=-1.0"], seeds=1)
    with pytest.raises(ConfigError, match="optimizer"):
        compare(cfg, "test", tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_a_comparison_runs_grows_by_a_seed_and_runs_nothing_twice(config, at_scenes, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    folder = tmp_path / "c"
    first = compare(config(seeds=1, arms=PAIR), "test", folder, parallel=2)
    said = capsys.readouterr().out
    for name in ("pretrain", "pretrained-seed0", "bissl-seed0"):
        assert f"{name} finished" in said
    assert first["failures"] == {} and "nothing can be concluded" in first["conclusion"]
    written = {file: file.stat().st_mtime_ns for file in folder.glob("runs/*/results.json")}
    assert len(written) == 3

    report = compare(config(seeds=2, arms=PAIR), "test", folder, parallel=2)
    said = capsys.readouterr().out
    assert "bissl-seed1 finished" in said and "seed0" not in said
    assert written.items() <= {file: file.stat().st_mtime_ns for file in folder.glob("runs/*/results.json")}.items()
    for arm, start in {"pretrained": "init", "bissl": "bissl"}.items():
        for seed in "01":
            results = json.loads((folder / "runs" / f"{arm}-seed{seed}" / "results.json").read_text())
            assert report["arms"][arm]["values"][seed] == results[start]["AP50"]
    assert compare(config(seeds=2, arms=PAIR), "test", folder, only_report=True) == report
    three = compare(config(seeds=3, arms=PAIR), "test", folder, only_report=True)
    assert three["failures"] == {"pretrained-seed2": "not begun yet", "bissl-seed2": "not begun yet"}
    assert (folder / "comparison.png").stat().st_size > 10_000


def test_the_shipped_comparisons_tie_their_levels(at_scenes):
    for name in ("digit_scenes", "cells", "clothes"):
        cfg = load_config(f"compare/{name}.py")
        read_settings(cfg, name)
        assert cfg.train.publish.name is None
        optimizer = cfg.optimizer.lower
        steps = cfg.bilevel.lower_steps * cfg.bilevel.alternations
        upper = cfg.bilevel["lambda"] * optimizer.lr / (1 - optimizer.momentum) * steps
        assert 1.0 < upper < 15.0  # at the full rate; the schedule takes about half of it
