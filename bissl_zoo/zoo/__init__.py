"""The model zoo: find, check and load backbones (hub), publish them (publish), and weights of other projects."""

from bissl_zoo.zoo.card import EntryMetadata, render_card
from bissl_zoo.zoo.create import create_backbone
from bissl_zoo.zoo.export import export_backbone
from bissl_zoo.zoo.hub import (
    Entry,
    Zoo,
    as_zoo,
    default_zoo,
    get_config,
    get_entry,
    list_backbones,
    load_entry_weights,
)
from bissl_zoo.zoo.publish import PublishedEntry, publish_entry
from bissl_zoo.zoo.weights import read_foreign

__all__ = [
    "Entry",
    "EntryMetadata",
    "PublishedEntry",
    "Zoo",
    "as_zoo",
    "create_backbone",
    "default_zoo",
    "export_backbone",
    "get_config",
    "get_entry",
    "list_backbones",
    "load_entry_weights",
    "publish_entry",
    "read_foreign",
    "render_card",
]
