#!/usr/bin/env python
"""Search for the settings of fine-tuning: many runs of a config, each at a random draw from log-uniform ranges.

python tools/search.py --config-file configs/bissl/voc_det.py train.init=runs/voc_det train.stages=[finetune]
python tools/search.py --config-file my.py --trials 20 --parallel 4 --prune finetune.eval_period=200
python tools/search.py --config-file my.py --trials 50        # later: 30 more, in the same folder

The config's section `search` says what is drawn; without one, learning rate and weight decay are, in the ranges of the
BiSSL paper. The same command goes on with a search that was interrupted. The folder then holds trials.csv, search.png,
and best.yaml for tools/train_net.py.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

# what takes seconds to import is imported in the functions: --help and wrong options are answered at once


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; what is no option is an override."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--config-file", required=True, metavar="FILE", help="a config of configs/, your own, or zoo:NAME"
    )
    parser.add_argument("--trials", type=int, metavar="N", help="how many draws in all; search.trials of the config")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="runs/search_NAME, with the name of the config")
    parser.add_argument("--parallel", type=int, metavar="N", help="trials at a time; one per GPU, or one")
    parser.add_argument("--prune", action="store_true", help="give up trials that fall behind the median on the way")
    parser.add_argument(
        "--engine", choices=("local", "ray"), default="local", help="this machine, or a Ray cluster's machines"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="a.b=c changes a key, +a.b=c adds one, ~a.b removes one"
    )
    return parser.parse_intermixed_args(argv)


def main(args: argparse.Namespace) -> int:
    """Search, and tell what was found."""
    from bissl_zoo.engine.checks import open_config
    from bissl_zoo.progress.display import console
    from bissl_zoo.studies.search import BEST_FILE, PICTURE_FILE, TABLE_FILE, search

    cfg = open_config(args.config_file, args.overrides)
    name = re.sub(r"[^\w.-]", "_", Path(args.config_file).stem)
    folder = args.output or Path("runs") / f"search_{name}"
    with console():
        result = search(cfg, args.config_file, folder, args.trials, args.parallel, args.prune, args.engine)
    print(f"\n{result.table}\n\nbest: {' '.join(result.best_overrides)}")
    print(f"{folder / TABLE_FILE}, {folder / PICTURE_FILE}\nrun it with")
    print(f"    python tools/train_net.py --config-file {folder / BEST_FILE}")
    return 0


def cli(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (`sys.argv` by default) and return the exit status."""
    args = parse_args(argv)
    from bissl_zoo.engine.launch import launch

    return launch(main, 1, args)


if __name__ == "__main__":
    sys.exit(cli())
