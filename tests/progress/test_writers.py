"""The writers of metrics: their names in a config, what each writes, and that none of them ends a run."""

import json
import sys

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from bissl_zoo.config import LazyConfig, load_config
from bissl_zoo.engine.checks import check_config
from bissl_zoo.engine.hooks import MetricsWriter
from bissl_zoo.engine.trainer import Trainer
from bissl_zoo.errors import ConfigError
from bissl_zoo.progress.writers import Record, open_writers


class Counter(Trainer):
    """A trainer whose steps hold a record of finer grain each."""

    record_key = "part"

    def run_step(self):
        self.records = [{"part": 2 * self.step + 1, "residual": 0.5, "status": "fine"}]
        return {"total_loss": 1.0 / (self.step + 1), "status": "fine"}

    def levels(self):
        return {}


def train(folder, *names, steps=2, start=0):
    trainer = Counter("stage", steps)
    trainer.step = start
    with open_writers(names, folder, 1, {"solver": {"iterations": 3}}) as writers:
        trainer.train([MetricsWriter(folder, 1, writers)])


def voc_det(writers, **options):
    return LazyConfig.apply_overrides(load_config("bissl/voc_det.py"), [f"train.writers={writers}", *options])


@pytest.mark.parametrize(
    ("writers", "message"),
    [
        ("[json,tensorbord]", "train.writers has 'tensorbord'. Did you mean 'tensorboard'? Writers: json, tensorboard"),
        ("[tensorboard]", "json cannot be left out"),
        ("json", "'train.writers' is a list"),
    ],
)
def test_invalid_writers_are_refused(writers, message):
    with pytest.raises(ConfigError) as error:
        check_config(voc_det(writers), "mine.py")
    assert message in str(error.value)


def test_a_missing_wandb_names_the_extra_before_the_run_starts(train_net, tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # which is how Python remembers that there is none
    folder = tmp_path / "run"
    message = train_net(*tiny(train__writers="[json,wandb]"), f"train.output_dir={folder}").message()
    assert 'pip install "bissl_zoo[wandb]"' in message and not folder.exists()


def test_json_alone_writes_one_file(tmp_path):
    train(tmp_path, "json")
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line.get("part"), line.get("total_loss")) for line in lines if "event" not in line] == [
        *((1, 1, None), (1, None, 1.0)),
        *((2, 3, None), (2, None, 0.5)),
    ]


def test_a_resumed_run_has_every_step_once_in_its_metrics_and_scalars_in_tensorboard(tmp_path):
    train(tmp_path, "json", "tensorboard", steps=3)
    train(tmp_path, "json", "tensorboard", steps=4, start=1)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "total_loss" in line] == [1, 2, 3, 4]
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert board.Tags()["scalars"] == ["stage/part/residual", "stage/total_loss"]
    assert [event.step for event in board.Scalars("stage/total_loss")] == [1, 2, 3, 2, 3, 4]
    assert [event.step for event in board.Scalars("stage/part/residual")][:3] == [1, 3, 5]


def test_a_tensorboard_file_that_cannot_be_written_is_a_warning_and_the_metrics_go_on(tmp_path, capsys):
    (tmp_path / "tensorboard").write_text("a file")
    train(tmp_path, "json", "tensorboard")
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("warning: TensorBoard") and "metrics.jsonl" in line
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 5


@pytest.fixture
def wandb(monkeypatch, tmp_path):
    """The library, working offline and with nothing of the user's."""
    library = pytest.importorskip("wandb", reason="wandb is an extra")
    for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "of_wandb"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    return library


@pytest.mark.slow
def test_wandb_has_the_config_and_the_metrics_and_a_resumed_run_is_the_same_one(wandb, tmp_path, capsys):
    folder = tmp_path / "run"
    folder.mkdir()
    runs = []
    for step in (1, 2):
        with open_writers(["json", "wandb"], folder, 1, {"solver": {"iterations": 3}}) as (_, writer):
            run = writer.target
            writer.write([Record("stage", step, {"loss": 0.5, "status": "fine"})], step)
            writer.write([Record("stage", step, {"part": 7, "residual": 0.25}, "part")], step)
            runs.append((run.id, run.name, run.project, dict(run.summary)))
            assert run.config["solver"] == {"iterations": 3}
    saved = (folder / "wandb" / "run_id").read_text().strip()
    assert [run[:3] for run in runs] == [(saved, "run", "bissl_zoo")] * 2
    metrics = {key: value for key, value in runs[1][3].items() if not key.startswith("_")}
    expected = {"stage/loss": 0.5, "stage/step": 2, "stage_part/residual": 0.25, "stage_part/number": 7}
    assert metrics == expected and capsys.readouterr().out.count(f"wandb: {folder}/wandb/offline-run-") == 2


@pytest.mark.slow
def test_a_wandb_that_fails_on_the_way_is_one_warning_and_the_run_goes_on(wandb, tmp_path, capsys):
    with open_writers(["json", "wandb"], tmp_path, 1) as writers:
        *_, writer = writers

        def refuse(metrics):
            raise ConnectionError("gone")

        run, writer.target.log = writer.target, refuse
        for step in (1, 2):
            writer.write([Record("stage", step, {"loss": 1.0})], step)
    run.finish()
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert len(warnings) == 1 and "ConnectionError: gone The run continues without it" in warnings[0]
