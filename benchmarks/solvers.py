"""Compare all hypergradient solvers: cost, how far each is from the exact solution, and the outcome of a stage.

    OMP_NUM_THREADS=1 python benchmarks/solvers.py                        # table of a small problem, minutes
    OMP_NUM_THREADS=1 python benchmarks/solvers.py --network --rounds 3   # time and memory on a resnet18

The small problem is that of `ideas.py` with 2,128 parameters, so that the matrix of the exact solution fits in memory.
The solutions are compared at the same weights and batches, after half of a stage with `identity`; each solver has its
own damping. `exact` is `(I + H / lambda)^-1 v` with the whole Hessian and no damping, `exact gauss_newton` has the
Gauss-Newton matrix in its place; both are too slow for a stage. Times are of alternations, interleaved, as the median
ratio to those of `identity`. With `--network` both levels are the resnet18 of `upper_stage.py`, and each peak memory is
that of a process of its own.
"""

import argparse
import copy
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import ideas
from ideas import SETTING, Contrast, Encoder, Start, make_level, momentum_sgd
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity
from torch.optim import AdamW
from upper_stage import Setting

from bissl_zoo.bilevel import BiLevel
from bissl_zoo.hypergradient import ConjugateGradient, Exact, Identity, MFac, MinRes, Nystrom, Sama
from bissl_zoo.pretext.simclr import positive_cross_entropy, similarity_logits


def adamw(*modules: nn.Module) -> AdamW:
    return AdamW([p for module in modules for p in module.parameters()], lr=1e-3)


#: name -> solver, curvature and optimizer of the lower level
VARIANTS = {
    "identity": (Identity, {}, "gauss_newton", momentum_sgd),
    "mfac, layer": (MFac, {"gradients": 20}, "gauss_newton", momentum_sgd),
    "mfac, all": (MFac, {"gradients": 20, "blocks": "all"}, "gauss_newton", momentum_sgd),
    "nystrom": (Nystrom, {"check": False}, "gauss_newton", momentum_sgd),
    "cg of the authors": (
        ConjugateGradient,
        {"iterations": 5, "tolerance": 0.0, "damping": 10.0, "blockwise": True, "check": False},
        "hessian",
        momentum_sgd,
    ),
    "minres hessian": (MinRes, {"damping": "auto"}, "hessian", momentum_sgd),
    "cg gauss_newton": (
        ConjugateGradient,
        {"iterations": 6, "tolerance": 0.05, "damping": "auto"},
        "gauss_newton",
        momentum_sgd,
    ),
    "exact gauss_newton": (Exact, {}, "gauss_newton", momentum_sgd),
    "exact": (Exact, {}, "hessian", momentum_sgd),
    "identity, AdamW": (Identity, {}, "gauss_newton", adamw),
    "sama, AdamW": (Sama, {}, "gauss_newton", adamw),
}
EXACT = ("exact", "exact gauss_newton")  # no stages


class ConvexContrast(Contrast):
    """SimCLR with the cut of the loss that Gauss-Newton needs."""

    def outputs(self, backbone: nn.Module, views: Tensor) -> tuple[Tensor]:
        return (similarity_logits(self.projector(backbone(views)), 0.5),)

    def outer(self, outputs: tuple[Tensor]) -> dict[str, Tensor]:
        return {"nt_xent": positive_cross_entropy(outputs[0])}


class Record:
    """A solver that follows another one and returns `v`, so that both see the same weights."""

    damping = 0.0

    def __init__(self, solver: Any) -> None:
        for name in ("attach", "start_alternation", "observe_lower_gradient"):
            if hasattr(solver, name):
                setattr(self, name, getattr(solver, name))

    def __call__(self, operator: Any, v: Tensor) -> Any:
        return Identity()(operator, v)


def small_problem(start: Start, name: str, solver: Any = None) -> BiLevel:
    """Return the bilevel problem of `ideas.py` from its start, for a variant."""
    kind, arguments, curvature, optimizer = VARIANTS[name]
    nets = [copy.deepcopy(module) for module in (start.encoder, start.contrast, start.encoder, start.classify)]
    lower = make_level("lower", *nets[:2], start.digits.views(seed=3), optimizer(*nets[:2]))
    upper = make_level("upper", *nets[2:], start.digits.labelled(seed=4), momentum_sgd(*nets[2:]))
    lower_steps, upper_steps, alternations = 20, 8, int(SETTING["alternations"])
    return BiLevel(
        lower,
        upper,
        solver or kind(**arguments),
        lam=SETTING["lambda"],
        lower_steps=lower_steps,
        upper_steps=upper_steps,
        alternations=alternations,
        curvature=curvature,
    )


