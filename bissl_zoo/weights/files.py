"""Checkpoint files of other projects as plain containers and tensors, with nothing in them ever run."""

import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from bissl_zoo.errors import ZooError

TORCH_SUFFIXES = (".pth", ".pt", ".tar", ".ckpt", ".bin", ".torch", ".th")
SUFFIXES = (*TORCH_SUFFIXES, ".safetensors", ".pkl")

#: what a pickle that is cut short or made up raises
_DAMAGE = (EOFError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, MemoryError, RecursionError)

#: what a training run keeps beside its model; it may be large and holds no weights
_TRAINING_STATE = re.compile(
    r"(optimi[sz]er|lr_sched|sched|scaler|fp16_scaler|amp|native_amp|callbacks|loops|hyper_parameters|dino_loss|args)"
)


def read_file(path: Path, skip_objects: bool = False) -> Any:
    """What a checkpoint file holds: containers, numbers, strings and tensors.

    `.pth`, `.pt`, `.tar`, `.ckpt`, `.bin`, `.torch` and `.th` are read with `torch.load(weights_only=True)`, `.pkl` by
    a reader that knows numeric numpy arrays and builtin containers, numbers and strings, and nothing else.

    Args:
        skip_objects: put an inert placeholder where a torch file has an object of any other class (argparse.Namespace).
    Raises:
        ZooError: missing, damaged, of no known kind, or with objects in it.
    """
    if not path.is_file():
        raise ZooError(f"There is no file {path}.")
    if path.suffix not in SUFFIXES:
        raise ZooError(f"{path} does not end like a checkpoint file. Accepted: {', '.join(SUFFIXES)}.")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        # torch.save writes a zip archive under any name it is given
        if path.suffix == ".pkl" and not zipfile.is_zipfile(path):
            return _read_pickle(path)
        return _read_torch(path, skip_objects)
    except (SafetensorError, OSError) as error:
        raise ZooError(f"{path} cannot be read: {error}. Is the download complete?") from error


def named_tensors(content: Any) -> dict[str, Tensor]:
    """Every tensor of nested containers by its path, as in `state_dict.module.conv1.weight`; no training state."""
    if isinstance(content, Mapping):
        content = {key: value for key, value in content.items() if not _TRAINING_STATE.match(str(key))}
    return dict(_walk(content, ""))


