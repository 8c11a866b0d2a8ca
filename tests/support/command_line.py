"""Call commands of `bissl` in this process."""

import contextlib
import sys
from pathlib import Path

import bissl_zoo.registry as registry
from bissl_zoo.cli import main, parse_args

#: scripts of tools/ that have another name than their command
COMMAND_OF = {"train_net": "train", "analyze_model": "analyze", "check_hypergradient": "check", "prepare_data": "data"}
#: modules of the examples, which register parts
EXAMPLES = {"examples", *(file.stem for file in Path(__file__).resolve().parents[2].glob("examples/*/*.py"))}


class Command:
    """A command by its name, or by that of its script in tools/."""

    def __init__(self, name):
        self.name = COMMAND_OF.get(name, name)

    def cli(self, arguments):
        """Run the command and return its exit status."""
        return main([self.name, *map(str, arguments)])

    def parse_args(self, arguments):
        """Return the parsed arguments without running the command."""
        return parse_args([self.name, *map(str, arguments)])[1]


load_tool = Command


@contextlib.contextmanager
def temporary_registrations():
    """Undo registrations and imports at the end of the block, as the end of a process does."""
    before = {r: dict(r._obj_map) for r in vars(registry).values() if isinstance(r, registry.Registry)}
    modules = set(sys.modules)
    try:
        yield
    finally:
        for registered, names in before.items():
            for name in set(registered._obj_map) - set(names):
                if not registered._obj_map[name].__module__.startswith("bissl_zoo."):
                    del registered._obj_map[name]
        for name in set(sys.modules) - modules:
            if name.split(".")[0] in EXAMPLES:
                del sys.modules[name]
