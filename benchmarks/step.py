"""One training step, from forward to ``.grad``: plain, as published, by peers, by hand, and with the library.

    python -m benchmarks.step [--quick]

Time over the plain step in the same round, peak memory in a fresh process, and the error of the gradients against
float64, over models, numbers of clusters and batch sizes. Writes results/step_cpu.json and
docs/images/step_cost.png; on a CUDA device, which the same command uses, results/step_cuda.json and
docs/images/step_cost_cuda.png. TorchJD comes with the ``bench`` extra, the plot needs the ``train`` extra.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
import warnings
from collections.abc import Container, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import diffmtl_fast as dm
from benchmarks.harness import (
    RESULTS,
    Candidate,
    Comparison,
    GateError,
    compare,
    environment,
    relative_error,
    write,
)
from benchmarks.memory import in_fresh_process, peak
from benchmarks.models import MODELS, Case
from benchmarks.reference import (
    cluster_gradients,
    nash_residual,
    pcgrad,
    plain_step,
    random_orders,
    update_direction,
)
from benchmarks.ways import COMPILED, SEED, Outcome, Rows, Way, projecting, slice_batches, uncertainty, ways
from diffmtl_fast._extras import require

IMAGES = Path(__file__).parents[1] / "docs" / "images"
TYPICAL_K = 5  # of the published experiments
ALLOWANCE = 2.0  # no way takes more than about twice the plain step's time of the whole run
CHUNK = 8  # samples of a float64 forward

Expected = dict[Outcome, Tensor]  # rows in float64: [1, P], the Jacobian [K, P]


@dataclass(frozen=True)
class Setting:
    """What one table is about; a fresh process builds its case from it."""

    model: str
    batch: int
    k: int
    device: str
    autocast: bool

    def case(self) -> Case:
        """Build the case, the same in every process."""
        torch.manual_seed(SEED)
        case = MODELS[self.model](self.batch, self.k).to(torch.device(self.device))
        return replace(case, autocast=self.autocast)


def exact_jacobian(case: Case) -> Tensor:
    """Return every cluster's gradient by its definition in float64, [K, P]: of its own samples, by the chunk."""
    case = case.exact()
    rows = []
    for part in slice_batches(case):
        case.model.zero_grad(set_to_none=True)
        size = len(part.target)
        for start in range(0, size, CHUNK):
            losses = case.losses(case.model, part.narrow(start, min(CHUNK, size - start)))
            (losses.sum() / size).backward()
        rows.append(_flat([p.grad for p in case.model.parameters()], case))
    return torch.stack(rows)


def directions(case: Case, jacobian: Tensor) -> Expected:
    """Balance a float64 Jacobian by the published definitions."""
    k = case.num_clusters
    present = torch.ones(k, dtype=torch.bool, device=jacobian.device)
    orders = projecting(case).draw_order(k, case.device)
    torchjd_orders = random_orders(k, torch.Generator().manual_seed(SEED))
    variances = uncertainty(case).log_var.detach().to(jacobian)
    gramian = jacobian @ jacobian.T
    found: dict[Outcome, Tensor] = {
        "mean": torch.tensor(case.sizes).to(jacobian) @ jacobian / sum(case.sizes),
        "uncertainty": update_direction(jacobian, 0.5 * torch.exp(-variances), present),
        "pcgrad": update_direction(jacobian, _projecting(gramian, orders), present),
        "pcgrad, torchjd's order": update_direction(jacobian, _projecting(gramian, torchjd_orders), present),
        "nash": update_direction(jacobian, _bargaining(gramian), present),
    }
    if min(relative_error(found[name], jacobian.mean(0)) for name in ("pcgrad", "nash")) < 0.01:
        raise GateError(f"{case.name}: expected gradients to balance, found all weights near 1")
    return {name: direction.unsqueeze(0) for name, direction in found.items()}


