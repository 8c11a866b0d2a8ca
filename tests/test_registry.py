import functools
import sys

import pytest

from bissl_zoo import registry
from bissl_zoo.errors import RegistryError
from bissl_zoo.registry import Registry


def scale(factor: float, offset: float = 0.0) -> tuple[float, float]:
    return factor, offset


class Method:
    def __init__(self, projector: list[int], *, temperature: float = 0.5) -> None:
        if temperature <= 0:
            raise TypeError("temperature must be positive")
        self.projector, self.temperature = projector, temperature


@pytest.fixture
def methods() -> Registry:
    methods = Registry("PRETEXT_METHODS", "pretext method")
    methods.register("simclr")(Method)
    methods.register("byol")(scale)
    return methods


def test_register_returns_the_object_and_get_finds_it(methods):
    assert methods.register("again")(Method) is Method
    assert methods.get("simclr") is Method
    assert "byol" in methods and "moco" not in methods
    assert dict(methods) == {"simclr": Method, "byol": scale, "again": Method}


def test_list_is_sorted_and_takes_wildcards(methods):
    assert methods.list() == ["byol", "simclr"]
    assert methods.list("sim*") == ["simclr"]
    assert methods.list("nothing*") == []


def test_unknown_name_names_the_nearest_and_the_registered(methods):
    with pytest.raises(RegistryError) as error:
        methods.get("simcrl")
    assert str(error.value) == ("Unknown pretext method 'simcrl'. Did you mean 'simclr'? Registered: byol, simclr.")
    with pytest.raises(RegistryError, match=r"Unknown pretext method \['simclr'\]"):
        methods.get(["simclr"])


def test_long_lists_are_shortened_and_empty_registries_say_so():
    many = Registry("MANY", "thing")
    with pytest.raises(RegistryError, match="none is registered. Import the module"):
        many.get("x")
    for i in range(300):
        many.register(f"thing{i:03d}")(scale)
    with pytest.raises(RegistryError) as error:
        many.get("x")
    assert str(error.value).endswith("thing019, ... (300 in all).")


def test_a_name_is_registered_once_except_by_the_same_definition(methods):
    def redefine() -> type:
        class Reloaded:
            pass

        return Reloaded

    first, second = redefine(), redefine()
    methods.register("mine")(first)
    methods.register("mine")(second)
    assert methods.get("mine") is second
    with pytest.raises(RegistryError, match=r"'simclr' is already registered as .*Method; register .*scale"):
        methods.register("simclr")(scale)
    methods.register("half")(functools.partial(scale, factor=0.5))
    methods.register("half")(functools.partial(scale, factor=0.5))
    with pytest.raises(RegistryError, match="already registered"):
        methods.register("half")(functools.partial(scale, factor=0.25))


def test_register_needs_a_name(methods):
    with pytest.raises(RegistryError, match=r'@PRETEXT_METHODS.register\("name"\)'):
        methods.register(Method)


@pytest.mark.parametrize("target", [Method, functools.partial(Method, temperature=0.1)])
def test_wrong_keyword_names_the_nearest_and_the_accepted(methods, target):
    methods.register("target")(target)
    with pytest.raises(RegistryError) as error:
        methods.build("target", projector=[8], temprature=0.1)
    assert str(error.value) == (
        "The pretext method 'target' does not take 'temprature'. Did you mean 'temperature'? "
        "It accepts: projector, temperature."
    )


def test_missing_keyword_is_named(methods):
    with pytest.raises(RegistryError, match=r"'simclr' needs 'projector'. It accepts: projector, temperature."):
        methods.build("simclr", temperature=0.1)
    with pytest.raises(RegistryError, match=r"'byol' needs 'factor'. It accepts: factor, offset."):
        methods.build("byol")


def test_functions_partials_and_open_keywords_are_built(methods):
    methods.register("partial")(functools.partial(scale, offset=1.0))
    methods.register("open")(lambda size, **kwargs: (size, kwargs))
    methods.register("builtin")(dict)  # has no signature to check
    assert methods.build("byol", factor=2.0) == (2.0, 0.0)
    assert methods.build("partial", factor=2.0) == (2.0, 1.0)
    assert methods.build("open", size=3, name="any", key=1) == (3, {"name": "any", "key": 1})
    assert methods.build("builtin", a=1) == {"a": 1}
    with pytest.raises(RegistryError, match="needs 'size'"):
        methods.build("open", sizes=3)


