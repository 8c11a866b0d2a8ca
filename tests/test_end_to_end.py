"""The whole pipeline, from the quickstart's config to an entry of the zoo that plain timm loads."""

import json

import pytest
import timm
import torch
from safetensors.torch import load_file

import bissl_zoo
from bissl_zoo.config import LazyConfig
from bissl_zoo.runs.checkpoint import load_checkpoint

pytestmark = pytest.mark.slow

COUNTS = {"unlabeled": 48, "train": 24, "val": 1, "test": 12}
OVERRIDES = [
    "train.log_period=2",
    "train.checkpoint.period=2",
    "pretrain.steps=3",
    "bilevel.head_warmup.steps=2",
    "bilevel.alternations=2",
    "bilevel.lower_steps=2",
    "bilevel.upper_steps=2",
    "finetune.steps=3",
    "dataloader.pretext.batch_size=16",
    "dataloader.train.batch_size=8",
    *(f"+dataloader.{role}.dataset.{key}={n}" for role in ("pretext", "train", "test") for key, n in COUNTS.items()),
]
STAGES = ["pretrain", "head_warmup", "bissl", "finetune_pretrained", "finetune"]


@pytest.fixture(scope="module")
def finished_run(train_net_process, tmp_path_factory):
    """One run of the command line, as a user starts it: run directory, zoo, datasets root, what it printed."""
    base = tmp_path_factory.mktemp("run")
    settings = [*OVERRIDES, f"train.output_dir={base / 'run'}", f"train.publish.zoo={base / 'zoo'}"]
    config = "configs/quickstart/digit_scenes_det.py"
    outcome = train_net_process(*settings, config=config, datasets=base / "datasets")
    assert outcome.status == 0, outcome.err
    return base, settings, outcome


def entry_of(finished_run):
    return json.loads((finished_run[0] / "run" / "zoo_entry.json").read_text())


def test_the_run_prints_progress_metrics_and_how_to_load_the_entry(finished_run):
    _, _, outcome = finished_run
    for number, stage in enumerate(STAGES, start=1):
        assert f"stage {number} of 5: {stage}" in outcome.out
    assert "[pretrain 1/3] total_loss " in outcome.out and "% waiting for data  ETA 0:00:0" in outcome.out
    table = outcome.out[outcome.out.index("fine-tuned from") :].splitlines()
    assert {"AP50", "AP"} <= set(table[0].split())
    assert [line.split()[0] for line in table[2:4]] == ["pretrained", "bissl"]
    entry = entry_of(finished_run)
    for line in (f"published {entry['name']}", f"where {entry['location']}", f"sha256 {entry['sha256']}"):
        assert line in outcome.out
    assert f'bissl_zoo.create_backbone("{entry["name"]}", pretrained=True)' in outcome.out
    assert "Warning" not in outcome.err and "Traceback" not in outcome.err


def test_the_run_directory_records_what_was_run(finished_run):
    run = finished_run[0] / "run"
    asked = LazyConfig.apply_overrides(bissl_zoo.load_config("quickstart/digit_scenes_det.py"), finished_run[1])
    assert LazyConfig.load(run / "config.yaml") == asked
    environment = (run / "environment.txt").read_text()
    for fact in (f"torch: {torch.__version__}", f"timm: {timm.__version__}", "--config-file", "python: "):
        assert fact in environment
    assert list((run / "tensorboard").glob("events.out.tfevents.*"))
    for stage in STAGES:
        newest = max((run / "checkpoints" / stage).iterdir())
        info = json.loads((newest / "manifest.json").read_text())
        assert info["done"] and info["stage"] == stage and info["architecture"] == "resnet18"
    assert (run / "checkpoints" / "latest").read_text() == "finetune/step_000003\n"
    results = json.loads((run / "results.json").read_text())
    assert list(results) == ["pretrained", "bissl"]
    assert all(0.0 <= metrics["AP50"] <= 1.0 for metrics in results.values())
    left = {path.name for path in run.iterdir()}
    expected = {"config.yaml", "environment.txt", "metrics.jsonl", "tensorboard", "checkpoints", "results.json"}
    expected |= {"model", "model_pretrained"}
    assert left == expected | {"metadata.json", "zoo_entry.json", "log.txt", "per_class.json", "report.html"}


