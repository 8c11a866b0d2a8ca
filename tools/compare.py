#!/usr/bin/env python
"""Does BiSSL help on a data set? Its arms over the same seeds, with error bars.

python tools/compare.py --config-file configs/compare/digit_scenes.py --seeds 10
python tools/compare.py --config-file configs/compare/cells.py --parallel 2 train.output_dir=runs/cells
python tools/compare.py --config-file configs/compare/papers_simclr.py --datasets food101,dtd,voc_det

Arms: fine-tuning from the pretrained backbone; BiSSL, then fine-tuning; as many more pretext steps, then fine-tuning;
the BiSSL stage without curvature, then fine-tuning. The same command goes on where an earlier one was stopped or
killed, and with more --seeds adds them. The report is in train.output_dir: comparison.md, .csv, .json and .png.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from bissl_zoo.progress.console import printable

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read once, when torch is imported
# what takes seconds to import is imported in the functions: --help and wrong options are answered at once


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; what is no option is an override."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", required=True, metavar="FILE", help="a config of configs/compare or your own")
    parser.add_argument("--seeds", type=seeds, metavar="N", help="how many, or which, as in 0,1,5; of the config")
    parser.add_argument("--arms", type=names, metavar="A,B", help="which arms; of the config")
    parser.add_argument("--datasets", type=names, metavar="A,B", help="one comparison each, of compare.datasets")
    parser.add_argument("--parallel", type=int, metavar="N", help="runs at a time; one per GPU, or one")
    parser.add_argument(
        "--engine", choices=("local", "ray"), default="local", help="this machine, or a Ray cluster's machines"
    )
    parser.add_argument("--report", action="store_true", help="report of what has finished by now, and run nothing")
    parser.add_argument("--dry-run", action="store_true", help="show what would run, and run nothing")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as of train_net.py, the same in every arm")
    args = parser.parse_intermixed_args(argv)
    if args.report and args.dry_run:
        parser.error("--report and --dry-run exclude each other")
    return args


def seeds(text: str) -> int | list[int]:
    """`10` for ten of them, `0,1,5` for those."""
    return [int(part) for part in text.split(",") if part] if "," in text else int(text)


def names(text: str) -> list[str]:
    """The parts of `a,b`."""
    return [part.strip() for part in text.split(",") if part.strip()]


def main(args: argparse.Namespace) -> int:
    """Compare, and say what came out."""
    from bissl_zoo.engine.checks import open_config
    from bissl_zoo.progress.display import console
    from bissl_zoo.studies.compare import compare, compare_datasets, describe
    from bissl_zoo.studies.compare_arms import override
    from bissl_zoo.studies.compare_report import datasets_table

    chosen = {"compare.seeds": args.seeds, "compare.arms": args.arms}
    overrides = [override(key, value) for key, value in chosen.items() if value is not None]
    with console():
        cfg = open_config(args.config_file, [*args.overrides, *overrides])
        folder = Path(cfg.train.output_dir)
        if args.dry_run:
            print(describe(cfg, args.config_file, folder, args.datasets))
        elif args.datasets:
            settings = (args.parallel, args.report, args.engine)
            reports = compare_datasets(cfg, args.config_file, folder, args.datasets, *settings)
            print(f"\n{datasets_table(reports)}\n\nreport {folder / 'datasets.md'}")
        else:
            tell(compare(cfg, args.config_file, folder, args.parallel, args.report, args.engine), folder)
    return 0


def tell(report: dict, folder: Path) -> None:
    """The table, the sentences, and what was left out."""
    from bissl_zoo.studies.compare_report import table

    print(f"\n{table(report)}\n")
    for name, message in report["failures"].items():
        print(f"warning: {name} is left out: {printable(message)}")
    print("\n".join([*report["sentences"], report["conclusion"]]))
    print("\n".join(f"  {note}" for note in report["notes"]))
    print(f"\nreport {folder / 'comparison.md'}   picture {folder / 'comparison.png'}")


def cli(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (`sys.argv` by default) and return the exit status."""
    args = parse_args(argv)
    from bissl_zoo.engine.launch import launch

    return launch(main, 1, args)


if __name__ == "__main__":
    sys.exit(cli())
