"""Every shipped config loads, also in Detectron2, is equal after saving and loading, and dry-runs.

Configs of the papers that differ only in data set and rates dry-run by kind in test_paper_configs.py.
"""

import importlib.util
import re

import pytest
from original_layouts import picture, write_imagenet, write_stl10, write_voc2007_classification

from bissl_zoo.config import LazyConfig, config_root, load_config

ROOT = config_root()
CONFIGS = [path for path in sorted(ROOT.rglob("*.py")) if path.relative_to(ROOT).parts[0] != "common"]
DRY_RUN = [
    path
    for path in CONFIGS
    if not re.search(r"common\.papers\.(classification|bissl_light|sets import c)", path.read_text())
]
#: at the paper's sizes a dry run takes a minute: byol is in test_paper_configs.py, minres is voc_det with a solver
DRY_RUN = [path for path in DRY_RUN if path.name not in ("voc_det_byol.py", "voc_det_minres.py")]
DRY_RUN += [path for path in CONFIGS if path.parent.name == "pretrain" and path not in DRY_RUN]
# the shipped digit scenes are thousands of images; these are enough to open
FEWER = [f"+dataloader.{{}}.dataset.{split}=4" for split in ("unlabeled", "train", "val", "test")]
#: configs that need an optional library, and the advice if it is missing
OPTIONAL = {
    "bissl/voc_det_detectron2.py": ("detectron2", "https://detectron2.readthedocs.io/en/latest/tutorials/install.html")
}


def name_of(path):
    return path.relative_to(ROOT).as_posix()


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    """Return a root with every data set of the configs, small, in its original layout."""
    root = tmp_path_factory.mktemp("originals")
    write_imagenet(root)
    write_stl10(root)
    for folder in (
        "VOCdevkit/VOC2007",
        "VOCdevkit/VOC2012",
        "bccd_voc/VOCdevkit/VOC2007",
        "aquarium_voc/VOCdevkit/VOC2007",
    ):
        write_voc2007_classification(root, folder)
    for split in ("train", "val", "test"):
        for label, clothing in enumerate(("hat", "shirt")):
            picture(root / "clothing10" / split / clothing / "0.jpg", label)
            picture(root / "trashnet" / split / clothing / "0.jpg", label)
    return root


@pytest.mark.parametrize(
    "folder",
    [
        "quickstart",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("pretrain", "bissl", "bissl_light", "bissl_v2", "compare")),
    ],
)
def test_every_config_is_equal_after_saving_and_loading(folder, tmp_path):
    configs = sorted((ROOT / folder).glob("*.py"))
    assert configs
    for config in configs:
        cfg = LazyConfig.load(config)
        LazyConfig.save(cfg, tmp_path / "config.yaml")
        assert LazyConfig.load(tmp_path / "config.yaml") == cfg, config


def test_every_folder_of_configs_is_tested():
    assert {path.parent.name for path in CONFIGS} == {
        *("pretrain", "quickstart", "bissl", "bissl_light", "bissl_v2", "compare")
    }


@pytest.mark.slow
def test_every_config_loads_with_detectron2():
    detectron2 = pytest.importorskip("detectron2.config", reason="Detectron2 is not installed")
    for config in ROOT.rglob("*.py"):
        loaded, cfg = detectron2.LazyConfig.load(str(config)), LazyConfig.load(config)
        assert set(cfg) <= set(loaded), config


@pytest.mark.slow
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


@pytest.mark.slow
def test_the_dry_run_counts_steps_from_the_data(train_net, datasets):
    outcome = train_net("--dry-run", "train.device=cpu", config="bissl/voc_det.py", datasets=datasets)
    rows = {line.split()[0]: line.split() for line in outcome.out.splitlines() if line and line[0].isalpha()}
    assert rows["pretrain"][1] == "15"  # 500 epochs of 30 images at batch 1024
    assert rows["head_warmup"][1] == "19"  # 5 epochs of 60 images at batch 16
    assert rows["bissl"][1:8] == "500 x (20 lower, 8 upper)".split() + ["1024"]
    assert rows["finetune"][1] == "188"  # 50 epochs
    assert "(1024, 6, 6)" in outcome.out  # C4 of 96 pixels


def test_overriding_the_upper_rate_moves_that_of_the_head_warm_up():
    cfg = LazyConfig.apply_overrides(load_config("bissl/voc_det.py"), ["optimizer.upper.lr=0.5"])
    assert cfg.optimizer.head_warmup.lr == 0.5
