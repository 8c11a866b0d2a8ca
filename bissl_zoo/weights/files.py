"""Files with weights: checkpoints of other projects, of which nothing is run, and backbones as .safetensors."""

import json
import os
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bissl_zoo.config.arguments import PARTS
from bissl_zoo.errors import ZooError, shorten
from bissl_zoo.files import is_sha256, parse_json, replacing

SUFFIXES = (".pth", ".pt", ".tar", ".ckpt", ".bin", ".torch", ".th", ".safetensors", ".pkl")

_METADATA_KEY = "bissl_zoo"
_STATED = ("architecture", "model_args", "pixels", "source", "licence")

#: errors of a pickle that is truncated or crafted
_DAMAGE = (EOFError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, MemoryError, RecursionError)

#: top-level keys of the training state beside a model, without weights
_TRAINING_STATE = re.compile(
    r"(optimi[sz]er|lr_sched|sched|scaler|fp16_scaler|amp|native_amp|callbacks|loops|hyper_parameters|dino_loss|args)"
)


def model_args_problem(model_args: Any) -> str:
    """Return what is wrong with stored arguments of a timm model, or an empty string.

    Only arguments of `bissl_zoo.config.arguments` are accepted: the others name files, addresses, caches or code.
    """
    if not isinstance(model_args, dict):
        return f"{model_args!r:.100} is not a mapping"
    _, domains = PARTS["bissl_zoo.registry.build_backbone"]
    for name, value in model_args.items():
        if name not in domains or name in ("architecture", "out_features"):
            return f"'{name!s:.100}' is not an accepted argument"
        if problem := domains[name].problem(value):
            return f"{name} is {value!r:.100}; it {problem}"
    return ""


@dataclass(frozen=True)
class StoredBackbone:
    """The weights of a backbone and what its user must know.

    Args:
        state: on the CPU, under the names of `timm.create_model(architecture, num_classes=0, **model_args)`; without
            the tensors in `missing`.
        pixels: `mean` and `std` of RGB images scaled to [0, 1], and `input_size` if known; None if unknown.
        source: where it comes from, as in `timm:resnet50.a1_in1k`.
        licence: as its source states it, or "unknown".
        sha256: of the file that it was read from.
        parents: `name`, `sha256` and `licence` of the weights that it was trained from, and so on.
        format: the layout of the file, a name in `formats.FORMATS`.
        missing: tensors of the backbone that the file lacks or has in another shape, with shapes.
        unexpected: tensors of the file that are neither in `state` nor in `head`, with shapes.
        head: the classifier or pretext head, under the names in the file.
        notes: further sentences for the user.
    """

    state: Mapping[str, Tensor]
    architecture: str
    model_args: Mapping[str, Any] = field(default_factory=dict)
    pixels: Mapping[str, Any] | None = None
    source: str = ""
    licence: str = "unknown"
    sha256: str = ""
    parents: Sequence[Mapping[str, str]] = ()
    format: str = "timm"
    missing: Sequence[str] = ()
    unexpected: Sequence[str] = ()
    head: Mapping[str, Tensor] = field(default_factory=dict)
    notes: Sequence[str] = ()

    @property
    def lineage(self) -> list[dict[str, str]]:
        """Name, digest and licence of these weights, then of their parents."""
        return [{"name": self.source, "sha256": self.sha256, "licence": self.licence}, *map(dict, self.parents)]

    def checked(self, where: str, architecture: str | None = None) -> "StoredBackbone":
        """Return self; raise `ZooError` for metadata of a wrong type, or an architecture that does not match."""
        if not isinstance(self.architecture, str) or not self.architecture:
            problem = "an architecture that is not a name"
        elif wrong := model_args_problem(self.model_args):
            problem = f"invalid model_args: {wrong}"
        elif self.pixels is not None and not _are_pixels(self.pixels):
            problem = "pixels without a mean and a std of three numbers each"
        elif not isinstance(self.source, str) or not isinstance(self.licence, str):
            problem = "a source or licence that is not text"
        elif not isinstance(self.parents, list | tuple) or not all(map(_is_parent, self.parents)):
            problem = "parents without name and sha256"
        elif architecture not in (None, self.architecture):
            raise ZooError(f"{where} is a {self.architecture}, not a {architecture}.")
        else:
            return self
        raise ZooError(f"{where} has {problem}. Download it again, or report it to its author.")


def save_backbone(backbone: StoredBackbone, output: str | os.PathLike[str]) -> None:
    """Write a backbone to a .safetensors file, with its metadata; see :func:`save_tensors`."""
    parents = backbone.lineage if backbone.sha256 else list(backbone.parents)
    metadata = {**{key: getattr(backbone, key) for key in _STATED}, "parents": parents}
    save_tensors(backbone.state, output, {_METADATA_KEY: json.dumps(metadata)})


