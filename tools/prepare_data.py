#!/usr/bin/env python
"""Prepare image data: check your own, fetch and check the sets that are known by name, pack and index shards.

python tools/prepare_data.py --check /data/mine                    # class folders, images, VOC, COCO or shards
python tools/prepare_data.py --check mine/train.json --images mine/images

python tools/prepare_data.py --list
python tools/prepare_data.py food101
python tools/prepare_data.py --check food101
python tools/prepare_data.py --to-shards /data/imagenet/train --out /data/shards --name imagenet
python tools/prepare_data.py --index-shards 'https://host/laion-{000000..000146}.tar' --out indexes/laion

A config then reads them: L(build_dataset)(name="food101", split="train"), or (name="shards", urls="/data/shards").
Sets by name lie in $BISSL_ZOO_DATASETS. See docs/data.md.
"""

import argparse
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bissl_zoo.progress.console import exit_status

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read once, when torch is imported
# what takes seconds to import is imported in the functions: --help and wrong options are answered at once

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("dataset", nargs="?", metavar="NAME", help="fetch this set if it is not there, and count it")
    what.add_argument("--list", action="store_true", help="the sets that are known by name, and what is there of them")
    what.add_argument("--to-shards", metavar="FOLDER", help="pack the images at any depth of this folder")
    what.add_argument("--index-shards", nargs="+", metavar="URL", help="write index.json of these shards")
    what.add_argument("--check", metavar="PATH|NAME", help="every file of your own data, or of a set by name")
    parser.add_argument("--images", metavar="DIR", help="where the images of a JSON file to --check lie (around it)")
    parser.add_argument("--root", type=Path, metavar="DIR", help="where sets by name lie; default: $BISSL_ZOO_DATASETS")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where shards or index go; index: beside the shards")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--samples-per-shard", type=int, metavar="N", help="images of one shard (10000)")
    size.add_argument("--shard-size", type=byte_size, metavar="SIZE", help="or most bytes of one shard, such as 1GB")
    parser.add_argument("--name", metavar="NAME", help="what shards are called; default: the folder's name")
    parser.add_argument("--seed", type=int, default=0, help="of the order of the images (0)")
    parser.add_argument(
        "--on-bad", choices=["error", "skip"], default="error", help="images that do not decode (error)"
    )
    workers = min(4, os.cpu_count() or 1)
    parser.add_argument("--num-workers", type=int, default=workers, metavar="N", help=f"processes at work ({workers})")
    args = parser.parse_args(argv)
    if args.to_shards is not None and args.out is None:
        parser.error("--to-shards needs --out DIR, a new or empty folder")
    for name in ("samples_per_shard", "shard_size"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be 1 or more")
    return args


def byte_size(text: str) -> int:
    """The number of bytes that "1GB", "500 MB", "1GiB" or "1000000" mean."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]I?)?B?", text.strip().upper())
    if match is None:
        raise argparse.ArgumentTypeError(f"'{text}' is no size such as 1GB, 500MB or 1GiB")
    return int(float(match[1]) * _UNITS[match[2] or ""])


def pack(args: argparse.Namespace) -> int:
    """Pack a folder; say what came of it, and what was left out."""
    from bissl_zoo.data.prepare.pack import pack_folder

    default = re.sub(r"[^A-Za-z0-9_-]+", "-", Path(args.to_shards).absolute().name)
    samples = args.samples_per_shard or (None if args.shard_size else 10_000)
    settings = (samples, args.shard_size, args.seed, args.on_bad, args.num_workers)
    packed = pack_folder(args.to_shards, args.out, args.name or default, *settings)
    print("\n".join(f"skipped    {problem}" for problem in packed.skipped[:20]), end="\n" if packed.skipped else "")
    images, size = (sum(getattr(shard, what) for shard in packed.shards) for what in ("samples", "bytes"))
    print(f"wrote      {args.out}: {len(packed.shards)} shards, {images} images, {size:,} bytes")
    print(f"skipped    {len(packed.skipped)} images that do not decode")
    return 0


def index(args: argparse.Namespace) -> int:
    """Index shards; say where."""
    from bissl_zoo.data.prepare.pack import index_shards

    print(f"wrote      {index_shards(args.index_shards, args.out, args.num_workers)}")
    return 0


def prepare_set(args: argparse.Namespace) -> int:
    """Fetch a set that is known by name where it is not there; say what is."""
    from bissl_zoo.data.prepare.known import prepare

    fetched, found = prepare(args.dataset)
    print("".join(f"fetched    {folder}\n" for folder in fetched), end="")
    return tell(found)


def list_sets(args: argparse.Namespace) -> int:
    """Print the sets that are known by name."""
    from bissl_zoo.data.prepare.known import listing

    print(listing())
    return 0


def tell(survey: Any) -> int:
    """Print what is there of a set and what is wrong with it; the exit status is 1 where anything is."""
    print("\n\n".join(filter(None, [survey.table(), survey.shapes])), end="\n" if survey.found else "")
    print("".join(f"note       {note}\n" for note in survey.notes), end="")
    print("".join(f"wrong      {problem}\n" for problem in survey.problems), end="")
    print(f"checked    {survey.where}: {len(survey.problems)} problems")
    return 1 if survey.problems else 0


def check(args: argparse.Namespace) -> int:
    """Check a set that is known by name, or what lies at a path; the exit status is 1 where anything is wrong."""
    from bissl_zoo.data.prepare.known import is_known, survey
    from bissl_zoo.data.prepare.own import survey_path

    if is_known(args.check) or not (os.sep in args.check or Path(args.check).exists()):
        return tell(survey(args.check, open_files=True, num_workers=args.num_workers))
    return tell(survey_path(args.check, args.images, args.num_workers))


def task_of(args: argparse.Namespace) -> Callable[[argparse.Namespace], int]:
    """The function that does what the command line asks for."""
    tasks = {"to_shards": pack, "index_shards": index, "check": check, "list": list_sets, "dataset": prepare_set}
    return next(task for name, task in tasks.items() if getattr(args, name))


def cli(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (`sys.argv` by default) and return the exit status."""
    args = parse_args(argv)
    from bissl_zoo.data.prepare.known import datasets_in

    with datasets_in(args.root):
        return exit_status(lambda: task_of(args)(args))


if __name__ == "__main__":
    sys.exit(cli())