def test_every_metrics_line_parses_and_the_solver_is_in_them(finished_run):
    def refuse(constant):
        raise ValueError(constant)

    lines = (finished_run[0] / "run" / "metrics.jsonl").read_text().splitlines()
    lines = [json.loads(line, parse_constant=refuse) for line in lines]
    assert [line["stage"] for line in lines if line.get("event") == "stage_end"] == STAGES
    lines = [line for line in lines if "event" not in line]
    records = [line for line in lines if "upper_step" not in line]
    logged = [(record["stage"], record["step"]) for record in records]
    three, two = [2, 3], [2]
    steps = dict(zip(STAGES, (three, two, [1, 2], three, three), strict=True))  # every alternation
    assert logged == [(stage, step) for stage in STAGES for step in steps[stage]]
    bissl = next(record for record in reversed(records) if record["stage"] == "bissl")
    solver = {"residual", "products", "status", "damping", "v_norm", "x_norm", "cos_xv", "plain_norm", "cos_x_plain"}
    assert {f"solver/{name}" for name in solver} <= set(bissl)
    assert {"lower/total_loss", "lower/pull", "lower/lr", "upper/total_loss", "upper/lr"} <= set(bissl)
    upper_steps = [line for line in lines if "upper_step" in line]
    assert [(line["stage"], line["step"], line["upper_step"]) for line in upper_steps] == [
        ("bissl", alternation, upper_step) for alternation, upper_step in ((1, 1), (1, 2), (2, 3), (2, 4))
    ]
    assert all({f"solver/{name}" for name in solver} <= set(line) for line in upper_steps)
    assert upper_steps[-1]["solver/residual"] == bissl["solver/residual"]


def test_plain_timm_loads_the_entry_with_the_same_features(finished_run):
    base, entry = finished_run[0], entry_of(finished_run)
    ours = bissl_zoo.create_backbone(entry["name"], pretrained=True, zoo=base / "zoo")
    plain = timm.create_model(f"local-dir:{entry['location']}", pretrained=True).eval()
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(plain.forward_features(images), ours(images)["c5"])
    assert ours.state_dict().keys() == plain.state_dict().keys()


def test_the_entry_is_the_lower_backbone(finished_run):
    base, entry = finished_run[0], entry_of(finished_run)
    published = load_file(base / "zoo" / entry["name"] / "model.safetensors")
    state = load_checkpoint(base / "run" / "checkpoints" / "bissl" / "step_000002")[1]
    lower, upper = state["levels"]["lower"], state["levels"]["upper"]["backbone"]
    tail = {key[len("tail.") :]: value for key, value in lower["head"].items() if key.startswith("tail.")}
    assert published.keys() == lower["backbone"].keys() | tail.keys()
    for key, value in {**lower["backbone"], **tail}.items():
        assert torch.equal(published[key], value), key
    assert not torch.equal(upper["conv1.weight"], published["conv1.weight"])


def test_evaluating_the_run_again_gives_the_same_metrics(finished_run, train_net):
    base, settings, outcome = finished_run
    measured = json.loads((base / "run" / "results.json").read_text())["bissl"]
    before = sorted(base.rglob("*"))
    again = train_net("--eval-only", *settings, f"train.init={base / 'run'}", datasets=base / "datasets")
    assert again.status == 0, again.err
    header, _, row = (line.split() for line in again.out.splitlines() if line)
    assert dict(zip(header[2:], row[1:], strict=True)) == {name: f"{measured[name]:.4f}" for name in header[2:]}
    assert sorted(base.rglob("*")) == before


def test_resuming_the_finished_run_publishes_nothing_new(finished_run, train_net):
    base, settings, _ = finished_run
    entries = bissl_zoo.list_backbones(zoo=base / "zoo")
    results = (base / "run" / "results.json").read_text()
    again = train_net("--resume", *settings, datasets=base / "datasets")
    assert again.status == 0, again.err
    assert "is finished; there is nothing to resume" in again.out and "[finetune" not in again.out
    assert f"published {entry_of(finished_run)['name']}\n" in again.out
    assert bissl_zoo.list_backbones(zoo=base / "zoo") == entries
    assert (base / "run" / "results.json").read_text() == results
