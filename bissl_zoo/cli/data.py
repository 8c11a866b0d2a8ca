"""Prepare image data: check your data, fetch and check sets by name, pack and index shards.

bissl data --check /data/mine                    # class folders, images, VOC, COCO or shards
bissl data --check mine/train.json --images mine/images

bissl data --list
bissl data food101
bissl data --check food101
bissl data --to-shards /data/imagenet/train --out /data/shards --name imagenet
bissl data --index-shards 'https://host/laion-{000000..000146}.tar' --out indexes/laion

A config then reads them: L(build_dataset)(name="food101", split="train"), or (name="shards", urls="/data/shards").
Sets by name lie in $BISSL_ZOO_DATASETS. See docs/data.md.
"""

import argparse
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def parse(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "dataset", nargs="?", metavar="NAME", help="fetch this set if it is missing, and count its images"
    )
    what.add_argument("--list", action="store_true", help="list the sets that are known by name")
    what.add_argument("--to-shards", metavar="FOLDER", help="pack the images at any depth of this folder")
    what.add_argument("--index-shards", nargs="+", metavar="URL", help="write index.json of these shards")
    what.add_argument("--check", metavar="PATH|NAME", help="open every file of your data, or of a set by name")
    parser.add_argument(
        "--images", metavar="DIR", help="folder of the images of a JSON file to --check; default: near it"
    )
    parser.add_argument(
        "--root", type=Path, metavar="DIR", help="folder of the sets by name; default: $BISSL_ZOO_DATASETS"
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="output folder of shards or an index; default for an index: beside the shards",
    )
    parser.add_argument("--samples-per-shard", type=int, default=10_000, metavar="N", help="images per shard (10000)")
    parser.add_argument("--name", metavar="NAME", help="prefix of the shards' names; default: the folder's name")
    parser.add_argument("--seed", type=int, default=0, help="seed of the order of the images (0)")
    parser.add_argument(
        "--on-bad", choices=["error", "skip"], default="error", help="for images that cannot be decoded (error)"
    )
    workers = min(4, os.cpu_count() or 1)
    parser.add_argument(
        "--num-workers", type=int, default=workers, metavar="N", help=f"number of worker processes ({workers})"
    )
    args = parser.parse_args(argv)
    if args.to_shards is not None and args.out is None:
        parser.error("--to-shards needs --out DIR, a new or empty folder")
    if args.samples_per_shard < 1:
        parser.error("--samples-per-shard must be 1 or more")
    return args


def pack(args: argparse.Namespace) -> int:
    """Pack a folder and print the result."""
    from bissl_zoo.data.prepare.pack import pack_folder

    name = args.name or re.sub(r"[^A-Za-z0-9_-]+", "-", Path(args.to_shards).absolute().name)
    settings = (args.samples_per_shard, args.seed, args.on_bad, args.num_workers)
    shards, skipped = pack_folder(args.to_shards, args.out, name, *settings)
    for problem in skipped[:20]:
        print(f"skipped    {problem}")
    images, size = (sum(getattr(shard, key) for shard in shards) for key in ("samples", "bytes"))
    print(f"wrote      {args.out}: {len(shards)} shards, {images} images, {size:,} bytes")
    print(f"skipped    {len(skipped)} images that cannot be decoded")
    return 0


def index(args: argparse.Namespace) -> int:
    """Index shards and print where."""
    from bissl_zoo.data.prepare.pack import index_shards

    print(f"wrote      {index_shards(args.index_shards, args.out, args.num_workers)}")
    return 0


def prepare_set(args: argparse.Namespace) -> int:
    """Fetch a set by name if it is missing, and print its size."""
    from bissl_zoo.data.prepare.check import prepare

    fetched, result = prepare(args.dataset)
    print("".join(f"fetched    {folder}\n" for folder in fetched), end="")
    return print_survey(result)


def list_sets(args: argparse.Namespace) -> int:
    """Print the sets that are known by name."""
    from bissl_zoo.data.prepare.check import list_sets

    print(list_sets())
    return 0


def check(args: argparse.Namespace) -> int:
    """Check a set by name, or the data at a path."""
    from bissl_zoo.data.prepare.check import known_sets, survey, survey_path

    if args.check in known_sets() or not (os.sep in args.check or Path(args.check).exists()):
        return print_survey(survey(args.check, open_files=True, num_workers=args.num_workers))
    return print_survey(survey_path(args.check, args.images, args.num_workers))


def print_survey(survey: Any) -> int:
    """Print the sizes and problems of a set, and return the exit status: 1 if there are problems."""
    print(survey.table(), end="\n" if survey.splits else "")
    print("".join(f"note       {note}\n" for note in survey.notes), end="")
    print("".join(f"wrong      {problem}\n" for problem in survey.problems), end="")
    print(f"checked    {survey.where}: {len(survey.problems)} problems")
    return 1 if survey.problems else 0


def run(args: argparse.Namespace) -> int:
    """Run the task of the first argument."""
    if args.root is not None:
        os.environ["BISSL_ZOO_DATASETS"] = str(args.root)
    tasks = {"to_shards": pack, "index_shards": index, "check": check, "list": list_sets, "dataset": prepare_set}
    return next(task for name, task in tasks.items() if getattr(args, name))(args)
