"""The model zoo: find, check and load published backbones (hub), publish them (publish), describe them (card)."""

from bissl_zoo.zoo.card import render_card
from bissl_zoo.zoo.hub import (
    Zoo,
    create_backbone,
    default_zoo,
    get_entry,
    list_backbones,
    load_entry_weights,
    verify_file,
)
from bissl_zoo.zoo.publish import EntryMetadata, PublishedEntry, publish_entry

__all__ = [
    "EntryMetadata",
    "PublishedEntry",
    "Zoo",
    "create_backbone",
    "default_zoo",
    "get_entry",
    "list_backbones",
    "load_entry_weights",
    "publish_entry",
    "render_card",
    "verify_file",
]
