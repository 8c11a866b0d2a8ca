"""Reading files in COCO's format (Lin et al., arXiv 1405.0312), without the masks, which most of them is."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bissl_zoo.data.datasets.catalog import require_plain
from bissl_zoo.errors import DatasetError, did_you_mean

#: bytes of an annotation file; COCO's largest has 470 MB, and Objects365's 5 GB
_BYTES_LIMIT = 8 << 30


def read_annotations(path: Path, keys: Sequence[str]) -> dict[str, list[Any]]:
    """The lists `keys` of a JSON file, without the masks in them.

    Raises:
        DatasetError: where the file is missing, no plain file, too large, no JSON, or does not hold these lists.
    """
    try:
        if require_plain(path, "COCO annotations").st_size > _BYTES_LIMIT:
            raise DatasetError(f"COCO annotations {path} have more than {_BYTES_LIMIT:,} bytes, so they are not read.")
        content = json.loads(path.read_bytes(), object_hook=_without_mask)
    except FileNotFoundError as error:
        present = sorted(name for name in names_in(path.parent) if name.endswith(".json"))
        raise DatasetError(
            f"COCO annotations {path} do not exist.{did_you_mean(path.name, present)} "
            f"There: {', '.join(present[:20]) or 'none'}{', ...' if len(present) > 20 else ''}."
        ) from error
    except (ValueError, RecursionError, OSError) as error:
        raise DatasetError(f"COCO annotations {path} cannot be read as JSON: {error}.") from error
    for key in keys:
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise DatasetError(
                f"COCO annotations {path} have no list '{key}', so they are not in COCO's format. It is a JSON object "
                "with the lists 'images', 'annotations' and 'categories'."
            )
    return {key: content[key] for key in keys}


def _without_mask(record: dict[str, Any]) -> dict[str, Any]:
    # nine tenths of COCO's file; dropped while it is read, so that it is never in the memory as a whole
    record.pop("segmentation", None)
    return record


def names_in(folder: Path) -> frozenset[str]:
    """What is in a folder; nothing where it is none."""
    try:
        return frozenset(os.listdir(folder))
    except OSError:
        return frozenset()
