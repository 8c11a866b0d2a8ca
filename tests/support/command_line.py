"""Call commands of `bissl` in this process."""

from bissl_zoo.cli import main, parse_args

#: scripts of tools/ that have another name than their command
COMMAND_OF = {"train_net": "train", "analyze_model": "analyze", "check_hypergradient": "check", "prepare_data": "data"}


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