def solution(start: Start, name: str) -> Tensor:
    """Return x of a variant after half a stage with `identity`."""
    kind, arguments, *_ = VARIANTS[name]
    solver = kind(**arguments)
    problem = small_problem(start, name, Record(solver))
    for number in range(problem.alternations // 2):
        problem.alternate(number)
    problem.solver = solver
    operator = problem.curvature(problem.lower.next_batch()).prepare()
    return problem.upper_gradients(problem.upper.next_batch(), operator).solution.x


def measure_small(seeds: int) -> dict[str, dict[str, float]]:
    """Return the medians over seeds of each variant."""
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in VARIANTS}
    for seed in range(seeds):
        start = Start(seed)
        solutions = {name: solution(start, name) for name in VARIANTS}
        problems = {name: small_problem(start, name) for name in VARIANTS if name not in EXACT}
        seconds: dict[str, list[float]] = {name: [] for name in problems}
        for number in range(int(SETTING["alternations"])):
            for name, problem in problems.items():
                begin = time.process_time()
                problem.alternate(number)
                seconds[name].append(time.process_time() - begin)
        exact, semidefinite = solutions["exact"], solutions["exact gauss_newton"]
        for name, x in solutions.items():
            base = "identity, AdamW" if name.endswith("AdamW") else "identity"
            v = solutions[base]
            staged = name in problems
            ratios = [a / b for a, b in zip(seconds[name], seconds[base], strict=True)] if staged else []
            same = base == "identity"  # AdamW's lower level is elsewhere
            rows[name].append(
                {
                    "time": statistics.median(ratios) if staged else None,
                    "cos(x, v)": float(cosine_similarity(x, v, dim=0)),
                    "|x|/|v|": float(x.norm() / v.norm()),
                    "to exact gauss_newton": float((x - semidefinite).norm() / semidefinite.norm()) if same else None,
                    "to exact": float((x - exact).norm() / exact.norm()) if same else None,
                    "fine-tuned": start.finetuned(problems[name].lower.backbone) if staged else None,
                }
            )
        print(f"seed {seed}: fine-tuned without a stage {start.pretrained_finetuned:.4f}", flush=True)
    return {
        name: {
            key: None if found[0][key] is None else statistics.median([row[key] for row in found]) for key in found[0]
        }
        for name, found in rows.items()
    }


def network_problem(setting: Setting, name: str, number: int) -> BiLevel:
    kind, arguments, curvature, _ = VARIANTS[name]
    problem = setting.problem(kind(**arguments), number)
    problem.curvature_matrix = curvature
    return problem


def measure_network(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Return time over `identity` and the peak memory of each variant on the resnet18."""
    names = args.only or [name for name in VARIANTS if name not in EXACT and "AdamW" not in name]
    setting = Setting(args)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(args.rounds + 1):  # the first one warms up
        for name in names:
            problem = network_problem(setting, name, number)
            begin = time.process_time()
            problem.alternate(0)
            seconds[name].append(time.process_time() - begin)
            print(f"round {number}: {name} {seconds[name][-1]:.1f} s", flush=True)
    command = [sys.executable, __file__, "--network", "--state", str(args.state), "--memory"]
    outputs = {name: subprocess.run([*command, name], check=True, capture_output=True, text=True) for name in names}
    return {
        name: {
            "time": statistics.median([a / b for a, b in zip(seconds[name], seconds["identity"], strict=True)][1:]),
            "s per alternation": statistics.median(seconds[name][1:]),
            "peak memory, MiB": float(outputs[name].stdout.split()[-1]),
        }
        for name in names
    }


def peak_memory(args: argparse.Namespace) -> float:
    """Return the peak memory in MiB of this process after an alternation of 20 lower and 1 upper steps."""
    problem = network_problem(Setting(args), args.memory, 0)
    problem.upper_steps = 1
    problem.alternate(0)
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) / 1024


def show(rows: dict[str, dict[str, float]]) -> None:
    keys = list(next(iter(rows.values())))
    print(f"\n| solver | {' | '.join(keys)} |\n|---{'|---' * len(keys)}|")
    for name, row in rows.items():
        cells = ["-" if row[key] is None else f"{row[key]:.4g}" for key in keys]
        print(f"| {name} | {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--network", action="store_true", help="time and memory on a resnet18 instead")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="*", choices=VARIANTS, help="variants of --network, identity first")
    parser.add_argument("--state", type=Path, default=Path("runs/benchmark/resnet18_64_32.pt"))
    parser.add_argument("--memory", choices=VARIANTS, help="only the peak memory of one variant")
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    args = parser.parse_args()
    vars(args).update(architecture="resnet18", size=64, batch=32, train_steps=300, device="cpu")
    if args.memory:
        return print(peak_memory(args))
    if args.network:
        rows = measure_network(args)
    else:
        ideas.Encoder, ideas.Contrast = (lambda: Encoder(hidden=16)), ConvexContrast
        rows = measure_small(args.seeds)
    show(rows)
    if args.output:
        args.output.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