def _walk(content: Any, path: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(content, Tensor):
        yield path, content
        return
    if isinstance(content, list | tuple):
        content = dict(enumerate(content))
    if isinstance(content, Mapping):
        for key, value in content.items():
            key = key.decode("latin-1") if isinstance(key, bytes) else str(key)
            yield from _walk(value, f"{path}.{key}" if path else key)


class _Skipped:
    """Stands where a torch file has an object of a class that is not loaded; takes any arguments, keeps none."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


def _read_torch(path: Path, skip_objects: bool) -> Any:
    skipped: set[str] = set()
    while True:
        # one class for each name, since torch keeps the names by class
        placeholders = [(type("_Skipped", (_Skipped,), {}), name) for name in skipped]
        try:
            with torch.serialization.safe_globals(placeholders):
                return torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            names = _objects_in(path, error)
            if not skip_objects or names <= skipped:
                raise ZooError(_refusal(path, error, names, skip_objects)) from error
            skipped |= names
        except (RuntimeError, EOFError, ValueError, KeyError, TypeError, AttributeError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ZooError(f"{path} cannot be read as a file of torch.save: {reason} Is the download whole?") from error


def _objects_in(path: Path, error: Exception) -> set[str]:
    """Names of what a torch file holds beside plain data: all of them, or of the old form the one in the error."""
    if zipfile.is_zipfile(path):
        return set(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    return set(re.findall(r"GLOBAL ([\w.]+) ", str(error))[:1])


def _refusal(path: Path, error: Exception, names: set[str], skipped: bool) -> str:
    if not names:
        reason = str(error).split("WeightsUnpickler error:")[-1].strip().splitlines()[0]
        return f"{path} cannot be read as a file of torch.save (weights only): {reason}"
    if skipped:
        reason = str(error).strip().splitlines()
        told = next((line for line in reason if "blocked" in line), reason[-1])
        return f"{path} is refused even without its objects ({', '.join(sorted(names))}): {told} Do not use this file."
    return (
        f"{path} holds more than tensors and plain values: {', '.join(sorted(names))}. Loading such objects can run "
        "code, so it is refused. Read it with skip_objects=True (tools/convert.py in --skip-objects), which leaves "
        "them out, or save the weights alone where the file comes from: torch.save(model.state_dict(), FILE)."
    )


class _Dtype:
    """What a pickle says of a numpy dtype: a numeric one, its byte order given later."""

    def __init__(self, code: str, *_: Any) -> None:
        if not re.fullmatch(r"[<>|=]?(b1|\?|[iu][1248]|f[248]|c(8|16))", str(code)):
            raise pickle.UnpicklingError(f"an array of dtype {code!r}, which is not numeric")
        self.dtype = np.dtype(str(code))

    def __setstate__(self, state: tuple) -> None:
        if state[1] in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(state[1])


class _Array:
    """What a pickle says of a numpy array, gathered without numpy's own code, which trusts its input."""

    def __init__(self, *_: Any) -> None:
        self.array = np.zeros(0, np.float32)

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, fortran, data = state
        data = data.encode("latin-1") if isinstance(data, str) else data
        flat = np.frombuffer(data, dtype.dtype)
        self.array = flat.reshape(shape, order="F" if fortran else "C")


def _from_buffer(data: Any, dtype: _Dtype, shape: tuple, order: str) -> _Array:
    array = _Array()
    array.__setstate__((1, shape, dtype, order == "F", bytes(data)))
    return array


def _scalar(dtype: _Dtype, data: Any) -> Any:
    data = data.encode("latin-1") if isinstance(data, str) else data
    return np.frombuffer(data, dtype.dtype)[0].item()


def _encode(text: str, encoding: str) -> bytes:
    if encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"text in the encoding {encoding!r}")
    return text.encode("latin-1")


def _bytes(data: bytes = b"", *_: Any) -> bytes:
    if not isinstance(data, bytes):  # a number would ask for that much memory
        raise pickle.UnpicklingError("bytes made of something else")
    return data


class _Call:
    """A function that a pickle may call but not change, as it otherwise may the attributes of what it names."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("a change of the reader itself")


_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("collections", "OrderedDict"): OrderedDict,
    ("_codecs", "encode"): _Call(_encode),  # how Python 3 writes bytes for Python 2
    # numpy 2 renamed numpy.core; Python 2 called builtins otherwise
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _Array for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): _Call(_scalar) for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _Call(_from_buffer) for core in ("core", "_core")},
    **{(module, kind.__name__): kind for module in ("builtins", "__builtin__") for kind in (set, frozenset, complex)},
    **{(module, kind): _Call(_bytes) for module in ("builtins", "__builtin__") for kind in ("bytes", "bytearray")},
}


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickles the names in `_ALLOWED`, as the stand-ins given there, and refuses every other."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"the global {module}.{name}")
        return _ALLOWED[module, name]


def _read_pickle(path: Path) -> Any:
    try:
        with open(path, "rb") as stream:
            # what Python 2 wrote as str is bytes or text; latin-1 keeps both
            return _with_tensors(_ArrayUnpickler(stream, encoding="latin1").load())
    except pickle.UnpicklingError as error:
        raise ZooError(
            f"{path} is refused: it asks for {error}. Of a pickle only numeric numpy arrays, builtin containers, "
            "numbers and strings are read, since all else can run code. Detectron2's model files hold nothing else, so "
            "find out what this one is before you use it anywhere."
        ) from error
    except _DAMAGE as error:
        raise ZooError(f"{path} is not a pickle of arrays ({type(error).__name__}: {error}).") from error


def _with_tensors(content: Any) -> Any:
    if isinstance(content, _Array):
        array = content.array
        return torch.from_numpy(np.array(array.astype(array.dtype.newbyteorder("="))))
    if isinstance(content, Mapping):
        return {key: _with_tensors(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_with_tensors(value) for value in content]
    return content
