"""Every shipped config loads, is saved and loads again, equal, and dry-runs; and the paper's numbers are in voc_det.

Those of the papers' classification sets, which differ by their data and rates alone, dry-run in test_paper_configs.py,
and so do the comparisons of them.
"""

import importlib.util
import re

import pytest
from original_layouts import picture, write_imagenet, write_stl10, write_voc2007_classification

import bissl_zoo
from bissl_zoo.config import LazyConfig, config_root, instantiate

ROOT = config_root()
CONFIGS = [path for path in sorted(ROOT.rglob("*.py")) if path.relative_to(ROOT).parts[0] != "common"]
DRY_RUN = [
    path for path in CONFIGS if not re.search(r"common\.papers\.(classification|sets import c)", path.read_text())
]
DRY_RUN += [path for path in CONFIGS if path.parent.name == "pretrain" and path not in DRY_RUN]
# the shipped digit scenes are thousands of images; these are enough to open
FEWER = [f"+dataloader.{{}}.dataset.{split}=4" for split in ("unlabeled", "train", "val", "test")]
#: configs of libraries that need not be there, with what is said where they are not
OPTIONAL = {
    "bissl/voc_det_detectron2.py": ("detectron2", "https://detectron2.readthedocs.io/en/latest/tutorials/install.html")
}


def name_of(path):
    return path.relative_to(ROOT).as_posix()


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    """Every data set that the configs name, small, in its original layout."""
    root = tmp_path_factory.mktemp("originals")
    write_imagenet(root)
    write_stl10(root)
    for folder in ("VOCdevkit/VOC2007", "VOCdevkit/VOC2012", "bccd_voc/VOCdevkit/VOC2007"):
        write_voc2007_classification(root, folder)
    for split in ("train", "val", "test"):
        for label, clothing in enumerate(("hat", "shirt")):
            picture(root / "clothing10" / split / clothing / "0.jpg", label)
    return root


def test_there_are_configs():
    assert {path.parent.name for path in CONFIGS} >= {"pretrain", "bissl", "bissl_v2", "quickstart"}


@pytest.mark.parametrize("config", CONFIGS, ids=name_of)
def test_every_config_is_saved_and_loads_again_equal(config, tmp_path):
    cfg = LazyConfig.load(config)
    LazyConfig.save(cfg, tmp_path / "config.yaml")
    assert LazyConfig.load(tmp_path / "config.yaml") == cfg


@pytest.mark.parametrize("config", DRY_RUN, ids=name_of)
def test_a_config_dry_runs_and_leaves_nothing(config, train_net, datasets, tmp_path):
    cfg = LazyConfig.load(config)
    scenes = [role for role, loader in cfg.dataloader.items() if loader.dataset.name == "digit_scenes"]
    overrides = [f"train.output_dir={tmp_path / 'run'}", "train.device=cpu", "train.init=null"]
    overrides += [override.format(role) for role in scenes for override in FEWER]
    outcome = train_net("--dry-run", *overrides, config=config, datasets=datasets)
    assert not list(tmp_path.iterdir())
    library, advice = OPTIONAL.get(name_of(config), (None, None))
    if library and importlib.util.find_spec(library) is None:
        assert advice in outcome.message()
        return
    assert outcome.status == 0, outcome.err
    for heading in ("stages", "data", "parameters", "shapes", "shared backbone", *cfg.train.stages):
        assert heading in outcome.out


def test_the_dry_run_counts_steps_from_the_data(train_net, datasets):
    outcome = train_net("--dry-run", "train.device=cpu", config="bissl/voc_det.py", datasets=datasets)
    rows = {line.split()[0]: line.split() for line in outcome.out.splitlines() if line and line[0].isalpha()}
    assert rows["pretrain"][1] == "15"  # 500 epochs of 30 images at batch 1024
    assert rows["head_warmup"][1] == "19"  # 5 epochs of 60 images at batch 16
    assert rows["bissl"][1:8] == "500 x (20 lower, 8 upper)".split() + ["1024"]
    assert rows["finetune"][1] == "188"  # 50 epochs
    assert "(1024, 6, 6)" in outcome.out  # C4 of 96 pixels


def test_voc_det_holds_the_authors_numbers():
    cfg = bissl_zoo.load_config("bissl/voc_det.py")
    b = cfg.bilevel
    assert (b.lower_steps, b.upper_steps, b.alternations, b["lambda"], b.gamma) == (20, 8, 500, 0.001, 1.0)
    assert (b.shared_stage, b.adaptation, b.head_warmup.epochs, b.head_warmup.steps) == ("c4", None, 5, None)
    assert (cfg.solver.name, cfg.solver.iterations, cfg.solver.damping) == ("cg", 5, 10.0)
    assert cfg.backbone.name == "resnet50"
    assert (cfg.pretext.name, cfg.pretext.temperature) == ("simclr", 0.5)
    assert cfg.pretext.projector == [256, 256, 256] and cfg.pretext.augmentation.size == 96
    task = cfg.task
    assert task.anchor_sizes == [16, 32, 64, 128, 256] and task.anchor_ratios == [0.5, 1.0, 2.0]
    assert (task.min_size, task.max_size, task.roi_size, task.sampling_ratio) == (196, 320, 7, 2)
    loaders = cfg.dataloader
    assert (loaders.pretext.batch_size, loaders.train.batch_size) == (1024, 16)
    assert loaders.train.dataset.splits == ["2007_trainval", "2012_trainval"]
    assert loaders.test.dataset.splits == ["2007_test"]
    assert (cfg.finetune.epochs, cfg.finetune.steps, cfg.pretrain.epochs) == (50, None, 500)
    assert (cfg.clip_grad.lower, cfg.clip_grad.upper) == (10.0, 10.0)


def test_voc_det_has_the_authors_optimizers_and_schedules():
    cfg = bissl_zoo.load_config("bissl/voc_det.py")
    optimizer = cfg.optimizer
    assert optimizer.lower._target_.endswith("Lars") and optimizer.pretrain._target_.endswith("Lars")
    assert (optimizer.lower.lr, optimizer.lower.weight_decay, optimizer.lower.momentum) == (1.0, 1e-6, 0.9)
    assert optimizer.lower.trust_coeff == 0.001
    assert (optimizer.pretrain.lr, optimizer.pretrain.weight_decay) == (4.8, 1e-6)
    assert optimizer.upper._target_.endswith("SGD")
    assert (optimizer.upper.lr, optimizer.upper.weight_decay, optimizer.upper.momentum) == (0.015, 0.0, 0.9)
    assert (optimizer.head_warmup.lr, optimizer.head_warmup.weight_decay) == (0.015, 0.0)
    lower, upper = instantiate(cfg.lr_multiplier.lower), instantiate(cfg.lr_multiplier.upper)
    total = 20 * 500
    assert lower(0, total) == pytest.approx(1 / 200) and lower(199, total) == 1.0  # over 10 alternations
    assert lower(total, total) == pytest.approx(0.001) and lower(5100, total) == pytest.approx(0.5005, abs=1e-3)
    assert upper(0, 8 * 500) == 1.0 and upper(8 * 500, 8 * 500) == pytest.approx(0.001)


def test_overriding_the_upper_rate_moves_that_of_the_head_warm_up():
    cfg = LazyConfig.apply_overrides(bissl_zoo.load_config("bissl/voc_det.py"), ["optimizer.upper.lr=0.5"])
    assert cfg.optimizer.head_warmup.lr == 0.5
