"""Search hyperparameters of fine-tuning with Optuna: many runs of a config, each with other parameters.

bissl search --config-file configs/bissl/voc_det.py train.init=runs/voc_det train.stages=[finetune]
bissl search --config-file my.py --trials 20 --parallel 4 --prune finetune.eval_period=200
bissl search --config-file my.py --trials 50        # later: 30 more, in the same folder

The section `search` of the config defines the search space; the default is learning rate and weight decay in the ranges
of the BiSSL paper. Repeat the command to resume an interrupted search. The output folder holds trials.csv and
best.yaml, a config for tools/train_net.py.
"""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from bissl_zoo.cli import add_config


def parse(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line; positional arguments are config overrides."""
    add_config(parser)
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
    return parser.parse_intermixed_args(argv)


def run(args: argparse.Namespace) -> int:
    """Run the search and print the best trials."""
    from bissl_zoo.engine.checks import open_config
    from bissl_zoo.progress.display import console
    from bissl_zoo.studies.search import BEST_FILE, TABLE_FILE, search

    name = re.sub(r"[^\w.-]", "_", Path(args.config_file).stem)
    folder = args.output or Path("runs") / f"search_{name}"
    with console():
        cfg = open_config(args.config_file, args.overrides)
        result = search(cfg, args.config_file, folder, args.trials, args.parallel, args.prune, args.engine)
    print(f"\n{result.table}\n\nbest: {' '.join(result.best_overrides)}")
    print(f"Results: {folder / TABLE_FILE}. Run the best config with")
    print(f"    bissl train --config-file {folder / BEST_FILE}")
    return 0
