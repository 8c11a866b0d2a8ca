"""Compare the upper stage with the textbook scheme: time, products, true residuals and memory, interleaved.

    python benchmarks/upper_stage.py --architecture resnet18 --size 64 --batch 32
    python benchmarks/upper_stage.py --architecture resnet50 --size 96 --batch 16

Both levels are trained briefly first (`--state` keeps that state), since at random initialisation nothing converges.

    floor  no curvature: solver `identity`
    a      the textbook scheme as the BiSSL authors' code has it: each product from a fresh forward and backward pass,
           blockwise conjugate gradient, 5 iterations, damping 10
    b      the arithmetic of a, one graph per alternation, batch norm and convolution with own double backward
    c      textbook conjugate gradient on the joint system, each product from a fresh pass, each solve from zero, to
           a residual of 0.05 at the damping of d
    d      recycled minimal residuals to 0.05 (configs/common/solvers/minres.py), automatic damping included
    e      d with half the batch for the curvature (bilevel.curvature_batch_size)

An alternation is 20 lower and 8 upper steps. The lower steps are the same in all. Steps that cost the same in each
alternation (floor, a, b, c) are timed twice per round, d and e eight times.
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from fvcore.common.param_scheduler import ConstantParamScheduler
from torch import Tensor
from torch.optim import SGD, AdamW
from tqdm import tqdm

from bissl_zoo.bilevel import BiLevel
from bissl_zoo.bilevel.level import Level
from bissl_zoo.data.datasets.digit_scenes import DigitScenes
from bissl_zoo.data.samples import to_device
from bissl_zoo.data.views import two_views
from bissl_zoo.distributed import flatten
from bissl_zoo.hypergradient import ConjugateGradient, Identity, MinRes
from bissl_zoo.optim import LRMultiplier
from bissl_zoo.registry import build_backbone, build_pretext, build_task

LAM, AUTHORS_DAMPING, LOWER_STEPS, UPPER_STEPS = 0.001, 10.0, 20, 8
TOLERANCE = 0.05
BATCHES = 24


class Setting:
    """Two levels from a briefly trained state, with their batches drawn beforehand."""

    def __init__(self, args: argparse.Namespace) -> None:
        torch.manual_seed(0)
        np.random.seed(0)
        self.args = args
        trunk, tail = self._split()
        views = two_views(args.size, crop_scale=(0.15, 0.6), flip_probability=0.0)
        self.pretext = build_pretext(name="simclr", backbone=trunk, tail=tail, augmentation=views)
        self.lower, self.upper = trunk, self._split()[0]
        self.task = build_task(name="classification", backbone=trunk, classes=list("0123456789"), image_size=args.size)
        self.modules = {"lower": self.lower, "upper": self.upper, "pretext": self.pretext, "task": self.task}
        for module in self.modules.values():
            module.to(args.device).train()
        self._scenes = [image for image, _ in DigitScenes("unlabeled")]
        self._digits = list(_crops(DigitScenes("train")))
        if args.state.exists():
            self.restore(torch.load(args.state, map_location=args.device, weights_only=True))
        else:
            self._train()
            args.state.parent.mkdir(parents=True, exist_ok=True)
            torch.save(self.snapshot(), args.state)
        self.pretext_batches = [self._views() for _ in range(BATCHES)]
        self.task_batches = [self._labelled() for _ in range(BATCHES)]
        self._start = self.snapshot()

    def snapshot(self) -> dict[str, dict[str, Tensor]]:
        return {n: {k: v.detach().clone() for k, v in m.state_dict().items()} for n, m in self.modules.items()}

    def restore(self, state: dict[str, dict[str, Tensor]]) -> None:
        for name, module in self.modules.items():
            module.load_state_dict(state[name])

    def problem(self, solver, number: int, hvp_mode: str = "retain_graph", curvature: int | None = None) -> BiLevel:
        """The bilevel problem from the start, at round `number`'s batches."""
        self.restore(self._start)
        levels = []
        for name, net, head, batches in (
            ("lower", self.lower, self.pretext, self.pretext_batches),
            ("upper", self.upper, self.task, self.task_batches),
        ):
            optimizer = SGD([*net.parameters(), *head.parameters()], lr=0.01, momentum=0.9)
            first = number * UPPER_STEPS % BATCHES
            stream = itertools.islice(itertools.cycle(batches), first, None)
            levels.append(Level(name, net, head, optimizer, stream, LRMultiplier(ConstantParamScheduler(1.0)), 10**6))
        return BiLevel(*levels, solver=solver, lam=LAM, hvp_mode=hvp_mode, curvature_batch_size=curvature)

    def _split(self):
        return build_backbone(name=self.args.architecture, zero_init_last=False).split("c5")

    def _views(self):
        chosen = np.random.choice(len(self._scenes), self.args.batch, replace=False)
        views = [self.pretext.views()(self._scenes[i]) for i in chosen]
        return to_device(tuple(torch.stack(view) for view in zip(*views, strict=True)), self.args.device)

    def _labelled(self):
        transform = self.task.transform(train=True)
        chosen = np.random.choice(len(self._digits), self.args.batch, replace=False)
        return to_device(self.task.collate([transform(*self._digits[i]) for i in chosen]), self.args.device)

    def _train(self) -> None:
        steps = self.args.train_steps
        parameters = [*self.lower.parameters(), *self.pretext.parameters()]
        optimizer = AdamW(parameters, lr=1e-3, weight_decay=1e-4)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps, pct_start=0.1)
        for _ in tqdm(range(steps), desc="pretraining"):
            optimizer.zero_grad()
            sum(self.pretext.losses(self.lower, self._views()).values()).backward()
            optimizer.step()
            schedule.step()
        self.upper.load_state_dict(self.lower.state_dict())
        self.upper.eval()
        optimizer = AdamW(self.task.parameters(), lr=3e-3)
        for _ in tqdm(range(60), desc="head warm-up"):
            optimizer.zero_grad()
            sum(self.task.losses(self.upper, self._labelled()).values()).backward()
            optimizer.step()
        self.upper.train()


