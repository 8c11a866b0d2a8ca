#!/usr/bin/env python
"""Tell whether the hypergradient of a config is right, and whether its solver solves it.

python tools/check_hypergradient.py --config-file configs/bissl/voc_det.py --run runs/pretrained
python tools/check_hypergradient.py --config-file configs/bissl/voc_det.py bilevel.curvature_batch_size=64

A. A small smooth problem with the configured pretext method, in float64: products, hypergradient and solver against
   finite differences and a direct solve.
B. The config's own networks and data, one curvature batch: symmetry, spectrum, and what every solver makes of it.

Figures go to DIR/check.json and curves to DIR/check.png; one sentence at the end says what to change.
Exit status: 0 where part A passes, whatever the sentence says of the solver; 1 where it fails or input is refused.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from bissl_zoo.errors import BisslZooError, ConfigError

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read once, when torch is imported
# what takes seconds to import is imported in the functions: --help and wrong options are answered at once


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; what is no option is an override."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", required=True, metavar="FILE", help="a config of configs/ or your own")
    parser.add_argument(
        "--output-dir", type=Path, default=Path("runs/check"), metavar="DIR", help="default: runs/check"
    )
    parser.add_argument("--run", metavar="RUN_DIR", help="take the weights of this run, as train.init=RUN_DIR does")
    parser.add_argument("--max-products", type=int, default=12, metavar="N", help="largest budget of a solver")
    parser.add_argument("--lanczos-steps", type=int, default=12, metavar="N", help="from v, and from a random vector")
    parser.add_argument("--warmup-steps", type=int, default=20, metavar="N", help="most steps of the head's warm-up")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as of train_net.py")
    return parser.parse_intermixed_args(argv)


def main(args: argparse.Namespace) -> int:
    """What one process does."""
    from bissl_zoo.analysis.hypergradient_check import Effort, check_hypergradient, open_check
    from bissl_zoo.analysis.hypergradient_report import save, table
    from bissl_zoo.distributed import is_main_process, on_main_process
    from bissl_zoo.engine.checks import open_config
    from bissl_zoo.progress.display import console

    overrides = [*args.overrides, *([f"train.init={json.dumps(args.run)}"] if args.run else [])]
    cfg = open_config(args.config_file, overrides)
    effort = Effort(args.max_products, args.lanczos_steps, args.warmup_steps)
    with console():
        context, initial = open_check(cfg, args.config_file)
        on_main_process(lambda: make_folder(args.output_dir))
        figures = {"config": args.config_file, "overrides": overrides, **check_hypergradient(context, initial, effort)}
        on_main_process(lambda: save(figures, args.output_dir))
    if is_main_process():
        print(f"\n{table(figures['real'])}")
        print(f"\nfigures {args.output_dir / 'check.json'}   curves {args.output_dir / 'check.png'}")
        print(f"\n{figures['advice']['sentence']}")
        for words in figures["advice"]["overrides"]:
            print(f"    {' '.join(words)}")
    if not figures["passed"]:
        reduced = figures["reduced"]
        failed = [f"{c['name']}: {c['error']:.1e}, {c['detail']}" for c in reduced["checks"] if not c["passed"]]
        raise BisslZooError(f"The hypergradient is not right. {'; '.join(failed) or reduced['error']}")
    return 0


def make_folder(folder: Path) -> None:
    """Make the output directory before the work, not after it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--output-dir {folder}: cannot make this directory ({error.strerror}).") from error


def cli(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (`sys.argv` by default) and return the exit status."""
    args = parse_args(argv)
    from bissl_zoo.engine.launch import launch

    return launch(main, 1, args)


if __name__ == "__main__":
    sys.exit(cli())
