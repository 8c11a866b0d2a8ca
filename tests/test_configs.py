"""Every shipped config loads, is saved and loads again, equal, and dry-runs; and the paper's numbers are in it."""

import importlib.util

import numpy as np
import pytest
from PIL import Image

import bissl_zoo
from bissl_zoo.config import LazyConfig, config_root, instantiate

ROOT = config_root()
CONFIGS = [path for path in sorted(ROOT.rglob("*.py")) if path.relative_to(ROOT).parts[0] != "common"]
# the shipped digit scenes are thousands of images; these are enough to open
FEWER = [
    f"+dataloader.{role}.dataset.{split}=4"
    for role in ("pretext", "train", "test")
    for split in ("unlabeled", "train", "val", "test")
]
CLASSES = ("aeroplane", "tvmonitor")
#: configs of libraries that need not be there, with what is said where they are not
OPTIONAL = {
    "bissl/voc_det_detectron2.py": ("detectron2", "https://detectron2.readthedocs.io/en/latest/tutorials/install.html")
}


def write_image(path, size=(60, 40)):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def write_voc(year, **splits):
    """A devkit year with one object per image."""
    for split, names in splits.items():
        listed = year / "ImageSets" / "Main" / f"{split}.txt"
        listed.parent.mkdir(parents=True, exist_ok=True)
        listed.write_text("".join(f"{name}\n" for name in names))
        for number, name in enumerate(names):
            write_image(year / "JPEGImages" / f"{name}.jpg")
            (year / "Annotations").mkdir(exist_ok=True)
            (year / "Annotations" / f"{name}.xml").write_text(
                "<annotation><size><width>60</width><height>40</height></size><object>"
                f"<name>{CLASSES[number % 2]}</name><difficult>0</difficult><bndbox><xmin>5</xmin><ymin>6</ymin>"
                "<xmax>50</xmax><ymax>30</ymax></bndbox></object></annotation>"
            )


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    """Every data set that the configs name, tiny, in its original layout."""
    root = tmp_path_factory.mktemp("originals")
    for wnid in ("n01440764", "n01443537"):
        for number in range(3):
            write_image(root / "imagenet" / "train" / wnid / f"{wnid}_{number}.JPEG")
    write_voc(root / "VOCdevkit" / "VOC2007", trainval=["000005", "000007"], test=["000001"])
    write_voc(root / "VOCdevkit" / "VOC2012", trainval=["2008_000002", "2008_000003", "2008_000007"])
    return root


@pytest.fixture(params=CONFIGS, ids=lambda path: path.relative_to(ROOT).as_posix())
def config(request):
    return request.param


def test_there_are_configs():
    assert {path.parent.name for path in CONFIGS} >= {"pretrain", "bissl", "quickstart"}


def test_every_config_is_saved_and_loads_again_equal(config, tmp_path):
    cfg = LazyConfig.load(config)
    LazyConfig.save(cfg, tmp_path / "config.yaml")
    assert LazyConfig.load(tmp_path / "config.yaml") == cfg


def test_every_config_dry_runs_and_leaves_nothing(config, train_net, datasets, tmp_path):
    fewer = FEWER if "digit_scenes" in config.read_text() else []
    folder = tmp_path / "run"
    outcome = train_net(
        "--dry-run", f"train.output_dir={folder}", "train.device=cpu", *fewer, config=config, datasets=datasets
    )
    assert not folder.exists() and not list(tmp_path.iterdir())
    library, advice = OPTIONAL.get(config.relative_to(ROOT).as_posix(), (None, None))
    if library and importlib.util.find_spec(library) is None:
        assert advice in outcome.message()
        return
    assert outcome.status == 0, outcome.err
    for heading in ("stages", "data", "parameters", "shapes", "shared backbone"):
        assert heading in outcome.out
    for stage in LazyConfig.load(config).train.stages:
        assert stage in outcome.out


def test_the_dry_run_counts_steps_from_the_data(train_net, datasets):
    outcome = train_net("--dry-run", "train.device=cpu", config="bissl/voc_det.py", datasets=datasets)
    rows = {line.split()[0]: line.split() for line in outcome.out.splitlines() if line and line[0].isalpha()}
    assert rows["pretrain"][1] == "3"  # 500 epochs of 6 images at batch 1024
    assert rows["head_warmup"][1] == "2"  # 5 epochs of 5 images at batch 16
    assert rows["bissl"][1:8] == "500 x (20 lower, 8 upper)".split() + ["1024"]
    assert rows["finetune"][1] == "16"  # 50 epochs
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
