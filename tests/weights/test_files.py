"""Reading files: hostile and damaged checkpoints are one error and nothing in them is run; backbones keep metadata."""

import argparse
import collections
import json
import os
import pickle
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from hostile_input import time_limit
from safetensors.torch import save_file
from tiny_entries import publish_tiny, replace_file

from bissl_zoo.errors import ZooError
from bissl_zoo.weights.files import StoredBackbone, named_tensors, read_file, read_stated, save_backbone
from bissl_zoo.weights.load import read_weights
from bissl_zoo.zoo import read_entry


class Calls:
    """An object that calls a function when it is unpickled."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def pickled(tmp_path, content, protocol=2):
    path = tmp_path / "model.pkl"
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    return path


#: by the last part of the global; older protocols have the module names of Python 2
HOSTILE = {
    "system": lambda mark: Calls(os.system, f"touch {mark}"),
    "eval": lambda mark: Calls(eval, f"open({str(mark)!r}, 'w')"),
    "getattr": lambda mark: Calls(getattr, {}, "clear"),
    "load": lambda mark: Calls(np.load, str(mark)),
    "SimpleNamespace": lambda mark: types.SimpleNamespace(a=1),
    "Counter": lambda mark: collections.Counter("ab"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_pickle_with_other_globals_is_refused_by_their_name(tmp_path, name):
    mark = tmp_path / "ran"
    for protocol in (0, 2, 4):
        path = pickled(tmp_path, {"model": {"conv1.weight": np.zeros(3)}, "x": HOSTILE[name](mark)}, protocol)
        with pytest.raises(ZooError, match=rf"contains the global \w+\.{name}, which could run code"):
            read_file(path)
    assert not mark.exists()


@pytest.mark.parametrize(
    "allowed", [b"c_codecs\nencode\n", b"cnumpy\nndarray\n", b"cnumpy\ndtype\n", b"ccollections\nOrderedDict\n"]
)
@pytest.mark.parametrize("slots", [False, True])
def test_a_pickle_cannot_change_the_unpickler(tmp_path, allowed, slots):
    state = {"__defaults__": ("latin-1", "latin-1"), "marked": 1}
    state = pickle.dumps((None, state) if slots else state, protocol=2)[2:-1]
    (tmp_path / "model.pkl").write_bytes(b"\x80\x02" + allowed + state + b"b.")
    with pytest.raises(ZooError, match="contains a change|is not a pickle of arrays"):
        read_file(tmp_path / "model.pkl")
    array = np.arange(3.0)
    assert read_file(pickled(tmp_path, {"w": array}))["w"].tolist() == [0, 1, 2]


def test_a_name_below_an_allowed_module_is_refused(tmp_path):
    path = tmp_path / "model.pkl"
    # a dotted path in protocol 4
    path.write_bytes(b"\x80\x04\x8c\x0bcollections\x8c\x1cOrderedDict.__init__.__doc__\x93.")
    with pytest.raises(ZooError, match="the global collections.OrderedDict.__init__"):
        read_file(path)


def test_lists_that_share_lists_or_contain_themselves_are_read_once(tmp_path):
    shared = [np.zeros(3)]
    for _ in range(40):
        shared = [shared, shared]  # 2^40 paths
    shared.append(shared)
    with time_limit(10):
        (tensor,) = named_tensors(read_file(pickled(tmp_path, {"model": shared}))).values()
    assert tensor.tolist() == [0, 0, 0]


def test_changed_bytes_never_raise_anything_but_our_error(tmp_path):
    rng = np.random.default_rng(0)
    whole = pickle.dumps({"model": {"w": np.zeros((2, 3), np.float32), "b": np.ones(4)}, "n": [1, "a"]}, protocol=2)
    outcomes = set()
    for _ in range(150):
        data = bytearray(whole)
        for position in rng.integers(2, len(data), size=rng.integers(1, 4)):
            data[position] = rng.integers(0, 256)
        (tmp_path / "model.pkl").write_bytes(bytes(data))
        try:
            read_file(tmp_path / "model.pkl")
            outcomes.add("read")
        except ZooError:
            outcomes.add("refused")
    assert outcomes == {"read", "refused"}


@pytest.mark.parametrize(
    "array", [np.array([None, {}], dtype=object), np.array(["a", "bc"]), np.zeros(2, dtype=[("a", "f4"), ("b", "i8")])]
)
@pytest.mark.parametrize("protocol", [2, 5])
def test_arrays_that_are_not_numeric_are_refused(tmp_path, array, protocol):
    with pytest.raises(ZooError, match="not numeric"):
        read_file(pickled(tmp_path, {"model": array}, protocol))


@pytest.mark.parametrize("core", ["numpy.core.multiarray", "numpy._core.multiarray"])
@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_arrays_of_any_numpy_and_protocol_keep_their_values(tmp_path, core, protocol):
    rng = np.random.default_rng(0)
    arrays = {
        "c": rng.normal(size=(3, 4)).astype(np.float32),
        "fortran": np.asfortranarray(rng.normal(size=(2, 5))),
        "big endian": rng.normal(size=4).astype(">f8"),
        "empty": np.zeros((0, 3), np.int64),
        "scalar array": np.array(7, np.int64),
        "bool": np.array([True, False]),
        "strided": rng.integers(0, 9, size=(4, 6))[::2, ::3],
    }
    data = pickle.dumps({"model": arrays, "number": np.float64(0.25), "set": {1, 2}}, protocol=protocol)
    ours = b"numpy._core.multiarray"
    if core.encode() != ours and protocol < 4:  # above, names carry their length
        data = data.replace(ours, core.encode())
    (tmp_path / "model.pkl").write_bytes(data)
    content = read_file(tmp_path / "model.pkl")
    assert content["number"] == 0.25 and content["set"] == {1, 2}
    for name, array in arrays.items():
        np.testing.assert_array_equal(content["model"][name].numpy(), array)


def test_a_pickle_written_by_python_2_is_read(tmp_path):
    # what Python 2.7 with numpy 1.16 writes for {"w": numpy.array([1.0, -2.5], "<f4")}: str where Python 3 has bytes
    raw = np.array([1.0, -2.5], "<f4").tobytes()
    data = (
        b"\x80\x02}q\x01U\x01wq\x02cnumpy.core.multiarray\n_reconstruct\nq\x03cnumpy\nndarray\nq\x04K\x00\x85q\x05"
        b"U\x01bq\x06\x87q\x07Rq\x08(K\x01K\x02\x85q\tcnumpy\ndtype\nq\nU\x02f4q\x0bK\x00K\x01\x87q\x0cRq\r"
        b"(K\x03U\x01<q\x0eNNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tq\x0fb\x89U\x08" + raw + b"q\x10tq\x11bs."
    )
    (tmp_path / "model.pkl").write_bytes(data)
    assert read_file(tmp_path / "model.pkl")["w"].tolist() == [1.0, -2.5]


def test_an_array_whose_bytes_do_not_fill_its_shape_is_refused(tmp_path):
    data = pickle.dumps({"w": np.zeros(2, np.float32)}, protocol=2)
    assert data.count(b"K\x02\x85") == 1  # the shape (2,)
    (tmp_path / "model.pkl").write_bytes(data.replace(b"K\x02\x85", b"K\x09\x85"))
    with pytest.raises(ZooError, match="is not a pickle of arrays"):
        read_file(tmp_path / "model.pkl")


def test_a_torch_file_with_objects_is_refused_and_read_without_them(tmp_path):
    path = tmp_path / "checkpoint.pth"
    arguments = argparse.Namespace(lr=0.1, output=Path("/tmp"))
    for zipped in (True, False):  # False: the old format
        content = {"teacher": {"conv1.weight": torch.ones(2)}, "args": arguments}
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
        with pytest.raises(ZooError, match=r"could run code: argparse.Namespace.*skip_objects=True"):
            read_file(path)
        assert named_tensors(read_file(path, skip_objects=True))["teacher.conv1.weight"].tolist() == [1, 1]


def test_skipping_objects_runs_none_of_them(tmp_path):
    mark, path = tmp_path / "ran", tmp_path / "checkpoint.pth"
    torch.save({"model": {"w": torch.ones(2)}, "x": Calls(subprocess.call, ["touch", str(mark)])}, path)
    with pytest.raises(ZooError, match=r"(subprocess|commands)\.call"):
        read_file(path)
    assert named_tensors(read_file(path, skip_objects=True)).keys() == {"model.w"}
    assert not mark.exists()


def test_a_file_with_a_blocked_module_is_always_refused(tmp_path):
    mark, path = tmp_path / "ran", tmp_path / "checkpoint.pth"
    torch.save({"model": {"w": torch.ones(2)}, "x": Calls(os.system, f"touch {mark}")}, path)
    for skip, message in ((False, "posix.system. Leave them out"), (True, "module posix is blocked")):
        with pytest.raises(ZooError, match=message):
            read_file(path, skip_objects=skip)
    assert not mark.exists()


def test_a_file_of_torch_save_is_recognised_under_the_name_pkl(tmp_path):
    torch.save({"model": {"w": torch.ones(2)}}, tmp_path / "model.pkl")
    assert named_tensors(read_file(tmp_path / "model.pkl")).keys() == {"model.w"}


def test_training_state_is_not_among_the_tensors():
    content = {
        "state_dict": {"w": torch.ones(1), "optimizer_like": torch.ones(1)},
        "optimizer": {"state": {0: {"momentum_buffer": torch.ones(1)}}},
        "optimizer_states": [torch.ones(1)],
        "lr_schedulers": [{"x": torch.ones(1)}],
    }
    assert named_tensors(content).keys() == {"state_dict.w", "state_dict.optimizer_like"}


@pytest.mark.parametrize("name", ["a.pth", "a.pth.tar", "a.pkl", "a.safetensors"])
@pytest.mark.parametrize("damage", ["cut", "empty", "text"])
def test_damaged_files_are_refused(tmp_path, name, damage):
    path = tmp_path / name
    if name.endswith("safetensors"):
        save_file({"w": torch.ones(1000)}, path)
    elif name.endswith("pkl"):
        path.write_bytes(pickle.dumps({"w": np.ones(1000)}, protocol=2))
    else:
        torch.save({"w": torch.ones(1000)}, path, _use_new_zipfile_serialization=not name.endswith("tar"))
    data = {"cut": path.read_bytes()[:-300], "empty": b"", "text": b"<!DOCTYPE html><html>not found</html>"}[damage]
    path.write_bytes(data)
    with pytest.raises(ZooError, match=str(path)):
        read_file(path)


@pytest.mark.slow
def test_reading_a_pickle_imports_nothing_it_names(tmp_path):
    (tmp_path / "planted.py").write_text("open('ran', 'w')\ndef f(): ...\n")
    (tmp_path / "model.pkl").write_bytes(b"\x80\x02cplanted\nf\n)R.")
    code = (
        "import sys\nfrom pathlib import Path\nfrom bissl_zoo.errors import ZooError\n"
        "from bissl_zoo.weights.files import read_file\n"
        "try:\n    read_file(Path('model.pkl'))\nexcept ZooError as error:\n    print(error)\n"
        "print('planted' in sys.modules)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert "contains the global planted.f" in done.stdout and done.stdout.strip().endswith("False")
    assert not (tmp_path / "ran").exists()


STATE = {"weight": torch.arange(6.0).view(2, 3)}
METADATA = {
    "architecture": "resnet18",
    "model_args": {"in_chans": 3},
    "pixels": {"mean": [0.5] * 3, "std": [1, 0.5, 0.25]},
    "source": "x",
}


def test_a_backbone_keeps_its_metadata(tmp_path):
    save_backbone(StoredBackbone(STATE, **METADATA), tmp_path / "a.safetensors")
    stored = read_stated(tmp_path / "a.safetensors")
    assert {key: getattr(stored, key) for key in METADATA} == METADATA and stored.licence == "unknown"
    assert torch.equal(read_file(tmp_path / "a.safetensors")["weight"], STATE["weight"])


@pytest.mark.parametrize(
    ("metadata", "problem"),
    [
        ("[" * 100_000, "invalid metadata"),
        ({"state": {}}, "invalid metadata"),
        ({"architecture": ["resnet18"]}, "an architecture that is not a name"),
        ({"model_args": {"checkpoint_path": "/tmp/weights.pth"}}, "invalid model_args"),
        ({"pixels": {"mean": ["0.5"] * 3, "std": [1] * 3}}, "pixels without a mean and a std of three numbers"),
        ({"source": 3}, "a source or licence that is not text"),
    ],
)
def test_invalid_metadata_are_one_error(tmp_path, metadata, problem):
    text = metadata if isinstance(metadata, str) else json.dumps(METADATA | metadata)
    save_file(STATE, tmp_path / "a.safetensors", {"bissl_zoo": text})
    with pytest.raises(ZooError, match=rf"a\.safetensors .*{problem}"):
        read_weights(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("file", "change", "problem"),
    [
        ("entry.json", {"architecture": None}, "an architecture that is not a name"),
        ("entry.json", {"input": [1]}, "pixels without a mean"),
        ("config.json", {"model_args": {"checkpoint_path": "/tmp/weights.pth"}}, "invalid model_args"),
    ],
)
def test_invalid_metadata_of_an_entry_are_one_error(tmp_path, file, change, problem):
    publish_tiny(tmp_path)
    content = json.loads((tmp_path / "tiny" / file).read_text()) | change
    replace_file(tmp_path, "tiny", file, json.dumps(content).encode())
    with pytest.raises(ZooError, match=f"Zoo entry 'tiny' has {problem}"):
        read_entry("tiny", zoo=tmp_path)
