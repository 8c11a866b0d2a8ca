"""`train.probe`: its metrics, its log line, and that training is unchanged."""

import json
import math
import random

import numpy as np
import pytest
import torch
from digit_images import write_digit_folder
from run_outcomes import assert_same, outcome
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torchvision.transforms import v2

from bissl_zoo.config import LazyCall as L
from bissl_zoo.engine.build import Weights
from bissl_zoo.engine.checks import open_context
from bissl_zoo.engine.features import FixedViews, build_probe, extract_features
from bissl_zoo.engine.resume import preserved_randomness
from bissl_zoo.engine.runner import run
from bissl_zoo.engine.stages import Pretrain
from bissl_zoo.errors import DatasetError
from bissl_zoo.evaluation.probes import effective_rank, normalized_std
from bissl_zoo.registry import build_dataset, build_task

CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def digit_folder(tmp_path_factory):
    """Handwritten digits as an image folder: 60 to train, 40 to test, of 4 classes."""
    return write_digit_folder(tmp_path_factory.mktemp("digits"))


@pytest.fixture
def labelled_config(tiny_config, digit_folder):
    """The tiny config with a classification task: `labelled_config(train__probe__period=1)`."""

    def build(**changed):
        cfg = tiny_config(**changed)
        cfg.task = L(build_task)(name="classification", image_size=32)
        for role in ("pretext", "train", "test"):
            split = "test" if role == "test" else "train"
            cfg.dataloader[role].dataset = L(build_dataset)(name="image_folder", root=str(digit_folder), split=split)
        cfg.dataloader.pretext.dataset.labelled = False
        return cfg

    return build


def records(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines if "upper_step" not in line and "event" not in line]


def untimed(record):
    return {key: value for key, value in record.items() if key != "time" and not key.startswith(("speed/", "time/"))}


@pytest.mark.slow
def test_a_run_with_and_without_the_probe_ends_bit_equal(labelled_config, tmp_path):
    folders, random_states = {}, {}
    for period in (0, 1):
        folders[period] = tmp_path / str(period)
        cfg = labelled_config(train__probe__period=period, train__output_dir=folders[period])
        cfg.train.stages, cfg.train.publish.name = ["pretrain", "bissl"], None
        run(cfg, "test")
        random_states[period] = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    without, with_probe = (outcome(folders[period])["states"] for period in (0, 1))
    assert {name.partition("/")[0] for name in without} == {"pretrain", "head_warmup", "bissl"}
    assert_same(without, with_probe)
    assert random_states[0] == random_states[1]
    plain, probed = (records(folders[period]) for period in (0, 1))
    for record, other in zip(plain, probed, strict=True):
        assert untimed(record) == {key: value for key, value in untimed(other).items() if "probe/" not in key}
    for key in ("probe/knn_top1", "time/probe"):
        measured = [(record["stage"], record["step"]) for record in probed if key in record]
        assert measured == [("pretrain", 1), ("pretrain", 2), ("bissl", 1), ("bissl", 2)]
    assert all(record.get("time/probe", 1) > 0 for record in probed)


