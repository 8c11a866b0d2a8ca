#!/usr/bin/env python
"""Search hyperparameters of fine-tuning with Optuna: many runs of a config, each with other parameters.

python tools/search.py --config-file configs/bissl/voc_det.py train.init=runs/voc_det train.stages=[finetune]
python tools/search.py --config-file my.py --trials 20 --parallel 4 --prune finetune.eval_period=200
python tools/search.py --config-file my.py --trials 50        # later: 30 more, in the same folder

The section `search` of the config defines the search space; the default is learning rate and weight decay in the ranges
of the BiSSL paper. Repeat the command to resume an interrupted search. The output folder holds trials.csv, search.png
and best.yaml, a config for tools/train_net.py.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

# slow imports are inside the functions, so that --help is instant


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; positional arguments are config overrides."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--config-file", required=True, metavar="FILE", help="a config of configs/, your own, or zoo:NAME"
    )
    parser.add_argument(
        "--trials", type=int, metavar="N", help="total number of trials (default: search.trials of the config)"
    )
    parser.add_argument(
        "--output", type=Path, metavar="FOLDER", help="default: runs/search_NAME with the name of the config"
    )
    parser.add_argument("--parallel", type=int, metavar="N", help="trials at a time (default: one per GPU, or one)")
    parser.add_argument(
        "--prune", action="store_true", help="stop trials whose metric is below the median of the finished ones"
    )
    parser.add_argument(
        "--engine", choices=("local", "ray"), default="local", help="run on this machine or on a Ray cluster"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="a.b=c changes a key, +a.b=c adds one, ~a.b removes one"
    )
    return parser.parse_intermixed_args(argv)


def main(args: argparse.Namespace) -> int:
    """Run the search and print the best trials."""
    from bissl_zoo.engine.checks import open_config
    from bissl_zoo.progress.display import console
    from bissl_zoo.studies.search import BEST_FILE, PLOT_FILE, TABLE_FILE, search

    name = re.sub(r"[^\w.-]", "_", Path(args.config_file).stem)
    folder = args.output or Path("runs") / f"search_{name}"
    with console():
        cfg = open_config(args.config_file, args.overrides)
        result = search(cfg, args.config_file, folder, args.trials, args.parallel, args.prune, args.engine)
    print(f"\n{result.table}\n\nbest: {' '.join(result.best_overrides)}")
    print(f"Results: {folder / TABLE_FILE}, {folder / PLOT_FILE}. Run the best config with")
    print(f"    python tools/train_net.py --config-file {folder / BEST_FILE}")
    return 0


def cli(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (`sys.argv` by default) and return the exit status."""
    args = parse_args(argv)
    from bissl_zoo.engine.launch import launch

    return launch(main, 1, args)


if __name__ == "__main__":
    sys.exit(cli())
