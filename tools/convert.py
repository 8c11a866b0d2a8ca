#!/usr/bin/env python
"""Bring a backbone in from another project's checkpoint, or take one out to another library.

python tools/convert.py in moco_v2_800ep.pth.tar --architecture resnet50 --output backbone.safetensors
python tools/convert.py in timm:resnet50.a1_in1k --output backbone.safetensors
python tools/convert.py out backbone.safetensors --to detectron2 --output backbone.pkl
python tools/convert.py out simclr_resnet18_digits --to onnx --output backbone.onnx

What comes in is a .safetensors file under timm's names (`train.init` takes it), with its facts in the file's metadata;
what goes out is a zoo entry or such a file.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bissl_zoo.errors import ZooError
from bissl_zoo.progress.console import exit_status
from bissl_zoo.zoo import TARGETS

if TYPE_CHECKING:
    from bissl_zoo.weights.load import ForeignBackbone

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read once, when torch is imported
# what takes seconds to import is imported in the functions: --help and wrong options are answered at once


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="in|out")
    into = commands.add_parser("in", help="read another project's checkpoint")
    into.add_argument("source", metavar="FILE", help="a checkpoint, or timm:NAME")
    into.add_argument("--architecture", metavar="NAME", help="timm's name; a plain ResNet is recognised without")
    into.add_argument("--allow-partial", action="store_true", help="take what there is of the backbone")
    into.add_argument("--channel-order", choices=["RGB", "BGR"], help="where a Detectron2 file does not say it")
    into.add_argument("--skip-objects", action="store_true", help="leave out objects that are not plain data")
    into.add_argument("--head", type=Path, metavar="FILE", help="the pretext head, where it is a file of its own")
    into.add_argument("--head-output", type=Path, metavar="FILE", help="write the head's tensors here (.safetensors)")
    out = commands.add_parser("out", help="write a backbone for another library")
    out.add_argument("source", metavar="BACKBONE", help="a zoo entry, or a .safetensors under timm's names")
    out.add_argument("--to", required=True, choices=TARGETS)
    out.add_argument("--architecture", metavar="NAME", help="of a .safetensors that does not say it")
    for statistic in ("mean", "std"):
        out.add_argument(f"--{statistic}", type=float, nargs=3, metavar="X", help="of RGB in [0, 1], where not stated")
    out.add_argument("--image-size", type=int, nargs=2, metavar=("H", "W"), help="to trace with (onnx, export)")
    for command in (into, out):
        command.add_argument("--output", required=True, type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    if args.command == "out" and (args.mean is None) != (args.std is None):
        parser.error("--mean and --std go together")
    return args


def bring_in(args: argparse.Namespace) -> None:
    """Read the checkpoint, write the backbone, say what became of every tensor."""
    from bissl_zoo.weights.backbone_file import StoredBackbone, save_backbone, save_tensors
    from bissl_zoo.weights.load import read_foreign

    options = {key: getattr(args, key) for key in ("allow_partial", "channel_order", "skip_objects")}
    read = read_foreign(args.source, args.architecture, head_path=args.head, **options)
    if args.head_output and not read.head:
        raise ZooError(f"--head-output: {args.source} holds no head.")
    facts = StoredBackbone(read.state, read.architecture, read.model_args, read.pixels, source=read.format)
    save_backbone(facts, args.output)
    print(report(read))
    print(f"wrote      {args.output}")
    if args.head_output:
        save_tensors(read.head, args.head_output)
        print(f"wrote      {args.head_output}")


def report(read: "ForeignBackbone") -> str:
    """What was recognised, matched, missing and left, in lines."""
    whole = len(read.matched) + len(read.missing)
    lines = [
        f"layout     {read.format}",
        f"backbone   {read.architecture}: {len(read.matched)} of {whole} tensors match",
        f"images     {_images(read)}",
    ]
    for name, found in (("missing", read.missing), ("head", list(read.head)), ("unexpected", read.unexpected)):
        if found:
            more = f", and {len(found) - 4} more" if len(found) > 4 else ""
            lines.append(f"{name:<10} {len(found)}: {', '.join(found[:4])}{more}")
    return "\n".join(lines + [f"note       {note}" for note in read.notes])


def _images(read: "ForeignBackbone") -> str:
    if read.pixels is None:
        return "RGB in [0, 1]; the source does not say the mean and standard deviation"
    mean, std = (", ".join(f"{value:.4g}" for value in read.pixels[key]) for key in ("mean", "std"))
    return f"RGB in [0, 1], mean {mean}, standard deviation {std}"


def take_out(args: argparse.Namespace) -> None:
    """Read the backbone, write it for the other library, say what a user must know there."""
    from bissl_zoo.weights.backbone_file import read_backbone
    from bissl_zoo.weights.export import export_backbone

    backbone = read_backbone(args.source, args.architecture)
    pixels = {"mean": args.mean, "std": args.std} if args.mean else backbone.pixels
    written = export_backbone(
        backbone.state, backbone.architecture, args.to, args.output, backbone.model_args, pixels, args.image_size
    )
    width = max(len(name) for name in written.facts)
    print("\n".join(f"{name:<{width}}  {fact}" for name, fact in written.facts.items()))
    print(f"{'wrote':<{width}}  {written.path}")


def cli(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (`sys.argv` by default) and return the exit status."""
    args = parse_args(argv)
    return exit_status(lambda: (bring_in if args.command == "in" else take_out)(args))


if __name__ == "__main__":
    sys.exit(cli())
