"""A nested state as two files that hold data only: tensors in safetensors, the rest as JSON."""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from bissl_zoo.errors import CheckpointError

TENSORS_FILE, PLAIN_FILE = "state.safetensors", "state.json"

#: bytes of the JSON part, far above what any state has
_PLAIN_LIMIT = 64 << 20

#: keys of the dicts that stand for what JSON has no word for
_TENSOR, _TUPLE, _DICT = "$tensor", "$tuple", "$dict"


def write_state(folder: Path, state: Any) -> None:
    """Write `state`, dicts, lists, tuples, tensors, numbers, text and None nested in any way, to two files in `folder`.

    Raises:
        CheckpointError: it holds something else.
        OSError: the disk refuses.
    """
    tensors: dict[str, Tensor] = {}
    plain = _encode(state, "", tensors)
    try:
        save_file(dict(_unshared(tensors)), folder / TENSORS_FILE)
    except SafetensorError as error:
        # a failed write is told as text, and a number in it is what says why
        reason = re.search(r"os error (\d+)", str(error))
        if reason is None:
            raise
        raise OSError(int(reason[1]), os.strerror(int(reason[1]))) from error
    (folder / PLAIN_FILE).write_text(json.dumps(plain) + "\n")


def tensor_bytes(state: Any) -> int:
    """The size of the tensors in `state`: about what `write_state` needs."""
    tensors: dict[str, Tensor] = {}
    _encode(state, "", tensors)
    return sum(tensor.nbytes for tensor in tensors.values())


def read_state(folder: Path) -> dict[str, Any]:
    """What `write_state` wrote, tensors on the CPU.

    Raises:
        CheckpointError: a file is missing, or is not what was written.
    """
    try:
        if (folder / PLAIN_FILE).stat().st_size > _PLAIN_LIMIT:
            raise ValueError(f"{PLAIN_FILE} has more than {_PLAIN_LIMIT:,} bytes")
        tensors = load_file(folder / TENSORS_FILE)
        state = _decode(json.loads((folder / PLAIN_FILE).read_text()), tensors)
        if not isinstance(state, dict):
            raise ValueError(f"{PLAIN_FILE} holds no object")
        return state
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"The state in {folder} cannot be read ({type(error).__name__}: {error}).") from error


def _encode(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        name = path if path not in tensors else f"{path}/{len(tensors)}"  # of the keys 1 and "1" of one dict
        tensors[name] = value.detach()
        return {_TENSOR: name}
    if isinstance(value, dict):
        items = {key: _encode(item, f"{path}/{key}".lstrip("/"), tensors) for key, item in value.items()}
        if all(isinstance(key, str) and not key.startswith("$") for key in items):
            return items
        return {_DICT: [[key, item] for key, item in items.items()]}
    if isinstance(value, (list, tuple)):
        items = [_encode(item, f"{path}/{number}".lstrip("/"), tensors) for number, item in enumerate(value)]
        return {_TUPLE: items} if isinstance(value, tuple) else items
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise CheckpointError(
        f"A checkpoint holds tensors and plain values; '{path}' is a {type(value).__name__}. Keep it as a tensor (a "
        "buffer), a number or text."
    )


def _decode(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if _TENSOR in value:
        return tensors[value[_TENSOR]]
    if _TUPLE in value:
        return tuple(_decode(item, tensors) for item in value[_TUPLE])
    if _DICT in value:
        return {key: _decode(item, tensors) for key, item in value[_DICT]}
    return {key: _decode(item, tensors) for key, item in value.items()}


def _unshared(tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Contiguous tensors on the CPU none of which shares memory with another, as safetensors wants them."""
    seen: set[int] = set()
    for name, tensor in tensors.items():
        stored = tensor.cpu().contiguous()
        pointer = stored.untyped_storage().data_ptr()
        if pointer in seen or stored.numel() != stored.untyped_storage().nbytes() // stored.element_size():
            stored = stored.clone()
        seen.add(pointer)
        yield name, stored
