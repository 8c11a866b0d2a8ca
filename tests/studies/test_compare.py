"""Comparisons: settings, arms, the folder, the report, and one comparison with real runs."""

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
from bissl_zoo.files import is_sha256
from bissl_zoo.runs.directory import flatten
from bissl_zoo.studies import compare as module
from bissl_zoo.studies.arms import ARMS, Settings, base_config, pretrain_config, read_settings
from bissl_zoo.studies.compare import Comparison, claim_folder, open_comparisons
from bissl_zoo.studies.compare import compare as compare_all
from bissl_zoo.studies.compare_report import (
    Results,
    arm_to_publish,
    draw_labels,
    make_report,
    reports_table,
    save_report,
    save_reports,
    table,
)
from bissl_zoo.studies.places import JobOutcome
from bissl_zoo.studies.search import SearchResult

PAIR = ["pretrained", "bissl"]
SEARCH = {
    "space": {"optimizer.finetune.lr": [1e-4, 1e-1]},
    "overrides": ["dataloader.train.dataset.split=unlabeled", "dataloader.test.dataset.split=val"],
}


@pytest.fixture
def config(tiny_config):
    """The tiny quickstart as the config of a comparison: `config(["bilevel.lower_steps=3"], seeds=3)`."""

    def build(changed=(), search=None, **compare):
        cfg = tiny_config()
        cfg.compare = {"metric": "AP50", **compare}
        if search is not None:
            cfg.search = search
        return LazyConfig.apply_overrides(cfg, changed)

    return build


def compare(cfg, source, folder, only_report=False, **options):
    """Run a single comparison and return its report."""
    return compare_all(open_comparisons(cfg, source, folder, **options), folder, only_report)[""]


def differing(a, b):
    a, b = (flatten(OmegaConf.to_container(cfg, resolve=True)) for cfg in (a, b))
    return {key for key in a.keys() | b.keys() if a.get(key) != b.get(key)}


# ------------------------------------------------------------------------------------------------ settings


