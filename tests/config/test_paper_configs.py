"""The configs of the BiSSL paper (arXiv 2410.02387) have the numbers of its tables, and each kind of task trains."""

import inspect
import json

import pytest
from original_layouts import WRITERS, accept_small_copies, write_imagenet, write_voc2007_classification

from bissl_zoo.config import LazyConfig, config_root, instantiate, load_config, locate
from bissl_zoo.studies.arms import base_config, read_settings
from bissl_zoo.studies.search import draw, read_search, trial_config

pytestmark = pytest.mark.slow  # loads a hundred configs

# learning rate and weight decay of the upper level from SimCLR and from BYOL, and the metric of the table
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
    "voc_det": (0.015, 0.0, 0.03, 0.0002, "AP50"),
}
SETS_V2 = [name for name in TABLE if name != "voc_det"] + ["stl10", "fashion_mnist"]
METRICS = {"stl10": "top1", "fashion_mnist": "top1"} | {name: row[-1] for name, row in TABLE.items()}
#: config -> data set, method and rates of the upper level
CONFIGS = {f"bissl_v2/{name}.py": (name, "simclr", (0.015, 0.01)) for name in SETS_V2}
CONFIGS |= {f"bissl/{name}_simclr.py": (name, "simclr", row[:2]) for name, row in TABLE.items() if name != "voc_det"}
CONFIGS |= {f"bissl/{name}_byol.py": (name, "byol", row[2:4]) for name, row in TABLE.items()}
CONFIGS["bissl/voc_det.py"] = ("voc_det", "simclr", TABLE["voc_det"][:2])
COMPARISONS = {
    "papers_simclr": {name: c for c, (name, m, _) in CONFIGS.items() if m == "simclr" and "v2" not in c},
    "papers_byol": {name: config for config, (name, method, _) in CONFIGS.items() if method == "byol"},
    "papers_v2": {name: config for config, (name, _, _) in CONFIGS.items() if "v2" in config},
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
def configs():
    return {name: load_config(name) for name in CONFIGS}


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """Return a root with small data sets in their original layouts."""
    root = tmp_path_factory.mktemp("originals")
    for name in ("flowers102", "stl10"):
        WRITERS[name](root)
    write_imagenet(root)
    for year in (2007, 2012):
        write_voc2007_classification(root, f"VOCdevkit/VOC{year}")
    with pytest.MonkeyPatch.context() as patch:
        accept_small_copies(patch)
        yield root


def test_each_row_of_the_papers_tables_is_a_config(configs):
    folders = [config_root() / name for name in ("bissl", "bissl_v2")]
    shipped = {f"{folder.name}/{path.name}" for folder in folders for path in folder.glob("*.py")}
    assert shipped - {"bissl/voc_det_minres.py", "bissl/voc_det_detectron2.py"} == set(CONFIGS)
    assert len(CONFIGS) == 26 + 14
    for config, (name, method, rates) in CONFIGS.items():
        cfg, v2 = configs[config], "v2" in config
        optimizer, bilevel, loader = cfg.optimizer, cfg.bilevel, cfg.dataloader
        assert (optimizer.upper.lr, optimizer.upper.weight_decay) == rates, config
        assert (optimizer.head_warmup.lr, optimizer.head_warmup.weight_decay) == rates, config
        assert (cfg.backbone.name, cfg.pretext.name) == ("resnet18" if v2 else "resnet50", method), config
        assert (
            loader.pretext.dataset.name == ("stl10" if v2 else "image_folder") and not loader.pretext.dataset.labelled
        )
        assert (bilevel.gamma, bilevel.adaptation) == ((0.01, {"every": 100, "alpha": 0.1}) if v2 else (1.0, None))
        epochs = (bilevel.head_warmup.epochs, cfg.finetune.epochs, loader.train.batch_size, bilevel.shared_stage)
        assert epochs == ((5, 50, 16, "c4") if name == "voc_det" else (20, 400, 256, None)), config
        search = read_search(cfg, config)
        ranges = list(search.space.values())
        assert list(search.space) == ["optimizer.finetune.lr", "optimizer.finetune.weight_decay"]
        trial = trial_config(cfg, search, draw(search, 0), config).dataloader
        if name == "voc_det":
            splits = loader.train.dataset.splits, loader.test.dataset.splits, trial.test.dataset.splits
            assert splits == (["2007_trainval", "2012_trainval"], ["2007_test"], ["2007_val", "2012_val"])
            assert (search.metric, search.trials) == ("AP50", 50)
            assert ranges == [[1e-4, 1e-1], [1e-6, 1e-2]]
        else:
            splits = loader.train.dataset.split, loader.test.dataset.split, trial.train.dataset.split
            assert (*splits, trial.test.dataset.split) == ("trainval", "test", "train", "val"), config
            assert loader.train.dataset.name == loader.test.dataset.name == name
            assert (search.metric, search.trials) == (METRICS[name], 100)
            assert ranges == [[1e-4, 1.0], [1e-5, 1e-2]]
            multilabel = name == "voc2007_classification"
            assert cfg.task.name == ("multilabel_classification" if multilabel else "classification")
            assert cfg.task.get("loss") == ("bce" if multilabel else None) and cfg.task.image_size == 96
            crops = (cfg.task.aspect_ratio, cfg.task.interpolation, cfg.task.resize)
            assert crops == ([0.5, 1.0], "bilinear", 109), config  # int(96 / 0.875)


def test_all_configs_share_the_two_levels_of_the_papers(configs):
    for config, cfg in configs.items():
        b, lower, solver = cfg.bilevel, cfg.optimizer.lower, cfg.solver
        assert (b.lower_steps, b.upper_steps, b.alternations, b["lambda"]) == (20, 8, 500, 0.001), config
        assert (b.curvature, b.reset_teacher, cfg.finetune.sync_batch_norm) == ("hessian", True, True), config
        assert (solver.name, solver.iterations, solver.damping, solver.blockwise) == ("cg", 5, 10.0, False)
        assert lower._target_ == "timm.optim.lars.Lars"
        assert (lower.lr, lower.weight_decay, lower.momentum, lower.trust_coeff) == (1.0, 1e-6, 0.9, 0.001)
        assert lower.always_adapt and cfg.optimizer.pretrain.always_adapt
        for role in ("upper", "head_warmup", "finetune"):
            assert cfg.optimizer[role]._target_.endswith(".SGD") and cfg.optimizer[role].momentum == 0.9
        assert (cfg.clip_grad.lower, cfg.clip_grad.upper, b.head_warmup.steps) == (10.0, 10.0, None)
        assert cfg.dataloader.pretext.batch_size == 1024
        assert cfg.finetune.baseline and cfg.train.stages[-2:] == ["bissl", "finetune"]
        if config != "bissl/voc_det.py":  # it also pretrains
            start = "simclr_stl10" if "v2" in config else f"{CONFIGS[config][1]}_imagenet"
            assert cfg.train.init == f"runs/{start}"


def test_configs_of_the_papers_use_the_hessian_and_others_gauss_newton():
    names = [
        "bissl/voc_det_minres.py",
        "bissl/voc_det_detectron2.py",
        *(f"compare/{table}.py" for table in COMPARISONS),
    ]
    assert all(load_config(name).bilevel.curvature == "hessian" for name in names)
    for name in ("common/train.py", "quickstart/digit_scenes_det.py"):
        assert load_config(name).bilevel.curvature == "gauss_newton"


def test_configs_of_bissl_light_have_its_numbers():
    paths = sorted((config_root() / "bissl_light").glob("*.py"))
    assert len(paths) == 6 * 3
    for path in paths:
        cfg, size = load_config(f"bissl_light/{path.name}"), path.stem.rpartition("_")[2]
        bilevel, loaders = cfg.bilevel, cfg.dataloader
        assert (bilevel["lambda"], bilevel.lower_steps, bilevel.upper_steps, bilevel.alternations) == (
            0.001,
            20,
            8,
            500,
        )
        assert (dict(bilevel.lora), bilevel.lower_head_lr) == ({"r": 64, "alpha": 64, "targets": ["q", "v"]}, 1e-4)
        assert (cfg.optimizer.lower.lr, cfg.optimizer.upper.weight_decay) == (0.01, 0.0)
        assert (loaders.pretext.batch_size, loaders.train.batch_size) == (256, 64)
        assert (cfg.solver.name, cfg.solver.gradients, cfg.solver.blocks) == ("mfac", 20, "layer")
        assert (bilevel.head_warmup.epochs, cfg.finetune.epochs, cfg.train.amp) == (20, 200, "bf16")
        patch = {"base": 16, "large": 16, "huge": 14}[size]
        assert cfg.train.init == f"timm:{cfg.backbone.name}.mae" == f"timm:vit_{size}_patch{patch}_224.mae"
        assert cfg.pretext.augmentation.mask_patch == patch
        data = {part.dataset.name for part in (loaders.train, loaders.test)}
        assert data == {path.stem.removesuffix(f"_vit_{size}")}
        assert cfg.task.name == ("multilabel_classification" if "voc2007_classification" in data else "classification")


def test_detection_has_the_detector_of_the_papers(configs):
    task = configs["bissl/voc_det.py"].task
    assert task.anchor_sizes == [16, 32, 64, 128, 256] and task.anchor_ratios == [0.5, 1.0, 2.0]
    assert (task.min_size, task.max_size, task.roi_size, task.sampling_ratio) == (196, 320, 7, 2)


def test_schedules_are_cosines_and_the_lower_one_warms_up_for_10_alternations(configs):
    schedules = {role: instantiate(call) for role, call in configs["bissl/voc_det_byol.py"].lr_multiplier.items()}
    lower, upper, finetune = schedules["lower"], schedules["upper"], schedules["finetune"]
    assert lower(0, 10_000) == pytest.approx(1 / 200) and lower(199, 10_000) == 1.0
    assert lower(5100, 10_000) == pytest.approx(0.5005, abs=1e-3) and lower(10_000, 10_000) == pytest.approx(0.001)
    assert upper(0, 4000) == 1.0 and upper(2000, 4000) == pytest.approx(0.5005) and upper(4000, 4000) == 0.001
    assert finetune(0, 100) == 1.0 and finetune(50, 100) == pytest.approx(0.5005) and finetune(100, 100) == 0.001
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


def test_heads_and_views_are_those_of_the_papers(configs):
    simclr, byol = configs["bissl/food101_simclr.py"].pretext, configs["bissl/food101_byol.py"].pretext
    assert (simclr.temperature, simclr.projector) == (0.5, [256, 256, 256])
    assert byol.projector == byol.predictor == [256, 256, 256] and byol.decay == 0.9995
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
    for pretext in (simclr, byol, configs["bissl_v2/food101.py"].pretext):
        augmentation = dict(pretext.augmentation)
        signature = inspect.signature(locate(augmentation.pop("_target_")))
        defaults = {key: parameter.default for key, parameter in signature.parameters.items()}
        assert numbers.items() <= {**defaults, **augmentation}.items()


@pytest.mark.parametrize("table", COMPARISONS)
def test_each_data_set_of_a_comparison_is_the_experiment_of_its_config(table, configs):
    cfg = load_config(f"compare/{table}.py")
    assert set(cfg.compare.datasets) == set(COMPARISONS[table])
    assert cfg.train.stages == ["bissl", "finetune"] and cfg.train.output_dir == f"runs/{table}"
    for name, overrides in cfg.compare.datasets.items():
        arm, config = LazyConfig.apply_overrides(cfg, overrides), configs[COMPARISONS[table][name]]
        # the shipped detection config pretrains its backbone itself, so the sections `train` differ
        base, expected = (LazyConfig.apply_overrides(base_config(c), ["train={}"]) for c in (arm, config))
        assert base == expected, name
        settings, search = read_settings(arm, table), read_search(arm, table)
        assert search == read_search(config, name) and settings.search_trials == search.trials
        assert settings.metric == search.metric and settings.vary == "finetune" and len(settings.seeds) == 10
        assert list(settings.arms) == ["pretrained", "bissl"]


@pytest.mark.parametrize(
    ("config", "changes", "rate", "losses", "metrics"),
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
def test_each_kind_of_task_dry_runs_and_trains(config, changes, rate, losses, metrics, train_net, originals, tmp_path):
    cfg, run = load_config(config), tmp_path / "run"
    arguments = [*TINY, *TINY_TASK[cfg.task.name], f"train.output_dir={run}", *changes]
    outcome = train_net("--dry-run", *arguments, config=config, datasets=originals)
    assert outcome.status == 0 and not run.exists(), outcome.err
    assert cfg.dataloader.train.dataset.name in outcome.out
    outcome = train_net(*arguments, config=config, datasets=originals)
    assert outcome.status == 0, outcome.err
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    logged = {key for record in records for key in record}
    assert losses <= logged and not logged & ({"upper/cross_entropy", "upper/bce"} - losses)
    assert next(record["upper/lr"] for record in records if "upper/lr" in record) == rate
    results = json.loads((run / "results.json").read_text())
    assert set(results) == {"pretrained", "bissl"}
    for values in results.values():
        assert metrics <= set(values) and all(0 <= values[name] <= 1 for name in metrics)
