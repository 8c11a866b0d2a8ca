"""Draw data, views, predictions and embeddings as images.

bissl visualize data --config-file configs/bissl/voc_det.py --split test
bissl visualize views --config-file configs/pretrain/dino_imagenet.py pretext.augmentation.local_crops=4
bissl visualize predictions runs/a --worst
bissl visualize embeddings runs/a zoo:resnet18.simclr

Without --config-file the config of the run directory is used. Images are written to images/ in the run directory or in
the working directory: data_train.png, views.png and so on. --output names another file; its suffix (.png, .pdf, .svg)
is the format.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bissl_zoo.engine import ROLES
from bissl_zoo.errors import ConfigError
from bissl_zoo.report import IMAGES

if TYPE_CHECKING:
    from omegaconf import DictConfig

#: help text, default number of images, and name of the positional arguments
COMMANDS = {
    "data": ("Draw images with their targets.", 16, "RUN"),
    "views": ("Draw images and the views that the pretext method trains on.", 6, "RUN"),
    "predictions": ("Draw test images with their targets and the predictions of a run's model.", 16, "RUN"),
    "embeddings": ("Draw test features of backbones before fine-tuning by t-SNE, side by side.", IMAGES, "SOURCE"),
}


def parse(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line; words with `=` that are not the name of a file are overrides of the config."""
    help = f"{', '.join(COMMANDS)}; COMMAND --help lists the options of each"
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help=help)
    parser.add_argument("rest", nargs=argparse.REMAINDER, metavar="...", help="its arguments")
    first = parser.parse_args(argv)
    command = command_parser(parser.prog, first.command)
    args = command.parse_intermixed_args(first.rest)  # words before and after options
    args.command = first.command
    args.sources = [word for word in args.words if "=" not in word or Path(word).exists()]
    args.overrides = [word for word in args.words if word not in args.sources]
    if args.command == "embeddings" and not args.sources:
        command.error("give a SOURCE: a run directory, zoo:NAME, or a .safetensors file")
    if args.command != "embeddings" and len(args.sources) > (args.config_file is None):
        command.error("give --config-file, or one run directory")
    if args.images < 1:
        command.error("--images must be 1 or more")
    return args


def command_parser(prog: str, name: str) -> argparse.ArgumentParser:
    """Return the parser of one command."""
    help, images, sources = COMMANDS[name]
    parser = argparse.ArgumentParser(prog=f"{prog} {name}", description=help)
    parser.add_argument("words", nargs="*", metavar=sources, help="also overrides of the config, as KEY=VALUE")
    parser.add_argument("--config-file", metavar="FILE", help="a config of configs/ or your own; default: the run's")
    parser.add_argument("--images", type=int, default=images, metavar="N", help=f"maximum number of images ({images})")
    parser.add_argument("--seed", type=int, default=0, help="random seed of the chosen images (0)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="output file (.png, .pdf or .svg)")
    if name == "data":
        parser.add_argument("--split", choices=ROLES, default="train", help="data set of the config (train)")
    if name == "predictions":
        which = parser.add_mutually_exclusive_group()
        which.add_argument("--worst", action="store_true", help="images with the lowest scores")
        which.add_argument("--random", dest="worst", action="store_false", help="random images (default)")
        parser.add_argument(
            "--threshold", type=float, default=0.5, metavar="S", help="minimum score of drawn boxes (0.5)"
        )
    if name == "embeddings":
        parser.add_argument("--architecture", metavar="NAME", help="timm name, for files without one")
    return parser


def run(args: argparse.Namespace) -> int:
    """Draw and save an image."""
    from bissl_zoo.report import visualize
    from bissl_zoo.report.sheets import check_format, save_figure

    if args.output:
        check_format(args.output)
    cfg = config(args)
    output = args.output or default_output(args, cfg)
    if args.command == "data":
        figure = visualize.data_figure(cfg, args.split, args.images, args.seed)
    elif args.command == "views":
        figure = visualize.views_figure(cfg, args.images, args.seed)
    elif args.command == "predictions":
        figure = visualize.predictions_figure(cfg, args.images, args.seed, args.worst, args.threshold)
    else:
        figure = visualize.embeddings_figure(cfg, args.sources, args.images, args.seed, args.architecture).figure
    save_figure(figure, output)
    print(f"image {output}")
    return 0


def config(args: argparse.Namespace) -> "DictConfig":
    """Return the config of --config-file or of the first run among the sources."""
    from bissl_zoo.engine.checks import check_config, open_config
    from bissl_zoo.runs.directory import CONFIG_FILE

    name, overrides, run = args.config_file, args.overrides, first_run(args)
    if name is None and run is None:
        given = f"; {', '.join(args.sources)} is not one" if args.sources else ""
        raise ConfigError(f"Give --config-file or the directory of a run{given}.")
    if name is None:
        name = str(run / CONFIG_FILE)
        overrides = [f"train.init={json.dumps(str(run))}", *overrides] if args.command == "predictions" else overrides
    cfg = open_config(name, overrides)
    check_config(cfg, name)
    return cfg


def first_run(args: argparse.Namespace) -> Path | None:
    """Return the first run directory among the sources, or None."""
    from bissl_zoo.runs.directory import CONFIG_FILE

    return next((Path(source) for source in args.sources if (Path(source) / CONFIG_FILE).is_file()), None)


def default_output(args: argparse.Namespace, cfg: "DictConfig") -> Path:
    """Return the file to write without --output."""
    run = first_run(args) or (Path(cfg.train.init or ".") if args.command == "predictions" else Path("."))
    name = f"data_{args.split}" if args.command == "data" else args.command
    return run / "images" / f"{name}.png"
