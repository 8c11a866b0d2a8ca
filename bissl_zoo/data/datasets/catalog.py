"""Common functions of data sets: the datasets root, its error message, the digest of a sample list, reading images."""

import contextlib
import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image, ImageOps

from bissl_zoo.errors import DatasetError

DATASETS_VARIABLE = "BISSL_ZOO_DATASETS"
IMAGE_EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"})
#: formats by content, whatever the file's name; Pillow reads others too, EPS by starting Ghostscript
IMAGE_FORMATS = ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP")


def datasets_root() -> Path:
    """Return the folder of the data sets: `$BISSL_ZOO_DATASETS`, or `datasets` in the working directory."""
    return Path(os.environ.get(DATASETS_VARIABLE) or "datasets").expanduser()


def require_folder(path: str | os.PathLike, what: str, fetch: str = "") -> Path:
    """Return `path` if it is a folder.

    Args:
        what: name of the data set, with which the message begins.
        fetch: the command that downloads it, if any.

    Raises:
        DatasetError: with the absolute path, the command, and the variable of the datasets root and its value.
    """
    path = Path(path)
    if path.is_dir():
        return path
    value = os.environ.get(DATASETS_VARIABLE)
    present = f"is '{value}'" if value else "is not set, which means 'datasets' in the working directory"
    action = f"Fetch it with\n  {fetch}\nor set" if fetch else "Put it there, or set"
    raise DatasetError(
        f"{what}: there is no folder {path.absolute()}. {action} {DATASETS_VARIABLE} to the folder "
        f"that holds your data sets (it {present})."
    )


def require_regular_file(path: str | os.PathLike, what: str) -> os.stat_result:
    """Return the status of `path` if it is a regular file; reading a pipe may wait forever, and a device never end.

    Args:
        what: the kind of file, with which the message begins.

    Raises:
        DatasetError: it is a folder, a pipe or a device.
        OSError: it does not exist or cannot be accessed.
    """
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise DatasetError(f"{what} {path} is not a regular file but a folder, pipe or device.")
    return status


def sample_digest(dataset: Any) -> str | None:
    """Return the sha256 of a data set's list of samples, so that runs can be checked to have read the same split.

    This is the data set's own `digest()`, or else that of the sorted file names from `source(index)`. Names are
    relative to the datasets root; those of a set elsewhere to its `root`, or else the nearest common folder, so that a
    copy has the same digest. None if the data set has neither method.
    """
    if hasattr(dataset, "digest"):
        return dataset.digest()
    if not hasattr(dataset, "source"):
        return None
    files = [os.path.abspath(dataset.source(i)) for i in range(len(dataset))]
    root = os.path.abspath(datasets_root())
    if os.path.commonpath([root, *files]) != root:
        folder = getattr(dataset, "root", None)
        root = os.path.abspath(folder) if folder else os.path.commonpath([os.path.dirname(file) for file in files])
    names = sorted(os.path.relpath(file, root) for file in files)
    return hashlib.sha256("\n".join(names).encode("utf-8", "surrogateescape")).hexdigest()


def load_image(path: str | os.PathLike | IO[bytes], upright: bool = True, name: str = "") -> Image.Image:
    """Read and decode one image file as RGB.

    16-bit images keep their upper 8 bits, transparent pixels their colour, and CMYK is converted as viewers do.

    Args:
        path: a path or an open file.
        upright: apply the EXIF orientation. Detection sets pass False, because boxes count stored pixels.
        name: name of the image in messages, if it is not a file.

    Raises:
        DatasetError: the image is missing, not a regular file, truncated, of an unknown format, has 32-bit pixels or
            more pixels than Pillow decodes.
    """
    with _naming(name or path):
        if not hasattr(path, "read"):
            require_regular_file(path, "Image")
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            image.load()
            is_png = image.format == "PNG"
            if upright:
                image = ImageOps.exif_transpose(image)
            # Pillow's own conversion turns all above 255 white; its older releases give 16-bit PNG the mode I
            if image.mode.startswith("I;16") or (image.mode == "I" and is_png):
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            elif image.mode in ("I", "F"):
                raise ValueError(f"32-bit pixels, mode {image.mode}, have no known range; save it with 8 or 16 bits")
            return image.convert("RGB")


@contextlib.contextmanager
def _naming(image: str | os.PathLike | IO[bytes]) -> Iterator[None]:
    """Raise any error as a DatasetError that names the image."""
    try:
        yield
    except DatasetError:
        raise
    except FileNotFoundError as error:
        raise DatasetError(f"Image {image} does not exist.") from error
    except Image.DecompressionBombError as error:
        raise DatasetError(
            f"Image {image} is too large to decode: {error} If it is genuine, raise PIL.Image.MAX_IMAGE_PIXELS, or "
            "scale it down."
        ) from error
    except Exception as error:  # on damaged data, decoders raise OSError, SyntaxError, struct.error, ValueError, ...
        raise DatasetError(
            f"Image {image} does not decode ({type(error).__name__}: {error}). Replace the file, or remove it from "
            "the set."
        ) from error
