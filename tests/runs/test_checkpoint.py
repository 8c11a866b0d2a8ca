import json

import pytest
import torch

from bissl_zoo.errors import CheckpointError
from bissl_zoo.runs.checkpoint import FORMAT, Checkpointer, load_checkpoint, read_info, write_atomically

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
    (draft / "state.safetensors").write_bytes(b"half")
    assert Checkpointer(tmp_path).newest("bissl") is None
    save(tmp_path)
    assert names(tmp_path) == ["step_000003"]


def test_a_state_that_cannot_be_written_leaves_nothing_and_says_why(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="Could not write checkpoint .*file.*--resume"):
        save(tmp_path / "file")


def damage(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 255
    path.write_bytes(content)


@pytest.mark.parametrize("file", ["state.safetensors", "state.json"])
@pytest.mark.parametrize("position", [0, -1, 40])
def test_a_changed_byte_is_found(tmp_path, file, position):
    path = save(tmp_path)
    damage(path / file, position)
    with pytest.raises(CheckpointError, match=f"{file} is damaged: sha256"):
        load_checkpoint(path)


def test_of_several_checkpoints_the_newest_that_verifies_is_taken_and_damaged_ones_are_set_aside(tmp_path):
    for step in range(1, 6):
        save(tmp_path, step, keep=9)
    checkpoints = tmp_path / "bissl"
    damage(checkpoints / "step_000003" / "state.safetensors", -1)
    (checkpoints / "step_000004" / "state.json").write_text("{")
    (checkpoints / "step_000005" / "state.safetensors").unlink()
    path, damaged = Checkpointer(tmp_path).newest_intact("bissl")
    assert path == checkpoints / "step_000002"
    wrong = ["state.safetensors is missing", "state.json has 1 bytes instead of", "state.safetensors is damaged"]
    assert all(part in message and "kept as" in message for part, message in zip(wrong, damaged, strict=True))
    aside = [name for name in names(tmp_path) if name.startswith("damaged_")]
    assert len(aside) == 3 and [name[:19] for name in aside] == [f"damaged_step_00000{n}" for n in (3, 4, 5)]
    assert Checkpointer(tmp_path).newest_intact("bissl") == (path, [])
    save(tmp_path, 3, keep=1)
    assert names(tmp_path) == [*aside, "step_000003"]  # they do not count, and stay


def test_what_a_process_that_was_killed_had_no_time_to_drop_goes_at_the_resume(tmp_path):
    for step in (1, 2, 3):
        Checkpointer(tmp_path, keep=5).save("bissl", step, 3, "resnet18", {"step": step})
    newest, damaged = Checkpointer(tmp_path, keep=2).newest_intact("bissl")
    assert (newest.name, damaged) == ("step_000003", [])
    assert sorted(path.name for path in (tmp_path / "bissl").iterdir()) == ["step_000002", "step_000003"]


def test_milestones_and_the_best_by_a_metric_stay_also_after_a_restart(tmp_path):
    for step, value in enumerate((0.1, 0.5, 0.2, None, 0.3, 0.4, 0.45), start=1):
        metrics = {} if value is None else {"test/AP50": value}
        checkpointer = Checkpointer(tmp_path, keep=1, every=4, best="test/AP50")  # another process each time
        checkpointer.save("finetune", step, 10, "resnet18", STATE, metrics)
    assert names(tmp_path, "finetune") == ["step_000002", "step_000004", "step_000007"]


@pytest.mark.parametrize(
    "state",
    [
        {0: {"betas": (0.9, 0.999), "exp_avg": torch.ones(2)}, "0": [1, (2, [3, {}])], "none": None},
        {"infinite": float("inf"), "flag": True, "text": "µ", "empty": torch.empty(0), "number": torch.tensor(3)},
        {"$tensor": {"$tuple": torch.zeros(1)}, "nested": {1: {2: torch.arange(3)}}},
    ],
)
def test_any_nesting_of_tensors_and_plain_values_comes_back_as_it_was(tmp_path, state):
    def same(one, other):
        assert type(one) is type(other)
        if isinstance(one, torch.Tensor):
            assert one.dtype == other.dtype and torch.equal(one, other)
        elif isinstance(one, dict):
            assert list(one) == list(other)
            [same(one[key], other[key]) for key in one]
        elif isinstance(one, (list, tuple)):
            assert len(one) == len(other)
            [same(a, b) for a, b in zip(one, other, strict=True)]
        else:
            assert one == other

    same(load_checkpoint(save(tmp_path, state=state))[1], state)


def test_tensors_that_share_memory_or_are_views_come_back_whole(tmp_path):
    whole = torch.arange(12.0).view(3, 4)
    state = {"whole": whole, "again": whole, "column": whole[:, 1], "turned": whole.T}
    back = load_checkpoint(save(tmp_path, state=state))[1]
    assert all(torch.equal(back[name], tensor) for name, tensor in state.items())


def test_what_is_neither_tensor_nor_plain_value_is_refused_with_its_place(tmp_path):
    with pytest.raises(CheckpointError, match="'levels/1' is a set"):
        save(tmp_path, state={"levels": [0, {1, 2}]})


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format": 2}', '{"format": 2, "surprise": 2}'])
def test_a_damaged_description_names_the_file(tmp_path, text):
    path = save(tmp_path)
    (path / "manifest.json").write_text(text)
    with pytest.raises(CheckpointError, match="manifest.json cannot be read"):
        load_checkpoint(path)


def test_a_newer_format_is_refused(tmp_path):
    path = save(tmp_path)
    info = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**info, "format": FORMAT + 1}))
    with pytest.raises(CheckpointError, match=f"format {FORMAT + 1}; this version reads format {FORMAT}"):
        load_checkpoint(path)


def test_a_state_file_that_is_missing_is_named(tmp_path):
    path = save(tmp_path)
    (path / "state.safetensors").unlink()
    with pytest.raises(CheckpointError, match="state.safetensors is missing"):
        load_checkpoint(path)


def test_an_atomic_write_that_fails_keeps_the_old_text(tmp_path):
    write_atomically(tmp_path / "latest", "old\n")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(tmp_path / "latest", "\udcff")
    assert (tmp_path / "latest").read_text() == "old\n"
    assert [path.name for path in tmp_path.iterdir()] == ["latest"]
