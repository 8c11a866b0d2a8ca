"""Does BiSSL help on a data set? Compare its arms over the same seeds, with confidence intervals.

bissl compare --config-file photos.py                       # any config of bissl train
bissl compare --config-file configs/compare/digit_scenes.py --seeds 10
bissl compare --config-file configs/compare/cells.py --parallel 2 train.output_dir=runs/cells
bissl compare --config-file configs/compare/papers_simclr.py --datasets food101,dtd,voc_det

Arms: pretrained (fine-tuning alone), bissl, bissl[SOLVER], joint (the stage without curvature), longer_pretraining,
target_pretraining, self_training, lp_ft, l2_sp, lora, random. Repeat the command to resume a comparison or, with more
seeds or arms, to extend it. The report is written to train.output_dir: comparison.md, .json and .png.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from bissl_zoo.cli import add_config


def parse(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line; positional arguments are config overrides of all arms."""
    add_config(parser)
    parser.add_argument("--seeds", type=seeds, metavar="N", help="number of seeds, or a list as in 0,1,5")
    parser.add_argument("--arms", type=names, metavar="A,B", help="arms to compare (default: compare.arms)")
    parser.add_argument("--labels", type=shares, metavar="SHARES", help="of the labels, a comparison each: 5%%,100%%")
    parser.add_argument("--datasets", type=names, metavar="A,B", help="names in compare.datasets, a comparison each")
    parser.add_argument("--parallel", type=int, metavar="N", help="runs at a time (default: one per GPU, or one)")
    parser.add_argument(
        "--engine", choices=("local", "ray"), default="local", help="run on this machine or on a Ray cluster"
    )
    parser.add_argument("--report", action="store_true", help="report the finished runs and start none")
    parser.add_argument("--dry-run", action="store_true", help="list the runs and start none")
    args = parser.parse_intermixed_args(argv)
    if args.report and args.dry_run:
        parser.error("--report and --dry-run exclude each other")
    return args


def seeds(text: str) -> int | list[int]:
    """Parse `10` as a number of seeds and `0,1,5` as a list."""
    return [int(part) for part in text.split(",") if part] if "," in text else int(text)


def shares(text: str) -> list[float]:
    """Parse `5%,25%` as shares."""
    return [round(float(part.strip().removesuffix("%")) / 100, 6) for part in text.split(",") if part.strip()]


def names(text: str) -> list[str]:
    """Split `a,b`."""
    return [part.strip() for part in text.split(",") if part.strip()]


def run(args: argparse.Namespace) -> int:
    """Run the comparison and print its report."""
    from bissl_zoo.config import LazyConfig, load_config
    from bissl_zoo.engine.checks import open_config
    from bissl_zoo.errors import printable
    from bissl_zoo.progress.display import console
    from bissl_zoo.studies.compare import compare, open_comparisons
    from bissl_zoo.studies.compare_report import reports_table, summary

    chosen = {"compare.seeds": args.seeds, "compare.arms": args.arms, "compare.labels": args.labels}
    settings = [text.lstrip("+") for text in args.overrides if text.lstrip("+").startswith("compare.")]
    others = [text for text in args.overrides if not text.lstrip("+").startswith("compare.")]
    settings += [f"{key}={json.dumps(value)}" for key, value in chosen.items() if value is not None]
    with console():
        cfg = open_config(args.config_file, others)
        given = "compare" in cfg
        if not given:
            cfg.compare = load_config("common/compare.py").compare
        cfg = LazyConfig.apply_overrides(cfg, settings, args.config_file)
        folder = Path(cfg.train.output_dir)
        if not given:  # then it is the folder of a run
            folder = folder.with_name(f"{folder.name}_comparison")
        comparisons = open_comparisons(cfg, args.config_file, folder, args.datasets, args.parallel, args.engine)
        if args.dry_run:
            print("\n\n".join(comparison.describe() for comparison in comparisons.values()))
            return 0
        reports = compare(comparisons, folder, args.report)
    if "" not in reports:
        print(f"\n{reports_table(reports)}\n\nreport {folder / 'comparisons.md'}")
    else:
        print(f"\n{printable(summary(reports['']))}")
        print(f"\nreport {folder / 'comparison.md'}   plot {folder / 'comparison.png'}")
    return 0