def _crops(scenes):
    for image, target in scenes:
        for box, label in zip(target["boxes"].tolist(), target["labels"].tolist(), strict=True):
            x, y, half = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2, 0.65 * max(box[2] - box[0], box[3] - box[1])
            yield image.crop((int(x - half), int(y - half), int(x + half), int(y + half))), int(label)


class Textbook:
    """A hypergradient as the paper's pseudocode has it: lists of tensors, every product from a fresh pass."""

    def __init__(self, bilevel: BiLevel, batch, shift: float, blockwise: bool) -> None:
        self.bilevel, self.batch, self.shift, self.blockwise = bilevel, batch, shift, blockwise
        self.parameters = list(bilevel.lower.backbone.parameters())

    def product(self, u: list[Tensor]) -> list[Tensor]:
        lower = self.bilevel.lower
        loss = sum(lower.head.losses(lower.backbone, self.batch).values())
        gradient = torch.autograd.grad(loss, self.parameters, create_graph=True)
        hessian = torch.autograd.grad(gradient, self.parameters, grad_outputs=u)
        return [a + b / self.shift for a, b in zip(u, hessian, strict=True)]

    def dots(self, a: list[Tensor], b: list[Tensor]) -> list[Tensor]:
        """Inner products, per tensor or of all."""
        dots = [(x * y).sum() for x, y in zip(a, b, strict=True)]
        return dots if self.blockwise else [sum(dots)] * len(dots)

    def solve(self, v: list[Tensor], iterations: int, tolerance: float) -> tuple[list[Tensor], int]:
        x, r, p = [torch.zeros_like(t) for t in v], v, v
        r_dot_r = self.dots(r, r)
        limit = tolerance**2 * float(sum(r_dot_r)) / (1 if self.blockwise else len(v))
        for k in range(iterations):
            product = self.product(p)
            step = [a / (b + 1e-12) for a, b in zip(r_dot_r, self.dots(p, product), strict=True)]
            x = [a + s * b for a, s, b in zip(x, step, p, strict=True)]
            r = [a - s * b for a, s, b in zip(r, step, product, strict=True)]
            before, r_dot_r = r_dot_r, self.dots(r, r)
            if not self.blockwise and float(r_dot_r[0]) <= limit:
                return x, k + 1
            p = [a + n / (o + 1e-12) * b for a, n, o, b in zip(r, r_dot_r, before, p, strict=True)]
        return x, iterations

    def upper_step(self, iterations: int, tolerance: float = 0.0) -> tuple[Tensor, Tensor, int]:
        """One upper step; returns v, x and the number of products."""
        lower, upper = self.bilevel.lower, self.bilevel.upper
        batch, head = next(upper.data_iterator), list(upper.head.parameters())
        both = []
        for backbone in (lower.backbone, upper.backbone):
            shared = list(backbone.parameters())
            both.append(torch.autograd.grad(sum(upper.head.losses(backbone, batch).values()), [*shared, *head]))
        size = len(self.parameters)
        v = list(both[0][:size])
        x, products = self.solve(v, iterations, tolerance)
        total = [a + b for a, b in zip([*x, *both[0][size:]], both[1], strict=True)]
        for parameter, grad in zip([*upper.backbone.parameters(), *head], total, strict=True):
            parameter.grad = grad
        upper.optimize()
        return flatten(v), flatten(x), products


