"""The model zoo: find, check and load backbones (hub), publish them (publish), and weights of other projects."""

import importlib
from typing import Any

#: what a backbone can be exported to
TARGETS = ("timm", "torchvision", "detectron2", "onnx", "export")

#: the public names and where they are; imported when they are first asked for, since torch and timm take seconds
_PUBLIC = {
    "Entry": "hub",
    "EntryMetadata": "card",
    "PublishedEntry": "publish",
    "Zoo": "hub",
    "as_zoo": "hub",
    "create_backbone": "create",
    "default_zoo": "hub",
    "export_backbone": "export",
    "get_config": "hub",
    "get_entry": "hub",
    "list_backbones": "hub",
    "load_entry_weights": "hub",
    "publish_entry": "publish",
    "read_foreign": "weights",
    "render_card": "card",
}

__all__ = sorted(["TARGETS", *_PUBLIC])


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    value = getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
