import hashlib
import json
import os
import shutil

import pytest
import torch
from safetensors.torch import save_file

from bissl_zoo.engine.init import weights_of
from bissl_zoo.errors import CheckpointError
from bissl_zoo.runs.checkpoint import Checkpointer, load_checkpoint, read_info

STATE = {
    "step": 3,
    "levels": {"level": {"backbone": {"w": torch.arange(6.0).view(2, 3)}, "head": {"b": torch.ones(1)}}},
}
OLD_FILES = ("state.json", "state.safetensors")


def save(folder, step=3, keep=2, stage="finetune", total=10, state=STATE, **settings):
    return Checkpointer(folder, keep, **settings).save(stage, step, total, "resnet18", state)


def names(folder, stage="finetune"):
    return sorted(path.name for path in (folder / stage).iterdir())


def edit(path, **changes):
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | changes))


def describe(*files):
    """The entries of a manifest for these files."""
    content = {file.name: file.read_bytes() for file in files}
    return {name: {"size": len(c), "sha256": hashlib.sha256(c).hexdigest()} for name, c in content.items()}


def vouch(path, content):
    """Replace the state, and its digest in the manifest."""
    (path / "state.pt").write_bytes(content)
    edit(path, files=describe(path / "state.pt"))


def flip(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def same(one, other):
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and torch.equal(one, other)
    elif isinstance(one, dict):
        assert list(one) == list(other)
        [same(one[key], other[key]) for key in one]
    elif isinstance(one, (list, tuple)):
        [same(a, b) for a, b in zip(one, other, strict=True)]
    else:
        assert one == other


def test_the_state_and_its_manifest_are_read_back(tmp_path):
    path = save(tmp_path)
    info, state = load_checkpoint(path)
    same(state, STATE)
    assert (info.stage, info.step, info.total_steps, info.done, info.architecture) == (
        *("finetune", 3, 10, False),
        "resnet18",
    )
    assert (tmp_path / "latest").read_text() == "finetune/step_000003\n"
    assert read_info(save(tmp_path, step=10)).done


@pytest.mark.parametrize(
    "state",
    [
        {0: {"betas": (0.9, 0.999), "exp_avg": torch.ones(2)}, "0": [1, (2, [3, {}])], "none": None},
        {"infinite": float("inf"), "flag": True, "text": "µ", "empty": torch.empty(0), "number": torch.tensor(3)},
        {"$tensor": {"$tuple": torch.zeros(1)}, "half": torch.ones(2, dtype=torch.bfloat16), "big": 1 << 70},
    ],
)
def test_nested_tensors_and_plain_values_are_read_back_as_they_were(tmp_path, state):
    same(load_checkpoint(save(tmp_path, state=state))[1], state)


def test_views_and_shared_tensors_are_read_back_whole_and_take_no_more_room(tmp_path):
    whole = torch.arange(40_000.0).view(200, 200)
    state = {"again": whole, "column": whole[:, 1], "transposed": whole.T, "parameter": torch.nn.Parameter(whole)}
    path = save(tmp_path, state=state)
    loaded = load_checkpoint(path)[1]
    assert all(type(loaded[k]) is torch.Tensor and torch.equal(loaded[k], v) for k, v in state.items())
    size = (path / "state.pt").stat().st_size
    assert size < sum(v.nbytes for v in state.values()) + 4000


def test_equal_states_make_equal_files(tmp_path):
    loaded = load_checkpoint(save(tmp_path / "a"))[1]
    again = {"".join(["st", "ep"]): 3, "levels": loaded["levels"]}
    assert read_info(save(tmp_path / "a")).sha256 == read_info(save(tmp_path / "b", state=again)).sha256


def test_other_types_are_refused_with_their_place_before_anything_is_written(tmp_path):
    with pytest.raises(CheckpointError, match="'levels/1' is a set"):
        save(tmp_path, state={"levels": [0, {1, 2}]})
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_of_format_2_is_still_read(tmp_path):
    path = save(tmp_path)
    (path / "state.pt").unlink()
    save_file({"levels/w": torch.ones(2)}, path / "state.safetensors")
    plain = {"step": 3, "w": {"$tensor": "levels/w"}, "t": {"$tuple": [1, 2]}, "d": {"$dict": [[0, {"a": 1}]]}}
    (path / "state.json").write_text(json.dumps(plain))
    edit(path, format=2, files=describe(*(path / name for name in OLD_FILES)))
    same(load_checkpoint(path)[1], {"step": 3, "w": torch.ones(2), "t": (1, 2), "d": {0: {"a": 1}}})
    flip(path / "state.safetensors", -1)
    with pytest.raises(CheckpointError, match="state.safetensors is damaged: sha256"):
        load_checkpoint(path)


@pytest.mark.parametrize("number", [1, "x" * 5000])
def test_another_format_is_refused_with_its_number(tmp_path, number):
    path = save(tmp_path)
    edit(path, format=number)
    with pytest.raises(CheckpointError, match="has format .{1,60}this version reads 2 and 3"):
        load_checkpoint(path)


@pytest.mark.parametrize("position", [0, -1, 40])
def test_a_flipped_bit_is_found(tmp_path, position):
    path = save(tmp_path)
    flip(path / "state.pt", position)
    with pytest.raises(CheckpointError, match="state.pt is damaged: sha256"):
        load_checkpoint(path)


def test_only_the_newest_are_kept_also_by_another_process(tmp_path):
    for step in (999_999, 1_000_000, 10_000_000):
        save(tmp_path, step, keep=3)
    save(tmp_path, 1, stage="bissl")
    save(tmp_path, 10_000_001, keep=2)
    assert names(tmp_path) == ["step_10000000", "step_10000001"] and names(tmp_path, "bissl") == ["step_000001"]
    assert Checkpointer(tmp_path).newest_step("finetune") == 10_000_001


def test_milestones_are_kept_also_after_a_restart(tmp_path):
    for step in range(1, 8):
        save(tmp_path, step, keep=1, every=3)  # as in another process each time
    assert names(tmp_path) == ["step_000003", "step_000006", "step_000007"]


def test_leftovers_of_a_killed_process_are_ignored_and_removed(tmp_path):
    draft = tmp_path / "finetune" / ".step_000002-cafe"
    draft.mkdir(parents=True)
    (draft / "state.pt").write_bytes(b"half")
    assert Checkpointer(tmp_path).newest("finetune") is None
    for step in (1, 2, 3):
        save(tmp_path, step, keep=5)
    newest, damaged = Checkpointer(tmp_path, keep=2).newest_intact("finetune")
    assert (newest.name, damaged, names(tmp_path)) == ("step_000003", [], ["step_000002", "step_000003"])


def test_a_failed_write_leaves_nothing_and_names_the_reason(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="Could not write checkpoint .*file.*--resume"):
        save(tmp_path / "file")


def test_the_newest_checkpoint_that_verifies_is_used_and_damaged_ones_are_set_aside(tmp_path):
    first, second, *damaged_paths = (save(tmp_path, step, keep=9) for step in range(1, 6))
    flip(damaged_paths[0] / "state.pt", -1)
    (damaged_paths[1] / "state.pt").write_text("{")
    (damaged_paths[2] / "state.pt").unlink()
    path, damaged = Checkpointer(tmp_path).newest_intact("finetune")
    assert path == second
    expected = ["state.pt is missing", "state.pt has 1 bytes instead of", "state.pt is damaged"]
    assert all(part in message and "kept as" in message for part, message in zip(expected, damaged, strict=True))
    aside = [name for name in names(tmp_path) if name.startswith("damaged_")]
    assert [name[:19] for name in aside] == [f"damaged_step_00000{n}" for n in (3, 4, 5)]
    assert Checkpointer(tmp_path).newest_intact("finetune") == (path, [])
    save(tmp_path, 3, keep=1)
    assert names(tmp_path) == [*aside, "step_000003"]  # they do not count, and are kept


@pytest.mark.parametrize("text", ["", "[]", '{"format": 3}', '{"format": 3, "extra": 2}', "[" * 100_000])
def test_a_damaged_manifest_is_named(tmp_path, text):
    path = save(tmp_path)
    (path / "manifest.json").write_text(text)
    with pytest.raises(CheckpointError, match="manifest.json cannot be read"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    "changes",
    [
        {"step": "3"},
        {"metrics": [0.5]},
        {"metrics": {"test/AP50": "high"}},
        {"files": ["state.pt"]},
        {"files": {"state.pt": {}}},
        {"files": {}},
    ],
)
def test_a_manifest_with_wrong_types_is_one_short_error(tmp_path, changes):
    path = save(tmp_path)
    edit(path, **changes)
    with pytest.raises(CheckpointError, match="manifest.json cannot be read") as error:
        read_info(path)
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize("name", ["../../outside", "/etc/hostname", "a\0b", "x" * 5000, ""])
def test_a_manifest_cannot_name_files_outside_its_folder(tmp_path, name):
    path = save(tmp_path)
    files = json.loads((path / "manifest.json").read_text())["files"]
    for named in ({**files, name: files["state.pt"]}, {name: files["state.pt"]}):
        edit(path, files=named)
        with pytest.raises(CheckpointError, match=r"manifest\.json cannot be read"):
            load_checkpoint(path)


def test_a_manifest_that_is_too_large_or_would_block_is_refused(tmp_path):
    path = save(tmp_path) / "manifest.json"
    os.truncate(path, 100 << 20)
    with pytest.raises(CheckpointError, match="more than 1,048,576 bytes"):
        read_info(path.parent)
    path.unlink()
    os.mkfifo(path)  # opening it would block
    with pytest.raises(CheckpointError, match="not a regular file"):
        read_info(path.parent)


class Evil:
    def __reduce__(self):
        return os.mkdir, ("/tmp/unpickled_by_a_checkpoint",)


@pytest.mark.parametrize("content", [b"", b"\x80\x04N.", b"PK\x03\x04" + bytes(90), "code", "list", "cut"])
def test_a_state_with_a_valid_digest_but_other_content_is_one_error_and_runs_no_code(tmp_path, content):
    path = save(tmp_path)
    if content == "cut":
        content = (path / "state.pt").read_bytes()[:-100]
    elif isinstance(content, str):
        torch.save(Evil() if content == "code" else [1], tmp_path / "other.pt")
        content = (tmp_path / "other.pt").read_bytes()
    vouch(path, content)
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_checkpoint(path)
    assert not os.path.exists("/tmp/unpickled_by_a_checkpoint")


@pytest.mark.parametrize("levels", [3, {"level": []}, {"level": {"backbone": {}, "head": {"b": 3}}}])
def test_a_state_without_weights_hands_none_on(tmp_path, levels):
    path = save(tmp_path, state={"step": 3, "levels": levels})
    for stage in ("finetune", "bissl"):
        with pytest.raises(CheckpointError, match=f"holds no weights of the stage {stage}"):
            weights_of(stage, load_checkpoint(path)[1])


def test_a_folder_that_only_looks_like_a_checkpoint_is_not_touched(tmp_path):
    path = save(tmp_path)
    copies = [path.with_name(name) for name in ("step_000009 (copy)", "step_", "step_latest")]
    for copy in copies:
        shutil.copytree(path, copy)
    assert Checkpointer(tmp_path, keep=1).newest_intact("finetune") == (path, [])
    save(tmp_path, 4, keep=1)
    assert all((copy / "state.pt").exists() for copy in copies)


def test_a_linked_checkpoint_is_read_and_only_its_link_is_removed(tmp_path):
    path, elsewhere = save(tmp_path), tmp_path / "scratch" / "step"
    elsewhere.parent.mkdir()
    shutil.move(path, elsewhere)
    path.symlink_to(elsewhere)
    assert load_checkpoint(path)[1]["step"] == 3
    save(tmp_path, 4, keep=1)
    assert not path.exists() and sorted(file.name for file in elsewhere.iterdir()) == ["manifest.json", "state.pt"]