def _projecting(gramian: Tensor, orders: Tensor) -> Tensor:
    """Return PCGrad's weights: its loop over vectors of K elements that have the gradients' inner products."""
    factor = torch.linalg.cholesky(gramian)
    projected = pcgrad(factor, orders).unsqueeze(0)
    return torch.linalg.solve_triangular(factor, projected, upper=False, left=False).squeeze(0)


def _bargaining(gramian: Tensor) -> Tensor:
    """Return the bargaining weights, certified by the equations that only they solve."""
    weights = dm.ops.nash_weights(gramian)
    residual = nash_residual(gramian.cpu().numpy(), weights.cpu().numpy())
    if not residual < 1e-8:
        raise GateError(f"Nash weights: expected max |α(Ĝα) − 1| < 1e-8, found {residual:.3g}")
    return weights


def tolerances(case: Case, expected: Expected) -> dict[Outcome, float]:
    """Return how much error autocast excuses: twice what one backward per cluster has under it."""
    if not case.autocast:
        return dict.fromkeys(expected, 0.0)
    parameters = list(case.model.parameters())
    losses = case.losses(case.model, case.batch)
    jacobian = cluster_gradients(losses, case.batch.cluster, parameters, case.num_clusters).jacobian.double()
    found = {**directions(case, jacobian), "jacobian": jacobian}
    return {name: 2 * relative_error(found[name], expected[name]) for name in expected}


def candidates(case: Case, left_out: Container[str] = ()) -> list[Candidate]:
    """Return the ways as candidates, the plain step first, but those to be left out."""
    jacobian = exact_jacobian(case)
    expected: Expected = {**directions(case, jacobian), "jacobian": jacobian}
    excused = tolerances(case, expected)
    expected["jacobian"] = jacobian.cpu()  # [K, P] in float64 is more than a GPU should keep

    def candidate(way: Way) -> Candidate:
        prepared = cache(way.prepare)

        def error() -> float:
            return _error(prepared()(), expected[way.outcome], case)

        tolerance = max(way.tolerance, excused[way.outcome])
        return Candidate(way.name, lambda: prepared()(), error, tolerance, way.peer)

    return [candidate(way) for way in ways(case) if way.name not in left_out]


def _error(found: Rows, expected: Tensor, case: Case) -> float:
    """Return the relative error of all rows together, forming one in float64 at a time."""
    deviation = norm = 0.0
    for row, exact in zip(found, expected, strict=True):
        exact = exact.to(case.device)
        deviation += float((_flat(row, case) - exact).square().sum())
        norm += float(exact.square().sum())
    return (deviation / norm) ** 0.5


def _flat(row: Sequence[Tensor | None], case: Case) -> Tensor:
    """Concatenate the gradients of all parameters, [P] in float64."""
    pairs = zip(row, case.model.parameters(), strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten().double() for g, p in pairs])


def peak_of(setting: Setting, name: str) -> int:
    """Return the bytes that two steps of a way add to the model and the batch."""
    case = setting.case()
    way = next(way for way in ways(case) if way.name == name)
    # A sample brings in what any step needs once: code, the threads' stacks, scratch memory of libraries.
    plain_step(case.model, case.losses, case.batch.narrow(0, 1))
    case.model.zero_grad(set_to_none=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="There is a performance drop")  # said where times are taken
        return peak(way.prepare(), case.device)


def peaks(setting: Setting) -> dict[str, int]:
    """Return the peak memory of every way, each in a process of its own; peers that fail have none."""
    found = {}
    for way in ways(setting.case()):
        if way.name == COMPILED:  # the compiler would have to do its work again
            continue
        try:
            found[way.name] = in_fresh_process(peak_of, setting, way.name)
        except Exception as failure:
            if not way.peer:
                raise
            print(f"{way.name}: no peak memory, {type(failure).__name__}: {failure}", flush=True)
    return found


