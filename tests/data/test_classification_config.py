import pytest
from original_layouts import WRITERS

from bissl_zoo.config import LazyConfig, config_root, instantiate
from bissl_zoo.data.datasets.classification_sets import CLASSIFICATION_SETS
from bissl_zoo.engine.build import build_datasets
from bissl_zoo.errors import ConfigError
from bissl_zoo.registry import build_dataset


@pytest.fixture
def experiment(tmp_path):
    """Write a config of one's own beside the shipped ones' folder: `experiment("loaders('dtd')")` -> the config."""

    def write(loaders, pretext="unlabelled('dtd')"):
        (tmp_path / "common").symlink_to(config_root() / "common", target_is_directory=True)
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "config.py").write_text(
            "from ..common.data.classification import loaders, unlabelled\n"
            f"dataloader = dict(pretext={pretext}, **{loaders})\n"
        )
        return LazyConfig.load(tmp_path / "mine" / "config.py")

    return write


@pytest.mark.parametrize("name", sorted(CLASSIFICATION_SETS))
def test_every_set_has_its_loaders(name, experiment, tmp_path, monkeypatch):
    monkeypatch.setenv("BISSL_ZOO_DATASETS", str(tmp_path / "datasets"))
    WRITERS[name](tmp_path / "datasets")
    cfg = experiment(f"loaders('{name}', batch_size=6)", f"unlabelled('{name}')")
    LazyConfig.save(cfg, tmp_path / "config.yaml")
    assert LazyConfig.load(tmp_path / "config.yaml") == cfg
    sets = {role: instantiate(cfg.dataloader[role].dataset) for role in ("train", "test", "pretext")}
    assert sets["train"].classes == sets["test"].classes and sets["pretext"].classes is None
    assert sets["pretext"].digest() == sets["train"].digest() != sets["test"].digest()
    test = instantiate(cfg.dataloader.test, transform=lambda image, label: label, num_workers=0)
    assert sum(len(batch) for batch in test) == len(sets["test"])


def test_splits_and_arguments_go_to_both_loaders_and_can_be_overridden(experiment):
    cfg = experiment("loaders('dtd', train='train', test='val', partition=3, seed=2)")
    train, test = cfg.dataloader.train.dataset, cfg.dataloader.test.dataset
    assert (train.split, test.split) == ("train", "val")
    assert (train.partition, test.partition, train.seed, test.seed) == (3, 3, 2, 2)
    cfg = LazyConfig.apply_overrides(cfg, ["dataloader.train.batch_size=32", "dataloader.train.dataset.split=trainval"])
    assert cfg.dataloader.train.batch_size == 32 and cfg.dataloader.train.dataset.split == "trainval"


@pytest.mark.parametrize("name", ["dtd", "food101"])  # with validation images of its own, and with drawn ones
def test_validation_images_are_kept_back_from_the_training(name, experiment, tmp_path, monkeypatch):
    monkeypatch.setenv("BISSL_ZOO_DATASETS", str(tmp_path / "datasets"))
    WRITERS[name](tmp_path / "datasets")
    cfg = experiment(f"loaders('{name}', val='val', batch_size=6, seed=3)", f"unlabelled('{name}')")
    assert cfg.dataloader.train.dataset.split == "train" and cfg.dataloader.val.batch_size == 6
    data = build_datasets(cfg, {"train", "val", "test"})
    files = {role: {one.source(index) for index in range(len(one))} for role, one in data.items()}
    assert all(files.values()) and not (files["train"] & files["val"] or files["val"] & files["test"])
    whole = build_dataset(name, split="trainval")
    assert files["train"] | files["val"] == {whole.source(index) for index in range(len(whole))}
    loader = instantiate(cfg.dataloader.val, transform=lambda image, label: label, num_workers=0)
    assert sum(len(batch) for batch in loader) == len(data["val"])


def test_without_a_validation_split_all_images_are_trained_on(experiment):
    cfg = experiment("loaders('dtd')")
    assert set(cfg.dataloader) == {"pretext", "train", "test"} and cfg.dataloader.train.dataset.split == "trainval"


def test_the_test_split_is_refused_for_validation(experiment, tmp_path, monkeypatch):
    monkeypatch.setenv("BISSL_ZOO_DATASETS", str(tmp_path / "datasets"))
    WRITERS["dtd"](tmp_path / "datasets")
    with pytest.raises(ConfigError, match="dataloader.val and dataloader.test are the same samples"):
        build_datasets(experiment("loaders('dtd', val='test')"), {"train", "val", "test"})
