"""Where data sets lie, and what all of them share: the root folder, its error message, and reading one image."""

import contextlib
import hashlib
import io
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms.v2.functional import pil_to_tensor

from bissl_zoo.errors import DatasetError

DATASETS_VARIABLE = "BISSL_ZOO_DATASETS"
IMAGE_EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"})
#: of files by their content, whatever they are called; Pillow reads others too, EPS by starting Ghostscript
IMAGE_FORMATS = ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP")
JPEG = b"\xff\xd8"


def datasets_root() -> Path:
    """The folder that holds the data sets: `$BISSL_ZOO_DATASETS`, or `datasets` in the working directory."""
    return Path(os.environ.get(DATASETS_VARIABLE) or "datasets").expanduser()


def require_folder(path: str | os.PathLike, what: str, fetch: str = "") -> Path:
    """Return `path` if it is a folder.

    Args:
        path: the folder that a data set needs.
        what: the data set in words; the message begins with it.
        fetch: the command that brings it, where there is one.

    Raises:
        DatasetError: with the absolute path, the command, and the variable that moves the root and its present value.
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


def require_plain(path: str | os.PathLike, what: str) -> os.stat_result:
    """Raise where `path` is a pipe, a device or a folder: opening a pipe waits for ever, and a device may never end.

    Args:
        what: the file in words; the message begins with it.

    Raises:
        DatasetError: it is not a plain file, nor a link to one.
        OSError: it does not exist, or cannot be looked at.
    """
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):
        raise DatasetError(f"{what} {path} is not a plain file but a folder, pipe or device, so it is not read.")
    return found


def sample_digest(dataset: Any) -> str | None:
    """The sha256 of a data set's list of samples: its own `digest()`, or their files' names, sorted.

    Names begin below the data sets root; those of a set that lies elsewhere begin below its own folder (`root`, or else
    the nearest that holds all of it), so that a copy has the same. Two runs with the same digest have read the same
    split. None for a data set that does not know its files (it has no `source(index)` either).
    """
    if hasattr(dataset, "digest"):
        return dataset.digest()
    if not hasattr(dataset, "source"):
        return None
    files = [os.path.abspath(dataset.source(i)) for i in range(len(dataset))]
    root = os.path.abspath(datasets_root())
    if os.path.commonpath([root, *files]) != root:
        own = getattr(dataset, "root", None)
        root = os.path.abspath(own) if own else os.path.commonpath([os.path.dirname(file) for file in files])
    names = sorted(os.path.relpath(file, root) for file in files)
    return hashlib.sha256("\n".join(names).encode("utf-8", "surrogateescape")).hexdigest()


def load_image(path: str | os.PathLike | IO[bytes], upright: bool = True, name: str = "") -> Image.Image:
    """Read and fully decode one image file as RGB.

    Of 16 bits the upper 8 are kept, of transparent pixels the colour that they have, and CMYK comes as viewers show it.

    Args:
        path: the file, or what is open for reading.
        upright: turn the picture as its EXIF orientation says, as every viewer does. Detection sets pass False, because
            their boxes count the pixels as they are stored.
        name: the image in messages, where it is no file of its own.

    Raises:
        DatasetError: naming the file, where it is missing, truncated, no image, no plain file, one of more pixels than
            are decoded, or of 32-bit pixels, which have no range.
    """
    with _telling(name or path):
        if not hasattr(path, "read"):
            require_plain(path, "Image")
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            image.load()
            kind = image.format
            if upright:
                image = ImageOps.exif_transpose(image)
            return _as_rgb(image, kind)


def load_pixels(path: str | os.PathLike | IO[bytes], name: str = "") -> Tensor:
    """The image that `load_image` reads, upright, as `(3, H, W)` uint8.

    JPEG files are decoded by torchvision, to the same pixels in two thirds of the time.

    Raises:
        DatasetError: as there.
    """
    with _telling(name or path):
        if not hasattr(path, "read"):
            require_plain(path, "Image")
        content = path.read() if hasattr(path, "read") else Path(path).read_bytes()
        if content.startswith(JPEG):
            Image.open(io.BytesIO(content), formats=IMAGE_FORMATS)  # the header only, which a bomb's size is in
            stream = torch.frombuffer(bytearray(content), dtype=torch.uint8)
            return decode_jpeg(stream, ImageReadMode.RGB, apply_exif_orientation=True)
    return pil_to_tensor(load_image(io.BytesIO(content), name=name or str(path)))


def _as_rgb(image: Image.Image, kind: str | None) -> Image.Image:
    # Pillow's own conversion makes white of all beyond 255; in its older releases a PNG of 16 bits has the mode I
    if image.mode.startswith("I;16") or (image.mode == "I" and kind == "PNG"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError(f"pixels of 32 bits, mode {image.mode}, have no range of their own: save it with 8 or 16")
    return image.convert("RGB")


@contextlib.contextmanager
def _telling(image: str | os.PathLike | IO[bytes]) -> Iterator[None]:
    """Turn what goes wrong with an image into an error that names it."""
    try:
        yield
    except DatasetError:
        raise
    except FileNotFoundError as error:
        raise DatasetError(f"Image {image} does not exist.") from error
    except Image.DecompressionBombError as error:
        raise DatasetError(
            f"Image {image} is not decoded, as it would fill the memory: {error} If the image is genuine, raise "
            "PIL.Image.MAX_IMAGE_PIXELS, or scale it down."
        ) from error
    # Decoders raise whatever a damaged stream leads them to: OSError, SyntaxError, struct.error, ValueError, ...
    except Exception as error:
        raise DatasetError(
            f"Image {image} does not decode ({type(error).__name__}: {error}). Replace the file, or remove it from "
            "the set."
        ) from error
