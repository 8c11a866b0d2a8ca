"""Convert a backbone from a checkpoint of another project, or to the format of another library.

bissl convert in moco_v2_800ep.pth.tar --architecture resnet50 --output backbone.safetensors
bissl convert in timm:resnet50.a1_in1k --output backbone.safetensors
bissl convert out backbone.safetensors --to detectron2 --output backbone.pkl
bissl convert out simclr_resnet18_digits --to onnx --output backbone.onnx

`in` writes a .safetensors file under timm's names with its metadata. A source is a file, timm:NAME.TAG,
hf-hub:USER/REPO, zoo:NAME or a run directory, as for `train.init`, which needs no conversion; for `out` also the plain
name of an entry.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bissl_zoo.errors import ZooError, shorten
from bissl_zoo.weights import TARGETS

if TYPE_CHECKING:
    from bissl_zoo.weights.files import StoredBackbone


def parse(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    commands = parser.add_subparsers(dest="command", required=True, metavar="in|out")
    into = commands.add_parser("in", help="read another project's checkpoint")
    into.add_argument("source", metavar="SOURCE", help="a checkpoint, timm:NAME.TAG, hf-hub:USER/REPO, ...")
    into.add_argument("--architecture", metavar="NAME", help="timm's name; not needed for a plain ResNet")
    into.add_argument("--allow-partial", action="store_true", help="accept an incomplete backbone")
    into.add_argument("--channel-order", choices=["RGB", "BGR"], help="of a Detectron2 file that does not state it")
    into.add_argument("--skip-objects", action="store_true", help="leave out objects that are not plain data")
    into.add_argument("--head-output", type=Path, metavar="FILE", help="write the head to this .safetensors file")
    out = commands.add_parser("out", help="write a backbone for another library")
    out.add_argument("source", metavar="BACKBONE", help="a zoo entry, or a source as for in")
    out.add_argument("--to", required=True, choices=TARGETS)
    out.add_argument("--architecture", metavar="NAME", help="of a .safetensors file that does not state it")
    for statistic in ("mean", "std"):
        out.add_argument(f"--{statistic}", type=float, nargs=3, metavar="X", help="of RGB in [0, 1], if not stated")
    out.add_argument("--image-size", type=int, nargs=2, metavar=("H", "W"), help="of the traced images (onnx, export)")
    for command in (into, out):
        command.add_argument("--output", required=True, type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    if args.command == "out" and (args.mean is None) != (args.std is None):
        parser.error("--mean and --std go together")
    return args


def convert_in(args: argparse.Namespace) -> None:
    """Read the checkpoint, write the backbone, and print what matched."""
    from bissl_zoo.weights.files import save_backbone, save_tensors
    from bissl_zoo.weights.load import read_weights

    options = {key: getattr(args, key) for key in ("allow_partial", "channel_order", "skip_objects")}
    read = read_weights(args.source, args.architecture, **options)
    if args.head_output and not read.head:
        raise ZooError(f"--head-output: {args.source} has no head.")
    save_backbone(read, args.output)
    print(report(read))
    print(f"wrote      {args.output}")
    if args.head_output:
        save_tensors(read.head, args.head_output)
        print(f"wrote      {args.head_output}")


def report(read: "StoredBackbone") -> str:
    """Return lines on the layout, and on matching, missing and unexpected tensors."""
    total = len(read.state) + len(read.missing)
    lines = [
        f"source     {read.source}, licence {read.licence}",
        f"layout     {read.format}",
        f"backbone   {read.architecture}: {len(read.state)} of {total} tensors match",
        f"images     {_images(read)}",
    ]
    for name, tensors in (("missing", read.missing), ("head", list(read.head)), ("unexpected", read.unexpected)):
        if tensors:
            lines.append(f"{name:<10} {len(tensors)}: {shorten(tensors, 4)}")
    return "\n".join(lines + [f"note       {note}" for note in read.notes])


def _images(read: "StoredBackbone") -> str:
    if read.pixels is None:
        return "RGB in [0, 1]; mean and standard deviation are not stated"
    mean, std = (", ".join(f"{value:.4g}" for value in read.pixels[key]) for key in ("mean", "std"))
    return f"RGB in [0, 1], mean {mean}, standard deviation {std}"


def convert_out(args: argparse.Namespace) -> None:
    """Read the backbone, write it for the other library, and print what its user must know."""
    from bissl_zoo.weights.export import export_backbone
    from bissl_zoo.weights.load import entry_or_source, read_weights

    backbone = read_weights(entry_or_source(args.source), args.architecture)
    pixels = {"mean": args.mean, "std": args.std} if args.mean else backbone.pixels
    written = export_backbone(
        backbone.state, backbone.architecture, args.to, args.output, backbone.model_args, pixels, args.image_size
    )
    width = max(len(name) for name in written.details)
    print("\n".join(f"{name:<{width}}  {value}" for name, value in written.details.items()))
    print(f"{'wrote':<{width}}  {written.path}")


def run(args: argparse.Namespace) -> None:
    """Convert in the direction of the command."""
    (convert_in if args.command == "in" else convert_out)(args)
