"""The configs of the BiSSL paper (arXiv 2410.02387): its tables, written out here, and that each data set trains."""

import contextlib
import inspect
import io
import json

import pytest
from command_line import load_tool
from original_layouts import WRITERS, write_imagenet, write_voc2007_classification

from bissl_zoo.config import LazyConfig, config_root, instantiate, load_config, locate
from bissl_zoo.studies.arms import base_config, read_settings
from bissl_zoo.studies.search import draw, read_search, trial_config

# learning rate and weight decay of the upper level from SimCLR, from BYOL, and the figure that is compared
TABLE = {
    "food101": (0.03, 0.001, 0.035, 0.002, "top1"),
    "cifar10": (0.015, 0.001, 0.01, 0.001, "top1"),
    "cifar100": (0.01, 0.0001, 0.01, 0.001, "top1"),
    "cub200": (0.03, 0.001, 0.015, 0.0001, "top1"),
    "sun397": (0.015, 0.00005, 0.01, 0.00005, "top1"),
    "stanford_cars": (0.035, 0.001, 0.04, 0.002, "top1"),
    "fgvc_aircraft": (0.03, 0.005, 0.015, 0.003, "mean_per_class"),
    "voc2007_classification": (0.015, 0.005, 0.005, 0.006, "mAP11"),
    "dtd": (0.03, 0.001, 0.015, 0.0001, "top1"),
    "oxford_pets": (0.03, 0.001, 0.02, 0.002, "top1"),
    "caltech101": (0.03, 0.0001, 0.015, 0.0002, "top1"),
    "flowers102": (0.05, 0.0005, 0.035, 0.002, "top1"),
}
DETECTION = {"bissl/voc_det.py": (0.015, 0.0), "bissl/voc_det_byol.py": (0.03, 0.0002)}
SETS_V2 = [*TABLE, "stl10", "fashion_mnist"]
METRICS = {name: row[-1] for name, row in TABLE.items()} | {"stl10": "top1", "fashion_mnist": "top1"}
RESNET50 = {f"bissl/{name}_{method}.py": (name, method) for name in TABLE for method in ("simclr", "byol")}
RESNET18 = {f"bissl_v2/{name}.py": name for name in SETS_V2}
CLASSIFICATION = {config: name for config, (name, _) in RESNET50.items()} | RESNET18
EVERY = [*CLASSIFICATION, *DETECTION]
TABLES = {
    "papers_simclr": {**{name: f"bissl/{name}_simclr.py" for name in TABLE}, "voc_det": "bissl/voc_det.py"},
    "papers_byol": {**{name: f"bissl/{name}_byol.py" for name in TABLE}, "voc_det": "bissl/voc_det_byol.py"},
    "papers_v2": {name: f"bissl_v2/{name}.py" for name in SETS_V2},
}

TINY = """train.device=cpu train.init=null train.log_period=1 backbone.name=test_resnet pretext.augmentation.size=32
bilevel.alternations=2 bilevel.lower_steps=2 bilevel.upper_steps=1 bilevel.pretext_warmup.steps=1
bilevel.head_warmup.steps=1 bilevel.head_warmup.epochs=null finetune.steps=2 finetune.epochs=null solver.iterations=2
dataloader.pretext.batch_size=8 dataloader.train.batch_size=4 dataloader.test.batch_size=8
dataloader.pretext.num_workers=0 dataloader.train.num_workers=0 dataloader.test.num_workers=0""".split()
TINY_TASK = {
    "classification": ["task.image_size=32"],
    "multilabel_classification": ["task.image_size=32"],
    "faster_rcnn": ["task.min_size=64", "task.max_size=64", "task.box_head=16", "+task.rpn_proposals=[50, 20]"],
}


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """Every data set of the papers, small, in its original layout."""
    root = tmp_path_factory.mktemp("originals")
    for name in SETS_V2:
        WRITERS[name](root)
    write_imagenet(root)
    write_voc2007_classification(root, "VOCdevkit/VOC2012")
    return root


