"""BiSSL: align a self-supervised backbone with its downstream task before fine-tuning (arXiv 2410.02387)."""

import importlib
from typing import Any

__version__ = "0.1.0"

#: public name -> its module, imported at the first access, since torch and timm take seconds
_PUBLIC = {
    "BACKBONES": "registry",
    "DATASETS": "registry",
    "DOWNSTREAM_TASKS": "registry",
    "PRETEXT_METHODS": "registry",
    "SOLVERS": "registry",
    "Model": "model",
    "STAGES": "registry",
    "create_backbone": "zoo",
    "get_config": "zoo",
    "get_entry": "zoo",
    "list_backbones": "zoo",
    "load_config": "config",
    "load_model": "model",
    "train": "api",
}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    value = getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
