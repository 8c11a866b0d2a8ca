"""Run the stages of a config: pretrain, BiSSL, fine-tune, evaluate, publish.

bissl train --config-file configs/bissl/voc_det.py
bissl train --config-file configs/bissl/voc_det.py solver.iterations=10 train.output_dir=runs/a
bissl train --config-file configs/bissl/voc_det.py --eval-only train.init=runs/a
torchrun --nproc-per-node 2 tools/train_net.py --config-file configs/bissl/voc_det.py
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from bissl_zoo.cli import add_config

#: printed after the options
EPILOG = """exit status:
  0    the run is complete
  1    an error in config, data, disk or numbers; one message on standard error
  2    an invalid command line
  130  Ctrl-C; 143 SIGTERM; 138 SIGUSR1; 129 SIGHUP: the run is saved, continue with --resume
  137  killed (for example, out of memory); continue with --resume
  141  the reader of standard output has closed it
"""


def parse(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line; positional arguments are overrides."""
    add_config(parser)
    parser.add_argument("--resume", action="store_true", help="continue the run in train.output_dir")
    parser.add_argument(
        "--auto-resume", action="store_true", help="continue the run in train.output_dir if there is one, else start it"
    )
    parser.add_argument("--eval-only", action="store_true", help="evaluate the fine-tuned model of the run train.init")
    parser.add_argument("--dry-run", action="store_true", help="describe the run without training")
    parser.add_argument("--plain", action="store_true", help="log lines only, no live display")
    parser.add_argument("--quiet", action="store_true", help="print warnings, errors and the final table only")
    parser.add_argument("--verbose", action="store_true", help="log a line after every step")
    parser.add_argument("--num-gpus", type=int, default=1, metavar="N", help="processes to start on this machine")
    args = parser.parse_intermixed_args(argv)
    if args.dry_run + args.eval_only + args.resume + args.auto_resume > 1:
        parser.error("--dry-run, --eval-only, --resume and --auto-resume exclude each other")
    if args.quiet and args.verbose:
        parser.error("--quiet and --verbose exclude each other")
    return args


def run(args: argparse.Namespace) -> int:
    """Run, evaluate or describe the config in one process."""
    from bissl_zoo.distributed import is_main_process
    from bissl_zoo.engine.checks import open_config
    from bissl_zoo.engine.launch import restarted
    from bissl_zoo.engine.preflight import describe
    from bissl_zoo.engine.runner import evaluate_only
    from bissl_zoo.engine.runner import run as run_stages
    from bissl_zoo.progress.display import console
    from bissl_zoo.progress.live import choose_display
    from bissl_zoo.report import report_after
    from bissl_zoo.runs.listing import results_table

    with console(choose_display(args.plain, args.quiet, args.verbose)):
        cfg = open_config(args.config_file, args.overrides)
        if args.dry_run:
            output = describe(cfg, args.config_file)
        elif args.eval_only:
            output = results_table(evaluate_only(cfg, args.config_file))
        else:
            resume = "auto" if args.auto_resume or restarted() else args.resume
            outcome = run_stages(cfg, args.config_file, resume, write_report=report_after)
            output = summary(outcome, args.quiet)
            if not args.quiet and outcome["results"]:
                output += f"\n\n{next_steps(outcome['results'], cfg.train.output_dir, args.config_file)}"
    if output and is_main_process():
        print(output)
    return 0


def next_steps(results: dict[str, dict[str, float]], folder: str, config: str) -> str:
    """Return the verdict on this run, and the next commands."""
    from bissl_zoo.runs.listing import verdict

    report = Path(folder) / "report.html"
    rows = [("look at", f"open {report}")] if report.exists() else []
    rows += [("predict", f"bissl predict {folder} photo.jpg"), ("compare", f"bissl compare --config-file {config}")]
    return "\n".join([verdict(results), "", "next", *(f"    {name:<8} {command}" for name, command in rows)])


def summary(outcome: dict, quiet: bool) -> str:
    """Return the table of results and, unless `quiet`, how to load the published entry."""
    from bissl_zoo.runs.listing import results_table

    parts = [f"\n{results_table(outcome['results'])}"] if outcome["results"] else []
    entry = outcome["entry"]
    if entry is not None and not quiet:
        parts.append(
            f"\npublished {entry.name}\n    where {entry.location}\n   sha256 {entry.sha256}\n\nload it with\n"
            f'    import bissl_zoo\n    backbone = bissl_zoo.create_backbone("{entry.name}", pretrained=True)\n'
            "or in plain timm\n"
            f'    import timm\n    model = timm.create_model("local-dir:{entry.location}", pretrained=True)'
        )
    return "\n".join(parts)