@pytest.mark.parametrize(
    ("compare", "message"),
    [
        ({"seed": 3}, "compare has 'seed'. Did you mean 'seeds'"),
        ({"metric": 50}, "compare.metric is 50"),
        ({"arms": ["pretrained", "bisl"]}, "Did you mean 'bissl'"),
        ({"arms": ["bissl", "joint"]}, "give 'pretrained'"),
        ({"seeds": [1, 1]}, "compare.seeds"),
        ({"budget": "hours"}, "compare.budget has 'hours'"),
        ({"search_trials": 3}, "needs a section 'search'"),
        ({"search_trials": 3, "search": {"overrides": ["a=1"]}, "higher_is_better": False}, "for error rates"),
        ({"search_trials": 2, "search": {**SEARCH, "space": {"optimizer.upper.lr": [0.1, 1]}}}, "optimizer.upper.lr"),
    ],
)
def test_an_invalid_setting_is_refused_with_the_valid_ones(config, compare, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        read_settings(config(**compare), "test")


def test_any_config_of_a_run_can_be_compared_by_the_first_metric(tiny_config, tmp_path, monkeypatch):
    FakeJobs(monkeypatch)
    cfg = tiny_config()
    assert read_settings(cfg, "test") == read_settings(OmegaConf.merge(cfg, {"compare": {}}), "test")
    report = compare(cfg, "test", tmp_path / "c")
    assert report["metric"] == "AP50" and report["arms"]["bissl"]["count"] == 10


def test_a_comparison_needs_a_pretrained_backbone(config):
    with pytest.raises(ConfigError, match="needs a pretrained backbone"):
        read_settings(config(["train.stages=[bissl,finetune]"]), "test")
    given = ["train.stages=[bissl,finetune]", "train.init=some.safetensors"]
    with pytest.raises(ConfigError, match="vary is 'pretrain'"):
        read_settings(config(given, vary="pretrain"), "test")
    assert read_settings(config(given), "test").vary == "bissl"


# ------------------------------------------------------------------------------------------------ arms


def runs_of(config, **compare):
    return {job.name: job.cfg for job in Comparison(config(**compare), "test", Path("folder")).plan.all_jobs()}


def test_all_arms_start_from_the_same_pretraining_with_the_same_seed(config):
    runs = runs_of(config, seeds=[4, 7])
    assert list(runs)[0] == "pretrain" and runs.pop("pretrain").train.stages == ["pretrain"]
    assert len(runs) == 8
    for name, cfg in runs.items():
        assert cfg.train.init == "folder/runs/pretrain"
        assert cfg.train.seed == int(name[-1]) and cfg.train.seed in (4, 7)
        assert cfg.train.stages[-1] == "finetune" and not cfg.finetune.baseline and cfg.train.publish.name is None
        assert "compare" not in cfg and "search" not in cfg


def test_arms_differ_only_in_their_stage_and_its_settings(config):
    runs = runs_of(config, seeds=1)
    pretrained, bissl, joint = (runs[f"{arm}-seed0"] for arm in ("pretrained", "bissl", "joint"))
    assert differing(pretrained, bissl) == {"train.stages.0", "train.stages.1"}
    solver = {f"solver.{key}" for key in bissl.solver.keys() | joint.solver.keys()}
    assert differing(bissl, joint) == solver - {"solver._target_"} and joint.solver.name == "identity"


def test_longer_pretraining_takes_the_steps_of_the_lower_level_with_its_optimizer(config):
    changed = ["bilevel.lower_steps=3", "bilevel.alternations=5", "clip_grad.lower=7.0", "pretrain.accumulate=2"]
    runs = runs_of(lambda **compare: config(changed, **compare), seeds=1)
    pretrained, longer = runs["pretrained-seed0"], runs["longer_pretraining-seed0"]
    assert longer.train.stages == ["pretrain", "finetune"]
    assert (longer.pretrain.steps, longer.pretrain.epochs, longer.pretrain.accumulate) == (15, None, 1)
    for section in ("optimizer", "lr_multiplier", "clip_grad"):
        assert longer[section].pretrain == longer[section].lower == pretrained[section].lower
    allowed = ("train.stages", "pretrain.", "optimizer.pretrain.", "lr_multiplier.pretrain.", "clip_grad.pretrain")
    differences = differing(pretrained, longer)
    assert differences and all(key.startswith(allowed) for key in differences)


def test_pretraining_uses_seeds_that_no_arm_has(config):
    base = base_config(config())
    # the BiSSL stage adds 1 to the seed of a run, fine-tuning 2
    assert pretrain_config(base, 0).train.seed not in range(0, 1000)
    assert differing(pretrain_config(base, 0), pretrain_config(base, 1)) == {"train.seed"}


def test_vary_selects_the_first_stage_that_a_seed_changes(config):
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


def test_the_result_of_a_search_changes_the_runs_of_its_arm_only(config):
    jobs = Comparison(config(seeds=1, arms=PAIR), "test", Path("folder")).plan.seed_jobs(
        {"bissl": ["optimizer.finetune.lr=0.5"]}
    )
    assert jobs["bissl", 0, 0].cfg.optimizer.finetune.lr == 0.5
    assert jobs["pretrained", 0, 0].cfg.optimizer.finetune.lr != 0.5


def test_a_new_arm_is_a_few_lines(config, monkeypatch):
    monkeypatch.setitem(
        ARMS, "weak", type(ARMS["bissl"])("weak coupling", "bissl", lambda cfg: ["bilevel.lambda=0.001"])
    )
    runs = runs_of(config, seeds=1, arms=[*PAIR, "weak"])
    assert differing(runs["bissl-seed0"], runs["weak-seed0"]) == {"bilevel.lambda"}
    report = report_of(pretrained=VALUES["pretrained"], weak=VALUES["bissl"])
    assert report["sentences"][0].startswith("Weak coupling: significantly better than fine-tuning alone (+0.0500")


@pytest.mark.parametrize(
    ("arm", "stages", "changes"),
    [
        ("bissl[nystrom]", ["bissl", "finetune"], {"solver.name": "nystrom"}),
        ("bissl[hessian]", ["bissl", "finetune"], {"bilevel.curvature": "hessian"}),
        ("self_training", ["teacher", "finetune"], {}),
        ("lp_ft", ["finetune"], {"finetune.head": "warm"}),
        ("l2_sp", ["finetune"], {"finetune.l2_sp": 0.01}),
        ("lora", ["bissl", "finetune"], {"bilevel.lora": {"r": 64, "alpha": 64, "targets": ["q", "v"]}}),
        ("random", ["finetune"], {"train.init": None}),
        ("target_pretraining", ["pretrain", "finetune"], {"dataloader.pretext.dataset.split": "train"}),
    ],
)
def test_each_further_arm_has_its_stage_and_its_settings(config, arm, stages, changes):
    runs = runs_of(config, seeds=1, arms=["pretrained", arm])
    cfg = runs[f"{arm.replace('[', '-').replace(']', '')}-seed0"]
    assert list(cfg.train.stages) == stages
    assert {key: OmegaConf.select(cfg, key) for key in changes} == changes


def test_an_unknown_solver_of_an_arm_is_refused_with_the_nearest(config):
    with pytest.raises(ConfigError, match="'nystorm'. Did you mean 'nystrom'"):
        read_settings(config(arms=["pretrained", "bissl[nystorm]"]), "test")


def test_several_fine_tunings_start_from_the_stage_of_their_seed_and_share_its_labels(config):
    runs = runs_of(config, seeds=2, arms=[*PAIR, "self_training"], finetune_seeds=2)
    stage, second = runs["bissl-stage1"], runs["bissl-seed1-1"]
    assert list(stage.train.stages) == ["bissl"] and list(second.train.stages) == ["finetune"]
    assert second.train.init == "folder/runs/bissl-stage1" and second.train.label_seed == stage.train.seed == 1
    assert differing(runs["bissl-seed1"], second) == {"train.seed"} and second.train.seed not in range(100)
    assert list(runs["self_training-seed0-1"].train.stages) == ["teacher", "finetune"]
    assert "self_training-stage0" not in runs and len(runs) == 1 + 2 + 3 * 2 * 2


# ------------------------------------------------------------------------------------------------ the folder


def claim(folder, cfg):
    claim_folder(folder, Comparison(cfg, "test", folder).record())


def test_a_folder_accepts_the_same_comparison_and_more_seeds_and_arms(config, tmp_path, monkeypatch):
    folder = tmp_path / "comparison"
    claim(folder, config(seeds=2, arms=PAIR))
    claim(folder, config(seeds=5, arms=[*PAIR, "joint"]))
    claim(folder, config(["train.log_period=7", "dataloader.train.num_workers=3"], seeds=5, arms=PAIR))
    claim(folder, config(seeds=5, arms=PAIR, metric="AP"))  # every run computes all metrics
    assert set(LazyConfig.load(folder / "comparison.yaml").arms) == {*PAIR, "joint"}
    with pytest.raises(ConfigError, match="missing are 2, 3, 4.*--report"):
        claim(folder, config(seeds=2, arms=PAIR))
    monkeypatch.setitem(ARMS, "joint", ARMS["bissl"])
    with pytest.raises(ConfigError, match="arms.joint"):
        claim(folder, config(seeds=5, arms=[*PAIR, "joint"]))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("")
    with pytest.raises(ConfigError, match="not empty and holds no comparison"):
        claim(tmp_path / "other", config())


@pytest.mark.parametrize(
    ("changed", "keys", "row"),
    [
        (["optimizer.finetune.lr=0.25"], {}, r"config\.optimizer\.finetune\.lr +0\.001 +0\.25"),
        ([], {"vary": "finetune"}, r"vary +\"bissl\" +\"finetune\""),
    ],
)
def test_a_folder_refuses_another_configuration_with_the_keys_that_differ(config, tmp_path, changed, keys, row):
    claim(tmp_path, config(seeds=2))
    before = (tmp_path / "comparison.yaml").read_text()
    with pytest.raises(ConfigError, match=row):
        claim(tmp_path, config(changed, seeds=2, **keys))
    assert (tmp_path / "comparison.yaml").read_text() == before
    with pytest.raises(ConfigError, match=row):
        compare(config(changed, seeds=2, **keys), "test", tmp_path, only_report=True)


def test_a_report_needs_a_comparison_with_a_finished_run(config, tmp_path):
    with pytest.raises(ConfigError, match="holds no comparison"):
        compare(config(seeds=1), "test", tmp_path, only_report=True)
    claim(tmp_path, config(seeds=2))
    with pytest.raises(BisslZooError, match="pretrained-seed0: not started"):
        compare(config(seeds=1), "test", tmp_path, only_report=True)


@pytest.mark.slow
def test_images_and_weights_that_have_changed_under_the_same_name_are_refused(config, tmp_path, monkeypatch):
    monkeypatch.setenv("BISSL_ZOO_DATASETS", str(tmp_path / "data"))
    for split, colours in {"train": 3, "val": 2, "test": 2}.items():
        for number in range(2 * colours):
            picture(tmp_path / "data" / split / f"{number % 2}" / f"{number}.jpg", number % 2, number, (40, 40))
    init = tmp_path / "backbone.safetensors"
    given = ["train.stages=[bissl,finetune]", f"train.init={init}"]
    search = {"overrides": ["dataloader.test.dataset.root=val"]}
    cfg = config(given, search, seeds=1, arms=PAIR, search_trials=2)
    save_file(instantiate(cfg.backbone).state_dict(), init)
    cfg.task = {"_target_": "bissl_zoo.registry.build_task", "name": "classification", "image_size": 32}
    cfg.compare.metric = cfg.search.metric = "top1"
    for role, split in {"pretext": "train", "train": "train", "test": "test"}.items():
        cfg.dataloader[role].dataset = {
            "_target_": "bissl_zoo.registry.build_dataset",
            "name": "image_folder",
            "root": split,
            "labelled": role != "pretext",
        }
    folder = tmp_path / "c"

    def check_and_claim():
        comparison = Comparison(cfg, "test", folder)
        comparison.check()
        claim_folder(folder, comparison.record())
        with pytest.raises(BisslZooError, match="not started"):  # a report does not look at the data
            compare(cfg, "test", folder, only_report=True)
        return LazyConfig.load(folder / "comparison.yaml")

    record = check_and_claim()
    assert list(record.samples) == ["pretext", "train", "test", "search train", "search test"]
    assert all(is_sha256(sample.sample_list_sha256) for sample in record.samples.values())
    assert check_and_claim() == record
    (tmp_path / "data" / "val" / "0" / "0.jpg").unlink()
    with pytest.raises(ConfigError, match="samples.search test.sample_list_sha256"):
        check_and_claim()
    init.write_bytes(init.read_bytes()[:-1] + b"x")  # other weights under the same name
    with pytest.raises(ConfigError, match="init.0.sha256"):
        check_and_claim()


# ------------------------------------------------------------------------------------------------ the report

VALUES = {
    "pretrained": [0.40, 0.44, 0.42, 0.46, 0.43],
    "bissl": [0.45, 0.48, 0.48, 0.50, 0.49],
    "longer_pretraining": [0.42, 0.44, 0.41, 0.47, 0.45],
    "joint": [0.44, 0.47, 0.46, 0.52, 0.47],
}


def report_of(failures=None, higher=True, vary="bissl", margin=None, **values):
    values = values or VALUES
    count = max(map(len, values.values()))
    by_seed = {arm: {seed: v for seed, v in enumerate(row) if v is not None} for arm, row in values.items()}
    settings = Settings("AP50", higher, tuple(range(count)), tuple(values), vary, 0, {}, margin=margin)
    return make_report(Results(by_seed, failures or {}), settings)


def test_a_gain_over_both_controls_is_significant():
    report = report_of()
    bissl = report["sentences"][0]
    gain = "BiSSL: significantly better than fine-tuning alone (+0.0500 AP50, 95 % CI +0.0376 to +0.0624"
    assert bissl.startswith(gain) and "5 seeds" in bissl
    assert "significantly better than longer pretraining (+0.0420 AP50" in bissl
    assert "by more than its additional pretext steps" in report["conclusion"]


def test_a_gain_that_longer_pretraining_has_as_well_is_not_attributed_to_bissl():
    report = report_of(**{**VALUES, "longer_pretraining": [0.46, 0.47, 0.47, 0.51, 0.49]})
    assert "no significant difference from longer pretraining" in report["sentences"][0]
    assert "additional pretext steps alone may explain" in report["conclusion"]


def test_without_a_significant_difference_the_detectable_one_is_reported():
    report = report_of(pretrained=[0.40, 0.44, 0.42, 0.46, 0.43], bissl=[0.43, 0.42, 0.44, 0.45, 0.42])
    assert report["sentences"][0].startswith("BiSSL: no significant difference from fine-tuning alone (+0.0020 AP50")
    half = report["differences"]["pretrained"]["bissl"]["half_width"]
    assert f"differences below about {half:.4f} cannot be detected" in report["conclusion"]


@pytest.mark.parametrize(("higher", "verdict"), [(True, "worse"), (False, "better")])
def test_for_error_rates_lower_is_better(higher, verdict):
    report = report_of(higher=higher, pretrained=VALUES["bissl"], bissl=VALUES["pretrained"])
    assert f"significantly {verdict} than fine-tuning alone (-0.0500" in report["sentences"][0]
    best = "**0.4800" if higher else "**0.4300"
    assert best in reports_table({"a": report}) and " ↓" in reports_table({"a": report})


@pytest.mark.parametrize(
    ("pretrained", "bissl", "message"),
    [
        ([0.4], [0.5], "+0.1000 AP50 compared with fine-tuning alone in 1 seed"),
        ([0.2, 0.3, 0.7], [0.3, 0.4, 0.8], "in 3 seeds, which allows no test"),
        ([0.4], [None], "no seed in common with fine-tuning alone"),
    ],
)
def test_without_a_test_there_is_no_conclusion(tmp_path, pretrained, bissl, message):
    report = report_of(pretrained=pretrained, bissl=bissl)
    assert message in report["sentences"][0] and "No conclusion" in report["conclusion"]
    assert table(report).splitlines()[-1].split()[-3] == "-"  # the p value
    save_report(report, tmp_path)
    assert json.loads((tmp_path / "comparison.json").read_text()) == report


def test_p_values_are_corrected_for_the_number_of_comparisons():
    report = report_of()
    family = [
        report["differences"][reference][arm]
        for arm, references in {"bissl": 3, "longer_pretraining": 1, "joint": 2}.items()
        for reference in ("pretrained", "longer_pretraining", "joint")[:references]
    ]
    raw = sorted(item["paired_p"] for item in family)
    assert min(item["holm_p"] for item in family) == pytest.approx(6 * raw[0])
    assert all(item["holm_p"] >= item["paired_p"] for item in family)
    assert "corrected for 6 comparisons (Holm)" in " ".join(report["notes"])


def test_arms_that_differ_by_less_than_the_margin_are_equivalent_and_the_number_of_seeds_is_given():
    values = {"pretrained": [0.40, 0.44, 0.42, 0.46, 0.43], "bissl": [0.401, 0.439, 0.421, 0.459, 0.431]}
    report = report_of(margin=0.01, **values)
    assert "BiSSL: equivalent to fine-tuning alone within 0.01" in report["sentences"][0]
    assert "no difference of 0.01 or more" in report["conclusion"]
    assert "To find a difference of 0.01" in " ".join(report["notes"])
    assert "no significant difference" in report_of(**values)["sentences"][0]


def test_the_conclusion_names_the_best_arm_and_its_cost():
    values = {arm: dict(enumerate(row)) for arm, row in VALUES.items()}
    settings = Settings("AP50", True, tuple(range(5)), tuple(values), "bissl", 0, {})
    costs = {arm: [(10.0, 700.0)] if arm == "pretrained" else [(35.0, 900.0)] for arm in values}
    report = make_report(
        Results(values, costs=costs, leakage=["2 of 9 images of test have a near-duplicate"]), settings
    )
    expected = "Best mean: BiSSL, 0.4800 AP50, significantly better than fine-tuning alone, at 3.5 times its time."
    assert report["conclusion"].startswith(expected)
    assert report["notes"][0].startswith("2 of 9 images")
    assert table(report).splitlines()[3].split()[-2:] == ["35", "900"]


def test_label_fractions_are_comparisons_of_their_own_with_one_picture(config, tmp_path, monkeypatch):
    FakeJobs(monkeypatch)
    cfg = config(seeds=3, arms=PAIR, labels=[0.05, 0.25])
    comparisons = open_comparisons(cfg, "test", tmp_path)
    reports = compare_all(comparisons, tmp_path)
    assert list(reports) == ["labels5", "labels25"]
    assert [c.base.train.label_fraction for c in comparisons.values()] == [0.05, 0.25]
    assert (tmp_path / "labels25" / "comparison.md").is_file() and (tmp_path / "labels.png").is_file()
    figure = draw_labels(list(reports.values()))
    assert [tick.get_text() for tick in figure.axes[0].get_xticklabels()] == ["5 %", "25 %"]


def test_notes_mention_few_seeds_shared_stages_and_tests_that_disagree():
    notes = " ".join(report_of(pretrained=[0.30, 0.50, 0.40], bissl=[0.33, 0.54, 0.435])["notes"])
    assert "at least one arm has 3" in notes and "share one pretrained backbone" in notes
    assert "the paired test gives p = 0.007, Welch's" in notes
    assert "Few seeds" not in " ".join(report_of()["notes"])
    assert "Every seed has its own pretraining" in " ".join(report_of(vary="pretrain")["notes"])


def test_a_failed_run_is_named_and_its_seed_is_left_out_of_the_pairs(tmp_path):
    values = {**VALUES, "bissl": [0.45, None, 0.48, 0.50, 0.49]}
    report = report_of({"bissl-seed1": "The loss is NaN\nat step 3"}, **values)
    assert report["arms"]["bissl"]["count"] == 4 and report["arms"]["pretrained"]["count"] == 5
    difference = report["differences"]["pretrained"]["bissl"]
    assert difference["seeds"] == [0, 2, 3, 4]
    assert difference["mean"] == pytest.approx((0.05 + 0.06 + 0.04 + 0.06) / 4)
    save_report(report, tmp_path)
    assert "bissl-seed1 is left out: The loss is NaN at step 3" in (tmp_path / "comparison.md").read_text()
    assert "(1 of 5 seeds missing)" in reports_table({"a": report})


def test_the_first_seed_of_an_arm_is_published_with_the_metrics_of_all(tmp_path):
    report = report_of(pretrained=[0.5, 0.6, 0.7], bissl=[0.6, 0.8, 0.7])
    save_report(report, tmp_path)
    folder, metadata = arm_to_publish(tmp_path, "bissl")
    assert folder == tmp_path / "runs" / "bissl-seed0"
    assert metadata["seeds"] == [0, 1, 2]
    assert list(metadata["metrics"].values()) == [[0.5, 0.6, 0.7], [0.6, 0.8, 0.7]]
    assert [name.split()[-1] for name in metadata["metrics"]] == ["(pretrained)", "(bissl)"]
    assert report["conclusion"] in metadata["notes"]
    with pytest.raises(ConfigError, match="no arm 'bisl'. Did you mean"):
        arm_to_publish(tmp_path, "bisl")


def test_the_report_is_written_as_json_markdown_and_plot(tmp_path):
    report = report_of()
    save_report(report, tmp_path)
    assert json.loads((tmp_path / "comparison.json").read_text()) == report
    text = (tmp_path / "comparison.md").read_text()
    assert report["conclusion"] in text and "| BiSSL " in text and "(comparison.png)" in text
    with Image.open(tmp_path / "comparison.png") as plot:
        assert plot.width > 1000 and len(plot.convert("RGB").getcolors(maxcolors=1 << 20)) > 50


def test_the_table_of_data_sets_marks_the_best_and_the_significant(tmp_path):
    flat = {"pretrained": [0.50, 0.52, 0.54], "bissl": [0.51, 0.52, 0.53]}
    reports = {"cells": report_of(), "pets": report_of(**flat)}
    cells, pets = reports_table(reports).splitlines()[2:4]
    assert "**0.4800 ± 0.0187** ↑" in cells and "0.4300 ± 0.0224 " in cells and "**0.4300" not in cells
    assert "↑" not in pets and "↓" not in pets and pets.split()[-1] == "-"  # it has no joint training
    save_reports(reports, tmp_path)
    text = (tmp_path / "comparisons.md").read_text()
    assert "- cells: BiSSL: significantly better" in text
    assert json.loads((tmp_path / "comparisons.json").read_text()) == reports


# ------------------------------------------------------------------------------------------------ the runs


class FakeJobs:
    """Replaces `run_jobs`: no training, a value for each run, or a failure if it is in `broken`."""

    def __init__(self, monkeypatch, broken=(), value=None, seconds=None):
        self.broken, self.value, self.names, self.seconds = broken, value, [], seconds or {}
        self.configs = {}
        monkeypatch.setattr(module, "run_jobs", self)
        monkeypatch.setattr(Comparison, "check", lambda self: None)

    def __call__(self, jobs, folder, parallel, on_done, engine):
        self.engine = engine
        self.names += [job.name for job in jobs]
        self.configs |= {job.name: job.cfg for job in jobs}
        outcomes = [self.outcome(job.name, folder, number) for number, job in enumerate(jobs)]
        for outcome in outcomes:
            on_done(outcome)
        return outcomes

    def outcome(self, name, folder, number):
        if name in self.broken:
            return JobOutcome(name, folder, "failed", message="the loss is NaN")
        value = 0.1 + 0.01 * number**2 if self.value is None else self.value
        (folder / "runs" / name).mkdir(parents=True, exist_ok=True)
        # with 4 steps of fine-tuning at 0.5 s, as with as many of the teacher of self-training
        trained = [stage for stage in self.configs[name].train.stages if stage != "pretrain"]
        metadata = {"wall_time_s": self.seconds.get(name, 2.0), "stages": dict.fromkeys(trained, 4)}
        (folder / "runs" / name / "metadata.json").write_text(json.dumps(metadata))
        record = {"stage": "finetune", "step": 4, "speed/seconds_per_step": 0.5}
        (folder / "runs" / name / "metrics.jsonl").write_text(json.dumps(record) + "\n")
        return JobOutcome(name, folder, "finished", {"bissl": {"AP50": value}})


def test_without_pretraining_no_arm_runs(config, tmp_path, monkeypatch):
    jobs = FakeJobs(monkeypatch, broken=["pretrain"])
    with pytest.raises(BisslZooError, match="Pretraining failed. pretrain: the loss is NaN"):
        compare(config(seeds=2, arms=PAIR), "test", tmp_path / "c")
    assert jobs.names == ["pretrain"]


def test_a_seed_whose_pretraining_failed_is_left_out_of_every_arm(config, tmp_path, monkeypatch):
    FakeJobs(monkeypatch, broken=["pretrain-seed1"])
    report = compare(config(seeds=3, arms=PAIR, vary="pretrain"), "test", tmp_path / "c")
    assert report["failures"].keys() == {"pretrained-seed1", "bissl-seed1"}
    assert "pretrain-seed1: the loss is NaN" in report["failures"]["bissl-seed1"]


@pytest.mark.parametrize(
    ("fake", "compare_keys", "message"),
    [
        ({"broken": ["pretrained-seed0", "bissl-seed0"]}, {}, "No run .*\n  pretrained-seed0: the loss is NaN"),
        ({"value": float("nan")}, {}, "its AP50 is nan"),
        ({}, {"metric": "AP5"}, "compare.metric is 'AP5'.*Did you mean 'AP50'.*Known: AP50"),
    ],
)
def test_a_comparison_without_results_is_an_error_with_the_reasons(
    config, tmp_path, monkeypatch, fake, compare_keys, message
):
    FakeJobs(monkeypatch, **fake)
    with pytest.raises(BisslZooError, match=f"(?s){message}"):
        compare(config(seeds=1, arms=PAIR, **compare_keys), "test", tmp_path / "c")


def test_each_data_set_has_its_folder_and_its_overrides(config, tmp_path, monkeypatch):
    jobs = FakeJobs(monkeypatch)
    cfg = config(seeds=2, arms=PAIR, datasets={"small": ["finetune.steps=1"], "large": ["finetune.steps=9"]})
    reports = compare_all(open_comparisons(cfg, "test", tmp_path, ["large", "small"], engine="ray"), tmp_path)
    assert jobs.engine == "ray" and list(reports) == ["large", "small"] and len(jobs.names) == 2 * 5
    assert LazyConfig.load(tmp_path / "large" / "comparison.yaml").config.finetune.steps == 9
    assert (tmp_path / "comparisons.md").is_file() and (tmp_path / "small" / "comparison.md").is_file()
    with pytest.raises(ConfigError, match="no 'lage'. Did you mean 'large'"):
        open_comparisons(cfg, "test", tmp_path, ["lage"])


def test_every_arm_has_the_same_search_and_its_seeds_use_the_best_parameters(config, tmp_path, monkeypatch):
    jobs, searched = FakeJobs(monkeypatch), {}

    def fake_search(cfg, source, folder, trials, parallel, engine):
        searched[folder.name] = (cfg, trials)
        assert engine == "ray"
        return SearchResult([f"optimizer.finetune.lr=0.{len(searched)}"], "the best trials", None)

    monkeypatch.setattr(module, "search", fake_search)
    cfg = config(seeds=2, arms=PAIR, search_trials=4, search=SEARCH)
    report = compare(cfg, "test", tmp_path / "c", engine="ray")
    assert jobs.engine == "ray" and jobs.names[:2] == ["pretrain", "bissl-search"] and list(searched) == PAIR
    (pretrained, trials), (bissl, others) = searched.values()
    assert trials == others == 4 and pretrained.search == bissl.search
    assert differing(pretrained, bissl) == {"train.init"}
    assert bissl.train.init.endswith("runs/bissl-search") and pretrained.train.init.endswith("runs/pretrain")
    assert pretrained.train.stages == ["finetune"]
    assert report["arms"]["bissl"]["overrides"] == ["optimizer.finetune.lr=0.2"]
    assert "`optimizer.finetune.lr=0.2`" in (tmp_path / "c" / "comparison.md").read_text()
    comparison = Comparison(cfg, "test", tmp_path / "c")
    assert comparison.collect().best_overrides["pretrained"] == ["optimizer.finetune.lr=0.1"]
    # the stage before must not see the labels that the trials are evaluated on; the runs of the seeds may
    (stage,) = comparison.plan.search_jobs()
    assert stage.cfg.dataloader.train.dataset.split == "unlabeled"
    assert comparison.plan.seed_jobs({})["bissl", 0, 0].cfg.dataloader.train.dataset.split == "train"


PILOTS = {"pretrained-pilot": 10.0, "bissl-pilot": 40.2, "self_training-pilot": 20.0, "l2_sp-pilot": 50.0}


def test_with_equal_seconds_cheaper_arms_fine_tune_for_the_time_of_the_dearest(config, tmp_path, monkeypatch):
    jobs, arms = FakeJobs(monkeypatch, seconds=PILOTS), [*PAIR, "self_training"]
    cfg = config(["finetune.steps=4"], seeds=2, arms=arms, budget="seconds")
    report = compare(cfg, "test", tmp_path / "c")
    # 30.2 s more at 0.5 s a step; 20.2 s more at 0.5 s a step of teacher and student each
    expected = {"pretrained": 4 + 60, "bissl": 4, "self_training": 4 + 20}
    assert report["finetune_steps"] == expected
    for arm, steps in expected.items():
        assert jobs.configs[f"{arm}-seed1"].finetune.steps == steps and jobs.configs[f"{arm}-pilot"].finetune.steps == 4
    assert jobs.configs["pretrained-pilot"].train.seed == 0 and jobs.configs["pretrained-seed1"].finetune.epochs is None
    assert "equal time" in " ".join(report["notes"]) and "pretrained-pilot" not in report["arms"]

    again = FakeJobs(monkeypatch, seconds=dict.fromkeys(PILOTS, 99.0))  # times are measured once
    cfg.compare.seeds = 3
    assert compare(cfg, "test", tmp_path / "c")["finetune_steps"] == expected
    assert not [name for name in again.names if "pilot" in name]
    assert again.configs["pretrained-seed2"].finetune.steps == 64
    assert Comparison(cfg, "test", tmp_path / "c").collect().steps == expected
    cfg.compare.arms = [*arms, "l2_sp"]
    with pytest.raises(ConfigError, match="arm l2_sp takes 99 s, more than the 40 s"):
        compare(cfg, "test", tmp_path / "c")
    assert again.names[-1] == "l2_sp-pilot"


def test_a_pilot_includes_the_stage_that_several_fine_tunings_share(config, tmp_path, monkeypatch):
    jobs = FakeJobs(monkeypatch, seconds={"pretrained-pilot": 4.0, "bissl": 20.0, "bissl-pilot": 4.0})
    compare(config(["finetune.steps=4"], seeds=2, arms=PAIR, budget="seconds", vary="finetune"), "test", tmp_path / "c")
    assert list(jobs.configs["bissl-pilot"].train.stages) == ["finetune"]
    assert jobs.configs["pretrained-seed0"].finetune.steps == 4 + 40


@pytest.mark.slow
def test_a_comparison_can_be_extended_by_a_seed_and_repeats_no_run(config, at_scenes, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    folder = tmp_path / "c"
    first = compare(config(seeds=1, arms=PAIR), "test", folder, parallel=2)
    out = capsys.readouterr().out
    for name in ("pretrain", "pretrained-seed0", "bissl-seed0"):
        assert f"{name} finished" in out
    assert first["failures"] == {} and "No conclusion" in first["conclusion"]
    written = {file: file.stat().st_mtime_ns for file in folder.glob("runs/*/results.json")}
    assert len(written) == 3

    report = compare(config(seeds=2, arms=PAIR), "test", folder, parallel=2)
    out = capsys.readouterr().out
    assert "bissl-seed1 finished" in out and "seed0" not in out
    assert written.items() <= {file: file.stat().st_mtime_ns for file in folder.glob("runs/*/results.json")}.items()
    for arm, start in {"pretrained": "init", "bissl": "bissl"}.items():
        for seed in "01":
            results = json.loads((folder / "runs" / f"{arm}-seed{seed}" / "results.json").read_text())
            assert report["arms"][arm]["values"][seed] == results[start]["AP50"]
    assert compare(config(seeds=2, arms=PAIR), "test", folder, only_report=True) == report
    three = compare(config(seeds=3, arms=PAIR), "test", folder, only_report=True)
    assert three["failures"] == {"pretrained-seed2": "not started", "bissl-seed2": "not started"}
    assert (folder / "comparison.png").stat().st_size > 10_000


def test_the_shipped_comparisons_couple_their_levels():
    for name in ("digit_scenes", "cells", "clothes"):
        cfg = load_config(f"compare/{name}.py")
        read_settings(cfg, name)
        assert cfg.train.publish.name is None
        optimizer = cfg.optimizer.lower
        steps = cfg.bilevel.lower_steps * cfg.bilevel.alternations
        upper = cfg.bilevel["lambda"] * optimizer.lr / (1 - optimizer.momentum) * steps
        assert 1.0 < upper < 15.0  # at the full rate; the schedule takes about half of it
