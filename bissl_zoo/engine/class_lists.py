"""What to type where two data sets of a config have different classes."""

import inspect
import json
import shlex
from collections.abc import Sequence

from omegaconf import DictConfig

from bissl_zoo.data.datasets.boxes import shown_names
from bissl_zoo.registry import DATASETS

#: classes that an override can be expected to name
_MOST_TYPED = 40


def unequal_classes(cfg: DictConfig, role: str, classes: Sequence[str], other: str, others: Sequence[str]) -> str:
    """The message for two roles of `cfg.dataloader` with unlike classes: which differ, and the overrides that help."""
    told = f"dataloader.{role} has the classes {_shown(classes)} and dataloader.{other} {_shown(others)}. "
    lacks = {other: _without(classes, others), role: _without(others, classes)}
    differing = [f"dataloader.{one} lacks {_shown(names)}" for one, names in lacks.items() if names]
    told += f"{'; '.join(differing) or 'They are the same in another order'}. "
    wanted = list(classes) if not lacks[role] else list(others) if not lacks[other] else [*classes, *lacks[role]]
    changed = [one for one, names in ((role, classes), (other, others)) if list(names) != wanted]
    for one in changed:
        if not _takes_classes(cfg, one):
            name = cfg.dataloader[one].dataset.get("name")
            return f"{told}The classes of '{name}' are fixed, so let both read splits of one data set."
    typed = [_override(cfg, one, wanted) for one in changed]
    return f"{told}Give both the same list; a class may have no images in one of them:\n  " + " ".join(typed)


def _override(cfg: DictConfig, role: str, classes: Sequence[str]) -> str:
    add = "" if "classes" in cfg.dataloader[role].dataset else "+"
    key = f"{add}dataloader.{role}.dataset.classes"
    if len(classes) <= _MOST_TYPED:
        return shlex.quote(f"{key}={json.dumps(list(classes), ensure_ascii=False)}")
    first = json.dumps(list(classes[:3]), ensure_ascii=False)[:-1]
    return f"'{key}={first}, ...]' (all {len(classes)}, better in the config file)"


def _takes_classes(cfg: DictConfig, role: str) -> bool:
    """Whether a role's data set has the argument `classes`; one that is not registered is taken to have it."""
    name = cfg.dataloader[role].dataset.get("name")
    return name not in DATASETS or "classes" in inspect.signature(DATASETS.get(name)).parameters


def _without(names: Sequence[str], others: Sequence[str]) -> list[str]:
    held = set(others)
    return [name for name in names if name not in held]


def _shown(names: Sequence[str]) -> str:
    return shown_names([repr(name) for name in names])