def measure(setting: Setting, rounds: int, *, detailed: bool = True, compiled: bool = False) -> Comparison:
    """Measure one setting; in detail: memory too, and the ways that `Way.detail` names."""
    gc.collect()
    torch.cuda.empty_cache()  # what an earlier setting held is the next processes' to use
    found = peaks(setting) if detailed else {}
    case = setting.case()
    left_out = [way.name for way in ways(case) if way.detail and not detailed]
    baseline, *others = candidates(case, left_out if compiled else [*left_out, COMPILED])
    precision = "bf16 autocast" if setting.autocast else "float32"
    comparison = compare(
        f"{case.name}, K = {setting.k}, batch {setting.batch}, {precision}",
        baseline,
        others,
        rounds,
        warmup=0,  # the gate was one
        allowance=ALLOWANCE,
        title=case.name,
        **asdict(setting),
    )
    rows = [replace(row, memory=found.get(row.name)) for row in comparison.rows]
    return replace(comparison, rows=rows)


#: the lines of the plot: row, label, colour, line style
LINES = (
    ("TorchJD autojac, PCGrad", "TorchJD autojac", "tab:red", "--"),
    ("K backwards, PCGrad", "K backwards, as published", "0.25", "--"),
    ("TorchJD autogram, PCGrad", "TorchJD autogram", "tab:orange", "--"),
    ("vmap(grad), gradients only", "vmap(grad), gradients only", "tab:brown", ":"),
    ("slices by hand, gradients only", "slices by hand, gradients only", "tab:purple", ":"),
    ("plain", "plain step", "0.6", "-"),
    ("diffmtl_fast lean, PCGrad", "diffmtl_fast, lean", "tab:cyan", "-"),
    ("diffmtl_fast sliced, PCGrad", "diffmtl_fast, sliced", "tab:green", "-"),
    ("diffmtl_fast grouped, PCGrad", "diffmtl_fast, grouped", "tab:blue", "-"),
)
TICKS = (1, 1.5, 2, 3, 5, 10, 20, 30)


