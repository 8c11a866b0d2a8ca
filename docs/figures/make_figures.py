"""Draw the figure of `docs/ideas.md`: the two levels, and the effect of the hypergradient in two dimensions.

python docs/figures/make_figures.py

The colours (Okabe and Ito) are safe for colour-blind readers; the right panel is computed, not sketched.
"""

from pathlib import Path

import matplotlib

matplotlib.use("svg")
matplotlib.rcParams.update({"svg.fonttype": "path", "svg.hashsalt": "levels", "font.size": 10})

import numpy as np  # noqa: E402
from matplotlib import pyplot  # noqa: E402
from matplotlib.patches import FancyBboxPatch  # noqa: E402

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#555555"
LAMBDA = 1.0


def box(axes, x: float, y: float, text: str, colour: str, width: float = 2.5) -> None:
    """Draw a rounded box centred at (x, y)."""
    shape = FancyBboxPatch(
        (x - width / 2, y - 0.42),
        width,
        0.84,
        boxstyle="round,pad=0.02,rounding_size=0.12",
        fc="white",
        ec=colour,
        lw=1.6,
    )
    axes.add_patch(shape)
    axes.text(x, y, text, ha="center", va="center", linespacing=1.3)


def arrow(axes, start: tuple, end: tuple, colour: str, style: str = "-|>", **options) -> None:
    axes.annotate("", end, start, arrowprops={"arrowstyle": style, "color": colour, "lw": 1.6, **options})


def levels(axes) -> None:
    """Draw the parts of the two levels and the arrows between them."""
    axes.set(xlim=(0, 10.4), ylim=(0, 6.6), aspect="equal")
    axes.axis("off")
    for y, colour, name in ((4.9, ORANGE, "upper level: downstream"), (1.3, BLUE, "lower level: pretext")):
        axes.text(0.1, y + 1.0, name, color=colour, weight="bold")
        for left, right in ((2.6, 3.2), (5.7, 6.3)):
            arrow(axes, (left, y), (right, y), colour)
    box(axes, 1.3, 4.9, "images with\nlabels", ORANGE)
    box(axes, 4.45, 4.9, "backbone\n$\\theta_D$", ORANGE)
    box(axes, 7.7, 4.9, "head $\\phi_D$\nloss $L_D$", ORANGE, 2.8)
    box(axes, 1.3, 1.3, "images without\nlabels", BLUE)
    box(axes, 4.45, 1.3, "backbone\n$\\theta_P$", BLUE)
    box(axes, 7.7, 1.3, "head $\\phi_P$\nloss $L_P$", BLUE, 2.8)
    arrow(axes, (4.0, 4.4), (4.0, 1.8), GREY)
    axes.text(3.85, 3.1, "pull\n$\\frac{\\lambda}{2}\\|\\theta_P-\\theta_D\\|^2$", ha="right", va="center", color=GREY)
    arrow(axes, (5.0, 1.8), (5.0, 4.4), GREEN)
    axes.text(5.15, 3.1, "hypergradient\n$(I+H/\\lambda)^{-1}\\,v$", va="center", color=GREEN)
    arrow(axes, (7.7, 4.4), (5.75, 1.6), ORANGE, linestyle="--", connectionstyle="arc3,rad=-0.2")
    axes.text(7.6, 3.1, "$v$: gradient of $L_D$\nat $\\theta_P$", va="center", color=ORANGE)
    arrow(axes, (4.45, 0.85), (4.45, 0.35), BLUE)
    axes.text(4.45, 0.02, "leaves the stage, and is fine-tuned", ha="center", color=BLUE)


def plane(axes) -> None:
    """Draw a quadratic pretext loss in two dimensions, and how the lower backbone follows a step of the upper one."""
    turn = np.deg2rad(30)
    along, across = np.array([np.cos(turn), np.sin(turn)]), np.array([-np.sin(turn), np.cos(turn)])
    hessian = 0.15 * np.outer(along, along) + 6.0 * np.outer(across, across)
    answer = np.linalg.inv(np.eye(2) + hessian / LAMBDA)  # d theta_P* / d theta_D
    grid = np.linspace(-2.1, 2.1, 200)
    x, y = np.meshgrid(grid, grid)
    points = np.stack([x, y], axis=-1)
    loss = 0.5 * np.einsum("...i,ij,...j", points, hessian, points)
    axes.contour(x, y, loss, levels=[0.05, 0.2, 0.5, 1.0, 2.0, 4.0], colors=BLUE, alpha=0.35, linewidths=0.9)
    circle = 1.6 * np.stack([np.cos(t := np.linspace(0, 2 * np.pi, 200)), np.sin(t)])
    axes.plot(*circle, color=ORANGE, linewidth=1.4)
    axes.plot(*(answer @ circle), color=BLUE, linewidth=1.8)
    step = 1.6 * np.array([np.cos(1.75), np.sin(1.75)])
    bent = answer @ step
    for end, colour, text, place in (
        (step, ORANGE, "$v$", (-0.58, 1.3)),
        (bent, GREEN, "$(I+H/\\lambda)^{-1} v$", (0.4, -0.5)),
    ):
        arrow(axes, (0, 0), tuple(end), colour, lw=2.2)
        axes.text(*place, text, color=colour, size=11)
    axes.text(1.02, -1.62, "where $\\theta_D$ may go", color=ORANGE, ha="center")
    axes.text(-1.0, 0.55, "where $\\theta_P^*$\nthen goes", color=BLUE, ha="center")
    axes.plot(0, 0, "o", color="black", markersize=4)
    axes.set(aspect="equal", xlim=(-2.1, 2.1), ylim=(-2.1, 2.1), xticks=[], yticks=[])
    axes.set_title("contours: a pretext loss of two parameters", size=9, color=BLUE)


def main() -> None:
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.3), width_ratios=[1.62, 1], layout="constrained")
    levels(left)
    plane(right)
    figure.savefig(Path(__file__).with_name("levels.svg"), metadata={"Date": None})


if __name__ == "__main__":
    main()
