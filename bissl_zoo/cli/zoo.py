"""The model zoo from the command line.

bissl zoo list                                   # of $BISSL_ZOO, the checkout's model_zoo/, or the user's
bissl zoo list "*simclr*" --metric "AP50*" --zoo https://zoo.example.org
bissl zoo fetch resnet18.simclr_bissl_digit_scenes --to backbones
bissl zoo publish runs/quickstart --zoo /data/zoo
bissl zoo publish runs/compare_trash --name tf_efficientnet_lite0.bissl_trash --model --half
bissl zoo verify
"""

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path


def parse(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, help: str, json: bool = True) -> argparse.ArgumentParser:
        command = subparsers.add_parser(name, help=help, description=help)
        command.add_argument(
            "--zoo",
            action="append",
            metavar="LOCATION",
            help="folder or address; repeat for several, the first has priority",
        )
        if json:
            command.add_argument("--json", action="store_true", help="print JSON, for programs")
        return command

    command = add("list", "list the entries of a zoo")
    command.add_argument("filter", nargs="?", default="*", help="shell pattern of names")
    for key in ("pretext", "task", "architecture", "metric"):
        command.add_argument(f"--{key}", metavar="PATTERN", help=f"only entries with this {key}")
    add("show", "print the metadata of an entry").add_argument("name")
    add("card", "print the card (README.md) of an entry", json=False).add_argument("name")
    command = add("fetch", "download and verify an entry")
    command.add_argument("name")
    command.add_argument("--to", type=Path, metavar="FOLDER", help="copy it to FOLDER/NAME, for timm's local-dir:")
    add("verify", "compare every file with the index")
    command = add("publish", "publish the backbone of a finished run, or of the first seed of a comparison")
    command.add_argument("run", type=Path, help="directory of a run, or of a comparison, with its metrics of all seeds")
    command.add_argument("--name", help="name of the entry; default: train.publish.name of the run")
    command.add_argument("--arm", default="bissl", help="arm of a comparison (default: bissl)")
    command.add_argument("--model", action="store_true", help="publish the fine-tuned model, too")
    command.add_argument("--no-pretext-head", action="store_true", help="publish no pretext head")
    command.add_argument("--half", action="store_true", help="store float16: half the size, rounded to 3 digits")
    command.add_argument("--licence", help="of the weights, an SPDX identifier; default: train.publish.licence")
    command = add("remove", "remove an entry from a zoo")
    command.add_argument("name", help="with its version, for example x@1")
    command.add_argument("--yes", action="store_true", help="skip the question")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> int:
    """Run the command and return its exit status."""
    from bissl_zoo.zoo import Zoo, default_zoo
    from bissl_zoo.zoo.commands import COMMANDS

    logging.basicConfig(format="%(message)s")
    logging.getLogger("bissl_zoo").setLevel(logging.INFO)
    if args.command == "publish":
        return publish(args)
    return COMMANDS[args.command](args, Zoo(*args.zoo) if args.zoo else default_zoo())


def publish(args: argparse.Namespace) -> int:
    """Publish the backbone of a finished run, or of the first seed of an arm."""
    from bissl_zoo.engine.publishing import publish_run
    from bissl_zoo.studies.compare_report import COMPARISON_FILE, arm_to_publish
    from bissl_zoo.zoo import Zoo
    from bissl_zoo.zoo.commands import print_json

    folder, metadata = args.run, {}
    if (folder / COMPARISON_FILE).is_file():
        folder, metadata = arm_to_publish(folder, args.arm)
    if args.licence:
        metadata["licence"] = args.licence
    zoo, model = Zoo(*args.zoo) if args.zoo else None, args.model or None
    head = not args.no_pretext_head
    entry = publish_run(folder, args.name, zoo, half=args.half, model=model, pretext_head=head, **metadata)
    result = {"name": entry.name, "location": entry.location, "sha256": entry.sha256}
    return print_json(result) if args.json else print(f"published {entry.name} at {entry.location}") or 0