class Stopwatch:
    """Seconds of a block, the device's work included."""

    def __init__(self, device: str) -> None:
        self.wait = torch.cuda.synchronize if device == "cuda" else lambda: None

    def __enter__(self) -> "Stopwatch":
        self.wait()
        self.start = time.perf_counter()
        return self

    def __exit__(self, *error) -> None:
        self.wait()
        self.seconds = time.perf_counter() - self.start


class Round:
    """One round over all variants; each method returns seconds and figures."""

    def __init__(self, setting: Setting, number: int) -> None:
        self.setting, self.number, self.device = setting, number, setting.args.device
        self.batch = setting.pretext_batches[number % BATCHES]
        self.checks_residuals = True

    def floor(self, steps: int = 2):
        bilevel = self.setting.problem(Identity(), self.number)
        operator = bilevel.curvature(self.batch)
        with Stopwatch(self.device) as watch:
            for _ in range(steps):
                bilevel.upper_step(operator)
        return {"upper": watch.seconds / steps * UPPER_STEPS, "products": 0}

    def lower(self, steps: int = 2):
        bilevel = self.setting.problem(Identity(), self.number)
        with Stopwatch(self.device) as watch:
            for _ in range(steps):
                bilevel.lower_step()
        return {"lower": watch.seconds / steps * LOWER_STEPS}

    def a(self, steps: int = 2):
        return self._textbook(steps, LAM + AUTHORS_DAMPING, blockwise=True, iterations=5)

    def c(self, steps: int = 2):
        return self._textbook(steps, self.shift, blockwise=False, iterations=50, tolerance=TOLERANCE)

    def _textbook(self, steps: int, shift: float, blockwise: bool, **limits):
        bilevel = self.setting.problem(Identity(), self.number)
        scheme = Textbook(bilevel, self.batch, shift, blockwise)
        seconds, systems, products = 0.0, [], []
        for _ in range(steps):
            with Stopwatch(self.device) as watch:
                v, x, spent = scheme.upper_step(**limits)
            seconds += watch.seconds
            products.append(spent)
            if self.checks_residuals:
                systems.append((v, x))
        share = UPPER_STEPS / steps
        return {
            "upper": seconds * share,
            "products": sum(products) * share,
            "residual": self._true_residuals(bilevel, shift, systems),
            "first": systems[:1],
        }

    def b(self, steps: int = 2, hvp_mode: str = "retain_graph"):
        solver = ConjugateGradient(5, 0.0, AUTHORS_DAMPING, blockwise=True, check=False)
        bilevel = self.setting.problem(solver, self.number, hvp_mode)
        operator = bilevel.curvature(self.batch)
        with Stopwatch(self.device) as prepare:
            operator.prepare()
        systems, seconds = [], 0.0
        for _ in range(steps):
            with Stopwatch(self.device) as watch:
                v, x, _ = _step(bilevel, operator)
            seconds += watch.seconds
            if self.checks_residuals:
                systems.append((v, x))
        operator.release()
        return {
            "upper": prepare.seconds + seconds / steps * UPPER_STEPS,
            "products": 5 * UPPER_STEPS,
            "residual": self._true_residuals(bilevel, LAM + AUTHORS_DAMPING, systems),
            "first": systems[:1],
        }

    def e(self):
        return self._run("retain_graph", self.setting.args.batch // 2)

    def d(self, hvp_mode: str = "retain_graph"):
        results = self._run(hvp_mode, None)
        self.shift = results["damping"] + LAM
        return results

    def _run(self, hvp_mode: str, curvature: int | None):
        bilevel = self.setting.problem(MinRes(), self.number, hvp_mode, curvature)
        operator = bilevel.curvature(self.batch)
        systems, seconds, spent = [], 0.0, 0
        for step in range(UPPER_STEPS):
            with Stopwatch(self.device) as watch:
                if step == 0:
                    operator.prepare()
                v, x, metrics = _step(bilevel, operator)
            seconds += watch.seconds
            spent += metrics["solver/products"]
            if self.checks_residuals:
                systems.append((v, x))
        shift = operator.shift
        operator.release()
        return {
            "upper": seconds,
            "products": spent,
            "damping": shift - LAM,
            "residual": self._true_residuals(bilevel, shift, systems),
        }

    def _true_residuals(self, bilevel: BiLevel, shift: float, systems) -> float:
        """The larger `||v - A x|| / ||v||` of the last two systems, from new products that are not timed."""
        if not self.checks_residuals:
            return float("nan")
        operator = bilevel.curvature(self.batch)
        operator.shift = shift
        operator.prepare()
        residuals = [float((v - operator(x)).norm() / v.norm()) for v, x in systems[-2:]]
        operator.release()
        return max(residuals)


def _step(bilevel: BiLevel, operator):
    """Run an upper step and return v, x and its metrics."""
    solver, vectors = bilevel.solver, []

    class Recording:
        def __getattr__(self, name):
            return getattr(solver, name)

        def __call__(self, operator, v):
            solution = solver(operator, v)
            vectors.extend((v, solution.x))
            return solution

    bilevel.solver = Recording()
    try:
        metrics = bilevel.upper_step(operator)
    finally:
        bilevel.solver = solver
    return *vectors, metrics


def measure(setting: Setting, rounds: int) -> dict[str, list[dict]]:
    """Run `rounds` interleaved rounds after a warm-up round."""
    results_of: dict[str, list[dict]] = {name: [] for name in ("lower", "floor", "a", "b", "d", "c", "e")}
    for number in tqdm(range(rounds + 1), desc="rounds"):
        variants = Round(setting, number)
        results = {name: getattr(variants, name)() for name in results_of}
        [(_, x)], [(_, y)] = results["a"].pop("first"), results["b"].pop("first")
        results["b"]["difference"] = float((x - y).norm() / x.norm())
        results["c"].pop("first")
        if number:
            for name, result in results.items():
                results_of[name].append(result)
    return results_of


def report(results_of: dict[str, list[dict]]) -> dict:
    """Return medians per variant and medians of the per-round ratios."""

    def median(values):
        return statistics.median(values)

    lower = [result["lower"] for result in results_of["lower"]]
    alternation = {
        name: [low + result["upper"] for low, result in zip(lower, results, strict=True)]
        for name, results in results_of.items()
        if name != "lower"
    }
    rows = {
        name: {
            "alternation_s": median(alternation[name]),
            "upper_step_s": median([result["upper"] / UPPER_STEPS for result in results]),
            **{key: median([result[key] for result in results]) for key in results[0] if key != "upper"},
        }
        for name, results in results_of.items()
        if name != "lower"
    }
    ratios = {
        f"{x}/{y}": median([p / q for p, q in zip(alternation[x], alternation[y], strict=True)])
        for x, y in (("a", "b"), ("c", "d"), ("a", "d"), ("a", "e"), ("d", "floor"), ("e", "floor"), ("a", "floor"))
    }
    return {"lower_steps_s": median(lower), "variants": rows, "ratios": ratios, "rounds": len(lower)}


def show(summary: dict) -> None:
    print(f"\n20 lower steps: {summary['lower_steps_s']:.2f} s (median of {summary['rounds']})\n")
    print("| variant | s per alternation | s per upper step | products per alternation | true residual |")
    print("|---|---|---|---|---|")
    for name, row in summary["variants"].items():
        residual = f"{row['residual']:.3g}" if "residual" in row else "-"
        print(
            f"| {name} | {row['alternation_s']:.2f} | {row['upper_step_s']:.3f} | {row['products']:.0f} | {residual} |"
        )
    print()
    for name, value in summary["ratios"].items():
        print(f"{name}: {value:.2f}")
    print(f"x of b differs from that of a by {summary['variants']['b']['difference']:.1e} (relative)")
    print(f"automatic damping of d: {summary['variants']['d']['damping']:.1f}")


MEMORY = {
    "floor": lambda variants: variants.floor(),
    "a": lambda variants: variants.a(),
    "b graph": lambda variants: variants.b(),
    "b rebuild": lambda variants: variants.b(hvp_mode="recompute"),
    "d graph": lambda variants: variants.d(),
    "d rebuild": lambda variants: variants.d(hvp_mode="recompute"),
}


def peak_memory(setting: Setting, variant: str) -> float:
    """Return the peak memory in MiB (on a GPU: allocated there) of a lower step and the variant's upper steps."""
    variants = Round(setting, 0)
    variants.checks_residuals = False  # so that their vectors are not kept
    if setting.args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    variants.lower(1)
    MEMORY[variant](variants)
    if setting.args.device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    # not ru_maxrss, which a child process inherits from its parent
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) / 1024


