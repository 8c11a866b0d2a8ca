"""Check the hypergradient of a config, and compare all curvatures and solvers on it.

bissl check --config-file configs/bissl/voc_det.py --run runs/pretrained
bissl check --config-file configs/bissl/voc_det.py bilevel.curvature_batch_size=64

A. A small smooth problem with the configured pretext method, in float64: products with the Hessian and, if configured,
   the Gauss-Newton matrix, the hypergradient and the solver against finite differences and a direct solve.
B. The config's own networks and data, one curvature batch: symmetry and spectrum of both curvatures; residual,
   products, cos(x, v), |x|/|v| and time of every solver.

Writes DIR/check.json, and recommends a curvature and a solver with the reason.
Exit status: 0 if part A passes, whether the solver converges or not; 1 if part A fails or the input is invalid.
"""

import argparse
import json
import shlex
from collections.abc import Sequence
from pathlib import Path

from bissl_zoo.cli import add_config
from bissl_zoo.errors import BisslZooError, ConfigError


def parse(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line; positional arguments are config overrides."""
    add_config(parser)
    parser.add_argument(
        "--output-dir", type=Path, default=Path("runs/check"), metavar="DIR", help="default: runs/check"
    )
    parser.add_argument("--run", metavar="RUN_DIR", help="use the weights of this run, as train.init=RUN_DIR does")
    parser.add_argument("--max-products", type=int, default=12, metavar="N", help="Lanczos steps for the spectrum")
    parser.add_argument("--warmup-steps", type=int, default=20, metavar="N", help="limit of the head's warm-up")
    return parser.parse_intermixed_args(argv)


def run(args: argparse.Namespace) -> int:
    """Run the check, save its results and print the advice."""
    from bissl_zoo.analysis.hypergradient_check import Effort, check_hypergradient, open_check, save, table
    from bissl_zoo.distributed import is_main_process, on_main_process
    from bissl_zoo.engine.checks import open_config
    from bissl_zoo.progress.display import console

    overrides = [*args.overrides, *([f"train.init={json.dumps(args.run)}"] if args.run else [])]
    cfg = open_config(args.config_file, overrides)
    effort = Effort(args.max_products, args.warmup_steps)
    with console():
        context, initial = open_check(cfg, args.config_file)
        on_main_process(lambda: make_folder(args.output_dir))
        result = {"config": args.config_file, "overrides": overrides, **check_hypergradient(context, initial, effort)}
        on_main_process(lambda: save(result, args.output_dir))
    if is_main_process():
        print(f"\n{table(result['real'])}")
        print(f"\nresults {args.output_dir / 'check.json'}")
        print(f"\n{result['advice']['sentence']}")
        if result["advice"]["overrides"]:
            print(f"    {shlex.join(result['advice']['overrides'])}")
    if not result["passed"]:
        reduced = result["reduced"]
        failed = [f"{c['name']}: {c['error']:.1e}, {c['detail']}" for c in reduced["checks"] if not c["passed"]]
        raise BisslZooError(f"The hypergradient is wrong. {'; '.join(failed) or reduced['error']}")
    return 0


def make_folder(folder: Path) -> None:
    """Create the output directory before the check starts."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--output-dir {folder}: cannot create this directory ({error.strerror}).") from error