def tiny(config, folder):
    """Overrides that make a run of the config seconds."""
    return [*TINY, *TINY_TASK[load_config(config).task.name], f"train.output_dir={folder}"]


def test_there_is_a_config_for_every_experiment_and_no_other():
    folders = [config_root() / name for name in ("bissl", "bissl_v2")]
    shipped = {f"{folder.name}/{path.name}" for folder in folders for path in folder.glob("*.py")}
    assert len(EVERY) == 26 + 14
    assert shipped - {"bissl/voc_det_minres.py", "bissl/voc_det_detectron2.py"} == set(EVERY)


@pytest.mark.parametrize("config", RESNET50)
def test_the_rates_of_versions_3_to_5_are_those_of_the_set_and_the_method(config):
    cfg, (name, method) = load_config(config), RESNET50[config]
    rates = TABLE[name][:2] if method == "simclr" else TABLE[name][2:4]
    assert (cfg.optimizer.upper.lr, cfg.optimizer.upper.weight_decay) == rates
    assert (cfg.backbone.name, cfg.pretext.name) == ("resnet50", method)
    assert cfg.dataloader.pretext.dataset == {
        "_target_": "bissl_zoo.registry.build_dataset",
        "name": "image_folder",
        "root": "imagenet/train",
        "labelled": False,
    }
    assert (cfg.bilevel.gamma, cfg.bilevel.adaptation) == (1.0, None)
    assert (cfg.train.init, cfg.train.output_dir) == (f"runs/{method}_imagenet", f"runs/{name}_{method}")


@pytest.mark.parametrize("config", DETECTION)
def test_the_rates_of_detection_are_those_of_the_method(config):
    cfg = load_config(config)
    assert (cfg.optimizer.upper.lr, cfg.optimizer.upper.weight_decay) == DETECTION[config]
    assert (cfg.backbone.name, cfg.bilevel.shared_stage) == ("resnet50", "c4")
    assert cfg.pretext.name == ("byol" if "byol" in config else "simclr")
    assert (cfg.bilevel.head_warmup.epochs, cfg.finetune.epochs, cfg.dataloader.train.batch_size) == (5, 50, 16)
    assert cfg.dataloader.train.dataset.splits == ["2007_trainval", "2012_trainval"]
    assert cfg.dataloader.test.dataset.splits == ["2007_test"]
    assert (cfg.task.min_size, cfg.task.max_size, cfg.task.roi_size, cfg.task.sampling_ratio) == (196, 320, 7, 2)
    assert cfg.task.anchor_sizes == [16, 32, 64, 128, 256] and cfg.task.anchor_ratios == [0.5, 1.0, 2.0]


@pytest.mark.parametrize("config", RESNET18)
def test_versions_1_and_2_have_a_weaker_plain_loss_and_adapt_the_upper_backbone(config):
    cfg, name = load_config(config), RESNET18[config]
    assert (cfg.optimizer.upper.lr, cfg.optimizer.upper.weight_decay) == (0.015, 0.01)
    assert (cfg.bilevel.gamma, cfg.bilevel.adaptation) == (0.01, {"every": 100, "alpha": 0.1})
    assert (cfg.backbone.name, cfg.pretext.name) == ("resnet18", "simclr")
    pretext = cfg.dataloader.pretext.dataset
    assert (pretext.name, pretext.split, pretext.labelled) == ("stl10", "unlabeled", False)
    assert (cfg.train.init, cfg.train.output_dir) == ("runs/simclr_stl10", f"runs/{name}_v2")


