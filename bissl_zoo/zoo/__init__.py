"""The model zoo: find and load backbones (hub, create), publish them (publish), and where zoos are stored (stores)."""

import importlib
from typing import Any

#: public names and their modules, imported on first use: torch and timm take seconds
_PUBLIC = {
    "Entry": "hub",
    "EntryMetadata": "publish",
    "PublishedEntry": "publish",
    "Zoo": "hub",
    "as_zoo": "hub",
    "create_backbone": "create",
    "default_zoo": "hub",
    "get_config": "hub",
    "get_entry": "hub",
    "list_backbones": "hub",
    "load_entry_weights": "hub",
    "publish_entry": "publish",
    "read_entry": "create",
    "render_card": "card",
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