@pytest.mark.slow
def test_the_metrics_agree_with_scikit_learn_and_the_formulas(labelled_config, capsys):
    context = open_context(labelled_config(train__probe__period=2, train__probe__k=5, pretrain__steps=2), "test")
    trainer = Pretrain().build(context, Weights())
    trainer.train([build_probe(context, Pretrain())])
    metrics = {name: value for name, value in trainer.metrics.items() if name.startswith("probe/")}
    backbone, method = trainer.level.backbone.eval(), trainer.level.head.eval()
    crop = [v2.PILToTensor(), v2.Resize(37, v2.InterpolationMode.BICUBIC), v2.CenterCrop(32)]  # 37 is 32 / 0.875
    normalize = [v2.ToDtype(torch.float32, True), v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])]
    plain = v2.Compose([*crop, *normalize])

    def embedded(dataset):
        with torch.no_grad():
            images = torch.stack([plain(image) for image, _ in dataset])
            return method.embed(backbone, images).double().numpy(), [target for _, target in dataset]

    reference = KNeighborsClassifier(5, metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / 0.07))
    train, test = embedded(context.data["train"]), embedded(context.data["test"])
    assert metrics["probe/knn_top1"] == reference.fit(*train).score(*test)
    linear = make_pipeline(StandardScaler(), LogisticRegression(C=100.0, max_iter=1000)).fit(*train)
    assert metrics["probe/linear_top1"] == pytest.approx(linear.score(*test), abs=0.15)
    with preserved_randomness(CPU), torch.no_grad():
        samples = FixedViews(context.data["pretext"], range(60), method.views(), seed=0)
        first = method.embed(backbone, torch.stack([samples[i][0] for i in range(60)]))
    # batches of 8 there, of 60 here
    assert metrics["probe/effective_rank"] == pytest.approx(effective_rank(first), rel=1e-4)
    assert metrics["probe/std"] == pytest.approx(normalized_std(first), rel=1e-4)
    names = ("knn_top1", "linear_top1", "effective_rank", "std")
    assert metrics.keys() == {f"probe/{name}" for name in names}
    line = next(line for line in capsys.readouterr().out.splitlines() if "probe" in line)
    assert line.startswith(
        f"[pretrain 2/2] probe  kNN top-1 {metrics['probe/knn_top1']:.3f} (k=5, 60 images)  "
        f"linear top-1 {metrics['probe/linear_top1']:.3f}  effective"
    )
    assert f"rank {metrics['probe/effective_rank']:.1f}/60  std {metrics['probe/std']:.2f}" in line


def test_labelled_sets_that_the_stage_does_not_read_are_opened_and_must_be_there(labelled_config, tmp_path):
    cfg = labelled_config(train__probe__period=1, train__stages="[pretrain]")
    context = open_context(cfg, "test")
    assert context.data.keys() == {"pretext"}
    assert build_probe(context, Pretrain()).labelled.keys() == {"train", "test"}
    cfg.dataloader.test.dataset.root = str(tmp_path / "absent")
    with pytest.raises(DatasetError, match=r"(?s)absent.*train\.probe\.k=0"):
        build_probe(context, Pretrain())
    cfg.train.probe.k = 0  # the monitors alone need no labels
    assert build_probe(context, Pretrain()).labelled is None
    cfg.train.probe.k = 20
    del cfg.dataloader.test  # a config of pretraining alone
    assert build_probe(context, Pretrain()).labelled is None


@pytest.mark.slow
def test_no_more_images_are_looked_at_than_asked_for_and_always_the_same(labelled_config):
    context = open_context(labelled_config(train__probe__period=1, train__probe__images=25), "test")
    probe = build_probe(context, Pretrain())
    probe.trainer = Pretrain().build(context, Weights())
    metrics, line = probe._measure()
    assert "25 images" in line and "/25 " in line
    torch.manual_seed(99)
    assert probe._measure() == (metrics, line)
    context.cfg.dataloader.pretext.num_workers = 1
    assert probe._measure() == (metrics, line)


def test_an_embedding_that_is_not_finite_is_logged_and_does_not_end_the_run(tiny_config, at_scenes, capsys):
    context = open_context(tiny_config(train__probe__period=1, pretrain__steps=1), "test")
    trainer = Pretrain().build(context, Weights())
    next(module for module in trainer.level.backbone.modules() if hasattr(module, "running_var")).running_var.fill_(-1)
    trainer.train([build_probe(context, Pretrain())])  # batch statistics are used to train, running ones to probe
    assert "probe  the embedding is not finite in eval mode" in capsys.readouterr().out
    assert math.isfinite(trainer.metrics["total_loss"]) and math.isnan(trainer.metrics["probe/effective_rank"])


def test_the_first_of_a_view_and_a_mask_or_of_many_crops_is_the_same_in_every_pass(digit_folder):
    dataset = build_dataset(name="image_folder", root=str(digit_folder), split="train", labelled=False)
    crop = v2.Compose([v2.PILToTensor(), v2.RandomCrop(16), v2.ToDtype(torch.float32, True)])
    for others in (lambda image: torch.ones(2, 2, dtype=torch.bool), lambda image: crop(image)[:, :8, :8]):
        samples = FixedViews(dataset, [5, 3], lambda image, others=others: (crop(image), others(image)), seed=0)
        with preserved_randomness(CPU):
            (first,) = extract_features(torch.clone, samples, CPU, batch_size=2)
            (again,) = extract_features(torch.clone, samples, CPU, batch_size=1)
        assert first.shape == (2, 3, 16, 16) and torch.equal(again, first)
