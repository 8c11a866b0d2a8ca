import json

import pytest
import torch

from bissl_zoo.engine.checkpoint import Checkpointer, load_checkpoint, read_info, write_atomically
from bissl_zoo.errors import CheckpointError

STATE = {"step": 3, "levels": {"lower": {"weight": torch.arange(6.0).view(2, 3), "betas": (0.9, 0.999)}}}


def save(folder, step=3, keep=2, stage="bissl", total=10, state=STATE):
    return Checkpointer(folder, keep).save(stage, step, total, "resnet18", state)


def names(folder, stage="bissl"):
    return sorted(path.name for path in (folder / stage).iterdir())


def test_what_was_saved_comes_back(tmp_path):
    path = save(tmp_path)
    info, state = load_checkpoint(path)
    assert (info.stage, info.step, info.total_steps, info.done, info.architecture) == (
        "bissl",
        3,
        10,
        False,
        "resnet18",
    )
    assert torch.equal(state["levels"]["lower"]["weight"], STATE["levels"]["lower"]["weight"])
    assert state["levels"]["lower"]["betas"] == (0.9, 0.999)
    assert (tmp_path / "latest").read_text() == "bissl/step_000003\n"
    assert read_info(save(tmp_path, step=10)).done


def test_only_the_newest_are_kept_also_by_a_process_that_did_not_write_them(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step, keep=3)
    save(tmp_path, 1, stage="finetune")
    save(tmp_path, 4, keep=2)
    assert names(tmp_path) == ["step_000003", "step_000004"]
    assert names(tmp_path, "finetune") == ["step_000001"]


def test_the_newest_is_the_one_of_most_steps_beyond_a_million_too(tmp_path):
    for step in (999_999, 1_000_000, 10_000_000):
        save(tmp_path, step)
    assert Checkpointer(tmp_path).newest("bissl").name == "step_10000000"
    assert names(tmp_path) == ["step_1000000", "step_10000000"]


def test_a_step_saved_again_replaces_the_first(tmp_path):
    save(tmp_path)
    path = save(tmp_path, state={"step": 3, "levels": {}})
    assert load_checkpoint(path)[1] == {"step": 3, "levels": {}} and names(tmp_path) == ["step_000003"]


def test_a_draft_of_a_killed_process_is_no_checkpoint_and_goes_with_the_next_save(tmp_path):
    draft = tmp_path / "bissl" / ".step_000002-cafe"
    draft.mkdir(parents=True)
    (draft / "state.pt").write_bytes(b"half")
    assert Checkpointer(tmp_path).newest("bissl") is None
    save(tmp_path)
    assert names(tmp_path) == ["step_000003"]


def test_a_state_that_cannot_be_written_leaves_nothing_and_says_why(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="Could not write checkpoint .*file.*--resume"):
        save(tmp_path / "file")


@pytest.mark.parametrize("position", [0, -1, 400])
def test_a_changed_byte_is_found(tmp_path, position):
    path = save(tmp_path)
    content = bytearray((path / "state.pt").read_bytes())
    content[position] ^= 255
    (path / "state.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match="state.pt is damaged: sha256"):
        load_checkpoint(path)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format": 1}', '{"format": 1, "surprise": 2}'])
def test_a_damaged_description_names_the_file(tmp_path, text):
    path = save(tmp_path)
    (path / "state.json").write_text(text)
    with pytest.raises(CheckpointError, match="state.json cannot be read"):
        load_checkpoint(path)


def test_a_newer_format_is_refused(tmp_path):
    path = save(tmp_path)
    info = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps({**info, "format": 2}))
    with pytest.raises(CheckpointError, match="format 2; this version reads format 1"):
        load_checkpoint(path)


def test_a_state_file_that_is_missing_is_named(tmp_path):
    path = save(tmp_path)
    (path / "state.pt").unlink()
    with pytest.raises(CheckpointError, match="state.pt cannot be read"):
        load_checkpoint(path)


def test_an_atomic_write_that_fails_keeps_the_old_text(tmp_path):
    write_atomically(tmp_path / "latest", "old\n")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(tmp_path / "latest", "\udcff")
    assert (tmp_path / "latest").read_text() == "old\n"
    assert [path.name for path in tmp_path.iterdir()] == ["latest"]
