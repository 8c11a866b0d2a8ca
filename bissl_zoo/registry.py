"""Registries of the parts of a run, and the `build_*` functions that configs call.

To add a part, decorate a class or function with `@PRETEXT_METHODS.register("mine")` in a module that the config
imports (`train.imports`), or that an installed package lists among the entry points of the group `bissl_zoo.plugins`.
"""

import fnmatch
import functools
import importlib
import importlib.metadata
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from fvcore.common.registry import Registry as _FvcoreRegistry

from bissl_zoo.errors import RegistryError, argument_problem, did_you_mean

if TYPE_CHECKING:
    from bissl_zoo.config.domains import Domain

T = TypeVar("T", bound=Callable[..., Any])

logger = logging.getLogger(__name__)

_MAX_LISTED = 20
#: entry points name modules that register parts: `parts = my_package.parts`
PLUGIN_GROUP = "bissl_zoo.plugins"


@functools.cache  # once per process
def load_plugins() -> list[str]:
    """Import the modules of the installed plug-ins; log and return the problem of each that cannot be imported."""
    problems = []
    for point in sorted(importlib.metadata.entry_points(group=PLUGIN_GROUP), key=lambda point: point.value):
        try:
            point.load()
        except Exception as error:
            package = f"{point.dist.name} {point.dist.version}" if point.dist else point.value
            problems.append(f"The plug-in '{point.name}' of {package} failed: {type(error).__name__}: {error}")
            logger.warning(problems[-1])
    return problems


class Registry(_FvcoreRegistry):
    """fvcore's registry with explicit names, wildcards and errors that suggest the nearest name.

    Iteration yields `(name, object)` pairs and `name in registry` tests a name, as in fvcore.

    Args:
        name: name of the registry, such as "PRETEXT_METHODS".
        kind: noun for an entry in messages, such as "pretext method".
        modules: modules that register entries; imported at the first access, since their libraries take seconds.
    """

    def __init__(self, name: str, kind: str, modules: Sequence[str] = ()) -> None:
        super().__init__(name)
        self.kind = kind
        self._arguments: dict[str, dict[str, Domain]] = {}
        self._modules = list(modules)

    def _import_modules(self) -> None:
        while self._modules:
            module = self._modules.pop()  # before the import, since the module may access the registry
            try:
                importlib.import_module(module)
            except BaseException:
                self._modules.append(module)
                raise

    def _import_all(self) -> None:
        self._import_modules()
        load_plugins()

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        self._import_all()
        return super().__iter__()

    def __contains__(self, name: object) -> bool:
        self._import_all()
        return super().__contains__(name)

    def __repr__(self) -> str:
        self._import_all()
        return super().__repr__()

    def register(self, name: str, args: Mapping[str, "Domain"] | None = None) -> Callable[[T], T]:
        """Return a decorator that registers a class or function as `name` and returns it unchanged.

        Registering the same definition again, as a reloaded module does, replaces it.

        Args:
            args: domains of its arguments (`bissl_zoo.config.domains`): they are checked before a run starts, and the
                config of a zoo entry may set these and those of `bissl_zoo.config.arguments`, but no others.
        Raises:
            RegistryError: another definition has this name, or no name is given.
        """
        if not isinstance(name, str) or not name:
            raise RegistryError(f'Register a {self.kind} under a name: @{self._name}.register("name"), not {name!r}.')

        def decorate(obj: T) -> T:
            if not _definition(obj).startswith(f"{__package__}."):
                self._import_modules()  # so that a name of the package raises an error here, in the user's module
            previous = self._obj_map.get(name)
            if previous is not None and _definition(previous) != _definition(obj):
                raise RegistryError(
                    f"The {self.kind} '{name}' is already registered as {_definition(previous)}; "
                    f"register {_definition(obj)} under another name."
                )
            self._obj_map[name] = obj
            self._arguments[name] = dict(args or {})
            return obj

        return decorate

    def get(self, name: str) -> Any:
        """Return the object registered as `name`; raise RegistryError with the nearest name if there is none.

        Plug-ins are imported only for names that the package and `train.imports` do not register.
        """
        self._import_modules()
        problems = []
        if isinstance(name, str) and name not in self._obj_map:
            problems = load_plugins()
        if isinstance(name, str) and name in self._obj_map:
            return self._obj_map[name]
        hint = "".join(f" {problem}" for problem in problems)
        if not self._obj_map:
            advice = f"none is registered. Import the module that defines it.{hint}"
            raise RegistryError(f"Unknown {self.kind} {name!r}: {advice}")
        names = self.list()
        listed = ", ".join(names[:_MAX_LISTED])
        if len(names) > _MAX_LISTED:
            listed += f", ... ({len(names)} in all)"
        raise RegistryError(
            f"Unknown {self.kind} {name!r}.{did_you_mean(str(name), names)} Registered: {listed}.{hint}"
        )

    def arguments(self, name: str) -> dict[str, "Domain"]:
        """Return the domains that `name` was registered with; raise RegistryError as `get`."""
        self.get(name)
        return self._arguments[name]

    def list(self, pattern: str = "*") -> list[str]:
        """Return the sorted names that match a shell wildcard pattern such as "resnet*"."""
        self._import_all()
        return sorted(fnmatch.filter(self._obj_map, pattern))

    def build(self, name: str, /, **kwargs: Any) -> Any:
        """Call the object registered as `name` with `kwargs`.

        Raises:
            RegistryError: an unknown name, an unexpected keyword or a missing one. Errors of the call are passed on.
        """
        target = self.get(name)
        if problem := argument_problem(target, kwargs):
            raise RegistryError(f"The {self.kind} '{name}' {problem}")
        return target(**kwargs)