@pytest.mark.parametrize("config", CLASSIFICATION)
def test_classification_has_its_set_and_400_epochs_of_fine_tuning_from_both_backbones(config):
    cfg, name = load_config(config), CLASSIFICATION[config]
    train, test = cfg.dataloader.train, cfg.dataloader.test
    assert (train.dataset.name, train.dataset.split) == (name, "trainval")
    assert (test.dataset.name, test.dataset.split) == (name, "test")
    assert (cfg.finetune.epochs, cfg.finetune.steps, train.batch_size) == (400, None, 256)
    assert (cfg.bilevel.head_warmup.epochs, cfg.bilevel.head_warmup.steps) == (20, None)
    assert cfg.bilevel.shared_stage is None
    task = dict(name="classification", image_size=96)
    if name == "voc2007_classification":
        task = dict(name="multilabel_classification", image_size=96, loss="bce")
        assert "difficult" not in train.dataset and "difficult" not in test.dataset  # its default is to ignore them
    assert cfg.task == {"_target_": "bissl_zoo.registry.build_task", **task}


@pytest.mark.parametrize("config", EVERY)
def test_every_experiment_has_the_two_levels_of_the_papers(config):
    cfg = load_config(config)
    b, optimizer, solver = cfg.bilevel, cfg.optimizer, cfg.solver
    assert (b.lower_steps, b.upper_steps, b.alternations, b["lambda"]) == (20, 8, 500, 0.001)
    assert (solver.name, solver.iterations, solver.damping, solver.blockwise) == ("cg", 5, 10.0, False)
    assert optimizer.lower == {
        "_target_": "timm.optim.lars.Lars",
        "lr": 1.0,
        "weight_decay": 1e-6,
        "momentum": 0.9,
        "trust_coeff": 0.001,
    }
    for role in ("upper", "head_warmup", "finetune"):
        assert optimizer[role]._target_.endswith(".SGD") and optimizer[role].momentum == 0.9
    assert optimizer.head_warmup.lr == optimizer.upper.lr
    assert optimizer.head_warmup.weight_decay == optimizer.upper.weight_decay
    assert (cfg.clip_grad.lower, cfg.clip_grad.upper, b.head_warmup.steps) == (10.0, 10.0, None)
    assert cfg.dataloader.pretext.batch_size == 1024
    assert cfg.finetune.baseline and cfg.train.stages[-2:] == ["bissl", "finetune"]


@pytest.mark.parametrize("config", ["bissl/food101_byol.py", "bissl_v2/food101.py", "bissl/voc_det_byol.py"])
def test_schedules_are_cosines_and_the_lower_one_warms_up_for_10_alternations(config):
    schedules = {role: instantiate(one) for role, one in load_config(config).lr_multiplier.items()}
    lower, upper, finetune = schedules["lower"], schedules["upper"], schedules["finetune"]
    assert lower(0, 10_000) == pytest.approx(1 / 200) and lower(199, 10_000) == 1.0
    assert lower(10_000, 10_000) == pytest.approx(0.001)
    assert upper(0, 4000) == 1.0 and upper(2000, 4000) == pytest.approx(0.5005) and upper(4000, 4000) == 0.001
    assert finetune(0, 100) == 1.0 and finetune(50, 100) == pytest.approx(0.5)
    assert schedules["head_warmup"](0, 100) == schedules["head_warmup"](99, 100) == 1.0


@pytest.mark.parametrize(
    ("config", "backbone", "data", "epoch"),
    [
        ("pretrain/simclr_imagenet.py", "resnet50", "image_folder", 1_281_167 / 1024),
        ("pretrain/byol_imagenet.py", "resnet50", "image_folder", 1_281_167 / 1024),
        ("pretrain/simclr_stl10.py", "resnet18", "stl10", 100_000 / 1024),
    ],
)
def test_pretraining_has_the_numbers_of_the_papers(config, backbone, data, epoch):
    cfg = load_config(config)
    assert (cfg.train.stages, cfg.train.init) == (["pretrain"], None)
    assert (cfg.backbone.name, cfg.dataloader.pretext.dataset.name) == (backbone, data)
    assert (cfg.dataloader.pretext.batch_size, cfg.pretrain.epochs) == (1024, 500)
    optimizer = cfg.optimizer.pretrain
    assert optimizer._target_ == "timm.optim.lars.Lars"
    assert (optimizer.lr, optimizer.weight_decay, optimizer.momentum) == (4.8, 1e-6, 0.9)
    schedule = instantiate(cfg.lr_multiplier.pretrain)
    assert schedule(10 * int(epoch), 10**6) == pytest.approx(1.0, abs=0.01) and schedule(5 * int(epoch), 10**6) < 0.51


