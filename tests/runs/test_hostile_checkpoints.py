"""Run directories that lie: whatever a checkpoint or a metrics file holds, the outcome is data or one error."""

import hashlib
import json
import os
import shutil

import pytest
import torch

from bissl_zoo.engine.init import weights_of
from bissl_zoo.errors import CheckpointError
from bissl_zoo.progress.log_files import drop_lines_after
from bissl_zoo.runs.checkpoint import Checkpointer, load_checkpoint, read_info

STATE = {"step": 3, "levels": {"level": {"backbone": {"w": torch.zeros(2)}, "head": {"b": torch.zeros(1)}}}}


@pytest.fixture
def checkpoint(tmp_path):
    return Checkpointer(tmp_path / "run").save("finetune", 3, 10, "resnet18", STATE, {"test/AP50": 0.5})


def edit(checkpoint, **changes):
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    (checkpoint / "manifest.json").write_text(json.dumps(manifest | changes))


def vouch(checkpoint, file, content):
    """Replace a file, with the digest that makes it the one that was written."""
    (checkpoint / file).write_bytes(content)
    files = json.loads((checkpoint / "manifest.json").read_text())["files"]
    edit(checkpoint, files=files | {file: {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}})


@pytest.mark.parametrize(
    "name", ["../../outside", "/etc/hostname", "a/b", "a\0b", "\ud800", "x" * 5000, "", "..", "another.json"]
)
def test_a_manifest_names_the_files_of_its_folder_and_no_others(checkpoint, tmp_path, name):
    files = json.loads((checkpoint / "manifest.json").read_text())["files"]
    (tmp_path / "outside").write_bytes((checkpoint / "state.json").read_bytes())
    for named in ({**files, name: files["state.json"]}, {name: files["state.json"]}, {}, files | {"state.json": {}}):
        edit(checkpoint, files=named)
        with pytest.raises(CheckpointError, match=r"manifest\.json cannot be read"):
            load_checkpoint(checkpoint)


@pytest.mark.parametrize(
    "changes",
    [
        {"stage": 1},
        {"step": "3"},
        {"total_steps": None},
        {"done": "yes"},
        {"architecture": ["resnet18"]},
        {"metrics": [0.5]},
        {"metrics": {"test/AP50": "high"}},
        {"files": ["state.json"]},
        {"format": "x" * 5000},
    ],
)
def test_a_manifest_of_other_kinds_is_one_short_error(checkpoint, changes):
    edit(checkpoint, **changes)
    with pytest.raises(CheckpointError) as caught:
        read_info(checkpoint)
    assert len(str(caught.value)) < 1000


def test_a_manifest_without_end_in_depth_or_length_is_refused(checkpoint, tmp_path):
    path = checkpoint / "manifest.json"
    path.write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_info(checkpoint)
    with open(path, "r+b") as file:
        file.truncate(100 << 20)
    with pytest.raises(CheckpointError, match="more than 1,048,576 bytes"):
        read_info(checkpoint)
    path.unlink()
    os.mkfifo(path)  # to open it would be to wait for ever
    with pytest.raises(CheckpointError, match="no file"):
        read_info(checkpoint)


def header(claimed):
    return claimed.to_bytes(8, "little") + b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}' + b"\0" * 8


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("state.safetensors", header(10 << 30)),
        ("state.safetensors", header((1 << 64) - 1)),
        ("state.safetensors", b""),
        ("state.safetensors", b"\x80\x04N."),
        ("state.json", b"[" * 100_000),
        ("state.json", b"3"),
        ("state.json", b"[]"),
        ("state.json", b'{"step": {"$tensor": "nowhere"}}'),
        ("state.json", b'{"step": {"$tensor": []}}'),
        ("state.json", b'{"step": {"$tuple": 1}}'),
        ("state.json", b'{"step": {"$dict": [[[], 1]]}}'),
        ("state.json", b'{"step": ' + b"9" * 5000 + b"}"),
        ("state.json", b"\xff"),
    ],
)
def test_a_state_that_lies_is_one_error_also_where_the_manifest_vouches_for_it(checkpoint, file, content):
    vouch(checkpoint, file, content)
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_checkpoint(checkpoint)


def test_a_folder_that_only_looks_like_a_checkpoint_is_left_alone(checkpoint):
    for name in ("step_000009 (copy)", "step_", "step_latest"):
        shutil.copytree(checkpoint, checkpoint.with_name(name))
    checkpoints = Checkpointer(checkpoint.parents[1], keep=1)
    assert checkpoints.newest_intact("finetune") == (checkpoint, [])
    checkpoints.save("finetune", 4, 10, "resnet18", STATE)
    assert {path.name for path in checkpoint.parent.iterdir()} >= {"step_000004", "step_000009 (copy)", "step_latest"}


def test_links_in_a_checkpoint_are_read_but_what_they_lead_to_is_never_removed(checkpoint, tmp_path):
    aside = tmp_path / "scratch" / "step"
    aside.parent.mkdir()
    shutil.move(checkpoint, aside)
    checkpoint.symlink_to(aside)
    assert load_checkpoint(checkpoint)[1]["step"] == 3
    Checkpointer(checkpoint.parents[1], keep=1).save("finetune", 4, 10, "resnet18", STATE)
    assert not checkpoint.exists() and sorted(path.name for path in aside.iterdir()) == [
        "manifest.json",
        "state.json",
        "state.safetensors",
    ]


@pytest.mark.parametrize(
    "line", [b"[" * 100_000, b'{"stage": "bissl", "step": "2"}', b'{"stage": "bissl", "step": [2]}', b"\xff\xfe", b"3"]
)
def test_of_metrics_what_precedes_a_line_of_another_kind_stays(tmp_path, line):
    path, first = tmp_path / "metrics.jsonl", b'{"stage": "bissl", "step": 1}\n'
    path.write_bytes(first + line + b"\n" + first)
    drop_lines_after(path, "bissl", 5)
    assert path.read_bytes() == first


@pytest.mark.parametrize("levels", [3, {}, {"level": []}, {"level": {"backbone": {}, "head": {"b": 3}}}])
def test_a_state_without_weights_hands_none_on(checkpoint, levels):
    vouch(checkpoint, "state.json", json.dumps({"step": 3, "levels": levels}).encode())
    for stage in ("finetune", "bissl"):
        with pytest.raises(CheckpointError, match=f"holds no weights of the stage {stage}"):
            weights_of(stage, load_checkpoint(checkpoint)[1])