def _definition(obj: Any) -> str:
    """Return the dotted name of `obj`, which is equal before and after a reload."""
    if isinstance(obj, functools.partial):
        return f"{_definition(obj.func)} with {obj.args!r}, {obj.keywords!r}"
    return f"{obj.__module__}.{getattr(obj, '__qualname__', repr(obj))}"


# (B, 3, H, W) images -> dictionary of feature maps by stage
BACKBONES = Registry("BACKBONES", "backbone", ["bissl_zoo.backbones"])
# self-supervised methods: views, head and loss; the backbone is an argument
PRETEXT_METHODS = Registry("PRETEXT_METHODS", "pretext method", ["bissl_zoo.pretext"])
# supervised tasks: head, loss, predictions and evaluator; the backbone is an argument
DOWNSTREAM_TASKS = Registry("DOWNSTREAM_TASKS", "downstream task", ["bissl_zoo.downstream"])
# solvers of A x = v for a symmetric linear operator A on flat vectors
SOLVERS = Registry("SOLVERS", "hypergradient solver", ["bissl_zoo.bilevel"])
HYPERGRADIENT_SOLVERS = SOLVERS  # the name in earlier versions
# map-style data sets of (PIL image, target)
DATASETS = Registry(
    "DATASETS",
    "data set",
    ["bissl_zoo.data.shards"]
    + [f"bissl_zoo.data.datasets.{name}" for name in ("classification", "coco", "digit_scenes", "folder", "voc")],
)
# stages of the pipeline: pretrain, bissl, finetune, ...
STAGES = Registry("STAGES", "stage", ["bissl_zoo.engine.stages"])


def build_backbone(name: str, **kwargs: Any) -> Any:
    """Build the backbone registered as `name` with `kwargs`; see :meth:`Registry.build`."""
    return BACKBONES.build(name, **kwargs)


def build_pretext(name: str, **kwargs: Any) -> Any:
    """Build the pretext method registered as `name` with `kwargs`; see :meth:`Registry.build`."""
    return PRETEXT_METHODS.build(name, **kwargs)


def build_task(name: str, **kwargs: Any) -> Any:
    """Build the downstream task registered as `name` with `kwargs`; see :meth:`Registry.build`."""
    return DOWNSTREAM_TASKS.build(name, **kwargs)


def build_solver(name: str, **kwargs: Any) -> Any:
    """Build the hypergradient solver registered as `name` with `kwargs`; see :meth:`Registry.build`."""
    return SOLVERS.build(name, **kwargs)


def build_dataset(name: str, **kwargs: Any) -> Any:
    """Build the data set registered as `name` with `kwargs`; see :meth:`Registry.build`."""
    return DATASETS.build(name, **kwargs)