def profile(setting: Setting) -> None:
    """Print the time of a Hessian-vector product by operator."""
    bilevel = setting.problem(Identity(), 0)
    operator = bilevel.curvature(setting.pretext_batches[0]).prepare()
    u = flatten(torch.randn_like(p) for p in bilevel.lower.backbone.parameters())
    operator.hessian_product(u)
    with torch.profiler.profile() as trace:
        operator.hessian_product(u)
    key = "self_cuda_time_total" if setting.args.device == "cuda" else "self_cpu_time_total"
    print(trace.key_averages().table(sort_by=key, row_limit=12, max_name_column_width=40))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", default="resnet18")
    parser.add_argument("--size", type=int, default=64, help="side of the images in pixels")
    parser.add_argument("--batch", type=int, default=32, help="batch size of both levels and of the curvature")
    parser.add_argument("--train-steps", type=int, default=300, help="steps of SimCLR before the measurement")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--state", type=Path, help="file of the trained state; written if it does not exist")
    parser.add_argument("--output", type=Path, help="JSON file for all results")
    parser.add_argument("--no-memory", action="store_true", help="do not measure peak memory")
    parser.add_argument("--memory", choices=MEMORY, help="only the peak memory of one variant")
    parser.add_argument("--profile", action="store_true", help="only print the time of a product by operator")
    args = parser.parse_args()
    args.state = args.state or Path("runs/benchmark") / f"{args.architecture}_{args.size}_{args.batch}.pt"
    setting = Setting(args)
    if args.profile:
        return profile(setting)
    if args.memory:
        return print(json.dumps({args.memory: peak_memory(setting, args.memory)}))
    results = measure(setting, args.rounds)
    summary = report(results)
    show(summary)
    memory = {} if args.no_memory else _peaks(args)
    if args.output:
        args.output.write_text(json.dumps({**summary, "memory_mib": memory, "results": results}, indent=2))


def _peaks(args: argparse.Namespace) -> dict[str, float]:
    """Return the peak memory of each variant, each measured in a new process."""
    command = [sys.executable, __file__, *sys.argv[1:], "--state", str(args.state), "--memory"]
    outputs = [subprocess.run([*command, variant], check=True, capture_output=True, text=True) for variant in MEMORY]
    memory = {key: value for output in outputs for key, value in json.loads(output.stdout.splitlines()[-1]).items()}
    print("\npeak memory, MiB (over a's):")
    for variant, value in memory.items():
        print(f"  {variant}: {value:.0f} ({value / memory['a']:.2f})")
    return memory


if __name__ == "__main__":
    main()
