"""The run directory: the checks before a run, what a resumed run may change, and the metadata."""

import json
import os

import pytest
import torch

from bissl_zoo.config import LazyConfig, load_config
from bissl_zoo.engine.checks import open_config
from bissl_zoo.errors import CheckpointError, ConfigError
from bissl_zoo.runs import directory
from bissl_zoo.runs.directory import add_wall_time, check_run_dir, prepare_run_dir, read_metadata

METADATA = {
    "stages": {"pretrain": 10},
    "datasets": {"train": {"name": "a", "samples": 3}},
    "ancestors": [{"name": "a@1", "sha256": "0" * 64}],
    "hardware": "CPU",
    "wall_time_s": 1.5,
}
#: keys that were added after the first runs
NEW_KEYS = (
    "train.amp train.deterministic train.on_nonfinite train.max_skipped train.probe train.checkpoint.every "
    "train.lock pretrain.accumulate train.channels_last pretrain.compile "
    "bilevel.on_bad_hypergradient"
).split()


@pytest.fixture
def cfg(tmp_path, monkeypatch, request):
    """A config for the directory `a`: `cfg("train.seed=1")`."""
    if "slow" not in request.keywords:  # it asks git for the revision
        monkeypatch.setattr(directory, "describe_environment", lambda: "")

    base = load_config("bissl/voc_det.py")
    return lambda *overrides: LazyConfig.apply_overrides(base, [f"train.output_dir={tmp_path / 'a'}", *overrides])


@pytest.mark.slow
def test_a_new_directory_holds_the_config_and_the_environment(cfg, tmp_path):
    folder = prepare_run_dir(cfg(), resume=False)
    assert folder == tmp_path / "a" and LazyConfig.load(folder / "config.yaml") == cfg()
    assert f"torch: {torch.__version__}" in (folder / "environment.txt").read_text()
    assert sorted(path.name for path in folder.iterdir()) == ["config.yaml", "environment.txt"]


def test_a_directory_that_is_not_empty_or_a_file_is_refused(cfg, tmp_path):
    with pytest.raises(ConfigError, match="no run to resume"):
        check_run_dir(cfg(), resume=True)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "run.lock").touch()
    check_run_dir(cfg(), resume=False)
    (tmp_path / "a" / "notes.txt").touch()
    with pytest.raises(ConfigError, match="not empty.*--resume"):
        check_run_dir(cfg(), resume=False)
    with pytest.raises(ConfigError, match="is a file"):
        check_run_dir(cfg(f"train.output_dir={tmp_path / 'a' / 'notes.txt'}"), resume=False)


def test_a_resumed_run_may_change_only_where_and_how_it_runs_and_become_longer(cfg):
    prepare_run_dir(cfg(), resume=False)
    free = ["train.device=cpu", "train.log_period=3", "train.checkpoint.keep=5", "dataloader.train.num_workers=0"]
    free += ["train.lock=false", "bilevel.hvp_mode=recompute", "bilevel.alternations=501", "train.publish.name=x"]
    prepare_run_dir(cfg(*free), resume=True)
    for bound in ("train.seed=1", "train.init=x", "task.min_size=3", "optimizer.upper.lr=0.1", "train.amp=bf16"):
        with pytest.raises(ConfigError, match=f"\n{bound.split('=')[0]} +.* +{bound.split('=')[1]}\n"):
            check_run_dir(cfg(*free, bound), resume=True)
    with pytest.raises(ConfigError, match="bilevel.alternations +501 +500"):
        check_run_dir(cfg(), resume=True)


def test_a_run_from_before_some_keys_continues_with_their_defaults(cfg, tmp_path):
    prepare_run_dir(cfg(), resume=False)
    saved = tmp_path / "a" / "config.yaml"
    LazyConfig.save(LazyConfig.apply_overrides(cfg(), [f"~{key}" for key in NEW_KEYS]), saved)
    assert open_config(str(saved)) == cfg()
    with pytest.raises(ConfigError, match="train.amp +null +bf16"):
        prepare_run_dir(open_config(str(saved), ["train.amp=bf16"]), resume=True)
    prepare_run_dir(open_config(str(saved), ["train.probe.period=5", "train.on_nonfinite=skip"]), resume=True)


@pytest.mark.parametrize("name", ["metadata.json", "facts.json"])
def test_metadata_also_of_old_runs_are_read_and_count_the_time_of_every_process(tmp_path, name):
    assert read_metadata(tmp_path) == {}
    (tmp_path / name).write_text(json.dumps(METADATA))
    assert read_metadata(tmp_path) == METADATA
    add_wall_time(tmp_path, 2.25)
    add_wall_time(tmp_path, 1.0)
    metadata = read_metadata(tmp_path)
    assert metadata.pop("peak_memory_mib") > 100  # of this process, which has imported torch
    assert metadata == METADATA | {"wall_time_s": 4.8}


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"{", "cannot be read"),
        (b"[" * 100_000, "cannot be read"),
        (b'{"hardware": "\\ud800"}', "cannot be read"),
        (b"[]", "it holds list, not an object"),
        ({"datasets": {"train": "a"}}, "invalid 'datasets'"),
        ({"ancestors": [{"name": "a"}]}, "invalid 'ancestors'"),
        ({"stages": {"pretrain": "10"}}, "invalid 'stages'"),
        ({"hardware": 3}, "invalid 'hardware'"),
        ({"wall_time_s": True}, "invalid 'wall_time_s'"),
        ({"wall_time_s": float("nan")}, "invalid 'wall_time_s'"),
    ],
)
def test_damaged_metadata_is_one_error(tmp_path, content, problem):
    path = tmp_path / "metadata.json"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(METADATA | content).encode())
    with pytest.raises(CheckpointError, match=f"metadata.json .*{problem}.*Restore the file from a copy"):
        read_metadata(tmp_path)


def test_metadata_that_is_too_large_or_not_a_file_is_not_read(tmp_path):
    path = tmp_path / "metadata.json"
    path.touch()
    os.truncate(path, 100 << 20)
    with pytest.raises(CheckpointError, match=r"more than [\d,]+ bytes"):
        read_metadata(tmp_path)
    path.unlink()
    path.mkdir()
    with pytest.raises(CheckpointError, match="not a regular file"):
        read_metadata(tmp_path)
