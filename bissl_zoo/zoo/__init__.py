"""The model zoo: find, check and load published backbones (hub), publish them (publish), describe them (card)."""

from bissl_zoo.zoo.card import EntryMetadata, render_card
from bissl_zoo.zoo.hub import (
    Entry,
    Zoo,
    as_zoo,
    create_backbone,
    default_zoo,
    get_config,
    get_entry,
    list_backbones,
    load_entry_weights,
)
from bissl_zoo.zoo.publish import PublishedEntry, publish_entry

__all__ = [
    "Entry",
    "EntryMetadata",
    "PublishedEntry",
    "Zoo",
    "as_zoo",
    "create_backbone",
    "default_zoo",
    "get_config",
    "get_entry",
    "list_backbones",
    "load_entry_weights",
    "publish_entry",
    "render_card",
]