def plot(record: dict[str, Any], path: Path) -> None:
    """Draw the cost of a PCGrad step over the plain step against K, a panel per model, at the first batch size."""
    batch = record["settings"]["batch"][0]
    panels: dict[str, list[dict[str, Any]]] = {}
    for comparison in record["comparisons"]:
        if comparison["parameters"]["batch"] == batch:
            panels.setdefault(comparison["parameters"]["title"], []).append(comparison)
    figure = require("matplotlib.figure", "train").Figure(figsize=(9, 4.1), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, (title, comparisons) in zip(axes, panels.items(), strict=True):
        ks = sorted({c["parameters"]["k"] for c in comparisons})
        for name, label, colour, style in LINES:
            points = [
                (c["parameters"]["k"], row["ratio"]["median"])
                for c in comparisons
                for row in c["rows"]
                if row["name"] == name
            ]
            x, y = zip(*sorted(points), strict=True) if points else ([], [])
            width = 2.2 if name.startswith("diffmtl_fast") else 1.4
            axis.plot(x, y, style, color=colour, label=label, marker=".", lw=width)
        axis.set(title=title, xscale="log", yscale="log", xlabel="number of clusters K")
        axis.set_xticks(ks, labels=[str(k) for k in ks])
        axis.set_yticks(TICKS, labels=[f"{tick:g}" for tick in TICKS])
        axis.minorticks_off()
        axis.grid(alpha=0.25)
    axes[0].set_ylabel("time of a step / plain step")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def summary(record: dict[str, Any]) -> str:
    """Return README's table: time and peak memory over the plain step's at the typical K and first batch size."""
    first = [
        c
        for c in record["comparisons"]
        if c["parameters"]["batch"] == record["settings"]["batch"][0]
        and c["parameters"]["k"] == _typical(record["settings"]["k"])
    ]
    titles = [c["parameters"]["title"] for c in first]
    names = list(dict.fromkeys(name for c in first for name in [*_rows(c), *c["left_out"]]))
    lines = [
        "| | " + " | ".join([*titles, *(f"memory, {title}" for title in titles)]) + " |",
        "|---" * (1 + 2 * len(titles)) + "|",
    ]
    for name in names[1:]:
        cells = [_cell(c, name, "time") for c in first] + [_cell(c, name, "memory") for c in first]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _rows(comparison: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in comparison["rows"]}


def _cell(comparison: dict[str, Any], name: str, what: str) -> str:
    rows = _rows(comparison)
    if name not in rows:
        return "–"
    if what == "time":
        return f"{rows[name]['ratio']['median']:.2f}"
    memory, plain = rows[name]["memory"], comparison["rows"][0]["memory"]
    return "–" if memory is None or not plain else f"{memory / plain:.2f}"


def _typical(ks: Sequence[int]) -> int:
    return TYPICAL_K if TYPICAL_K in ks else ks[0]


def settings(options: argparse.Namespace) -> list[Setting]:
    """Return what to measure: every K at the first batch size, the typical K at the others."""
    chosen = product(options.models, options.batch, options.k)
    return [
        Setting(model, batch, k, options.device, options.autocast)
        for model, batch, k in chosen
        if batch == options.batch[0] or k == _typical(options.k)
    ]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; the defaults depend on the device."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description="Time one training step.")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--models", nargs="+", choices=MODELS, help="default: three for a CPU, two for a GPU")
    parser.add_argument("--k", nargs="+", type=int, default=[2, 5, 10, 20], help="numbers of clusters")
    parser.add_argument(
        "--batch",
        nargs="+",
        type=int,
        help=f"batch sizes: the first for every K, the others for K = {TYPICAL_K}; default 40 20, GPU 256",
    )
    parser.add_argument(
        "--rounds",
        type=int,
        default=7,
        help=f"how often a way is timed at K = {TYPICAL_K} (default 7), elsewhere half as often; slow ones less",
    )
    parser.add_argument(
        "--autocast", action=argparse.BooleanOptionalAction, help="bfloat16; default on a GPU"
    )
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="the compiled plain step too; default on a GPU",
    )
    parser.add_argument("--quick", action="store_true", help="does it still run? Small, and nothing written")
    parser.add_argument("--out", type=Path, help="folder of the JSON file and the plot")
    parser.add_argument(
        "--report", action="store_true", help="measure nothing: table and plot of an earlier run"
    )
    options = parser.parse_args(arguments)
    gpu = torch.device(options.device).type == "cuda"
    options.models = options.models or (["dit-s2", "dit-b2"] if gpu else ["dit", "unet", "diffusers-dit"])
    options.batch = options.batch or ([256] if gpu else [40, 20])
    options.autocast = gpu if options.autocast is None else options.autocast
    options.compile = gpu if options.compile is None else options.compile
    if options.quick:
        options.k, options.batch, options.rounds = [TYPICAL_K], [10], 2
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    kind = torch.device(options.device).type
    results = (options.out or RESULTS) / f"step_{kind}.json"
    if not options.report:
        run(options, results)
    if options.report or not options.quick or options.out:
        record = json.loads(results.read_text())
        plot(
            record, (options.out or IMAGES) / ("step_cost.png" if kind == "cpu" else f"step_cost_{kind}.png")
        )
        print(summary(record))


def run(options: argparse.Namespace, results: Path) -> None:
    """Measure, print a table for every setting, and write the results."""
    measured_in = environment()
    start = time.perf_counter()
    comparisons = []
    for setting in settings(options):
        typical = setting.batch == options.batch[0] and setting.k == _typical(options.k)
        rounds = options.rounds if typical else max(1, options.rounds // 2)
        comparisons.append(measure(setting, rounds, detailed=typical, compiled=options.compile))
        print(comparisons[-1].table(), flush=True)
    if not options.quick or options.out:
        chosen = {name: getattr(options, name) for name in ("models", "k", "batch", "autocast", "rounds")}
        minutes = round((time.perf_counter() - start) / 60, 1)
        write(results.stem, comparisons, measured_in, results.parent, **chosen, minutes=minutes)


if __name__ == "__main__":
    main()
