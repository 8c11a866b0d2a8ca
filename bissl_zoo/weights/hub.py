"""Weights on the Hugging Face hub and those that timm names, in the hub's own cache; nothing is unpickled."""

import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from timm.models import get_pretrained_cfg, split_model_name_tag

from bissl_zoo.errors import ZooError, did_you_mean
from bissl_zoo.files import parse_json

WEIGHT_FILES = (
    *("model.safetensors", "open_clip_model.safetensors", "open_clip_pytorch_model.safetensors"),
    *("pytorch_model.bin", "open_clip_pytorch_model.bin", "model.pth"),
)
CONFIG_FILES = ("config.json", "open_clip_config.json")


def download(repo: str, files: Sequence[str], needed: bool = True) -> Path | None:
    """Return the first of `files` that a repository (`user/name`, `user/name@revision`) has, from the hub's cache.

    Args:
        needed: raise an error if it has none of them; otherwise return None.
    Raises:
        ZooError: the hub cannot be reached and the cache lacks the file, or there is no such repository.
    """
    name, _, revision = repo.partition("@")
    offline = bool(os.environ.get("BISSL_ZOO_OFFLINE")) or constants.HF_HUB_OFFLINE
    for file in files:
        if isinstance(cached := try_to_load_from_cache(name, file, revision=revision or None), str):
            return Path(cached)
    for file in files:
        try:
            return Path(hf_hub_download(name, file, revision=revision or None, local_files_only=offline))
        except EntryNotFoundError as error:
            problem = "BISSL_ZOO_OFFLINE or HF_HUB_OFFLINE is set" if offline else _first_line(error)
            missing = offline or not isinstance(error, LocalEntryNotFoundError)
            if not missing:
                break
        except (RepositoryNotFoundError, HFValidationError) as error:
            raise ZooError(f"hf-hub:{repo}: no such repository, or no access to it ({_first_line(error)}).") from error
        except OSError as error:
            problem, missing = _first_line(error), False
            break
    if missing and not needed:
        return None
    raise ZooError(
        f"hf-hub:{repo}: cannot get {files[0]}{' or an equivalent' if files[1:] else ''} from {constants.ENDPOINT} "
        f"({problem}), and the cache {constants.HF_HUB_CACHE} lacks it. To work offline, run 'hf download {name}' on a "
        "machine with a network and copy that cache (HF_HUB_CACHE), or give a file."
    )


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:120]


def read_config(folder_or_repo: str) -> tuple[dict[str, Any], Path]:
    """Return the config of a repository, or of a folder with the same files, and the path of its weights.

    Raises:
        ZooError: a file is missing or damaged.
    """
    folder = Path(folder_or_repo)
    if folder.is_dir():
        config, weights = (
            next((folder / file for file in files if (folder / file).is_file()), None)
            for files in (CONFIG_FILES, WEIGHT_FILES)
        )
        if config is None or weights is None:
            raise ZooError(f"{folder} holds no model: it needs config.json and one of {', '.join(WEIGHT_FILES)}.")
    else:
        config = download(folder_or_repo, CONFIG_FILES)
        weights = download(folder_or_repo, WEIGHT_FILES)
    try:
        content = parse_json(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ZooError(f"{config} is not valid JSON ({error}).") from error
    if not isinstance(content, dict):
        raise ZooError(f"{config} is not a JSON object.")
    return content, weights


def card_licence(repo: str) -> str:
    """Return the licence in the card of a repository; "unknown" if it states none."""
    card = download(repo, ["README.md"], needed=False)
    match = card and re.search(r"^license:\s*(\S+)", card.read_text(encoding="utf-8", errors="replace"), re.MULTILINE)
    return match[1] if match else "unknown"


def timm_config(name: str) -> tuple[str, dict[str, Any]]:
    """Return architecture and pretrained config of timm's `NAME` or `NAME.TAG`.

    Raises:
        ZooError: timm has no such weights; the message has the nearest name.
    """
    architecture, tag = split_model_name_tag(name)
    if not timm.is_model(architecture) or not timm.models.is_model_pretrained(name):
        known = timm.list_pretrained()
        near = [each for each in known if tag and each.startswith(f"{architecture}.")]
        raise ZooError(
            f"timm {timm.__version__} has no weights '{name}'.{did_you_mean(name, near or known)} "
            "timm.list_pretrained() lists the names."
        )
    return architecture, get_pretrained_cfg(name).to_dict()


def timm_weights(name: str, stated: dict[str, Any]) -> Path:
    """Return the file of timm's weights `name` in the cache of the hub or of torch.

    Raises:
        ZooError: it cannot be downloaded, or is not a file of PyTorch.
    """
    if repo := stated.get("hf_hub_id"):
        filename = stated.get("hf_hub_filename")
        safe = [f"{filename.rpartition('.')[0]}.safetensors", filename] if filename else WEIGHT_FILES
        return download(repo, list(dict.fromkeys(safe)))
    url = stated.get("url") or ""
    if not url or url.endswith(".npz"):
        raise ZooError(f"timm:{name} is a file of another framework ({url or 'no address'}). Give another tag.")
    from timm.models._hub import download_cached_file

    try:
        return Path(download_cached_file(url, check_hash=True))
    except (OSError, RuntimeError) as error:
        raise ZooError(
            f"timm:{name}: cannot download {url} ({_first_line(error)}). To work offline, put the file into "
            f"{timm.models._hub.get_cache_dir()}."
        ) from error


def checkpoint_filter(architecture: str) -> Any:
    """Return timm's function that converts the official checkpoints of a family, `(state, model) -> state`, or None."""
    module = sys.modules[timm.model_entrypoint(architecture).__module__]
    names = ("checkpoint_filter_fn", "_filter_fn", "_filter_torchvision_pretrained", "checkpoint_filter_fn_encoder")
    return next((getattr(module, name) for name in names if hasattr(module, name)), None)
