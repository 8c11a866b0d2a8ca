"""The `bissl` command: `bissl NAME ...` runs the module `bissl_zoo/cli/NAME.py`; the scripts of tools/ do the same.

The module of a command has its help as docstring, `parse(parser, argv)`, which adds the options and returns the parsed
arguments, and `run(args)`, which returns the exit status. It imports what takes seconds inside of functions, so that
help and wrong options are answered at once.
"""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from types import ModuleType

from bissl_zoo import __version__
from bissl_zoo.errors import did_you_mean, require_extra
from bissl_zoo.progress.console import exit_status

COMMANDS = {
    "new": "look at a folder of images and write a config for it",
    "train": "run the stages of a config: pretrain, BiSSL, fine-tune, evaluate, publish",
    "compare": "does BiSSL help? compare its arms over the same seeds",
    "search": "search hyperparameters of fine-tuning",
    "predict": "predict images with a fine-tuned model",
    "probe": "evaluate a frozen backbone by kNN and a linear classifier",
    "runs": "list runs, show one",
    "report": "write an HTML report of a run",
    "visualize": "draw data, views, predictions and embeddings",
    "analyze": "count parameters and operations, measure time and memory",
    "check": "check the hypergradient of a config and its solver",
    "data": "check your data, fetch known sets, pack and index shards",
    "zoo": "list, show, fetch, verify, publish and remove entries",
    "convert": "import a checkpoint of another project, or export a backbone",
    "doctor": "check the installation and this machine",
}
#: without these nothing works
REQUIRED = {"torch", "torchvision", "timm", "numpy", "fvcore", "omegaconf", "safetensors"}
#: commands that start no processes and import torch only where they need it
LIGHT = {"convert", "data", "doctor", "new", "predict", "runs", "zoo"}
#: extras of setup.py that a command needs
NEEDS = {
    "train": ("train",),
    "compare": ("train", "report"),
    "search": ("train", "report"),
    "check": ("train", "report"),
    "report": ("report",),
    "visualize": ("report",),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (`sys.argv[1:]` by default) and return the exit status."""
    try:
        return _main(sys.argv[1:] if argv is None else argv)
    except ModuleNotFoundError as error:
        if error.name not in REQUIRED:
            raise
        python = f"{sys.executable}, which has no '{error.name}'"
        print(
            f"error: this Python is {python}. Use the one of your environment: pip install bissl_zoo", file=sys.stderr
        )
        return 1


def _main(argv: Sequence[str]) -> int:
    # OpenMP threads spin while they wait and would slow loader workers on the same cores down by a factor of ten
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read once, when torch is imported
    module, args = parse_args(argv)
    extras = NEEDS.get(args.bissl_command, ())
    if status := exit_status(lambda: require_extra(*extras)):
        return status
    if args.bissl_command in LIGHT:
        return exit_status(lambda: module.run(args))
    if sys.stderr.isatty():
        print("loading PyTorch ...", file=sys.stderr, flush=True)
    from bissl_zoo.engine.launch import launch

    return launch(module.run, getattr(args, "num_gpus", 1), args)


def parse_args(argv: Sequence[str]) -> tuple[ModuleType, argparse.Namespace]:
    """Return the module of the command that `argv` begins with, and its parsed arguments."""
    commands = "\n".join(f"  {name:<10} {text}" for name, text in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="bissl",
        description="Align a self-supervised backbone with its downstream task (BiSSL), and use a zoo of the results.",
        epilog=f"commands:\n{commands}\n\n`bissl COMMAND --help` lists the options of each.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"bissl_zoo {__version__}")
    parser.add_argument("command", metavar="COMMAND", help="one of the commands below")
    parser.add_argument("rest", nargs=argparse.REMAINDER, metavar="...", help="its arguments")
    first = parser.parse_args(argv)
    if first.command not in COMMANDS:
        parser.error(f"there is no command '{first.command}'.{did_you_mean(first.command, COMMANDS)}")
    module = importlib.import_module(f"{__name__}.{first.command}")
    command = argparse.ArgumentParser(
        prog=f"bissl {first.command}",
        description=module.__doc__,
        epilog=getattr(module, "EPILOG", None),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    args = module.parse(command, first.rest)
    args.bissl_command = first.command
    return module, args


def add_config(parser: argparse.ArgumentParser, required: bool = True, help: str = "") -> None:
    """Add `--config-file` and overrides of the config."""
    help = help or "a file, a shipped config such as bissl/voc_det.py, or zoo:NAME"
    parser.add_argument("--config-file", required=required, metavar="FILE", help=help)
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="a.b=c changes a key, +a.b=c adds one, ~a.b removes one"
    )