def test_an_error_inside_the_call_is_passed_on(methods):
    with pytest.raises(TypeError, match="temperature must be positive"):
        methods.build("simclr", projector=[], temperature=-1.0)


@pytest.mark.parametrize(
    ("build", "table"),
    [
        ("build_backbone", "BACKBONES"),
        ("build_pretext", "PRETEXT_METHODS"),
        ("build_task", "DOWNSTREAM_TASKS"),
        ("build_solver", "SOLVERS"),
        ("build_dataset", "DATASETS"),
    ],
)
def test_each_build_function_uses_its_registry(monkeypatch, build, table):
    getattr(registry, table).list()  # the modules of the package register themselves before the patch
    monkeypatch.setattr(getattr(registry, table), "_obj_map", {"only_here": scale})
    assert getattr(registry, build)(name="only_here", factor=3.0) == (3.0, 0.0)
    assert f"Registry of {table}" in repr(getattr(registry, table))
    with pytest.raises(RegistryError, match="Did you mean 'only_here'"):
        getattr(registry, build)("onlyhere")


def test_modules_of_a_registry_are_imported_at_the_first_access(tmp_path, monkeypatch):
    (tmp_path / "parts_at_first_access.py").write_text(
        "import builtins\nbuiltins.METHODS.register('ours')(int)\nassert 'ours' in builtins.METHODS\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    methods = Registry("METHODS", "method", ["parts_at_first_access"])
    monkeypatch.setattr("builtins.METHODS", methods, raising=False)
    assert methods._obj_map == {}
    for ask in (lambda: methods.get("ours"), methods.list, lambda: "ours" in methods, lambda: dict(methods)):
        assert ask()


def test_the_second_registration_of_a_name_fails_and_not_the_packages_own(tmp_path, monkeypatch):
    (tmp_path / "parts_of_the_package.py").write_text("import builtins\nbuiltins.METHODS.register('ours')(int)\n")
    monkeypatch.syspath_prepend(tmp_path)
    methods = Registry("METHODS", "method", ["parts_of_the_package"])
    monkeypatch.setattr("builtins.METHODS", methods, raising=False)
    with pytest.raises(RegistryError, match="'ours' is already registered as builtins.int; register .*scale"):
        methods.register("ours")(scale)
    assert methods.get("ours") is int


def plugin(folder, name, code):
    """Write an installed package: a module, and its metadata with an entry point."""
    (folder / f"{name}.py").write_text(code)
    metadata = folder / f"{name}-1.5.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.5\n")
    (metadata / "entry_points.txt").write_text(f"[bissl_zoo.plugins]\nparts = {name}\n")


@pytest.fixture
def plugins(tmp_path, monkeypatch):
    """Install two plug-ins, of which one fails."""
    register = (
        "from bissl_zoo.registry import PRETEXT_METHODS\n@PRETEXT_METHODS.register('of_plugin')\nclass Mine: ...\n"
    )
    plugin(tmp_path, "good_plugin", register)
    plugin(tmp_path, "sad_plugin", "import no_such_library\n")
    monkeypatch.setattr(registry.PRETEXT_METHODS, "_obj_map", dict(registry.PRETEXT_METHODS))
    monkeypatch.syspath_prepend(tmp_path)
    registry.load_plugins.cache_clear()
    yield
    registry.load_plugins.cache_clear()
    sys.modules.pop("good_plugin", None)


def test_an_installed_plugin_is_imported_when_a_name_is_looked_up_that_the_package_lacks(plugins):
    assert registry.PRETEXT_METHODS.get("simclr") and "good_plugin" not in sys.modules
    assert registry.PRETEXT_METHODS.get("of_plugin").__module__ == "good_plugin"
    assert "of_plugin" in registry.PRETEXT_METHODS.list()


def test_a_plugin_that_fails_is_named_and_leaves_the_others(plugins, caplog):
    failed = "The plug-in 'parts' of sad_plugin 1.5 failed: ModuleNotFoundError"
    assert "of_plugin" in registry.PRETEXT_METHODS.list() and caplog.text.count(failed) == 1
    with pytest.raises(RegistryError, match=f"Unknown pretext method 'of_plugn'. Did you mean 'of_plugin'.*{failed}"):
        registry.PRETEXT_METHODS.get("of_plugn")
    assert caplog.text.count(failed) == 1
