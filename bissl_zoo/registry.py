"""Names for the parts a run is made of, and the `build_*` functions that configs call.

Adding a part takes no change here: a class or function decorated with `@PRETEXT_METHODS.register("mine")`, in a module
that the config imports, is found by its name everywhere.
"""

import fnmatch
import functools
import importlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from fvcore.common.registry import Registry as _FvcoreRegistry

from bissl_zoo.errors import RegistryError, did_you_mean

T = TypeVar("T", bound=Callable[..., Any])

_MAX_LISTED = 20


class Registry(_FvcoreRegistry):
    """fvcore's registry with explicit names, wildcards and errors that say which name was meant.

    Iteration yields `(name, object)` pairs and `name in registry` tests a name, as in fvcore.

    Args:
        name: what the registry is called in its printed form, such as "PRETEXT_METHODS".
        kind: what one entry is, in words, for messages: "pretext method".
        modules: that register entries when they are imported, which is done when somebody first asks for one: the
            libraries behind them take seconds.
    """

    def __init__(self, name: str, kind: str, modules: Sequence[str] = ()) -> None:
        super().__init__(name)
        self.kind = kind
        self._modules = list(modules)

    def _import_modules(self) -> None:
        while self._modules:
            module = self._modules.pop()  # first, as the module may ask for what it has registered itself
            try:
                importlib.import_module(module)
            except BaseException:
                self._modules.append(module)
                raise

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        self._import_modules()
        return super().__iter__()

    def __contains__(self, name: object) -> bool:
        self._import_modules()
        return super().__contains__(name)

    def __repr__(self) -> str:
        self._import_modules()
        return super().__repr__()

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that registers a class or function as `name` and returns it unchanged.

        Registering the same definition again, as a reloaded module does, replaces it.

        Raises:
            RegistryError: when another definition holds the name already, or no name is given.
        """
        if not isinstance(name, str) or not name:
            raise RegistryError(
                f'A {self.kind} is registered under a name: @{self._name}.register("name"), not {name!r}.'
            )

        def decorate(obj: T) -> T:
            if not callable(obj):
                raise RegistryError(f"The {self.kind} '{name}' must be a class or a function, not {obj!r}.")
            if not _definition(obj).startswith(f"{__package__}."):
                self._import_modules()  # so that who takes a name of ours is told, and not we
            held = self._obj_map.get(name)
            if held is not None and _definition(held) != _definition(obj):
                raise RegistryError(
                    f"The {self.kind} '{name}' is registered already, as {_definition(held)}; "
                    f"register {_definition(obj)} under another name."
                )
            self._obj_map[name] = obj
            return obj

        return decorate

    def get(self, name: str) -> Any:
        """The object registered as `name`; RegistryError with the nearest name where there is none."""
        self._import_modules()
        if isinstance(name, str) and name in self._obj_map:
            return self._obj_map[name]
        if not self._obj_map:
            raise RegistryError(f"Unknown {self.kind} {name!r}: none is registered; import the module that defines it.")
        names = self.list()
        listed = ", ".join(names[:_MAX_LISTED])
        if len(names) > _MAX_LISTED:
            listed += f", ... ({len(names)} in all)"
        raise RegistryError(f"Unknown {self.kind} {name!r}.{did_you_mean(str(name), names)} Registered: {listed}.")

    def list(self, pattern: str = "*") -> list[str]:
        """Sorted names that match a shell wildcard pattern such as "resnet*"."""
        self._import_modules()
        return sorted(fnmatch.filter(self._obj_map, pattern))

    def build(self, name: str, /, **kwargs: Any) -> Any:
        """Call the object registered as `name` with `kwargs`, once its signature is known to accept them.

        Raises:
            RegistryError: for an unknown name, a keyword that it does not take or one that it lacks. What the call
                itself raises is passed on unchanged.
        """
        target = self.get(name)
        self._check_keywords(name, target, kwargs)
        return target(**kwargs)

    def _check_keywords(self, name: str, target: Callable[..., Any], kwargs: dict[str, Any]) -> None:
        try:
            parameters = inspect.signature(target).parameters.values()
        except (TypeError, ValueError):  # some builtins have no signature; the call itself will tell
            return
        by_keyword = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        accepted = [p.name for p in by_keyword]
        accepts = f"It accepts: {', '.join(accepted) or 'no arguments'}."
        wrong = [key for key in kwargs if key not in accepted]
        if wrong and not any(p.kind == p.VAR_KEYWORD for p in parameters):
            raise RegistryError(
                f"The {self.kind} '{name}' does not take '{wrong[0]}'.{did_you_mean(wrong[0], accepted)} {accepts}"
            )
        missing = [p.name for p in by_keyword if p.default is p.empty and p.name not in kwargs]
        if missing:
            raise RegistryError(f"The {self.kind} '{name}' needs {', '.join(repr(m) for m in missing)}. {accepts}")


def _definition(obj: Any) -> str:
    """Where `obj` was defined, equal for the same source line before and after a reload."""
    if isinstance(obj, functools.partial):
        return f"{_definition(obj.func)} with {obj.args!r}, {obj.keywords!r}"
    return f"{obj.__module__}.{getattr(obj, '__qualname__', repr(obj))}"


# Image backbones: (B, 3, H, W) images -> a dictionary of feature maps by stage.
BACKBONES = Registry("BACKBONES", "backbone", ["bissl_zoo.backbones"])
# Self-supervised methods: the views they want, a head and a loss; the backbone is an argument.
PRETEXT_METHODS = Registry("PRETEXT_METHODS", "pretext method", ["bissl_zoo.pretext"])
# Supervised tasks: a head, a loss, predictions and their evaluator; the backbone is an argument.
DOWNSTREAM_TASKS = Registry("DOWNSTREAM_TASKS", "downstream task", ["bissl_zoo.downstream"])
# Solvers of A x = v for a symmetric linear operator A and flat vectors.
SOLVERS = Registry("SOLVERS", "hypergradient solver", ["bissl_zoo.bilevel"])
HYPERGRADIENT_SOLVERS = SOLVERS  # the name in earlier versions
# Map-style data sets of (PIL image, target).
DATASETS = Registry("DATASETS", "data set", ["bissl_zoo.data"])
# Stages of the pipeline: pretrain, bissl, finetune, ...
STAGES = Registry("STAGES", "stage", ["bissl_zoo.engine.stages"])


def build_backbone(name: str, **kwargs: Any) -> Any:
    """Backbone registered as `name`, built with `kwargs`; raises as `Registry.build`."""
    return BACKBONES.build(name, **kwargs)


def build_pretext(name: str, **kwargs: Any) -> Any:
    """Pretext method registered as `name`, built with `kwargs`; raises as `Registry.build`."""
    return PRETEXT_METHODS.build(name, **kwargs)


def build_task(name: str, **kwargs: Any) -> Any:
    """Downstream task registered as `name`, built with `kwargs`; raises as `Registry.build`."""
    return DOWNSTREAM_TASKS.build(name, **kwargs)


def build_solver(name: str, **kwargs: Any) -> Any:
    """Hypergradient solver registered as `name`, built with `kwargs`; raises as `Registry.build`."""
    return SOLVERS.build(name, **kwargs)


def build_dataset(name: str, **kwargs: Any) -> Any:
    """Data set registered as `name`, built with `kwargs`; raises as `Registry.build`."""
    return DATASETS.build(name, **kwargs)