@pytest.mark.parametrize("config", ["bissl/food101_simclr.py", "bissl_v2/food101.py", "pretrain/simclr_stl10.py"])
def test_simclr_has_the_projector_and_the_temperature_of_the_papers(config):
    pretext = load_config(config).pretext
    assert (pretext.name, pretext.temperature, pretext.projector) == ("simclr", 0.5, [256, 256, 256])


def test_byol_has_the_networks_of_the_papers():
    pretext = load_config("bissl/food101_byol.py").pretext
    assert pretext.projector == pretext.predictor == [256, 256, 256] and pretext.decay == 0.9995


@pytest.mark.parametrize("config", ["bissl/food101_simclr.py", "bissl/food101_byol.py", "bissl_v2/food101.py"])
def test_views_are_those_of_the_papers(config):
    augmentation = dict(load_config(config).pretext.augmentation)
    make = locate(augmentation.pop("_target_"))
    defaults = {key: parameter.default for key, parameter in inspect.signature(make).parameters.items()}
    numbers = {
        "size": 96,
        "crop_scale": (0.08, 1.0),
        "aspect_ratio": (0.5, 1.0),
        "flip_probability": 0.5,
        "jitter": (0.4, 0.4, 0.2, 0.1),
        "jitter_probability": 0.8,
        "grayscale_probability": 0.2,
        "blur_probability": (1.0, 0.1),
        "blur_sigma": (0.1, 2.0),
        "solarize_probability": (0.0, 0.2),
    }
    assert numbers.items() <= {**defaults, **augmentation}.items()


@pytest.mark.parametrize("config", EVERY)
def test_a_search_draws_from_the_papers_ranges_and_measures_on_validation_images(config):
    cfg = load_config(config)
    search = read_search(cfg, config)
    lr, decay = (search.space[f"optimizer.finetune.{key}"] for key in ("lr", "weight_decay"))
    assert len(search.space) == 2
    data = trial_config(cfg, search, draw(search, 0), config).dataloader
    train, test = data.train.dataset, data.test.dataset
    if config in CLASSIFICATION:
        assert (search.metric, search.trials) == (METRICS[CLASSIFICATION[config]], 100)
        assert (lr, decay) == ([1e-4, 1.0], [1e-5, 1e-2])
        assert (train.split, test.split) == ("train", "val")
    else:
        assert (search.metric, search.trials) == ("AP50", 50)
        assert (lr, decay) == ([1e-4, 1e-1], [1e-6, 1e-2])
        assert (train.splits, test.splits) == (["2007_train", "2012_train"], ["2007_val", "2012_val"])


@pytest.mark.parametrize("config", [*RESNET18, "bissl/voc_det_byol.py"])
def test_every_data_set_dry_runs(config, train_net, originals, tmp_path):
    outcome = train_net("--dry-run", *tiny(config, tmp_path / "run"), config=config, datasets=originals)
    assert outcome.status == 0, outcome.err
    rows = {line.split()[0]: line.split() for line in outcome.out.splitlines() if line and line[0].isalpha()}
    cfg = load_config(config)
    for role in ("train", "test"):
        assert rows[role][1] == cfg.dataloader[role].dataset.name
    assert "not known for Lars" in outcome.out and "wanted" not in outcome.out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("table", "name"), [(table, name) for table, sets in TABLES.items() for name in sets])
