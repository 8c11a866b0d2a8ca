"""`bissl_zoo.train` builds the config of `bissl new`, runs it, and returns the model."""

import json

import pytest
import torch
from models import photo

import bissl_zoo
from bissl_zoo.api import build_config
from bissl_zoo.cli.new import config_text
from bissl_zoo.config import LazyConfig
from bissl_zoo.errors import BisslZooError, ConfigError, RegistryError
from bissl_zoo.registry import build_backbone
from bissl_zoo.weights.files import StoredBackbone, save_backbone

#: a run of seconds
SHORT = {
    **{"dataloader__pretext__batch_size": 4, "dataloader__train__batch_size": 4, "dataloader__test__batch_size": 4},
    **{f"dataloader__{role}__num_workers": 0 for role in ("pretext", "train", "test")},
    **{"pretext__augmentation__size": 32, "task__image_size": 32, "solver__iterations": 2, "train__report": False},
    **{"pretrain__steps": 2, "bilevel__alternations": 1, "bilevel__lower_steps": 1, "bilevel__upper_steps": 1},
    **{"bilevel__curvature_batch_size": 4, "bilevel__head_warmup__steps": 1, "finetune__steps": 2},
    **{"bilevel__pretext_warmup__steps": 1, "train__device": "cpu"},
}


@pytest.fixture(scope="module")
def labels(tmp_path_factory):
    """A folder of two classes with a split to train and one to test on."""
    folder = tmp_path_factory.mktemp("data") / "pets"
    for number, name in enumerate(f"{split}/{label}" for split in ("train", "test") for label in ("cat", "dog")):
        (folder / name).mkdir(parents=True)
        for image in range(4):
            photo(40, 40, 10 * number + image).save(folder / name / f"{image}.png")
    return folder


def test_the_config_is_that_of_bissl_new(labels, tmp_path):
    cfg = build_config(labels=labels, output_dir="runs/pets", model="test_resnet")
    (tmp_path / "pets.py").write_text(config_text("pets", labels, backbone="test_resnet"))
    written = LazyConfig.load(tmp_path / "pets.py")
    written.train.publish.name = None  # one call publishes nothing unless it is asked to
    assert LazyConfig.to_py(cfg) == LazyConfig.to_py(written)
    assert cfg.task.name == "classification" and list(cfg.train.stages) == ["pretrain", "bissl", "finetune"]


def test_weights_pretext_and_overrides_are_in_the_config(labels, tmp_path):
    weights = tmp_path / "vit.safetensors"
    backbone = build_backbone(name="test_vit", img_size=64)
    save_backbone(StoredBackbone(backbone.state_dict(), "test_vit", {"img_size": 64}), weights)
    overrides = {"finetune__steps": 7, "optimizer.finetune.lr": 1e-5, "+task.mean": [0.5, 0.5, 0.5]}
    cfg = build_config(
        labels=labels, data=labels / "test", output_dir="a", model=str(weights), pretext="byol", **overrides
    )
    assert cfg.train.init == str(weights) and list(cfg.train.stages) == ["bissl", "finetune"]
    assert (cfg.backbone.name, cfg.backbone.img_size, cfg.pretext.name) == ("test_vit", 64, "byol")
    assert cfg.pretext.augmentation.size == cfg.task.image_size == 64  # that of the weights
    assert cfg.dataloader.pretext.dataset.root == str(labels / "test")
    assert cfg.finetune.steps == 7 and cfg.optimizer.finetune.lr == 1e-5 and cfg.task.mean == [0.5] * 3


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"model": "resnet81"}, RegistryError, "Did you mean 'resnet18'"),
        ({"pretext": "simclear"}, RegistryError, "Did you mean 'simclr'"),
        ({"task": "clasification"}, RegistryError, "Did you mean 'classification'"),
        ({"finetune__stepz": 3}, ConfigError, "Nearest: finetune.steps"),
        ({"labels": "nowhere"}, BisslZooError, "nowhere"),
    ],
)
def test_a_wrong_name_is_refused_before_anything_is_removed(changed, error, message, labels, tmp_path):
    (tmp_path / "config.yaml").touch()
    with pytest.raises(error, match=message):
        bissl_zoo.train(**{"labels": labels, "output_dir": tmp_path, "overwrite": True, **changed})
    assert (tmp_path / "config.yaml").exists()


@pytest.mark.slow
def test_one_call_trains_and_starts_again_with_overwrite(labels, tmp_path, capsys):
    call = {"labels": labels, "output_dir": tmp_path / "run", "model": "test_resnet", **SHORT}
    model, results = bissl_zoo.train(**call)
    assert results == json.loads((tmp_path / "run" / "results.json").read_text()) and set(results) == {
        *("pretrained", "bissl")
    }
    assert model.classes == ["cat", "dog"] and model.metrics["top1"] == results["bissl"]["top1"]
    assert model.predict(photo())["label"] in model.classes
    assert "[finetune 2/2]" in capsys.readouterr().out  # progress
    with pytest.raises(ConfigError, match="not empty"):
        bissl_zoo.train(**call)
    state = model.state_dict()
    again, _ = bissl_zoo.train(**call, overwrite=True)
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.state_dict().items())
    assert bissl_zoo.train(**call, resume=True)[1] == results
