"""Draw `ideas_NAME.svg` from the `ideas_NAME.csv` of `benchmarks/ideas.py`.

    python benchmarks/ideas_figures.py

Points are means over seeds, bands reach from the minimum to the maximum.
"""

import argparse
import csv
import math
import statistics
from pathlib import Path

import matplotlib

matplotlib.use("svg")
matplotlib.rcParams.update({"svg.fonttype": "path", "svg.hashsalt": "ideas", "font.size": 9})

from matplotlib import pyplot  # noqa: E402


def read(name: str, output: Path) -> dict[str, list[list[float]]]:
    """Return the columns of `ideas_NAME.csv`; each has a list over seeds for each value of the parameter."""
    with (output / f"ideas_{name}.csv").open() as file:
        rows = [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]
    values = list(dict.fromkeys(row[name] for row in rows))
    return {key: [[row[key] for row in rows if row[name] == value] for value in values] for key in rows[0]}


BLUE, ORANGE, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"  # Okabe and Ito, safe for colour-blind readers
LABELS = {
    "lambda": "lambda",
    "gamma": "gamma (0, then logarithmic)",
    "upper_steps": "upper steps per alternation, N_U",
    "damping": "damping delta (lambda = 0.05)",
}


def curve(axes, x: list[float], seeds: list[list[float]], colour: str, marker: str, label: str) -> None:
    """Plot the mean over seeds, and their range as a band."""
    axes.plot(x, [statistics.mean(s) for s in seeds], color=colour, marker=marker, markersize=4, label=label)
    axes.fill_between(x, [min(s) for s in seeds], [max(s) for s in seeds], color=colour, alpha=0.15, linewidth=0)


def plot(name: str, output: Path) -> None:
    """Draw `ideas_NAME.svg` from its CSV."""
    columns_of = read(name, output)
    x = [seeds[0] for seeds in columns_of[name]]
    panels = PANELS[name]
    columns = 2 if len(panels) == 4 else len(panels)
    rows = len(panels) // columns
    figure, axes = pyplot.subplots(rows, columns, figsize=(3.3 * columns, 2.7 * rows), layout="constrained")
    for panel, (title, curves) in zip(axes.flat, panels, strict=True):
        for key, colour, marker, label in curves:
            points = [(a, s) for a, s in zip(x, columns_of[key], strict=True) if all(map(math.isfinite, s))]
            curve(panel, *map(list, zip(*points, strict=True)), colour, marker, label)
        panel.set(title=title, xlabel=LABELS[name])
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.25)
        if name == "upper_steps":
            panel.set_xscale("symlog", base=2, linthresh=1)
            panel.set_xticks(x, [f"{value:g}" for value in x])
        elif name == "gamma":
            panel.set_xscale("symlog", linthresh=0.01)
        else:
            panel.set_xscale("log")
        if len(curves) > 1:
            panel.legend(frameon=False, fontsize=8)
        if name == "gamma" and title.startswith("downstream"):
            panel.set_yscale("log")
        elif name == "upper_steps" and title.startswith("downstream"):
            panel.set_ylim(top=0.9)
            panel.legend(frameon=False, fontsize=8, loc="upper right")
        if "residual" in title:
            panel.set_yscale("log")
            panel.axhline(1, color="grey", linewidth=0.8, linestyle=":")
    figure.savefig(output / f"ideas_{name}.svg", metadata={"Date": None})
    pyplot.close(figure)


LOSSES = (
    "downstream loss, test images",
    [
        ("downstream_loss_lower", BLUE, "o", "on the lower backbone"),
        ("downstream_loss_upper", ORANGE, "s", "on the upper backbone"),
    ],
)
FINETUNED = (
    "test accuracy after fine-tuning",
    [("finetuned", BLUE, "o", "from BiSSL"), ("pretrained_finetuned", PURPLE, "v", "from the pretrained one")],
)
PANELS = {
    "lambda": [
        ("distance of backbones", [("gap", BLUE, "o", "lower to upper"), ("moved", ORANGE, "s", "upper to start")]),
        ("pretext loss, lower backbone", [("pretext_loss", GREEN, "^", "")]),
        LOSSES,
        FINETUNED,
    ],
    "gamma": [("cosine of the two gradients", [("cosine", GREEN, "^", "")]), LOSSES, FINETUNED],
    "upper_steps": [("pretext loss, lower backbone", [("pretext_loss", GREEN, "^", "")]), LOSSES, FINETUNED],
    "damping": [
        (
            "x beside v",
            [("cosine_x_v", BLUE, "o", "cosine"), ("norm_x_over_v", ORANGE, "s", "norm of x / norm of v")],
        ),
        (
            "true relative residual",
            [
                ("residual_v", PURPLE, "v", "x = v"),
                ("residual_cg5", ORANGE, "s", "5 steps of CG"),
                ("residual_minres200", BLUE, "o", "MINRES, 200 products"),
            ],
        ),
    ],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("docs/figures"))
    args = parser.parse_args()
    for name in PANELS:
        plot(name, args.folder)


if __name__ == "__main__":
    main()