def save_tensors(
    state: Mapping[str, Tensor], output: str | os.PathLike[str], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors to a .safetensors file atomically.

    Raises:
        ZooError: another suffix, or the file cannot be written.
    """
    output = Path(output)
    if output.suffix != ".safetensors":
        raise ZooError(f"{output}: tensors are written as .safetensors.")
    try:
        with replacing(output) as temporary:
            temporary.touch()
            mode = temporary.stat().st_mode  # safetensors lets only the owner read
            safetensors.torch.save_file(unshared(state), temporary, {"format": "pt", **(metadata or {})})
            temporary.chmod(mode)
    except (OSError, SafetensorError) as error:
        raise ZooError(f"{output} cannot be written: {error}.") from error


def read_stated(path: Path) -> StoredBackbone | None:
    """Return what :func:`save_backbone` wrote beside the tensors of a .safetensors file; None for another file.

    Raises:
        ZooError: the file or its metadata are damaged.
    """
    if path.suffix != ".safetensors" or not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get(_METADATA_KEY)
    except (SafetensorError, OSError) as error:
        raise ZooError(f"{path} cannot be read as safetensors: {error}. Is the download complete?") from error
    if text is None:
        return None
    try:
        metadata = parse_json(text)
        if unknown := metadata.keys() - {*_STATED, "parents"}:
            raise ValueError(f"unknown keys {sorted(unknown)}")
        stored = StoredBackbone({}, **metadata)
    except (ValueError, TypeError, AttributeError) as error:
        raise ZooError(f"{path} has invalid metadata of this package: {error}.") from error
    return stored.checked(str(path))


def state_difference(expected: Mapping[str, Tensor], actual: Mapping[str, Tensor]) -> str:
    """Return how two state dicts differ in names and shapes; empty if they do not."""
    shared = [key for key in expected if key in actual]
    reshaped = [key for key in shared if actual[key].shape != expected[key].shape]
    parts = {
        "missing": [key for key in expected if key not in actual],
        "unexpected": sorted(key for key in actual if key not in expected),
        "of another shape": [f"{k} {tuple(actual[k].shape)} instead of {tuple(expected[k].shape)}" for k in reshaped],
    }
    lines = [f"{len(names)} {what}: {shorten(names)}" for what, names in parts.items() if names]
    return f"{len(shared) - len(reshaped)} of {len(expected)} tensors match; {'; '.join(lines)}" if lines else ""


def unshared(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return contiguous copies on the CPU that share no memory, which safetensors refuses."""
    return {name: tensor.detach().cpu().clone().contiguous() for name, tensor in state.items()}


def _is_parent(parent: Any) -> bool:
    return (
        isinstance(parent, Mapping)
        and all(isinstance(value, str) for value in parent.values())
        and is_sha256(parent.get("sha256"))
    )


def _are_pixels(pixels: Any) -> bool:
    values = [pixels.get(key) for key in ("mean", "std")] if isinstance(pixels, dict) else [None]
    return all(
        isinstance(v, list) and len(v) == 3 and all(type(n) in (int, float) and abs(n) < 1e6 for n in v) for v in values
    )


def read_file(path: Path, skip_objects: bool = False) -> Any:
    """Read a checkpoint file: containers, numbers, strings and tensors.

    `.pth`, `.pt`, `.tar`, `.ckpt`, `.bin`, `.torch` and `.th` are read with `torch.load(weights_only=True)`, `.pkl` by
    an unpickler for numeric numpy arrays, builtin containers, numbers and strings, and nothing else.

    Args:
        skip_objects: replace objects of other classes in a torch file (argparse.Namespace) by an inert placeholder.
    Raises:
        ZooError: the file is missing, damaged, of an unknown kind, or contains objects.
    """
    if not path.is_file():
        raise ZooError(f"There is no file {path}.")
    if path.suffix not in SUFFIXES:
        raise ZooError(f"{path} is not a checkpoint file. Accepted suffixes: {', '.join(SUFFIXES)}.")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        # torch.save writes a zip archive, whatever the suffix
        if path.suffix == ".pkl" and not zipfile.is_zipfile(path):
            return _read_pickle(path)
        return _read_torch(path, skip_objects)
    except (SafetensorError, OSError) as error:
        raise ZooError(f"{path} cannot be read: {error}. Is the download complete?") from error


def named_tensors(content: Any) -> dict[str, Tensor]:
    """Return every tensor of nested containers by its path (`state_dict.module.conv1.weight`); no training state."""
    if isinstance(content, Mapping):
        content = {key: value for key, value in content.items() if not _TRAINING_STATE.match(str(key))}
    return dict(_walk(content, "", {}))


def _walk(content: Any, path: str, seen: dict[int, Any]) -> Iterator[tuple[str, Tensor]]:
    """Yield tensors with their paths; enter a container once, since lists that share lists have 2^n paths."""
    if isinstance(content, Tensor):
        yield path, content
    if not isinstance(content, list | tuple | Mapping) or seen.setdefault(id(content), path) != path:
        return
    for key, value in content.items() if isinstance(content, Mapping) else enumerate(content):
        key = key.decode("latin-1") if isinstance(key, bytes) else str(key)
        yield from _walk(value, f"{path}.{key}" if path else key, seen)


class _Skipped:
    """Placeholder for an object of a class that is not loaded; ignores its arguments."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


def _read_torch(path: Path, skip_objects: bool) -> Any:
    skipped: set[str] = set()
    while True:
        # one class per name, since torch stores the names by class
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
            raise ZooError(
                f"{path} cannot be read as a file of torch.save: {reason} Is the download complete?"
            ) from error


def _objects_in(path: Path, error: Exception) -> set[str]:
    """Return the names of classes in a torch file beside plain data: all, or in the old format the one in the error."""
    if zipfile.is_zipfile(path):
        return set(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    return set(re.findall(r"GLOBAL ([\w.]+) ", str(error))[:1])


def _refusal(path: Path, error: Exception, names: set[str], skipped: bool) -> str:
    if not names:
        reason = str(error).split("WeightsUnpickler error:")[-1].strip().splitlines()[0]
        return f"{path} cannot be read as a file of torch.save (weights only): {reason}"
    if skipped:
        reason = str(error).strip().splitlines()
        line = next((line for line in reason if "blocked" in line), reason[-1])
        return f"{path} is refused even without its objects ({', '.join(sorted(names))}): {line} Do not use this file."
    return (
        f"{path} contains objects that could run code: {', '.join(sorted(names))}. Leave them out with "
        "skip_objects=True (bissl convert in --skip-objects), or save only the weights: "
        "torch.save(model.state_dict(), FILE)."
    )


class _Dtype:
    """A numeric numpy dtype in a pickle; its byte order follows."""

    def __init__(self, code: str, *_: Any) -> None:
        if not re.fullmatch(r"[<>|=]?(b1|\?|[iu][1248]|f[248]|c(8|16))", str(code)):
            raise pickle.UnpicklingError(f"an array of dtype {code!r}, which is not numeric")
        self.dtype = np.dtype(str(code))

    def __setstate__(self, state: tuple) -> None:
        if state[1] in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(state[1])


class _Array:
    """A numpy array in a pickle, rebuilt without numpy's own code, which trusts its input."""

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
        raise pickle.UnpicklingError("bytes of another type")
    return data


class _Call:
    """A function that a pickle may call; its attributes cannot be changed."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("a change of the unpickler itself")


_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("collections", "OrderedDict"): OrderedDict,
    ("_codecs", "encode"): _Call(_encode),  # how Python 3 writes bytes for Python 2
    # numpy 2 renamed numpy.core; Python 2 has another name for builtins
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _Array for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): _Call(_scalar) for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _Call(_from_buffer) for core in ("core", "_core")},
    **{(module, kind.__name__): kind for module in ("builtins", "__builtin__") for kind in (set, frozenset, complex)},
    **{(module, kind): _Call(_bytes) for module in ("builtins", "__builtin__") for kind in ("bytes", "bytearray")},
}


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickler that resolves the names in `_ALLOWED` to their replacements and refuses all others."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"the global {module}.{name}")
        return _ALLOWED[module, name]


def _read_pickle(path: Path) -> Any:
    try:
        with open(path, "rb") as stream:
            # a str of Python 2 is bytes or text; latin-1 keeps both
            return _with_tensors(_ArrayUnpickler(stream, encoding="latin1").load(), {})
    except pickle.UnpicklingError as error:
        raise ZooError(
            f"{path} is refused: it contains {error}, which could run code. Only numeric numpy arrays, builtin "
            "containers, numbers and strings are read; Detectron2's model files contain nothing else."
        ) from error
    except _DAMAGE as error:
        raise ZooError(f"{path} is not a pickle of arrays ({type(error).__name__}: {error}).") from error


def _with_tensors(content: Any, known: dict[int, Any]) -> Any:
    """Return `content` with tensors in place of arrays; what is shared stays shared (`known`: results by id)."""
    if id(content) in known:
        return known[id(content)]
    if isinstance(content, _Array):
        array = content.array
        known[id(content)] = torch.from_numpy(np.array(array.astype(array.dtype.newbyteorder("="))))
    elif isinstance(content, Mapping):
        known[id(content)] = result = {}
        result.update((key, _with_tensors(value, known)) for key, value in content.items())
    elif isinstance(content, list | tuple):
        known[id(content)] = result = []
        result.extend(_with_tensors(value, known) for value in content)
    return known.get(id(content), content)