def test_a_set_of_a_comparison_is_the_experiment_of_its_own_config(table, name):
    cfg = load_config(f"compare/{table}.py")
    one = LazyConfig.apply_overrides(cfg, cfg.compare.datasets[name])
    settings, own = read_settings(one, table), load_config(TABLES[table][name])
    # where the backbone comes from in the shipped detection config is its own pretraining
    base, expected = (LazyConfig.apply_overrides(of, ["train={}"]) for of in (base_config(one), base_config(own)))
    assert base == expected
    search = read_search(one, table)
    assert search == read_search(own, name) and settings.search_trials == search.trials
    assert settings.metric == search.metric and settings.vary == "finetune" and len(settings.seeds) == 10
    assert list(settings.arms) == ["pretrained", "bissl"]


@pytest.mark.parametrize("table", TABLES)
def test_a_table_of_the_papers_has_every_set_and_starts_from_the_shared_pretraining(table):
    cfg = load_config(f"compare/{table}.py")
    assert list(cfg.compare.datasets) == list(TABLES[table])
    assert cfg.train.init == load_config(TABLES[table]["food101"]).train.init
    assert cfg.train.stages == ["bissl", "finetune"] and cfg.train.output_dir == f"runs/{table}"


@pytest.mark.parametrize("table", TABLES)
def test_a_comparison_of_every_set_dry_runs(table, originals, tmp_path):
    folder, out, err = tmp_path / "c", io.StringIO(), io.StringIO()
    changed = [*TINY, "task.image_size=32", "train.stages=[pretrain,bissl,finetune]", f"train.output_dir={folder}"]
    arguments = ["--config-file", f"compare/{table}.py", "--datasets", ",".join(TABLES[table]), "--seeds", "2"]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setenv("BISSL_ZOO_DATASETS", str(originals))
        status = load_tool("compare").cli([*arguments, "--dry-run", *changed])
    assert status == 0, err.getvalue()
    told = out.getvalue().split("data set ")[1:]
    assert [one.split()[0] for one in told] == list(TABLES[table])
    for one in told:
        name = one.split()[0]
        metric, trials = ("AP50", 50) if name == "voc_det" else (METRICS[name], 100)
        assert f"folder {folder / name}   figure {metric}   " in one and f"a search of {trials} trials per arm" in one
        assert {"pretrain", "bissl", "bissl-search", "bissl-seed1"} <= {
            line.split()[0] for line in one.splitlines() if line
        }
    assert not folder.exists()


@pytest.mark.parametrize(
    ("config", "changed", "rate", "losses", "figures"),
    [
        (
            "bissl_v2/flowers102.py",
            ["bilevel.adaptation.every=1"],
            0.015,
            {"lower/nt_xent", "upper/cross_entropy"},
            {"top1", "mean_per_class"},
        ),
        ("bissl/voc2007_classification_byol.py", [], 0.005, {"upper/bce"}, {"mAP11", "mAP"}),
        ("bissl/voc_det_byol.py", [], 0.03, {"upper/loss_classifier", "upper/loss_box_reg"}, {"AP50", "AP", "AP75"}),
    ],
)
def test_each_kind_of_data_trains(config, changed, rate, losses, figures, train_net, originals, tmp_path):
    outcome = train_net(*tiny(config, tmp_path / "run"), *changed, config=config, datasets=originals)
    assert outcome.status == 0, outcome.err
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    measured = {key for record in records for key in record}
    assert losses <= measured and not measured & ({"upper/cross_entropy", "upper/bce"} - losses)
    assert next(record["upper/lr"] for record in records if "upper/lr" in record) == rate
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert set(results) == {"pretrained", "bissl"}
    for found in results.values():
        assert figures <= set(found) and all(0 <= found[figure] <= 1 for figure in figures)
    assert read_search(load_config(config), config).metric in figures
