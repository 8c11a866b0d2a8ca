"""What the check of a hypergradient found, as a file, a table and a picture."""

import json
import math
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tabulate import tabulate

from bissl_zoo.files import write_atomically

#: of Okabe and Ito, told apart with any colour vision
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "os^Dv*P"


def save(figures: dict[str, Any], folder: Path) -> None:
    """Write `check.json` and `check.png`."""
    write_atomically(folder / "check.json", json.dumps(_jsonable(figures), indent=2, allow_nan=False) + "\n")
    draw(figures["real"]).savefig(folder / "check.png", dpi=120)


def _jsonable(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(item) for item in value]
    # JSON has no infinity and no NaN
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def table(real: dict[str, Any]) -> str:
    """Residuals by solver, damping and budget of products."""
    budgets = max(([p["budget"] for p in row["points"]] for row in real["solvers"]), key=len)
    lines = []
    for row in real["solvers"]:
        cells = [f"{p['residual']:.1e}" for p in row["points"]]
        cells += [""] * (len(budgets) - len(cells))
        cosines = [f"{row[key]:.4f}" for key in ("cosine_to_v", "cosine_to_best")]
        lines.append([row["solver"], f"{row['damping']:.4g}", *cells, row["points"][-1]["status"], *cosines])
    headers = ["solver", "damping", f"budget {budgets[0]}", *budgets[1:], "last status", "cos(x, v)", "cos(x, best)"]
    notes = [f"{name} left out: {reason}" for name, reason in real["skipped"].items()]
    lead = "true relative residual within a budget of products; a solver that takes none has a single figure"
    return "\n".join([lead, tabulate(lines, headers=headers, disable_numparse=True), *notes])


def draw(real: dict[str, Any]) -> Figure:
    """Residual against products, and the Ritz values of A."""
    figure = Figure(figsize=(14, 5), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.3, 1.0))
    _draw_residuals(left, real)
    _draw_spectrum(right, real)
    return figure


def _draw_residuals(axes: Axes, real: dict[str, Any]) -> None:
    names = list(dict.fromkeys(row["solver"] for row in real["solvers"]))
    first = real["solvers"][0]["damping"]
    for row in real["solvers"]:
        number = names.index(row["solver"])
        style = {"color": COLOURS[number % len(COLOURS)], "linestyle": "-" if row["damping"] == first else "--"}
        style["label"] = f"{row['solver']}, damping {row['damping']:.4g}"
        points = [p for p in row["points"] if math.isfinite(p["residual"])]
        if points and points[-1]["budget"] is None:
            axes.axhline(points[-1]["residual"], linewidth=1, **style)
        else:
            spent, residuals = [p["products"] for p in points], [p["residual"] for p in points]
            axes.plot(spent, residuals, marker=MARKERS[number % len(MARKERS)], markersize=5, **style)
    if real["tolerance"]:
        axes.axhline(real["tolerance"], color="0.5", linestyle=":", label=f"tolerance {real['tolerance']:g}")
    axes.set(yscale="log", xlabel="products, by the solver's own count", ylabel="relative residual ||v - Ax|| / ||v||")
    axes.set_title(f"Solvers, each from nothing (P = {real['parameters']:,})")
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def _draw_spectrum(axes: Axes, real: dict[str, Any]) -> None:
    for number, entry in enumerate(real["definiteness"]):
        shift = real["lambda"] + entry["damping"]
        values = [1 + value / shift for value in real["spectrum"]["values"]]
        errors = [bound / shift for bound in real["spectrum"]["bounds"]]
        label = f"damping {entry['damping']:.4g}: {entry['state']}"
        look = {"fmt": MARKERS[number], "color": COLOURS[number], "markersize": 5, "capsize": 3}
        axes.errorbar(values, [number] * len(values), xerr=errors, label=label, **look)
    count = len(real["definiteness"])
    axes.axvline(0.0, color="black", linewidth=1)
    axes.set_xscale("symlog", linthresh=1.0)
    axes.margins(x=0.1)
    axes.set(xlabel="Ritz values of A = I + H / (lambda + damping), with error bounds", ylabel="damping")
    axes.set_yticks(range(count), [f"{entry['damping']:.4g}" for entry in real["definiteness"]])
    axes.set(ylim=(-0.5, count - 0.2), title="Spectrum: a value left of the line makes A indefinite")
    axes.legend(fontsize=8, loc="upper left")
